# SPDX-License-Identifier: BSD-3-Clause
"""Fixtures of all tiers: fixed seeds, NaN in uninitialised memory, the backends under test.

`pytest tests/cpu --backend triton` runs the tests that take a `backend` on another backend than `cpu`; without a GPU
that is Triton's interpreter. `--hypothesis-profile explore` draws fresh random cases instead of the fixed ones.
"""

from __future__ import annotations

import os
from pathlib import Path

if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):  # before torch starts its threads
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(workers))))

import hypothesis
import pytest
import torch
from hypothesis.internal.conjecture import providers

TIERS = ("cpu", "sim", "gpu", "integration")
LIBCUDA = "libcuda.so.1"
EMPTY = [(torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"), (torch.Tensor, "new_empty")]


class FixedCases(providers.HypothesisProvider):
    """Draws no constants from the modules that happen to be loaded: which cases a test has depends on no other test."""

    _local_constants = providers.Constants()


providers.AVAILABLE_PROVIDERS["fixed"] = FixedCases
hypothesis.settings.register_profile(
    "ci", derandomize=True, backend="fixed", deadline=None, database=None, print_blob=True
)
hypothesis.settings.register_profile("explore", deadline=None, max_examples=1000, print_blob=True)
hypothesis.settings.load_profile("ci")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--backend", action="append", help="backend for tests that take one (default: cpu); repeatable")
    parser.addoption(
        "--hardware", nargs="?", const=LIBCUDA, help="run the simulator's tests on a GPU, by this driver library"
    )


def pytest_configure(config: pytest.Config) -> None:
    for tier in TIERS:
        config.addinivalue_line("markers", f"{tier}: tests/{tier} (set by the folder)")
    config.addinivalue_line("markers", "slow: minutes; left out by -m 'not slow'")
    config.addinivalue_line("markers", "interpreted: in tests/cpu under Triton's interpreter, in a process of its own")
    config.addinivalue_line("markers", "simulated: looks at the simulator itself, and cannot run on a GPU")
    config.addinivalue_line("markers", "unpoisoned: leave torch.empty as it is")
    if "triton" in (config.getoption("--backend") or ()) and not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported


@pytest.hookimpl(tryfirst=True)  # xdist reads the marks in its own
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        tier = Path(item.path).relative_to(Path(__file__).parent).parts[0]
        item.add_marker(tier)
        # The simulator stays the driver of its process: with --dist loadgroup, it has one of its own.
        item.add_marker(pytest.mark.xdist_group("sim" if tier == "sim" else "others"))
        if tier == "gpu" and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "backend" in metafunc.fixturenames:
        metafunc.parametrize("backend", metafunc.config.getoption("--backend") or ["cpu"])


@pytest.fixture
def device(backend: str) -> str:
    return "cpu" if backend == "cpu" or not torch.cuda.is_available() else "cuda"


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def poisoned_memory(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Uninitialised tensors start as NaN or as the largest integer, so that code which reads them is found out."""
    if request.node.get_closest_marker("unpoisoned"):
        return
    for owner, name in EMPTY:
        monkeypatch.setattr(owner, name, _poisoned(getattr(owner, name)))


def _poisoned(empty):
    def poisoned(*args, **kwargs):
        x = empty(*args, **kwargs)
        if x.is_meta or x.is_quantized or x.layout != torch.strided:
            return x
        if x.is_floating_point():
            return x.copy_(torch.full((), torch.nan, device=x.device))
        return x if x.is_complex() or x.dtype == torch.bool else x.fill_(torch.iinfo(x.dtype).max)

    return poisoned
