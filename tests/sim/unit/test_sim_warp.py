# SPDX-License-Identifier: BSD-3-Clause
"""Exchanges inside a warp, divergence, and matrices between lanes and shared memory."""

from __future__ import annotations

import pytest
import torch
from ptx import poison, run
from torch import Tensor

from tests.hopper_sim import Driver, DriverError

FULL = 0xFFFFFFFF
STORE = """
    mad.wide.u32 %d9, %t, 8, %a0;
    st.global.v2.u32 [%d9], {%r1, %r2};
"""


def results(driver: Driver, body: str, lanes: int = 32) -> tuple[list[int], list[int]]:
    """%r1 and %r2 of each lane."""
    out = poison(lanes, 2, dtype=torch.int32)
    run(driver, body + STORE, out, block=lanes)
    return [v % 2**32 for v in out[:, 0].tolist()], [v % 2**32 for v in out[:, 1].tolist()]


def shuffled(kind: str, lane: int, b: int, c: int) -> tuple[int, bool]:
    """The pseudo-code of shfl.sync in the PTX ISA."""
    clamp, segment, b = c & 31, c >> 8 & 31, b & 31
    top, bottom = (lane & segment) | (clamp & ~segment), lane & segment
    source = {"up": lane - b, "down": lane + b, "bfly": lane ^ b, "idx": bottom | (b & ~segment)}[kind]
    inside = source >= top if kind == "up" else source <= top
    return (source if inside else lane), inside


@pytest.mark.parametrize("kind", ["up", "down", "bfly", "idx"])
@pytest.mark.parametrize("width", [32, 16, 8, 2])
def test_shuffle(driver: Driver, width: int, kind: str) -> None:
    for distance in (0, 1, 3, 5, 16, 31, 40):
        c = (32 - width) << 8 | (0 if kind == "up" else 31)
        body = f"""
        mad.lo.u32 %r0, %t, 3, 100;
        shfl.sync.{kind}.b32 %r1|%p1, %r0, {distance}, {c}, -1;
        selp.u32 %r2, 1, 0, %p1;
        """
        wanted = [shuffled(kind, lane, distance, c) for lane in range(32)]
        assert results(driver, body) == ([3 * lane + 100 for lane, _ in wanted], [int(inside) for _, inside in wanted])


@pytest.mark.parametrize("clamp", [0, 7, 20, 31])
def test_shuffle_clamps(driver: Driver, clamp: int) -> None:
    for kind in ("up", "down"):
        wanted = [shuffled(kind, lane, 2, clamp)[0] for lane in range(32)]
        assert results(driver, f"shfl.sync.{kind}.b32 %r1, %t, 2, {clamp}, -1;\nmov.u32 %r2, 0;")[0] == wanted


def test_shuffle_from_each_lane_its_own(driver: Driver) -> None:
    body = "xor.b32 %r3, %t, 5;\nshfl.sync.idx.b32 %r1, %t, %r3, 31, -1;\nmov.u32 %r2, 0;"
    assert results(driver, body)[0] == [lane ^ 5 for lane in range(32)]


@pytest.mark.simulated
def test_shuffle_from_a_lane_that_takes_no_part_is_a_hazard(driver: Driver) -> None:
    body = "setp.lt.u32 %p0, %t, 16;\n@%p0 shfl.sync.idx.b32 %r1, %t, 20, 31, 0xffff;"
    with pytest.raises(DriverError, match="hazard shfl: lane 0 reads lane 20, which takes no part"):
        run(driver, body)


def test_votes(driver: Driver) -> None:
    body = """
    and.b32 %r0, %t, 5;
    setp.eq.u32 %p0, %r0, 1;
    vote.sync.ballot.b32 %r1, %p0, -1;
    vote.sync.ballot.b32 %r2, !%p0, -1;
    """
    ballot = sum(1 << lane for lane in range(32) if lane & 5 == 1)
    assert results(driver, body) == ([ballot] * 32, [FULL ^ ballot] * 32)


@pytest.mark.parametrize("limit,expected", [(0, (0, 0, 1)), (7, (1, 0, 0)), (32, (1, 1, 1))])
def test_votes_of_predicates(driver: Driver, limit: int, expected: tuple[int, int, int]) -> None:
    for mode, wanted in zip(("any", "all", "uni"), expected, strict=True):
        body = f"""
        setp.lt.u32 %p0, %t, {limit};
        vote.sync.{mode}.pred %p1, %p0, -1;
        selp.u32 %r1, 1, 0, %p1;
        mov.u32 %r2, 0;
        """
        assert results(driver, body)[0] == [wanted] * 32


