# SPDX-License-Identifier: BSD-3-Clause
"""The launches of Hopper kernels: the choice of splits follows its model, and the model says what one expects of it."""

from __future__ import annotations

import itertools

import pytest
import torch

from flash_attn3 import heuristics, validate, variants
from flash_attn3.checks import Checks
from flash_attn3.problem import AttentionProblem

H100 = 132  # multiprocessors
DECODE = dict(block_bytes=128 * 256 * 2, block_seconds=0.2e-6)  # a key tile at head dim 128


def problem(batch: int, seqlen_q: int, seqlen_k: int, h: int = 8, h_kv: int = 8, **options) -> AttentionProblem:
    """On the meta device, where no length is known but by its bound."""

    def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    lengths = options.pop("lengths", ())
    packed = {"cu_seqlens_q", "cu_seqlens_k"} & set(lengths)
    q = empty(batch * seqlen_q, h, 128) if "cu_seqlens_q" in packed else empty(batch, seqlen_q, h, 128)
    k = empty(batch * seqlen_k, h_kv, 128) if "cu_seqlens_k" in packed else empty(batch, seqlen_k, h_kv, 128)
    for name in lengths:
        options[name] = empty(batch + name.startswith("cu"), dtype=torch.int32)
    if packed:
        options = {"max_seqlen_q": seqlen_q, "max_seqlen_k": seqlen_k} | options
    return validate.attention(Checks("test"), q, k, k, **options)


def launch(p: AttentionProblem) -> heuristics.FwdLaunch:
    return heuristics.fwd_launch(p, variants.select(p), H100)


def splits_of(*sizes: int, **options) -> int:
    return launch(problem(*sizes, **{"num_splits": 0} | options)).num_splits


# The model


def test_one_split_costs_no_merge() -> None:
    one, two = (heuristics.split_seconds(n, 1, 1, part_bytes=0, num_multiprocessors=H100, **DECODE) for n in (1, 2))
    assert two - one == pytest.approx(heuristics.COMBINE_SECONDS)


def test_parts_cost_their_bytes() -> None:
    costs = [
        heuristics.split_seconds(4, 8, 64, part_bytes=n, num_multiprocessors=H100, **DECODE) for n in (0, 3 * 10**6)
    ]
    assert costs[1] - costs[0] == pytest.approx(4 * 1e-6)


def test_few_tiles_are_bound_by_what_one_multiprocessor_reads() -> None:
    seconds = heuristics.split_seconds(1, 1, 1000, part_bytes=0, num_multiprocessors=H100, **DECODE)
    assert seconds == pytest.approx(heuristics.TILE_SECONDS + 1000 * DECODE["block_bytes"] / heuristics.SM_BANDWIDTH)


def test_many_tiles_are_bound_by_memory() -> None:
    seconds = heuristics.split_seconds(1, 5 * H100, 1000, part_bytes=0, num_multiprocessors=H100, **DECODE)
    bytes_read = 5 * H100 * 1000 * DECODE["block_bytes"]
    assert seconds == pytest.approx(5 * heuristics.TILE_SECONDS + bytes_read / heuristics.MEMORY_BANDWIDTH)


def test_products_bind_where_they_take_longer() -> None:
    costs = dict(block_bytes=1, block_seconds=1e-6, part_bytes=0, num_multiprocessors=H100)
    assert heuristics.split_seconds(1, 2 * H100, 10, **costs) == pytest.approx(2 * (heuristics.TILE_SECONDS + 10e-6))


@pytest.mark.parametrize(("tiles", "blocks"), list(itertools.product([1, 3, 8, 16, 50, 66, 100], [1, 2, 7, 64, 1000])))
def test_the_choice_is_near_the_best_and_the_fewest_that_is(tiles: int, blocks: int) -> None:
    costs = dict(part_bytes=8 * 4096, num_multiprocessors=H100, **DECODE)
    chosen = heuristics.fewest_splits(tiles, blocks, **costs)
    seconds = [heuristics.split_seconds(n, tiles, blocks, **costs) for n in range(1, min(blocks, 128) + 1)]
    assert seconds[chosen - 1] * heuristics.NEAR_BEST <= min(seconds)
    assert all(slower * heuristics.NEAR_BEST > min(seconds) for slower in seconds[: chosen - 1])


# The choice


@pytest.mark.parametrize("keys", [1024, 4096, 65536])
@pytest.mark.parametrize("batch", [16, 17, 32, 256])
def test_a_full_chip_is_not_split(batch: int, keys: int) -> None:
    """Batch x KV heads fill the multiprocessors: parts would only cost bytes."""
    assert splits_of(batch, 1, keys, 32, 8) == 1


@pytest.mark.parametrize("keys", [4096, 16384, 65536])
@pytest.mark.parametrize("batch", [1, 2, 4])
def test_mqa_is_not_starved(batch: int, keys: int) -> None:
    """One KV head for 64 query heads: a tile for each sequence, too few to use the bandwidth."""
    num_splits = splits_of(batch, 1, keys, 64, 1)
    assert batch * num_splits >= H100 / 4 or num_splits == keys // 128
    assert batch * num_splits <= H100


