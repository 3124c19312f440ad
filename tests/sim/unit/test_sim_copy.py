# SPDX-License-Identifier: BSD-3-Clause
"""cp.async, bulk copies without a tensor map, and their groups."""

from __future__ import annotations

import pytest
import torch
from ptx import poison, run

from tests.hopper_sim import Driver, DriverError

POLICIES = ["eager", "lazy", "lazy,order=oldest", "random,seed=3", "eager,late=reads", "eager,late=writes"]
MODULE = ".extern .shared .align 1024 .b8 image[];"


def some_bytes(count: int) -> torch.Tensor:
    return torch.arange(count, dtype=torch.int32).mul(89).add(7).to(torch.uint8)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("level,bytes_", [("ca", 4), ("ca", 8), ("ca", 16), ("cg", 16)])
def test_cp_async(driver: Driver, level: str, bytes_: int, policy: str) -> None:
    """The source size of each lane decides how much is copied; the rest becomes zero."""
    driver.configure(f"policy={policy}")
    x, out = some_bytes(32 * bytes_), poison(32 * bytes_, dtype=torch.uint8)
    vector = {4: ("u32", "%r5"), 8: ("v2.u32", "{%r5, %r6}"), 16: ("v4.u32", "{%r5, %r6, %r7, %r8}")}[bytes_]
    body = f"""
    mov.u32 %r1, image;
    mad.lo.u32 %r1, %t, {bytes_}, %r1;
    mad.wide.u32 %d1, %t, {bytes_}, %a0;
    rem.u32 %r2, %t, {bytes_ + 1};
    cp.async.{level}.shared.global [%r1], [%d1], {bytes_}, %r2;
    cp.async.commit_group;
    cp.async.wait_group 0;
    ld.shared.{vector[0]} {vector[1]}, [%r1];
    mad.wide.u32 %d2, %t, {bytes_}, %a1;
    st.global.{vector[0]} [%d2], {vector[1]};
    """
    run(driver, body, x, out, smem=512, module=MODULE)
    wanted = x.view(32, bytes_).clone()
    for lane in range(32):
        wanted[lane, lane % (bytes_ + 1) :] = 0
    assert torch.equal(out.view(32, bytes_), wanted)


@pytest.mark.parametrize("policy", POLICIES)
def test_groups_complete_in_order(driver: Driver, policy: str) -> None:
    """wait_group 1 leaves the newest group pending, but not the one before it."""
    driver.configure(f"policy={policy}")
    x, out = some_bytes(1536).view(torch.int32), poison(2, 32, dtype=torch.int32)
    body = """
    mov.u32 %r1, image;
    mad.lo.u32 %r1, %t, 4, %r1;
    mad.wide.u32 %d1, %t, 4, %a0;
    cp.async.ca.shared.global [%r1], [%d1], 4;
    cp.async.commit_group;
    cp.async.ca.shared.global [%r1+128], [%d1+128], 4;
    cp.async.commit_group;
    cp.async.wait_group 1;
    ld.shared.u32 %r2, [%r1];
    cp.async.wait_all;
    ld.shared.u32 %r3, [%r1+128];
    mad.wide.u32 %d2, %t, 4, %a1;
    st.global.u32 [%d2], %r2;
    st.global.u32 [%d2+128], %r3;
    """
    run(driver, body, x, out, smem=512, module=MODULE)
    assert torch.equal(out.flatten(), x[:64])


@pytest.mark.parametrize("policy", POLICIES)
def test_wait_all_needs_no_group(driver: Driver, policy: str) -> None:
    driver.configure(f"policy={policy}")
    x, out = some_bytes(128).view(torch.int32), poison(32, dtype=torch.int32)
    body = """
    mov.u32 %r1, image;
    mad.lo.u32 %r1, %t, 4, %r1;
    mad.wide.u32 %d1, %t, 4, %a0;
    cp.async.ca.shared.global [%r1], [%d1], 4;
    cp.async.wait_all;
    ld.shared.u32 %r2, [%r1];
    mad.wide.u32 %d2, %t, 4, %a1;
    st.global.u32 [%d2], %r2;
    """
    run(driver, body, x, out, smem=512, module=MODULE)
    assert torch.equal(out, x)


@pytest.mark.simulated
def test_lazy_copies_stay_away_without_a_wait(driver: Driver) -> None:
    driver.configure("policy=lazy,check=0")
    x, out = some_bytes(128).view(torch.int32), poison(32, dtype=torch.int32)
    body = """
    mov.u32 %r1, image;
    mad.lo.u32 %r1, %t, 4, %r1;
    mad.wide.u32 %d1, %t, 4, %a0;
    cp.async.ca.shared.global [%r1], [%d1], 4;
    ld.shared.u32 %r2, [%r1];
    cp.async.wait_all;
    mad.wide.u32 %d2, %t, 4, %a1;
    st.global.u32 [%d2], %r2;
    """
    run(driver, body, x, out, smem=512, module=MODULE)
    assert (out == -1).all()


