# SPDX-License-Identifier: BSD-3-Clause
"""`python -m flash_attn3 build`: what it prints and the code it exits with; and kernels compiled for a wheel."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from builds import Builds, write
from toy import ToyVariant

from flash_attn3 import __main__ as main
from flash_attn3 import build, variants
from flash_attn3.build import batch, manifest, sources, toolchain
from flash_attn3.build.report import Report
from flash_attn3.errors import ToolchainError

FAST, SLOW, BROKEN = VARIANTS = (ToyVariant(), ToyVariant(threads=256), ToyVariant(threads=512))


class Compiler(Builds):
    """Makes a good kernel, one that spills, and refuses the third."""

    def build_into(self, variant: build.Variant, folder: Path) -> None:
        super().build_into(variant, folder)
        if variant == BROKEN:
            raise ToolchainError(f"flash_attn3: nvcc {variant.name}.cu failed (2)\nerror: no such thing")
        if variant == SLOW:
            manifest.seal(folder, variant.name, Report(1.5, 255, 96, 8, ("96 bytes spilled",)))


@pytest.fixture
def compiler(monkeypatch, tmp_path) -> Compiler:
    Builds.use_cache(monkeypatch, tmp_path)
    monkeypatch.setattr(variants, "all_variants", lambda: VARIANTS)
    return Compiler(monkeypatch)


def run(capsys: pytest.CaptureFixture, *arguments: str) -> tuple[int, str, str]:
    code = main.main(["build", *arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_list_tells_what_is_compiled(compiler, capsys) -> None:
    assert run(capsys, "--list")[:2] == (0, "".join(f"{variant.name}  -\n" for variant in VARIANTS))
    build.obtain(FAST)
    assert f"{FAST.name}  compiled\n{SLOW.name}  -\n" in run(capsys, "--list")[1]
    assert len(compiler.folders) == 1


def test_table(compiler, capsys) -> None:
    code, out, _ = run(capsys, SLOW.name, FAST.name)
    lines = [line.split() for line in out.splitlines()]
    assert code == 0
    assert lines == [
        ["kernel", "seconds", "registers", "spills", "stack"],
        [SLOW.name, "1.50", "255", "96", "8"],
        ["96", "bytes", "spilled"],
        [FAST.name, "0.00", "8", "0", "0"],
    ]
    run(capsys, SLOW.name, FAST.name, FAST.name)
    assert len(compiler.folders) == 2  # the second time they come from the cache


@pytest.mark.parametrize(
    ("names", "code", "verdict"),
    [([FAST.name], 0, "check: 1 of 1 kernels pass"), ([FAST.name, SLOW.name], 1, "check: 1 of 2 kernels pass")],
)
def test_check_is_the_gate(names, code, verdict, compiler, capsys) -> None:
    assert run(capsys, *names)[0] == 0
    found, out, _ = run(capsys, "--check", *names)
    assert found == code and out.splitlines()[-1] == verdict


def test_one_that_does_not_compile_does_not_stop_the_others(compiler, capsys) -> None:
    code, out, err = run(capsys, "--all", "--check", "-j", "1")
    assert code == 1 and out.splitlines()[-1] == "check: 1 of 3 kernels pass"
    assert FAST.name in out and SLOW.name in out and BROKEN.name not in out
    assert f"nvcc {BROKEN.name}.cu failed (2)\nerror: no such thing" in err
    assert run(capsys, BROKEN.name)[:2] == (1, "")


def test_progress_counts_kernels(compiler, capsys) -> None:
    assert "3/3" in run(capsys, "--all")[2]


def test_unknown_names_are_refused_with_the_nearest(compiler, capsys) -> None:
    code, out, err = run(capsys, FAST.name, "toy_t255_s65536", "fwd")
    assert (code, out) == (2, "") and not compiler.folders
    assert f"no kernel 'toy_t255_s65536'; the nearest is {SLOW.name}, and --list shows all" in err
    assert "no kernel 'fwd'" in err


@pytest.mark.parametrize("arguments", [[], ["--list", "--all"], ["--list", "--check"], ["--all", "fwd"]])
def test_contradictions_are_refused(arguments, compiler, capsys) -> None:
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "") and "give names of kernels, or --all, or --list alone" in err


@pytest.mark.parametrize("jobs", ["0", "-1", "many"])
def test_jobs_are_a_count(jobs, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        main.main(["build", "--all", "-j", jobs])
    assert stop.value.code == 2 and "-j" in capsys.readouterr().err


def test_no_compiler_is_said_once(compiler, capsys, monkeypatch) -> None:
    def missing() -> None:
        raise ToolchainError("flash_attn3: no compiler for Hopper kernels")

    monkeypatch.setattr(toolchain, "find", missing)
    assert run(capsys, "--all") == (2, "", "flash_attn3: no compiler for Hopper kernels\n")


def test_no_headers_are_said_once(compiler, capsys, monkeypatch) -> None:
    def missing() -> None:
        raise ToolchainError("flash_attn3: no CUTLASS headers")

    monkeypatch.setattr(sources, "cutlass_folder", missing)
    assert run(capsys, "--all") == (2, "", "flash_attn3: no CUTLASS headers\n")


def test_jobs_run_at_the_same_time(tmp_path) -> None:
    meeting = threading.Barrier(len(VARIANTS), timeout=30)

    def make(variant: build.Variant) -> manifest.Artifact:
        meeting.wait()  # passes when all are there
        folder = tmp_path / variant.name
        folder.mkdir()
        write(folder, variant.name)
        return manifest.load(folder, variant.name)

    made = dict(batch.compile_all(VARIANTS, len(VARIANTS), make))
    assert {variant.name for variant in VARIANTS} == {artifact.name for artifact in made.values()}


def test_prebuilt_kernels_replace_those_of_before(compiler, tmp_path) -> None:
    root = tmp_path / "prebuilt"
    (root / "gone").mkdir(parents=True)
    made = batch.prebuild([FAST], root, jobs=1)
    assert [path.name for path in root.iterdir()] == [FAST.name]
    assert made == {FAST: manifest.load(root / FAST.name, FAST.name)}


@pytest.mark.parametrize(("variant", "why"), [(SLOW, "96 bytes spilled"), (BROKEN, "no such thing")])
def test_a_wheel_takes_no_bad_kernels(variant, why, compiler, tmp_path) -> None:
    with pytest.raises(ToolchainError, match=rf"(?s){variant.name}.*{why}"):
        batch.prebuild([FAST, variant], tmp_path / "prebuilt", jobs=2)
