# SPDX-License-Identifier: BSD-3-Clause
"""Barriers of a block and of a cluster, setmaxnreg, griddepcontrol, fences, hints and traps."""

from __future__ import annotations

import pytest
import torch
from ptx import poison, run

from tests.hopper_sim import Driver, DriverError

POLICIES = ["eager", "random,seed=1", "random,seed=2", "eager,starve=1", "eager,starve=14"]
RING = """
    .shared .align 4 .b8 data[{bytes}];
    mov.u32 %r1, data;
    mad.lo.u32 %r2, %t, 4, %r1;
    st.shared.u32 [%r2], %t;
    {barrier}
    add.u32 %r3, %t, 32;
    rem.u32 %r3, %r3, {threads};
    mad.lo.u32 %r2, %r3, 4, %r1;
    ld.shared.u32 %r4, [%r2];
    mad.wide.u32 %d1, %t, 4, %a0;
    st.global.u32 [%d1], %r4;
"""


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("barrier", [
    "bar.sync 0;", "bar.sync 3, 128;", "barrier.sync.aligned 5;", "barrier.sync 6;", "barrier.cta.sync.aligned 1, 128;",
    "mov.u32 %r9, 7; mov.u32 %r10, 128; bar.sync %r9, %r10;",
])  # fmt: skip
def test_block_barrier(driver: Driver, barrier: str, policy: str) -> None:
    driver.configure(f"policy={policy}")
    out = poison(128, dtype=torch.int32)
    run(driver, RING.format(bytes=512, threads=128, barrier=barrier), out, block=128)
    assert out.tolist() == [(t + 32) % 128 for t in range(128)]


@pytest.mark.parametrize("policy", POLICIES)
def test_arrive_does_not_wait(driver: Driver, policy: str) -> None:
    """Two producers arrive and go on, two consumers wait for them; three rounds over the same barriers."""
    driver.configure(f"policy={policy}")
    out = poison(3, 64, dtype=torch.int32)
    body = """
    .shared .align 4 .b8 data[256];
    mov.u32 %r1, data;
    and.b32 %r9, %t, 63;
    mad.lo.u32 %r2, %r9, 4, %r1;
    mad.wide.u32 %d1, %r9, 4, %a0;
    setp.ge.u32 %p0, %t, 64;
    mov.u32 %r3, 0;
    @%p0 bra consumer;
producer:
    setp.eq.u32 %p2, %r3, 0;
    @%p2 bra first;
    bar.sync 2, 128;
first:
    mad.lo.u32 %r4, %r3, 1000, %t;
    st.shared.u32 [%r2], %r4;
    bar.arrive 1, 128;
    add.u32 %r3, %r3, 1;
    setp.lt.u32 %p1, %r3, 3;
    @%p1 bra producer;
    bra end;
consumer:
    bar.sync 1, 128;
    ld.shared.u32 %r4, [%r2];
    st.global.u32 [%d1], %r4;
    add.u64 %d1, %d1, 256;
    add.u32 %r3, %r3, 1;
    setp.eq.u32 %p1, %r3, 3;
    @%p1 bra end;
    bar.arrive 2, 128;
    bra consumer;
end:
    """
    run(driver, body, out, block=128)
    assert torch.equal(out, (1000 * torch.arange(3)[:, None] + torch.arange(64)).int())


@pytest.mark.parametrize("policy", POLICIES)
def test_reducing_barriers(driver: Driver, policy: str) -> None:
    driver.configure(f"policy={policy}")
    out = poison(128, 3, dtype=torch.int32)
    body = """
    rem.u32 %r1, %t, 3;
    setp.eq.u32 %p1, %r1, 0;
    bar.red.popc.u32 %r2, 0, %p1;
    bar.red.and.pred %p2, 0, !%p1;
    barrier.red.or.aligned.pred %p3, 1, 128, %p1;
    selp.u32 %r3, 1, 0, %p2;
    selp.u32 %r4, 1, 0, %p3;
    mad.wide.u32 %d1, %t, 12, %a0;
    st.global.u32 [%d1], %r2;
    st.global.u32 [%d1+4], %r3;
    st.global.u32 [%d1+8], %r4;
    """
    run(driver, body, out, block=128)
    assert (out == torch.tensor([43, 0, 1])).all()


