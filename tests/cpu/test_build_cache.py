# SPDX-License-Identifier: BSD-3-Clause
"""The cache of compiled kernels: complete or absent, and one compilation for many."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import toy
from builds import COMPILER, KEY, Builds, write
from toy import ToyVariant

from flash_attn3 import build, env
from flash_attn3.build import cache, manifest, nvcc, sources, toolchain
from flash_attn3.errors import ToolchainError

ROOT = Path(__file__).parents[2]
# Another process at the same cache; it tells of each build in a file, and is slow at it.
PROCESS = """
import sys, time, types
from pathlib import Path
package = types.ModuleType("flash_attn3")
package.__path__ = ["flash_attn3"]
sys.modules["flash_attn3"] = package
from flash_attn3.build import cache
from flash_attn3.build.manifest import seal
from flash_attn3.build.report import Report

folder, log, seconds = Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3])
def build(scratch):
    (scratch / "kernel.cubin").write_bytes(b"half")
    with log.open("a") as file:
        file.write(f"{scratch.name}\\n")
    time.sleep(seconds)
    for suffix in (".cubin", ".ptx", ".log"):
        (scratch / f"kernel{suffix}").write_text("whole")
    seal(scratch, "kernel", Report(0.0, 8, 0, 0, ()))
assert cache.fetch(folder, sys.argv[4], "kernel", build).cubin == b"whole"
"""


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> Builds:
    return Builds(monkeypatch)


@pytest.fixture
def root(tmp_path, monkeypatch) -> Path:
    return Builds.use_cache(monkeypatch, tmp_path)


def start(folder: Path, log: Path, seconds: float) -> subprocess.Popen:
    command = [sys.executable, "-c", PROCESS, str(folder), str(log), str(seconds), KEY]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)


def wait_for(condition, seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.01)


def test_compiled_once_then_loaded(root, builds) -> None:
    assert build.find(ToyVariant()) is None
    first, second = build.artifact(ToyVariant()), build.artifact(ToyVariant())
    assert first == second == build.find(ToyVariant())
    assert len(builds.folders) == 1
    folder = root / "sm_90a" / build.key(ToyVariant())
    assert folder.stat().st_mode & 0o777 == 0o700 and (root.stat().st_mode & 0o077) == 0
    assert not builds.folders[0].exists()  # the scratch folder has become the artefact


def test_prebuilt_kernels_come_first(root, builds, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(build, "PREBUILT", tmp_path / "prebuilt")
    folder = tmp_path / "prebuilt" / ToyVariant().name
    folder.mkdir(parents=True)
    write(folder, ToyVariant().name, b"prebuilt")
    monkeypatch.setattr(env, "no_jit", True)
    assert build.artifact(ToyVariant()).cubin == b"prebuilt"
    assert not builds.folders and not root.exists()


@pytest.mark.parametrize("change", ["variant", "header", "nested header", "compiler", "options"])
def test_key_changes_with_everything_that_the_kernel_depends_on(change, tmp_path, monkeypatch) -> None:
    (tmp_path / "toy.cuh").write_text('#include "nested/a.h"\n')
    (tmp_path / "toy_entry.cuh").write_text("entry")
    (tmp_path / "nested").mkdir()
    (tmp_path / "nested" / "a.h").write_text('#  include "b.h"  // beside it\n')
    (tmp_path / "nested" / "b.h").write_text("b")
    (tmp_path / "other.h").write_text("not included")
    monkeypatch.setattr(sources, "include_folders", lambda: (tmp_path,))
    monkeypatch.setattr(toolchain, "find", lambda: COMPILER)
    variant = ToyVariant()
    before = build.key(variant)
    (tmp_path / "other.h").write_text("changed")
    assert build.key(variant) == before
    if change == "variant":
        variant = ToyVariant(threads=64)
    elif change == "header":
        (tmp_path / "toy_entry.cuh").write_text("entries")
    elif change == "nested header":
        (tmp_path / "nested" / "b.h").write_text("changed")
    elif change == "compiler":
        other = nvcc.Nvcc(COMPILER.path, COMPILER.ptxas, "release 13.1")
        monkeypatch.setattr(toolchain, "find", lambda: other)
    else:
        monkeypatch.setattr(nvcc.Nvcc, "options", (*COMPILER.options, "-O2"))
    assert build.key(variant) != before


@pytest.mark.parametrize("name", ["../kernel", "Kernel", "a b", "k" * 129, ""])
def test_names_that_could_leave_the_folder_are_refused(name) -> None:
    with pytest.raises(ValueError, match="is no name of a kernel"):
        build.key(toy.SourceVariant(name, ""))


@pytest.mark.parametrize("suffix", [*manifest.SUFFIXES, "manifest"])
@pytest.mark.parametrize("damage", ["truncated", "one bit", "missing", "link", "folder", "of another kernel"])
def test_damaged_artefacts_are_rebuilt(suffix, damage, tmp_path, builds) -> None:
    assert builds.fetch(tmp_path).cubin == b"whole"
    victim = tmp_path / KEY / (manifest.MANIFEST if suffix == "manifest" else f"kernel{suffix}")
    content = victim.read_bytes()
    victim.unlink()
    if damage == "truncated":
        victim.write_bytes(content[:-1])
    elif damage == "one bit":
        victim.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    elif damage == "link":
        (tmp_path / "elsewhere").write_bytes(content)
        victim.symlink_to(tmp_path / "elsewhere")
    elif damage == "folder":
        victim.mkdir()
    elif damage == "of another kernel":
        (tmp_path / "other").mkdir()
        write(tmp_path / "other", "other", b"others")
        victim.write_bytes((tmp_path / "other" / victim.name.replace("kernel", "other")).read_bytes())
    assert manifest.load(tmp_path / KEY, "kernel") is None
    assert builds.fetch(tmp_path).cubin == b"whole" and len(builds.folders) == 2
    assert manifest.load(tmp_path / KEY, "kernel").cubin == b"whole"


def test_the_bytes_loaded_are_the_bytes_verified(tmp_path, builds, monkeypatch) -> None:
    """A file that is exchanged while it is loaded is found out, since it is read once."""
    builds.fetch(tmp_path)
    reads: list[Path] = []
    read = manifest._read
    monkeypatch.setattr(manifest, "_read", lambda path: reads.append(path) or read(path))
    manifest.load(tmp_path / KEY, "kernel")
    assert len(reads) == len(set(reads)) == 1 + len(manifest.SUFFIXES)


def test_one_compilation_for_many_processes(tmp_path) -> None:
    log = tmp_path / "log"
    processes = [start(tmp_path, log, 0.5) for _ in range(6)]
    assert [process.communicate(timeout=60)[1] for process in processes] == [""] * 6
    assert [process.returncode for process in processes] == [0] * 6
    assert len(log.read_text().splitlines()) == 1


def test_one_compilation_for_many_threads(root, builds) -> None:
    barrier = threading.Barrier(8)
    made: list[manifest.Artifact] = []

    def run() -> None:
        barrier.wait()
        made.append(build.artifact(ToyVariant()))

    threads = [threading.Thread(target=run) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 8 and len(set(made)) == 1 and len(builds.folders) == 1


def test_killed_in_the_middle(tmp_path, builds) -> None:
    """What was being built is no artefact, its lock is free, and the next process sweeps it up."""
    log = tmp_path / "log"
    process = start(tmp_path, log, 600)
    wait_for(log.exists)
    assert manifest.load(tmp_path / KEY, "kernel") is None  # half-written is not there
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    leftover = tmp_path / log.read_text().strip()
    assert (leftover / "kernel.cubin").read_bytes() == b"half"
    assert builds.fetch(tmp_path).cubin == b"whole"
    assert not leftover.exists()


def test_killed_after_every_step(tmp_path, builds, monkeypatch) -> None:
    """Wherever a process dies, the next finds nothing or everything."""

    class Killed(BaseException):
        pass

    def dying(function, after: bool):
        def die(*args, **kwargs):
            if after:
                function(*args, **kwargs)
            raise Killed

        return die

    for step in ("mkdtemp", "fsync", "rename"):
        for after in (False, True):
            with monkeypatch.context() as patch:
                owner = cache.tempfile if step == "mkdtemp" else os
                patch.setattr(owner, step, dying(getattr(owner, step), after))
                patch.setattr(shutil, "rmtree", lambda *args, **kwargs: None)  # nobody cleans up after SIGKILL
                with pytest.raises(Killed):
                    builds.fetch(tmp_path)
            found = manifest.load(tmp_path / KEY, "kernel")
            assert (found is not None) == (step == "rename" and after)
            assert builds.fetch(tmp_path).cubin == b"whole"
            shutil.rmtree(tmp_path / KEY)


def test_processes_without_locks_publish_one_artefact(tmp_path, builds) -> None:
    """On a file system without locks two may build at once; the slower one uses what the other published."""

    def overtaken(scratch: Path) -> None:
        other = tmp_path / "other"
        other.mkdir()
        write(other, "kernel")
        cache.publish(other, tmp_path / KEY)
        write(scratch, "kernel")

    assert cache.fetch(tmp_path, KEY, "kernel", overtaken).cubin == b"whole"
    assert sorted(path.name for path in tmp_path.iterdir()) == [KEY, f"{KEY}.lock"]


def test_a_failing_compiler_leaves_nothing(tmp_path) -> None:
    def fail(scratch: Path) -> None:
        (scratch / "kernel.ptx").write_text("half")
        raise ToolchainError("nvcc failed")

    with pytest.raises(ToolchainError, match="nvcc failed"):
        cache.fetch(tmp_path, KEY, "kernel", fail)
    assert [path.name for path in tmp_path.iterdir()] == [f"{KEY}.lock"]


def test_changed_while_it_was_built(tmp_path) -> None:
    def tamper(scratch: Path) -> None:
        write(scratch, "kernel")
        (scratch / "kernel.cubin").write_bytes(b"planted")

    with pytest.raises(ToolchainError, match="was changed in"):
        cache.fetch(tmp_path, KEY, "kernel", tamper)


def test_sources_edited_while_they_are_compiled(root, builds, tmp_path, monkeypatch) -> None:
    """Which text the compiler has read is unknown then: nothing is kept under the key of either."""
    edited = tmp_path / "kernels"
    shutil.copytree(toy.FOLDER, edited)
    monkeypatch.setattr(sources, "kernel_folder", lambda: edited)

    def build_into(variant: build.Variant, folder: Path) -> None:
        builds.build_into(variant, folder)
        with (edited / "toy.cuh").open("a") as file:
            file.write("// edited\n")

    with monkeypatch.context() as patch:
        patch.setattr(build, "build_into", build_into)
        with pytest.raises(ToolchainError, match="sources of toy_t128_s65536 were changed while it was compiled"):
            build.obtain(ToyVariant())
    assert build.find(ToyVariant()) is None
    assert build.obtain(ToyVariant()).cubin == b"whole"