def test_few_short_keys_are_split_too() -> None:
    """No rule that so many key tiles are too few: they are read one after another."""
    assert splits_of(1, 1, 512, 8, 1) > 1


def test_longer_keys_are_not_split_less() -> None:
    counts = [splits_of(1, 1, 1024 * 2**n, 32, 8) for n in range(7)]
    assert counts == sorted(counts)


def test_prefill_is_not_split() -> None:
    assert splits_of(1, 4096, 4096, 8, 8) == 1


def test_a_window_bounds_what_is_split() -> None:
    assert splits_of(1, 1, 65536, 8, 1, window_size=(128, 0)) <= 3


def test_splits_have_a_size() -> None:
    """So that short sequences of the batch have fewer of them."""
    plan = launch(problem(2, 1, 16384, 8, 1, num_splits=0, lengths=["seqused_k"]))
    assert plan.num_splits * plan.split_blocks >= 128 > (plan.num_splits - 1) * plan.split_blocks
    given = launch(problem(2, 1, 16384, 8, 1, num_splits=7, lengths=["seqused_k"]))
    assert (given.num_splits, given.split_blocks) == (7, 1)


def test_parts_without_keys_are_left_out_where_all_lengths_are_known() -> None:
    assert launch(problem(1, 1, 640, num_splits=4)).num_splits == 3  # two tiles of five to each
    assert launch(problem(1, 1, 640, num_splits=256)).num_splits == 5
    assert launch(problem(1, 1, 0, num_splits=9)).num_splits == 1


# Batch invariance


@pytest.mark.parametrize("batch", [1, 3, 200])
@pytest.mark.parametrize("lengths", [["seqused_k"], ["cu_seqlens_q", "seqused_k"], ["cu_seqlens_q", "cu_seqlens_k"]])
def test_the_size_of_an_invariant_split_is_fixed(batch: int, lengths: list[str]) -> None:
    for keys, pack_gqa in itertools.product((300, 5000, 20000), (None, True, False)):
        p = problem(batch, 1, keys, 32, 8, num_splits=0, batch_invariant=True, lengths=lengths, pack_gqa=pack_gqa)
        plan = launch(p)
        assert plan.split_blocks == 8  # 512 KB of keys and values: 1024 of them at head dim 128
        assert plan.num_splits == min(heuristics.INVARIANT_SPLITS, -(-keys // 1024))


def test_invariant_splits_are_for_few_rows() -> None:
    options = dict(num_splits=0, batch_invariant=True)
    assert launch(problem(1, 16, 9000, 32, 8, **options)).num_splits == 9
    assert launch(problem(1, 17, 9000, 32, 8, **options)).num_splits == 1
    mixed = launch(problem(4, 500, 9000, 32, 8, lengths=["cu_seqlens_q", "seqused_k"], **options))
    assert (mixed.num_splits, mixed.split_rows, mixed.part_rows_of_sequence) == (9, 16, 16)


def test_parts_take_no_more_memory_than_rows() -> None:
    p = problem(4, 3, 9000, 32, 8, num_splits=0, batch_invariant=True, lengths=["cu_seqlens_q", "seqused_k"])
    assert launch(p).part_rows_of_sequence == 0 and launch(p).part_rows(p) == 12


# Tiles


def test_packed_rows_have_no_more_tiles_than_they_need() -> None:
    """Of 100 sequences of up to 8192 rows in 10,000 rows, most are short."""
    options = dict(lengths=["cu_seqlens_q", "cu_seqlens_k"], max_seqlen_q=8192)
    assert launch(problem(100, 100, 100, 1, 1, num_splits=0, **options)).grid == H100
    assert launch(problem(2, 100, 100, 1, 1, num_splits=1, **options)).grid <= 4


@pytest.mark.parametrize(("causal", "dynamic"), [(False, False), (True, True)])
def test_tiles_are_drawn_where_they_differ(causal: bool, dynamic: bool) -> None:
    assert launch(problem(4, 2048, 2048, 8, 8, num_splits=1, causal=causal)).dynamic is dynamic
    assert launch(problem(4, 2048, 2048, 8, 8, num_splits=1, causal=causal, lengths=["seqused_k"])).dynamic
    assert not launch(problem(1, 128, 128, 8, 8, num_splits=1, causal=causal)).dynamic


def test_a_call_sorts_sequences_where_that_pays() -> None:
    lengths = ["cu_seqlens_q", "cu_seqlens_k"]
    for seqlen, sorts in ((64, False), (4096, True)):
        p = problem(16, seqlen, seqlen, 8, 8, num_splits=1, lengths=lengths)
        assert heuristics.sorts(p, launch(p)) is sorts
    dense = problem(16, 4096, 4096, 8, 8, num_splits=1)
    assert not heuristics.sorts(dense, launch(dense))


def test_tiles_are_counted_in_32_bits() -> None:
    assert not heuristics.too_many_tiles(problem(1, 2**20, 10, 128, 128, num_splits=1))
    assert heuristics.too_many_tiles(problem(2**22, 1, 10, 128, 128, num_splits=1))
