# SPDX-License-Identifier: BSD-3-Clause
"""Mutation testing of kernels/pipeline.cu: whatever synchronisation is changed, the simulator notices."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pipeline
import pytest

from tests.hopper_sim import Driver, mutate

KERNEL = "pipeline"
WARPS = 12
SOURCES = Path(__file__).parent / "kernels"


@pytest.fixture
def text(compiled: Callable[[str], str]) -> str:
    return compiled(KERNEL)


def prepare(driver: Driver) -> mutate.Prepare:
    def loaded(text: str) -> mutate.Run:
        kernel = driver.load(text, KERNEL)
        return lambda: pipeline.run(driver, kernel, m=128, n=192, k=448)

    return loaded


def test_no_schedule_alarms_at_the_kernel_itself(driver: Driver, text: str) -> None:
    run = prepare(driver)(text)
    schedules = mutate.policies(driver, run, WARPS)
    assert len(schedules) > 20
    assert {policy: alarm for policy in schedules if (alarm := mutate.alarm(driver, run, policy))} == {}
    assert not [warning for launch in driver.report()["launches"] for warning in launch["warnings"]]


def test_every_mutant_is_caught(driver: Driver, text: str) -> None:
    run = prepare(driver)(text)
    schedules = mutate.policies(driver, run, WARPS)
    executed = mutate.executed_lines(driver, run)
    mutants = mutate.mutants(driver, text, KERNEL, SOURCES)
    known = mutate.Known(KERNEL)
    assert {mutant.line for mutant in mutants} <= executed
    assert not known.unused(mutants) and "unknown" not in known.classes.values()
    unknown = [mutant for mutant in mutants if known.group(mutant) is None]
    result = mutate.survey(driver, prepare(driver), unknown, schedules)
    assert [mutant.name for mutant in result.survivors] == []
    assert len(result.caught) > 100


@pytest.mark.slow
def test_known_survivors_survive(driver: Driver, text: str) -> None:
    schedules = mutate.policies(driver, prepare(driver)(text), WARPS)
    known = mutate.Known(KERNEL)
    mutants = [m for m in mutate.mutants(driver, text, KERNEL, SOURCES) if known.group(m)]
    assert mutate.survey(driver, prepare(driver), mutants, schedules).caught == {}