def test_votes_inside_a_branch_count_its_lanes(driver: Driver) -> None:
    body = """
    mov.u32 %r1, 0;
    mov.u32 %r2, 0;
    setp.ge.u32 %p0, %t, 8;
    @%p0 bra end;
    setp.ne.u32 %p1, %t, 3;
    vote.sync.ballot.b32 %r1, %p1, 0xff;
    activemask.b32 %r2;
end:
    bar.warp.sync -1;
    """
    assert results(driver, body) == ([0xF7] * 8 + [0] * 24, [0xFF] * 8 + [0] * 24)


@pytest.mark.parametrize("bits", [32, 64])
def test_match_any(driver: Driver, bits: int) -> None:
    register = "%r0" if bits == 32 else "%d1"
    body = f"and.b32 %r0, %t, 3;\ncvt.u64.u32 %d1, %r0;\nmatch.any.sync.b{bits} %r1, {register}, -1;\nmov.u32 %r2, 0;"
    assert results(driver, body)[0] == [0x11111111 << (lane & 3) for lane in range(32)]


def test_match_all(driver: Driver) -> None:
    body = "shr.u32 %r0, %t, 5;\nmatch.all.sync.b32 %r1|%p1, %r0, -1;\nselp.u32 %r2, 1, 0, %p1;"
    assert results(driver, body) == ([FULL] * 32, [1] * 32)
    body = "match.all.sync.b32 %r1|%p1, %t, -1;\nselp.u32 %r2, 1, 0, %p1;"
    assert results(driver, body) == ([0] * 32, [0] * 32)


@pytest.mark.simulated
@pytest.mark.parametrize("choice,leader", [("first", (0, 4)), ("last", (31, 11))])
def test_elect(driver: Driver, choice: str, leader: tuple[int, int]) -> None:
    driver.configure(f"elect={choice}")
    body = "elect.sync %r1|%p1, 0xffffffff;\nselp.u32 %r2, 1, 0, %p1;"
    assert results(driver, body) == ([leader[0]] * 32, [int(lane == leader[0]) for lane in range(32)])
    body = """
    mov.u32 %r1, 99;
    sub.u32 %r3, %t, 4;
    setp.lt.u32 %p0, %r3, 8;
    @%p0 elect.sync %r1|%p1, 0xff0;
    mov.u32 %r2, 0;
    """
    assert results(driver, body)[0] == [leader[1] if 4 <= lane < 12 else 99 for lane in range(32)]


@pytest.mark.simulated
def test_elect_is_the_same_lane_for_the_same_mask(driver: Driver) -> None:
    body = "elect.sync %r1|%p1, -1;\nelect.sync %r2|%p1, -1;"
    chosen = set()
    for seed in range(1, 9):
        driver.configure(f"elect=random,seed={seed}")
        first, second = results(driver, body)
        assert first == second and len(set(first)) == 1
        chosen.add(first[0])
    assert len(chosen) > 2


REDUCTIONS = {"add.u32": sum, "min.u32": min, "max.u32": max, "min.s32": min, "max.s32": max}
BITWISE = {"and": lambda x, y: x & y, "or": lambda x, y: x | y, "xor": lambda x, y: x ^ y}


@pytest.mark.parametrize("opcode", [*REDUCTIONS, *(f"{name}.b32" for name in BITWISE)])
def test_reduce(driver: Driver, opcode: str) -> None:
    signed = opcode.endswith("s32")
    values = [(lane * 37 % 29) - (10 if signed else 0) for lane in range(32)]
    body = f"mul.lo.u32 %r0, %t, 37;\nrem.u32 %r0, %r0, 29;\nsub.u32 %r0, %r0, {10 * signed};\n"
    body += f"redux.sync.{opcode} %r1, %r0, -1;\nmov.u32 %r2, 0;"
    wanted = values[0]
    for value in values[1:]:
        name = opcode.split(".")[0]
        wanted = BITWISE[name](wanted, value) if name in BITWISE else REDUCTIONS[opcode]([wanted, value])
    assert results(driver, body)[0] == [wanted % 2**32] * 32


def test_divergence_makes_progress_and_meets_again(driver: Driver) -> None:
    """Loops of different length in each lane, then an exchange of all."""
    body = """
    mov.u32 %r1, 0;
loop:
    add.u32 %r1, %r1, 2;
    mul.lo.u32 %r3, %t, 2;
    setp.le.u32 %p0, %r1, %r3;
    @%p0 bra loop;
    bar.warp.sync -1;
    shfl.sync.bfly.b32 %r2, %r1, 1, 31, -1;
    """
    assert results(driver, body) == ([2 * lane + 2 for lane in range(32)], [2 * (lane ^ 1) + 2 for lane in range(32)])