def test_a_warp_that_left_is_not_waited_for(driver: Driver) -> None:
    out = torch.zeros(1, dtype=torch.int32)
    body = "setp.ge.u32 %p0, %t, 96;\n@%p0 exit;\nbar.sync 0;\nsetp.eq.u32 %p1, %t, 0;\n@%p1 st.global.u32 [%a0], 1;"
    run(driver, body, out, block=128)
    assert out.tolist() == [1]


@pytest.mark.simulated
@pytest.mark.parametrize("body,message", [
    ("bar.sync 16;", "barrier 16 of 16"),
    ("bar.sync 1, 48;", "barrier 1 with count 48"),
    ("setp.lt.u32 %p1, %t, 32;\n@%p1 bra a;\nbar.sync 1, 64;\nbra b;\na: bar.sync 1, 96;\nb:",
     "counts 96 and 64|counts 64 and 96"),
    ("setp.lt.u32 %p1, %t, 32;\n@!%p1 bra b;\nbar.sync 1, 128;\nb:", "waits at barrier 1: 32 of 128 threads are there"),
])  # fmt: skip
def test_misuse(driver: Driver, body: str, message: str) -> None:
    with pytest.raises(DriverError, match=message):
        run(driver, body, block=128)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("forms", [(".aligned", ".aligned"), ("", ""), (".release.aligned", ".acquire.aligned")])
def test_cluster_barrier(driver: Driver, forms: tuple[str, str], policy: str) -> None:
    """Each block writes into its neighbour's memory, twice."""
    driver.configure(f"policy={policy}")
    out = poison(4, 2, 64, dtype=torch.int32)
    body = f"""
    .shared .align 4 .b8 data[256];
    mov.u32 %r1, data;
    mad.lo.u32 %r1, %t, 4, %r1;
    mov.u32 %r2, %cluster_ctarank;
    add.u32 %r3, %r2, 1;
    and.b32 %r3, %r3, 3;
    mapa.shared::cluster.u32 %r4, %r1, %r3;
    mov.u32 %r5, 0;
    mad.lo.u32 %r6, %r2, 128, %t;
    mad.wide.u32 %d1, %r6, 4, %a0;
round:
    mad.lo.u32 %r7, %r5, 10000, %t;
    mad.lo.u32 %r7, %r2, 1000, %r7;
    barrier.cluster.arrive{forms[0]};
    barrier.cluster.wait{forms[1]};
    st.shared::cluster.u32 [%r4], %r7;
    barrier.cluster.arrive{forms[0]};
    barrier.cluster.wait{forms[1]};
    ld.shared.u32 %r8, [%r1];
    st.global.u32 [%d1], %r8;
    add.u64 %d1, %d1, 256;
    add.u32 %r5, %r5, 1;
    setp.lt.u32 %p1, %r5, 2;
    @%p1 bra round;
    barrier.cluster.arrive{forms[0]};
    barrier.cluster.wait{forms[1]};
    """
    run(driver, body, out, grid=4, block=64, cluster=4)
    rank, turn, thread = torch.meshgrid(torch.arange(4), torch.arange(2), torch.arange(64), indexing="ij")
    assert torch.equal(out, (10000 * turn + 1000 * ((rank - 1) % 4) + thread).int())


