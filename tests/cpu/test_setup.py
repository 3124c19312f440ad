# SPDX-License-Identifier: BSD-3-Clause
"""setup.py: a wheel with and without the extension, with and without kernels, installed where it was not built."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from flash_attn3 import variants
from flash_attn3.build import sources

ROOT = Path(__file__).parents[2]
# The folders of a checkout that a wheel is made of, and the files beside them.
INPUTS = ("csrc", "flash_attn3", "hopper", "setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE")
KERNEL = variants.fwd_variants()[0].name
NOT_INPUTS = shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info", "_prebuilt", "_hopper", "*.missing.txt")
WITHOUT_HEADERS = """
import runpy, sys, types
sys.modules["flash_attn3"] = types.ModuleType("flash_attn3")
sys.modules["flash_attn3"].__path__ = ["flash_attn3"]
from flash_attn3.build import options
options.cuda_headers = lambda: None
runpy.run_path("setup.py", run_name="__main__")
"""
CALL = """
import torch, flash_attn3
q, k, v = (torch.randn(1, 9, 2, 64) for _ in range(3))
out = flash_attn3.flash_attn_func(q, k, v, causal=True)
expected = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=True)
torch.testing.assert_close(out, expected.transpose(1, 2))
print(flash_attn3.__file__)
"""


def run(*command: str | Path, folder: Path = ROOT, **environment: str) -> str:
    done = subprocess.run(
        list(map(str, command)), cwd=folder, env=os.environ | environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build_extension(folder: Path, *command: str, **environment: str) -> Path:
    """What setup.py puts beside the Python files."""
    run(
        *(sys.executable, *command, "-q", "build_ext"),
        *("--build-lib", folder / "lib", "--build-temp", folder / "temporary"),
        **environment,
    )
    return folder / "lib" / "flash_attn3"


def test_without_a_compiler_there_is_a_reason_in_place_of_the_extension(tmp_path) -> None:
    built = build_extension(tmp_path, "setup.py", PATH=str(tmp_path), CC="/no/such/g++", CXX="/no/such/g++")
    assert "/no/such/g++" in (built / "_C.missing.txt").read_text()
    assert not list(built.glob("*.so"))


def test_without_headers_there_is_a_reason_in_place_of_the_extension(tmp_path) -> None:
    built = build_extension(tmp_path, "-c", WITHOUT_HEADERS)
    assert (built / "_C.missing.txt").read_text() == (
        "no cuda.h in CUDA_HOME, /usr/local/cuda or the pip package nvidia-cuda-runtime\n"
    )


def test_sources_of_the_kernels_are_copied_and_leftovers_are_not(tmp_path) -> None:
    leftovers = [tmp_path / "lib" / "flash_attn3" / name / "old.cuh" for name in ("_hopper", "_prebuilt")]
    for leftover in leftovers:
        leftover.parent.mkdir(parents=True)
        leftover.touch()
    built = build_extension(tmp_path, "-c", WITHOUT_HEADERS)
    copied = {path.relative_to(built / "_hopper"): path.read_bytes() for path in (built / "_hopper").rglob("*.*")}
    suffixes = {".h", ".cuh", ".cu"}
    originals = [path for path in (ROOT / "hopper").rglob("*") if path.suffix in suffixes]
    assert copied == {path.relative_to(ROOT / "hopper"): path.read_bytes() for path in originals}
    assert not any(leftover.exists() for leftover in leftovers)


def test_other_values_of_prebuild_are_refused(tmp_path) -> None:
    with pytest.raises(AssertionError, match="FLASH_ATTN3_PREBUILD = 'some'; expected one of '0', 'all'"):
        build_extension(tmp_path, "setup.py", FLASH_ATTN3_PREBUILD="some")


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy, since a build leaves files behind, with the first kernel alone."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in INPUTS:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=NOT_INPUTS)
        else:
            shutil.copy(ROOT / name, folder / name)
    with (folder / "flash_attn3" / "variants.py").open("a") as file:
        file.write("\n\ndef all_variants() -> tuple[Variant, ...]:\n    return fwd_variants()[:1]\n")
    return folder


@pytest.fixture(scope="module")
def wheel(checkout, tmp_path_factory) -> Path:
    """With all kernels, made in an environment that holds what pyproject.toml asks for and nothing else.

    A warning of the host's compiler would cost the extension.
    """
    folder = tmp_path_factory.mktemp("wheel")
    environment = {"FLASH_ATTN3_PREBUILD": "all", "CUTLASS_PATH": str(sources.cutlass_folder())}
    environment |= dict.fromkeys(("CFLAGS", "CXXFLAGS"), "-Werror")  # which one counts, depends on setuptools
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder, checkout, **environment)
    (made,) = folder.iterdir()
    return made


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    run(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", folder, wheel)
    return folder


def python(installed: Path, *arguments: str, **environment: str) -> str:
    """In another folder, with the installed package in front of this checkout."""
    return run(sys.executable, *arguments, folder=installed.parent, PYTHONPATH=str(installed), **environment)


@pytest.mark.slow
def test_wheel_holds_package_extension_and_kernels(wheel) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"flash_attn3"}
    assert sum(name.startswith("flash_attn3/_C.") and name.endswith(".so") for name in names) == 1
    assert f"flash_attn3/_prebuilt/{KERNEL}/{KERNEL}.cubin" in names
    assert "flash_attn3/_hopper/params.h" in names and "flash_attn3/py.typed" in names


@pytest.mark.slow
def test_installed_wheel_computes(installed) -> None:
    assert python(installed, "-c", CALL).strip() == str(installed / "flash_attn3" / "__init__.py")


@pytest.mark.slow
def test_installed_wheel_tells_what_it_holds(installed) -> None:
    facts = json.loads(python(installed, "-m", "flash_attn3", "info", "--json", FLASH_ATTN3_NO_JIT="1"))
    assert facts["extension"]["reason"] is None
    assert Path(facts["extension"]["path"]).parent == installed / "flash_attn3"
    assert facts["compiler"]["compiled"] == facts["compiler"]["kernels"] == 1


@pytest.mark.slow
def test_installed_wheel_compiles_at_first_use(installed, tmp_path) -> None:
    """What is not prebuilt comes from the sources in the wheel."""
    prebuilt = installed / "flash_attn3" / "_prebuilt" / KERNEL
    prebuilt.rename(tmp_path / "prebuilt")
    try:
        command = ("-m", "flash_attn3", "build", "--check", KERNEL)
        assert "check: 1 of 1 kernels pass" in python(installed, *command, XDG_CACHE_HOME=str(tmp_path))
    finally:
        (tmp_path / "prebuilt").rename(prebuilt)
    (cubin,) = tmp_path.glob("flash_attn3/sm_90a/*/*.cubin")
    assert cubin.read_bytes() == (prebuilt / f"{KERNEL}.cubin").read_bytes()  # wherever it is compiled


@pytest.mark.slow
def test_source_distribution_makes_the_same_wheel(checkout, wheel, tmp_path) -> None:
    script = "import setuptools.build_meta as backend, sys; print(backend.build_sdist(sys.argv[1]))"
    run(sys.executable, "-c", script, tmp_path, folder=checkout)
    (archive,) = tmp_path.glob("*.tar.gz")
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", tmp_path / "wheel", archive)
    (made,) = (tmp_path / "wheel").iterdir()
    prebuilt = {name for name in zipfile.ZipFile(wheel).namelist() if "/_prebuilt/" in name}
    assert set(zipfile.ZipFile(made).namelist()) == set(zipfile.ZipFile(wheel).namelist()) - prebuilt
