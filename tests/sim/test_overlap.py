# SPDX-License-Identifier: BSD-3-Clause
"""The schedule that hopper/README.md draws is the one that the kernel has."""

from __future__ import annotations

from itertools import product

from tests.hopper_sim import overlap

TILES, BLOCKS = 2, 4

Lane = list[tuple[str, int, int]]


def beside(lane: Lane, other: Lane) -> int:
    """Ticks that both are at work."""
    return sum(max(0, min(a[2], b[2]) - max(a[1], b[1])) for a, b in product(lane, other))


def test_softmax_runs_beside_products(simulator) -> None:
    lanes = overlap.lanes(*overlap.record(simulator))
    assert [len(lanes[f"copies of {x}"]) for x in "QKV"] == [2 * TILES, TILES * BLOCKS, TILES * BLOCKS]
    one, two = ({kind: lanes[f"consumer {n}: {kind}"] for kind in ("arithmetic", "products")} for n in (1, 2))
    for consumer, other in ((one, two), (two, one)):
        for name in "SO":
            assert sum(x[0] == name for x in consumer["products"]) == TILES * BLOCKS
        values = [x for x in consumer["products"] if x[0] == "O"]
        assert beside(consumer["arithmetic"], values) > 0.2 * sum(end - begin for _, begin, end in values)
        assert beside(consumer["arithmetic"], other["products"]) > 0
    assert beside(one["products"], two["products"]) == 0  # there is one tensor core
