# SPDX-License-Identifier: BSD-3-Clause
"""Mutation testing of the backward kernels: whatever synchronisation is changed, the simulator notices.

In the cases every ring of stages comes round several times, blocks are cut and whole, several CTAs add to a block of dq
at once, in any order and in a fixed one, and something is not finite. `-m slow` runs every mutant, some minutes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from cases import attend, extent, inputs
from torch import Tensor

from flash_attn3 import build, variants
from flash_attn3.build import sources
from flash_attn3.flash_attn_interface import _flash_attn_backward
from flash_attn3.hopper import launch
from flash_attn3.testing import values
from flash_attn3.variants import Variant
from tests.hopper_sim import Driver, mutate

MAIN = next(v for v in variants.bwd_variants() if v.head_dim == 64)
KERNELS = {v.operation: v for v in (variants.BWD_PREPROCESS, MAIN, variants.BWD_POSTPROCESS)}
WARPS = 4 * (MAIN.consumers + 1)
STARVED = (0b0010, 0b1100)  # the writer, the guards
SAMPLE = 8  # of so many mutants, one is tried every day
EACH = pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)


class Case(NamedTuple):
    """Arguments of a backward, and how it is run."""

    arguments: dict[str, Any]
    options: str  # of the simulator
    free: bool  # dq is added up in any order


def cases() -> list[Case]:
    torch.manual_seed(0)
    sizes = dict(num_heads=2, num_heads_kv=1)
    length = 3 * MAIN.block_m
    # 12 steps of the first CTA: a count too small by one lets a stage go when a whole warpgroup still reads it.
    causal = inputs("bf16_d64_v64", batch=1, seqlen_q=length, seqlen_k=length - 40, num_heads=4, num_heads_kv=1)
    causal |= {"causal": True}
    spoiled = inputs("bf16_d64_v64", batch=1, seqlen_q=length, seqlen_k=length - 40, **sizes) | {"causal": True}
    spoiled["dout"] = values(spoiled["q"].shape, torch.bfloat16, seed=9)
    spoiled["dout"][0, 200, 0, 3] = torch.inf  # in a block that the mask cuts
    ragged = inputs("bf16_d64_v64", "padded", batch=2, seqlen_q=200, seqlen_k=150, sink=True, **sizes)
    return [
        case_of(causal, "sms=1,coresident=3"),
        case_of(spoiled, "sms=1"),
        case_of(ragged, "sms=132", dlse=True),  # with parts of dk and dv
        case_of(causal, "sms=1,cta_order=forward,coresident=3,ordered_sums=1", deterministic=True),
    ]


def case_of(case: dict[str, Any], options: str, deterministic: bool = False, dlse: bool = False) -> Case:
    given = dict(case)
    dout = given.pop("dout", None)
    out, lse = attend(given)
    names = {"causal": "is_causal", "seqused_q": "sequed_q", "seqused_k": "sequed_k"}
    given = {names.get(name, name): x for name, x in given.items()}
    given |= {"out": out, "softmax_lse": lse, "deterministic": deterministic, "backend": "hopper"}
    given["dout"] = values(out.shape, out.dtype, seed=9) if dout is None else dout
    if dlse:
        given["dlse"] = values(lse.shape, torch.float32, seed=10)
    return Case(given, options, not deterministic)


class Backward:
    """The cases on a kernel given by its text."""

    def __init__(self, driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
        self.driver = driver
        self.cases = cases()
        self.changed: dict[Variant, Any] = {}
        run, kernel = launch.run, launch.kernel

        def registered(prepared, tensors, stream) -> bool:
            for x in tensors:
                if x is not None:
                    driver.register(x.data_ptr(), extent(x), "")
            return run(prepared, tensors, stream)

        monkeypatch.setattr(launch, "run", registered)
        monkeypatch.setattr(launch, "kernel", lambda variant: self.changed.get(variant) or kernel(variant))
        self.expected = list(map(self.gradients, self.cases))

    def gradients(self, case: Case) -> dict[str, Tensor]:
        self.driver.configure("ordered_sums=0")
        self.driver.configure(case.options)
        given = case.arguments
        grads = {f"d{name}": torch.full_like(given[name], torch.nan) for name in "qkv"}
        grads["dq"] = grads["dq"].float()  # unrounded, for the order of its sums
        if given.get("s_aux") is not None:
            grads["dsink"] = torch.full((given["q"].shape[-2],), torch.nan)
        _flash_attn_backward(**given, **grads)
        return grads

    def right(self, case: Case, expected: dict[str, Tensor]) -> bool:
        grads = self.gradients(case)
        for name, grad in grads.items():
            bounds = dict(rtol=2e-2, atol=2e-3) if name == "dq" and case.free else dict(rtol=0, atol=0)
            if not torch.allclose(grad, expected[name], equal_nan=True, **bounds):
                return False
        return True

    def preparer(self, variant: Variant) -> mutate.Prepare:
        def prepare(text: str) -> mutate.Run:
            kernel = launch.module().Kernel(variant.name, variant.entry, [text.encode()])

            def right() -> bool:
                self.changed = {variant: kernel}
                return all(map(self.right, self.cases, self.expected))

            return right

        return prepare


class Mutated(NamedTuple):
    """A kernel under test."""

    prepare: mutate.Prepare
    text: str
    mutants: list[mutate.Mutant]
    known: mutate.Known
    schedules: list[str]


@pytest.fixture
def mutated(kernel: Variant, simulator, monkeypatch) -> Mutated:
    prepare = Backward(simulator, monkeypatch).preparer(kernel)
    text = build.obtain(kernel).ptx.decode()
    mutants = mutate.mutants(simulator, text, kernel.entry, sources.kernel_folder())
    schedules = mutate.policies(simulator, prepare(text), WARPS)
    schedules += [schedules[0].replace("policy=eager", f"starve={mask},quantum=1") for mask in STARVED]
    return Mutated(prepare, text, mutants, mutate.Known(kernel.operation), schedules)


@EACH
def test_no_schedule_alarms_at_the_kernel_itself(mutated: Mutated, simulator) -> None:
    run = mutated.prepare(mutated.text)
    assert len(mutated.schedules) > 20
    assert {policy: alarm for policy in mutated.schedules if (alarm := mutate.alarm(simulator, run, policy))} == {}


@EACH
def test_a_sample_of_mutants_is_caught(mutated: Mutated, simulator) -> None:
    chosen = [mutant for mutant in mutated.mutants if mutated.known.group(mutant) is None][::SAMPLE]
    survivors = mutate.survey(simulator, mutated.prepare, chosen, mutated.schedules).survivors
    assert len(chosen) > 0 and [mutant.name for mutant in survivors] == []


@pytest.mark.slow
@EACH
def test_every_mutant_is_caught(mutated: Mutated, simulator) -> None:
    executed = mutate.executed_lines(simulator, mutated.prepare(mutated.text))
    assert {mutant.line for mutant in mutated.mutants} <= executed
    untried = [mutant for mutant in mutated.mutants if mutated.known.group(mutant) is None]
    missed = [mutant for mutant in mutated.mutants if mutated.known.group(mutant) == "unknown"]
    assert len(missed) <= 0.05 * (len(untried) + len(missed))
    result = mutate.survey(simulator, mutated.prepare, untried, mutated.schedules)
    assert [mutant.name for mutant in result.survivors] == []


@pytest.mark.slow
@EACH
def test_known_survivors_survive(mutated: Mutated, simulator) -> None:
    assert mutated.known.unused(mutated.mutants) == set()
    chosen = [mutant for mutant in mutated.mutants if mutated.known.group(mutant)]
    assert mutate.survey(simulator, mutated.prepare, chosen, mutated.schedules).caught == {}