ARRIVAL = """
    .shared .align 8 .b64 full;
    mov.u32 %r9, full;
    mov.u32 %r1, image;
    mad.lo.u32 %r1, %t, 4, %r1;
    mad.wide.u32 %d1, %t, 4, %a0;
    setp.eq.u32 %p0, %t, 0;
    @%p0 mbarrier.init.shared::cta.b64 [%r9], {count};
    bar.sync 0;
    cp.async.ca.shared.global [%r1], [%d1], 4;
    cp.async.mbarrier.arrive{noinc}.shared::cta.b64 [%r9];
    {arrive}
again:
    mbarrier.try_wait.parity.shared::cta.b64 %p1, [%r9], 0;
    @!%p1 bra again;
    xor.b32 %r2, %t, 1;
    mov.u32 %r3, image;
    mad.lo.u32 %r3, %r2, 4, %r3;
    ld.shared.u32 %r4, [%r3];
    mad.wide.u32 %d2, %t, 4, %a1;
    st.global.u32 [%d2], %r4;
"""


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("noinc", [True, False])
def test_cp_async_arrives_on_an_mbarrier(driver: Driver, noinc: bool, policy: str) -> None:
    """With .noinc its arrivals are among those expected; without, they are extra and the threads arrive too."""
    driver.configure(f"policy={policy}")
    x, out = some_bytes(256).view(torch.int32), poison(64, dtype=torch.int32)
    arrive = "" if noinc else "mbarrier.arrive.shared::cta.b64 _, [%r9];"
    body = ARRIVAL.format(count=64, noinc=".noinc" * noinc, arrive=arrive)
    run(driver, body, x, out, block=64, smem=512, module=MODULE)
    assert torch.equal(out, x.view(32, 2).flip(1).flatten())


BULK_LOAD = """
    .shared .align 8 .b64 full;
    mov.u32 %r9, full;
    mov.u32 %r1, image;
    setp.ne.u32 %p0, %t, 0;
    @%p0 bra wait;
    mbarrier.init.shared::cta.b64 [%r9], 1;
    fence.mbarrier_init.release.cluster;
    mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r9], {bytes};
    cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r1], [%a0], {bytes}, [%r9];
wait:
    bar.warp.sync -1;
again:
    mbarrier.try_wait.parity.shared::cta.b64 %p1, [%r9], 0;
    @!%p1 bra again;
"""


@pytest.mark.parametrize("policy", POLICIES)
def test_bulk_load_and_store(driver: Driver, policy: str) -> None:
    driver.configure(f"policy={policy}")
    x, out = some_bytes(496), torch.zeros(512, dtype=torch.uint8)
    body = (
        BULK_LOAD.format(bytes=496)
        + """
    @%p0 ret;
    add.u64 %d1, %a1, 16;
    cp.async.bulk.global.shared::cta.bulk_group [%d1], [%r1], 480;
    cp.async.bulk.commit_group;
    cp.async.bulk.wait_group 0;
    """
    )
    run(driver, body, x, out, smem=512, module=MODULE)
    assert torch.equal(out[16:496], x[:480])
    assert not out[:16].any() and not out[496:].any()


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("kind,dtype", [("f32", torch.float32), ("f16", torch.float16), ("bf16", torch.bfloat16)])
def test_bulk_reduce(driver: Driver, kind: str, dtype: torch.dtype, policy: str) -> None:
    """Every block adds its copy."""
    driver.configure(f"policy={policy}")
    x = (torch.arange(512 // dtype.itemsize) % 7).to(dtype)
    out = torch.ones_like(x)
    noftz = ".noftz" * (kind != "f32")
    body = (
        BULK_LOAD.format(bytes=512)
        + f"""
    @%p0 ret;
    cp.reduce.async.bulk.global.shared::cta.bulk_group.add{noftz}.{kind} [%a1], [%r1], 512;
    cp.async.bulk.commit_group;
    cp.async.bulk.wait_group 0;
    """
    )
    run(driver, body, x, out, grid=3, smem=512, module=MODULE)
    assert torch.equal(out, 1 + 3 * x)


@pytest.mark.simulated
def test_wait_group_read_frees_the_source_only(driver: Driver) -> None:
    """late=writes: after .read the buffer may be filled again, and the target still gets the first bytes."""
    driver.configure("late=writes")
    x, out = some_bytes(512), torch.zeros(512, dtype=torch.uint8)
    body = (
        BULK_LOAD.format(bytes=512)
        + """
    @%p0 ret;
    cp.async.bulk.global.shared::cta.bulk_group [%a1], [%r1], 512;
    cp.async.bulk.commit_group;
    cp.async.bulk.wait_group.read 0;
    st.shared.u32 [%r1], 0;
    ld.global.u32 %r5, [%a1+4];
    st.global.u32 [%a2], %r5;
    cp.async.bulk.wait_group 0;
    """
    )
    seen = poison(1, dtype=torch.int32)
    run(driver, body, x, out, seen, smem=512, module=MODULE)
    assert torch.equal(out, x)
    assert seen.tolist() == [0]


@pytest.mark.simulated
@pytest.mark.parametrize(
    "copy,code",
    [
        ("cp.async.bulk.global.shared::cta.bulk_group [%a0], [%r1], 24;", 716),
        ("cp.async.bulk.global.shared::cta.bulk_group [%d1], [%r1], 16;", 716),
        ("cp.async.bulk.global.shared::cta.bulk_group [%a0], [%r2], 16;", 716),
        ("cp.async.bulk.global.shared::cta.bulk_group [%a0], [%r1], 1024;", 700),
        ("add.u64 %d1, %a0, 496; cp.async.bulk.global.shared::cta.bulk_group [%d1], [%r1], 32;", 700),
        ("cp.async.ca.shared.global [%r1], [%d1], 16;", 716),
        ("cp.async.ca.shared.global [%r2], [%a0], 16;", 716),
        ("cp.async.ca.shared.global [%r1], [%a0+512], 4;", 700),
    ],
)
def test_refused_copies(driver: Driver, copy: str, code: int) -> None:
    x = some_bytes(512)
    body = f"mov.u32 %r1, image;\nadd.u32 %r2, %r1, 8;\nadd.u64 %d1, %a0, 8;\n{copy}"
    with pytest.raises(DriverError) as error:
        run(driver, body, x, smem=512, module=MODULE)
    assert error.value.code == code, error.value