def test_one_lane_may_wait_for_another(driver: Driver) -> None:
    """A spin lock inside a warp: the waiting lanes must not starve the one that releases."""
    out = torch.zeros(2, dtype=torch.int32)
    body = """
again:
    atom.global.cas.b32 %r1, [%a0], 0, 1;
    setp.ne.u32 %p0, %r1, 0;
    @%p0 bra again;
    ld.volatile.global.u32 %r2, [%a0+4];
    add.u32 %r2, %r2, %t;
    st.volatile.global.u32 [%a0+4], %r2;
    atom.global.exch.b32 %r3, [%a0], 0;
    """
    run(driver, body, out)
    assert out.tolist() == [0, sum(range(32))]


def test_partial_warp(driver: Driver) -> None:
    body = "activemask.b32 %r1;\nvote.sync.any.pred %p1, 1, 0xfffff;\nselp.u32 %r2, 1, 0, %p1;"
    assert results(driver, body, lanes=20) == ([0xFFFFF] * 20, [1] * 20)


@pytest.mark.simulated
def test_lanes_that_never_come_are_a_deadlock(driver: Driver) -> None:
    body = """
    setp.lt.u32 %p0, %t, 16;
    @!%p0 bra away;
    bar.warp.sync -1;
away:
    bar.sync 1, 64;
    """
    with pytest.raises(DriverError, match="lanes 0xffff: waits for lanes 0xffff0000 of its warp") as error:
        run(driver, body)
    assert error.value.code == 702


def matrices(count: int) -> Tensor:
    """[count, 8, 8] of 16-bit numbers."""
    return torch.arange(count * 64, dtype=torch.int16).view(count, 8, 8) * 3 + 1


def fragments(x: Tensor, transposed: bool) -> Tensor:
    """[count, 8, 8] -> [32 lanes, count, 2]: lane l holds row l / 4, columns 2 (l % 4) and the next."""
    x = x.transpose(1, 2) if transposed else x
    return x.reshape(len(x), 32, 2).transpose(0, 1).contiguous()


ROWS = """
    .shared .align 16 .b8 rows[1024];
    mov.u32 %r0, rows;
    and.b32 %r1, %t, {mask};
    mad.lo.u32 %r1, %r1, 16, %r0;
"""


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_ldmatrix(driver: Driver, count: int, transposed: bool) -> None:
    x, out = matrices(count), poison(32, count, dtype=torch.int32)
    registers = "{" + ", ".join(f"%r{n}" for n in range(10, 10 + count)) + "}"
    body = (
        ROWS.format(mask=8 * count - 1)
        + f"""
    and.b32 %r2, %t, {8 * count - 1};
    mad.wide.u32 %d1, %r2, 16, %a0;
    ld.global.v4.u32 {{%r20, %r21, %r22, %r23}}, [%d1];
    st.shared.v4.u32 [%r1], {{%r20, %r21, %r22, %r23}};
    bar.warp.sync -1;
    ldmatrix.sync.aligned.m8n8.x{count}{".trans" * transposed}.shared.b16 {registers}, [%r1];
    mad.wide.u32 %d2, %t, {4 * count}, %a1;
    """
    )
    body += "".join(f"st.global.u32 [%d2+{4 * n}], %r{10 + n};\n" for n in range(count))
    run(driver, body, x, out)
    assert torch.equal(out.view(torch.int16).view(32, count, 2), fragments(x, transposed))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_stmatrix(driver: Driver, count: int, transposed: bool) -> None:
    x, out = matrices(count), poison(count, 8, 8, dtype=torch.int16)
    registers = "{" + ", ".join(f"%r{n}" for n in range(10, 10 + count)) + "}"
    body = ROWS.format(mask=8 * count - 1) + f"mad.wide.u32 %d2, %t, {4 * count}, %a0;\n"
    body += "".join(f"ld.global.u32 %r{10 + n}, [%d2+{4 * n}];\n" for n in range(count))
    body += f"""
    stmatrix.sync.aligned.m8n8.x{count}{".trans" * transposed}.shared.b16 [%r1], {registers};
    bar.warp.sync -1;
    setp.ge.u32 %p0, %t, {8 * count};
    @%p0 ret;
    ld.shared.v4.u32 {{%r20, %r21, %r22, %r23}}, [%r1];
    mad.wide.u32 %d1, %t, 16, %a1;
    st.global.v4.u32 [%d1], {{%r20, %r21, %r22, %r23}};
    """
    run(driver, body, fragments(x, transposed).view(32, -1), out)
    assert torch.equal(out, x)


@pytest.mark.simulated
def test_matrix_rows_must_be_aligned(driver: Driver) -> None:
    body = ROWS.format(mask=7) + "add.u32 %r1, %r1, 8;\nldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r2}, [%r1];"
    with pytest.raises(DriverError, match="716: misaligned: 16 bytes"):
        run(driver, body)
