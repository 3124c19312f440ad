# SPDX-License-Identifier: BSD-3-Clause
"""What a launch reports of itself."""

from __future__ import annotations

from collections.abc import Callable

import faults
import pipeline
import ptx
import pytest
import torch

from tests import hopper_sim


def statistics(driver: hopper_sim.Driver) -> dict:
    return driver.report()["launches"][-1]["statistics"]


# Name -> (opcode with its operands, extra phases); %r1 is 4 times the lane.
BANKS = {
    "consecutive words": ("ld.shared.b32 %r2, [%r3];", "mad.lo.u32 %r3, %t, 4, %s;", 0),
    "one word for all": ("ld.shared.b32 %r2, [%r3];", "mov.u32 %r3, %s;", 0),
    "every second word": ("ld.shared.b32 %r2, [%r3];", "mad.lo.u32 %r3, %t, 8, %s;", 1),
    "one bank": ("ld.shared.b32 %r2, [%r3];", "mad.lo.u32 %r3, %t, 128, %s;", 31),
    "vectors in a row": ("ld.shared.v4.b32 {%r4, %r5, %r6, %r7}, [%r3];", "mad.lo.u32 %r3, %t, 16, %s;", 0),
    "vectors 128 bytes apart": (
        "st.shared.v4.b32 [%r3], {%t, %t, %t, %t};",
        "mad.lo.u32 %r3, %t, 128, %s;",
        4 * 7,
    ),
    "a row of a matrix in each bank group": (
        "stmatrix.sync.aligned.x4.m8n8.shared.b16 [%r3], {%t, %t, %t, %t};",
        "mad.lo.u32 %r3, %t, 16, %s;",
        0,
    ),
    "rows of a matrix 128 bytes apart": (
        "ldmatrix.sync.aligned.x2.m8n8.shared.b16 {%r4, %r5}, [%r3];",
        "mad.lo.u32 %r3, %t, 128, %s;",
        2 * 7,
    ),
}


@pytest.mark.parametrize("name", BANKS)
def test_bank_conflicts(driver: hopper_sim.Driver, name: str) -> None:
    access, address, conflicts = BANKS[name]
    ptx.run(driver, faults.START + address + "\n" + access, module=faults.SHARED)
    found = statistics(driver)
    assert found["bank_conflicts"] == conflicts
    assert sum(found["bank_conflict_lines"].values()) == conflicts


def test_work_of_a_product(driver: hopper_sim.Driver, compiled: Callable[[str], str]) -> None:
    m, n, k = 256, 128, 384
    pipeline.run(driver, driver.load(compiled("pipeline"), "pipeline"), m, n, k)
    found = statistics(driver)
    tiles, steps = m // pipeline.TILE_M * (n // pipeline.TILE_N), k // pipeline.TILE_K
    assert found["macs"] == m * n * k
    assert found["wgmma"] == tiles * steps * 8 * 4
    read = tiles * steps * 2 * pipeline.TILE_K * (pipeline.TILE_M + pipeline.TILE_N)
    assert found["tma_bytes_in"] == read
    assert found["tma_bytes_again"] == read - 2 * k * (m + n)
    assert found["tma_bytes_out"] == 2 * m * n
    assert sum(found["async_sites"].values()) == tiles * (2 * steps + 2)
    producer, first, second = found["roles"]
    assert producer["wgmma"] == 0
    assert first["wgmma"] == second["wgmma"] == found["wgmma"] // 2
    assert sum(role["instructions"] for role in found["roles"]) == found["warp_instructions"]
    assert producer["stalls"]["empty"] > 0 == producer["stalls"]["full"]
    for consumer in (first, second):
        stalls = consumer["stalls"]
        assert stalls["full"] > 0 and stalls["wgmma"] > 0 and stalls["named_barrier"] > 0
        assert stalls["empty"] == 0
        assert consumer["instructions"] + sum(stalls.values()) <= 4 * found["ticks"]


def test_the_stall_picture_does_not_depend_on_when_copies_happen(
    driver: hopper_sim.Driver, compiled: Callable[[str], str]
) -> None:
    kernel = driver.load(compiled("pipeline"), "pipeline")
    pictures = []
    for policy in ("eager", "lazy", "lazy,order=oldest"):
        driver.configure(f"policy={policy}")
        pipeline.run(driver, kernel)
        pictures.append((statistics(driver)["ticks"], statistics(driver)["roles"]))
    assert pictures[0] == pictures[1] == pictures[2]


def test_waits_are_counted_once_a_place(driver: hopper_sim.Driver) -> None:
    ptx.run(driver, "bar.sync 0;\nbar.sync 0;", block=128)
    found = statistics(driver)
    assert found["barrier_waits"] == sum(found["blocked"].values()) == 6


def test_coverage(driver: hopper_sim.Driver) -> None:
    body = "mov.u32 %r1, 0;\nagain: add.u32 %r1, %r1, 1;\nsetp.lt.u32 %p1, %r1, 5;\n@%p1 bra again;\n@%p1 trap;"
    driver.configure("coverage=1")
    ptx.run(driver, body, block=64)
    lines = ptx.kernel(body).splitlines()
    found = {lines[int(line) - 1]: count for line, count in statistics(driver)["coverage"].items()}
    assert found["mov.u32 %r1, 0;"] == 2
    assert found["again: add.u32 %r1, %r1, 1;"] == 10
    assert found["@%p1 trap;"] == 0


def test_multicast(driver: hopper_sim.Driver) -> None:
    source = torch.zeros(1024, dtype=torch.int32)
    map_ = driver.tensor_map(source.data_ptr(), 7, [32, 32], [128], [32, 4])
    load = "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
    body = f"""{faults.START}{faults.BARRIERS}
@%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%bar], 512;
barrier.cluster.arrive.aligned;
barrier.cluster.wait.aligned;
mov.u32 %r1, %cluster_ctarank;
setp.eq.and.u32 %p3, %r1, 0, %p1;
mov.b16 %h1, 3;
mov.b64 %d1, m0;
@%p3 {load}.multicast::cluster [%s], [%d1, {{0, 0}}], [%bar], %h1;
{faults.wait(0)}
ld.shared.b32 %r2, [%slot];
"""
    ptx.run(driver, body, source, maps=[map_], grid=2, cluster=2, module=faults.SHARED)
    assert statistics(driver)["multicast_bytes"] == 2 * 512
