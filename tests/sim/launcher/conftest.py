# SPDX-License-Identifier: BSD-3-Clause
"""Launchers on the simulator and on the recorder; the toy kernel."""

from __future__ import annotations

from pathlib import Path

import pytest
import toy
from launchers import VARIABLE, Launcher, Recorder, compile_library
from toy import ToyVariant

from flash_attn3 import build
from tests import hopper_sim
from tests.sim import missing

FOLDER = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    own = [item for item in items if item.path.parent == FOLDER]
    if own and (reason := missing.for_launches()):
        for item in own:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def launcher(tmp_path_factory) -> Launcher:
    """On the simulator."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, str(hopper_sim.build()))
        made = Launcher(tmp_path_factory.mktemp("launcher"))
        assert made.module.driver_path() == str(hopper_sim.build())
    return made


@pytest.fixture(scope="session")
def images(tmp_path_factory) -> tuple[bytes, bytes]:
    """The toy kernel, as cubin and as PTX."""
    with pytest.MonkeyPatch.context() as patch:
        toy.use(patch)
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        made = build.artifact(ToyVariant())
    return made.cubin, made.ptx


@pytest.fixture(scope="session")
def recorder_library(tmp_path_factory) -> Path:
    source = FOLDER / "recorder.cpp"
    return compile_library(source, tmp_path_factory.mktemp("recorder") / "librecorder.so", linked=(hopper_sim.build(),))


@pytest.fixture
def recorder(recorder_library) -> Recorder:
    return Recorder(recorder_library)


@pytest.fixture
def recorded(recorder, tmp_path, monkeypatch) -> Launcher:
    """On the recorder."""
    monkeypatch.setenv(VARIABLE, str(recorder.path))
    return Launcher(tmp_path)
