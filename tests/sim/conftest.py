# SPDX-License-Identifier: BSD-3-Clause
"""The Hopper backend on the simulator: real `_C`, real PTX, CPU tensors for device memory.

Kernels may touch the tensors of the call and nothing beside them, and a hazard fails the launch. FLASH_ATTN3_LIBCUDA
names another build of the simulator.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cases import extent
from torch import Tensor

from flash_attn3 import build, env, extension, replay, runtime, variants
from flash_attn3.build import batch
from flash_attn3.hopper import launch
from tests import hopper_sim
from tests.sim import missing

FOLDER = Path(__file__).parent
MANY_TESTS = 500
VARIABLE = "FLASH_ATTN3_LIBCUDA"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    simulated = [item for item in items if FOLDER in item.path.parents and "simulator" in item.fixturenames]
    if simulated and (reason := missing.for_launches()):
        for item in simulated:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def simulated_driver(request: pytest.FixtureRequest) -> Iterator[hopper_sim.Driver]:
    """The simulator in place of the CUDA driver, for as long as tests of this folder run."""
    if request.session.testscollected > MANY_TESTS:  # which need most kernels: all processors compile them, at once
        list(batch.compile_all(variants.all_variants(), batch.default_jobs(), build.obtain))
    before = os.environ.get(VARIABLE)
    library = before or str(hopper_sim.build())
    os.environ[VARIABLE] = library
    runtime._diagnosis.cache_clear()
    if (opened := extension.load().driver_path()) != library:
        pytest.fail(f"this process has opened {opened} before: run tests/sim on its own")
    yield hopper_sim.Driver(Path(library))
    os.environ.pop(VARIABLE) if before is None else os.environ.update({VARIABLE: before})
    runtime._diagnosis.cache_clear()


@pytest.fixture
def simulator(simulated_driver: hopper_sim.Driver, monkeypatch: pytest.MonkeyPatch) -> Iterator[hopper_sim.Driver]:
    """The simulator with default options; a launch may touch the tensors that it was given and no other memory."""
    driver = simulated_driver
    driver.reset()
    for plans in replay._plans:  # which know the number of multiprocessors, that tests change
        plans.clear()
    given: list[Tensor] = []
    done: list[bool] = []
    run = launch.run

    def give(*tensors: Tensor | None) -> None:
        if done:  # what was given before was for the launches before
            given.clear()
            done.clear()
        given.extend(x for x in tensors if x is not None)

    def noted(prepared: Any, tensors: tuple[Tensor | None, ...], stream: int) -> bool:
        give(*tensors)
        return run(prepared, tensors, stream)

    @ctypes.CFUNCTYPE(None)
    def on_launch() -> None:
        done.append(True)
        for x in list(given):  # threads may add to it meanwhile
            driver.register(x.data_ptr(), extent(x), f"{str(x.dtype).removeprefix('torch.')}{tuple(x.shape)}")

    monkeypatch.setattr(launch, "run", noted)
    monkeypatch.setattr(launch, "num_multiprocessors", launch.num_multiprocessors.__wrapped__)
    driver.library.hopper_sim_on_launch(on_launch)
    yield driver
    report = driver.report()
    driver.library.hopper_sim_on_launch(None)
    driver.reset()
    warnings = [warning for one in report["launches"] for warning in one["warnings"]]
    assert not warnings, warnings[0]


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels that calls launch."""
    names: list[str] = []
    run = launch.run

    def noted(prepared: Any, tensors: tuple[Tensor | None, ...], stream: int) -> bool:
        names.append(prepared.kernel)
        return run(prepared, tensors, stream)

    monkeypatch.setattr(launch, "run", noted)
    return names


@pytest.fixture
def by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls that name no backend run on hopper, as with FLASH_ATTN3_BACKEND."""
    monkeypatch.setattr(env, "backend", "hopper")
