# SPDX-License-Identifier: BSD-3-Clause
"""The simulator as a fixture, clean before each test; tests of compiled kernels where a compiler is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from flash_attn3.build import sources, toolchain
from tests import hopper_sim
from tests.hopper_sim.hardware import Gpu
from tests.sim import missing

FOLDER = Path(__file__).parent
# What instructions do: these tests hold on a GPU too, but for those that are marked `simulated`.
ON_HARDWARE = {
    "test_pipeline",
    "test_sim_atomic",
    "test_sim_barrier",
    "test_sim_convert",
    "test_sim_copy",
    "test_sim_float",
    "test_sim_half",
    "test_sim_integer",
    "test_sim_mbarrier",
    "test_sim_memory",
    "test_sim_select",
    "test_sim_tma",
    "test_sim_warp",
    "test_sim_wgmma",
}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    own = [item for item in items if FOLDER in item.path.parents]
    for item in own:
        lacking = missing.for_compiled_kernels if "compiled" in item.fixturenames else missing.for_simulator
        if reason := lacking():
            item.add_marker(pytest.mark.skip(reason=reason))
    if config.getoption("--hardware"):
        simulated = {item for item in own if item.path.stem not in ON_HARDWARE or item.get_closest_marker("simulated")}
        config.hook.pytest_deselected(items=list(simulated))
        items[:] = [item for item in items if item not in simulated]


@pytest.fixture(scope="session")
def shared_driver(pytestconfig: pytest.Config) -> hopper_sim.Driver:
    library = pytestconfig.getoption("--hardware")
    return Gpu(library) if library else hopper_sim.Driver()


@pytest.fixture
def driver(shared_driver: hopper_sim.Driver) -> hopper_sim.Driver:
    """The simulator with default options, an empty report, and none but its own memory."""
    shared_driver.reset()
    return shared_driver


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """PTX of kernels/NAME.cu."""
    texts: dict[str, str] = {}

    def compile_kernel(name: str) -> str:
        if name not in texts:
            source = tmp_path_factory.mktemp(name) / f"{name}.cu"
            source.write_text((FOLDER / "kernels" / source.name).read_text())
            toolchain.find().compile(source, [sources.cutlass_folder()])
            texts[name] = source.with_suffix(".ptx").read_text()
        return texts[name]

    return compile_kernel
