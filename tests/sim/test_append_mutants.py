# SPDX-License-Identifier: BSD-3-Clause
"""Mutation testing of the kernels around attention to a cache: no change of their synchronisation goes unnoticed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from test_append import PLAIN, append, case_of, expected

from flash_attn3 import build, merge_state, variants
from flash_attn3.build import sources
from flash_attn3.hopper import launch
from flash_attn3.testing import bitwise_equal
from flash_attn3.variants import Variant
from tests.hopper_sim import mutate


def append_twice() -> bool:
    """The second launch writes what the first one has written; packed rows of several sequences in a tile search."""
    a = case_of(PLAIN | {"ragged": True, "new": (3, 40, 5), "rows": True})
    k, v = expected(a)
    append(a)
    append(a)
    return bitwise_equal(a["k_cache"], k) and bitwise_equal(a["v_cache"], v)


def merge_a_merge() -> bool:
    out, lse = torch.randn(5, 2, 64), torch.randn(5, 2)
    empty = torch.full_like(lse, -torch.inf)
    once = merge_state(out, lse, out, empty, lse_layout="sh", backend="hopper")
    return bitwise_equal(merge_state(*once, out, empty, lse_layout="sh", backend="hopper")[0], out)


RUNS: dict[Variant, Callable[[], bool]] = {variants.APPEND_KV: append_twice, variants.MERGE_STATE: merge_a_merge}


@pytest.mark.parametrize("variant", RUNS, ids=lambda variant: variant.operation)
def test_every_mutant_is_caught(variant: Variant, simulator, monkeypatch: pytest.MonkeyPatch) -> None:
    run, ptx = RUNS[variant], build.obtain(variant).ptx.decode()

    def prepare(text: str) -> mutate.Run:
        changed = launch.module().Kernel(variant.name, variant.entry, [text.encode()])
        monkeypatch.setattr(launch, "kernel", lambda _: changed)
        return run

    prepare(ptx)
    schedules = mutate.policies(simulator, run, variant.threads // 32)
    assert {policy: alarm for policy in schedules if (alarm := mutate.alarm(simulator, run, policy))} == {}
    mutants = mutate.mutants(simulator, ptx, variant.entry, sources.kernel_folder())
    known = mutate.Known(variant.operation)
    assert not known.unused(mutants)
    result = mutate.survey(simulator, prepare, [m for m in mutants if known.group(m) is None], schedules)
    assert [mutant.name for mutant in result.survivors] == [] and result.caught
    simulator.reset()