def test_special_registers_of_a_cluster(driver: Driver) -> None:
    names = ["%ctaid", "%nctaid", "%cluster_ctaid", "%cluster_nctaid", "%clusterid", "%nclusterid", "%tid", "%ntid"]
    out = poison(4 * 6, 8, 3, dtype=torch.int32)
    body = """
    mov.u32 %r1, %ctaid.y;
    mov.u32 %r2, %ctaid.x;
    mad.lo.u32 %r1, %r1, 6, %r2;
    mad.wide.u32 %d1, %r1, 96, %a0;
    mov.u32 %r4, %laneid;
    setp.ne.u32 %p0, %r4, 0;
    @%p0 ret;
    """
    for n, name in enumerate(names):
        for axis, letter in enumerate("xyz"):
            body += f"mov.u32 %r3, {name}.{letter};\nst.global.u32 [%d1+{12 * n + 4 * axis}], %r3;\n"
    run(driver, body, out, grid=(6, 4), block=(8, 2, 2), cluster=(3, 2))
    for y in range(4):
        for x in range(6):
            wanted = [
                (x, y, 0),
                (6, 4, 1),
                (x % 3, y % 2, 0),
                (3, 2, 1),
                (x // 3, y // 2, 0),
                (2, 2, 1),
                (0, 0, 0),
                (8, 2, 2),
            ]
            assert out[y * 6 + x].tolist() == [list(v) for v in wanted]


def test_scalar_special_registers(driver: Driver) -> None:
    names = ["%laneid", "%warpid", "%nwarpid", "%cluster_ctarank", "%cluster_nctarank", "%lanemask_lt", "%lanemask_le"]
    names += ["%lanemask_gt", "%lanemask_ge", "%lanemask_eq", "%dynamic_smem_size", "%smid", "%nsmid"]
    out = poison(2 * 64, len(names), dtype=torch.int32)
    body = f"""
    mov.u32 %r1, %cluster_ctarank;
    mad.lo.u32 %r1, %r1, 64, %t;
    mad.wide.u32 %d1, %r1, {4 * len(names)}, %a0;
    """
    body += "".join(f"mov.u32 %r2, {name};\nst.global.u32 [%d1+{4 * n}], %r2;\n" for n, name in enumerate(names))
    run(driver, body, out, grid=2, block=64, cluster=2, smem=96)
    for rank in range(2):
        for t in range(64):
            lane = t % 32
            masks = [(1 << lane) - 1, (2 << lane) - 1, -(2 << lane) % 2**32, -(1 << lane) % 2**32, 1 << lane]
            got = [v % 2**32 for v in out[64 * rank + t].tolist()]
            assert got == [lane, t // 32, 2, rank, 2, *masks, 96, got[-2], 132] and got[-2] < 132


NREG = """
    mov.u32 %r1, %warpid;
    setp.ge.u32 %p0, %r1, 4;
    @%p0 bra consumer;
    setmaxnreg.dec.sync.aligned.u32 {low};
    bra end;
consumer:
    setmaxnreg.inc.sync.aligned.u32 {high};
    setp.eq.u32 %p1, %t, 128;
    @%p1 st.global.u32 [%a0], 1;
end:
"""


@pytest.mark.simulated
def test_register_pool(driver: Driver) -> None:
    """384 threads start with 168 registers: 24 + 240 + 240 fit, 40 + 240 + 240 hang."""
    out = torch.zeros(1, dtype=torch.int32)
    launch = {"block": 384, "directives": ".maxntid 384, 1, 1 .minnctapersm 1"}
    run(driver, NREG.format(low=24, high=240), out, **launch)
    assert out.tolist() == [1]
    with pytest.raises(DriverError, match="setmaxnreg 240") as error:
        run(driver, NREG.format(low=40, high=240), out, **launch)
    assert error.value.code == 702


@pytest.mark.simulated
@pytest.mark.parametrize("count", [20, 36, 264])
def test_register_counts(driver: Driver, count: int) -> None:
    with pytest.raises(DriverError, match=r"24\.\.256 by 8"):
        run(driver, f"setmaxnreg.inc.sync.aligned.u32 {count};", block=128)


def test_programmatic_launch(driver: Driver) -> None:
    """A grid sees what the one before it wrote, after griddepcontrol.wait."""
    out = torch.zeros(32, dtype=torch.int32)
    first = "griddepcontrol.launch_dependents;\nmad.wide.u32 %d1, %t, 4, %a0;\nst.global.u32 [%d1], %t;"
    second = """
    griddepcontrol.wait;
    mad.wide.u32 %d1, %t, 4, %a0;
    ld.global.u32 %r1, [%d1];
    add.u32 %r1, %r1, 5;
    st.global.u32 [%d1], %r1;
    """
    run(driver, first, out)
    run(driver, second, out, programmatic=True)
    assert out.tolist() == [t + 5 for t in range(32)]


def test_fences_and_hints_do_nothing(driver: Driver) -> None:
    x = torch.zeros(32, dtype=torch.int32)
    body = """
    fence.acq_rel.gpu;
    fence.sc.cta;
    fence.acq_rel.cluster;
    membar.gl;
    fence.proxy.async;
    fence.proxy.async.global;
    fence.proxy.async.shared::cta;
    fence.mbarrier_init.release.cluster;
    prefetch.global.L2 [%a0];
    nanosleep.u32 20;
    createpolicy.fractional.L2::evict_first.b64 %d1, 1.0;
    ld.global.L2::cache_hint.u32 %r1, [%a0], %d1;
    ld.global.nc.L1::no_allocate.L2::128B.u32 %r1, [%a0];
    """
    run(driver, body, x)
    assert not x.any()


@pytest.mark.simulated
def test_trap(driver: Driver) -> None:
    with pytest.raises(DriverError, match="trap") as error:
        run(driver, "setp.eq.u32 %p0, %t, 7;\n@%p0 trap;")
    assert error.value.code == 719
