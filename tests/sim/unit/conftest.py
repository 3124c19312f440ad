# SPDX-License-Identifier: BSD-3-Clause
"""The simulator as a fixture, clean before each test; tests of compiled kernels where a compiler is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from flash_attn3.build import sources, toolchain
from tests import hopper_sim
from tests.sim import missing

FOLDER = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if FOLDER in item.path.parents:
            lacking = missing.for_compiled_kernels if "compiled" in item.fixturenames else missing.for_simulator
            if reason := lacking():
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def shared_driver() -> hopper_sim.Driver:
    return hopper_sim.Driver()


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
