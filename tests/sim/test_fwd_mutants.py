# SPDX-License-Identifier: BSD-3-Clause
"""Mutation testing of the forward kernel: whatever synchronisation is changed, the simulator notices.

The cases make each barrier pass several phases, with tiles that are empty or cut, more tiles than CTAs, values that are
not finite, and splits. `python -m pytest tests/sim/test_fwd_mutants.py -m slow` runs every mutant, some minutes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from cases import attend, extent, inputs
from torch import Tensor

from flash_attn3 import build, replay, variants
from flash_attn3.build import sources
from flash_attn3.hopper import launch
from flash_attn3.testing import bitwise_equal
from tests.hopper_sim import Driver, mutate

KERNEL = "fwd"
VARIANT = next(v for v in variants.fwd_variants() if (v.head_dim, v.block_m, v.kv_source) == (64, 128, "tma"))
WARPS = VARIANT.block_m // 16 + 4
CTAS = 2
FIRST_STREAM = 1 << 20  # any number will do for the simulator
SAMPLE = 8  # of so many mutants, one is tried every day


def calls() -> list[Callable[[], tuple[Tensor, ...]]]:
    torch.manual_seed(0)
    shape = "bf16_d64_v64"
    sizes = dict(num_heads=2, num_heads_kv=1)
    ragged = inputs(shape, "padded", batch=2, seqlen_q=150, seqlen_k=400, **sizes) | {"causal": True}
    groups = dict(num_heads=3, num_heads_kv=1)  # which leave rows of a tile unused
    window = inputs(shape, batch=1, seqlen_q=130, seqlen_k=450, **groups) | {
        "window_size": (280, 20)
    }  # whole blocks, too
    window["v"][0, 130, 0, 3] = window["v"][0, 445, 0, 7] = torch.inf  # in the first block of a tile, and in another
    paged = inputs(shape, "paged", batch=2, seqlen_q=70, seqlen_k=520, page_size=128, **sizes)
    return [partial(attend, ragged), partial(attend, window), partial(attend, paged, num_splits=2)]


class Forward:
    """The calls on a kernel given by its text."""

    def __init__(self, driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
        self.driver = driver
        self.calls = calls()
        self.stream = FIRST_STREAM
        self.kernels = {VARIANT: None}
        run, kernel = launch.run, launch.kernel

        def registered(prepared, tensors, stream) -> bool:
            for x in tensors:
                if x is not None:
                    driver.register(x.data_ptr(), extent(x), "")
            return run(prepared, tensors, self.stream)

        monkeypatch.setattr(launch, "run", registered)
        monkeypatch.setattr(launch, "kernel", lambda variant: self.kernels.get(variant) or kernel(variant))
        self.expected = self.results()

    def results(self) -> list[Tensor]:
        for plans in replay._plans:  # which have a kernel
            plans.clear()
        self.stream += 1  # an aborted launch does not leave its counter of tiles as zeros
        self.driver.configure(f"sms={CTAS}")
        return [x for call in self.calls for x in call()]

    def prepare(self, text: str) -> mutate.Run:
        kernel = launch.module().Kernel(VARIANT.name, VARIANT.entry, [text.encode()])

        def right() -> bool:
            self.kernels[VARIANT] = kernel
            return all(bitwise_equal(a, b) for a, b in zip(self.results(), self.expected, strict=True))

        return right


@pytest.fixture
def forward(simulator, monkeypatch) -> Forward:
    return Forward(simulator, monkeypatch)


@pytest.fixture
def text() -> str:
    return build.obtain(VARIANT).ptx.decode()


@pytest.fixture
def mutants(simulator, text) -> list[mutate.Mutant]:
    return mutate.mutants(simulator, text, VARIANT.entry, sources.kernel_folder())


def test_no_schedule_alarms_at_the_kernel_itself(forward: Forward, text: str) -> None:
    run = forward.prepare(text)
    schedules = mutate.policies(forward.driver, run, WARPS)
    assert len(schedules) > 20
    assert {policy: alarm for policy in schedules if (alarm := mutate.alarm(forward.driver, run, policy))} == {}


def test_a_sample_of_mutants_is_caught(forward: Forward, text: str, mutants: list[mutate.Mutant]) -> None:
    known = mutate.Known(KERNEL)
    chosen = [mutant for mutant in mutants if known.group(mutant) is None][::SAMPLE]
    schedules = mutate.policies(forward.driver, forward.prepare(text), WARPS)
    survivors = mutate.survey(forward.driver, forward.prepare, chosen, schedules).survivors
    assert len(survivors) <= 0.05 * len(chosen), [mutant.name for mutant in survivors]
    assert len(chosen) > 15


@pytest.mark.slow
def test_every_mutant_is_caught(forward: Forward, text: str, mutants: list[mutate.Mutant]) -> None:
    run = forward.prepare(text)
    assert {mutant.line for mutant in mutants} <= mutate.executed_lines(forward.driver, run)
    known = mutate.Known(KERNEL)
    untried = [mutant for mutant in mutants if known.group(mutant) is None]
    missed = [mutant for mutant in mutants if known.group(mutant) == "unknown"]
    assert len(missed) <= 0.05 * (len(untried) + len(missed))
    schedules = mutate.policies(forward.driver, run, WARPS)
    result = mutate.survey(forward.driver, forward.prepare, untried, schedules)
    assert [mutant.name for mutant in result.survivors] == []


@pytest.mark.slow
def test_known_survivors_survive(forward: Forward, text: str, mutants: list[mutate.Mutant]) -> None:
    known = mutate.Known(KERNEL)
    schedules = mutate.policies(forward.driver, forward.prepare(text), WARPS)
    chosen = [mutant for mutant in mutants if known.group(mutant)]
    assert mutate.survey(forward.driver, forward.prepare, chosen, schedules).caught == {}
