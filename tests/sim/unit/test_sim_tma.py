# SPDX-License-Identifier: BSD-3-Clause
"""Tensor maps and the copies that use them: boxes of every rank over every edge, swizzles, stores, reductions."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from ptx import run
from torch import Tensor

from tests.hopper_sim import Driver, DriverError

DATA_TYPES = {  # CUtensorMapDataType
    torch.uint8: 0,
    torch.int16: 1,
    torch.int32: 4,
    torch.int64: 5,
    torch.float16: 6,
    torch.float32: 7,
    torch.float64: 8,
    torch.bfloat16: 9,
}
SPANS = {0: 16, 1: 32, 2: 64, 3: 128}  # CUtensorMapSwizzle -> bytes
BASE = 1024  # address of dynamic shared memory
BUFFER = 8192
CANARY = 0xA5

SETUP = """
    .shared .align 8 .b64 full;
    .reg .b32 %buffer, %full;
    mov.u32 %buffer, image;
    mov.u32 %full, full;
    setp.ne.u32 %p0, %t, 0;
    @%p0 bra wait;
    mbarrier.init.shared::cta.b64 [%full], 1;
    fence.mbarrier_init.release.cluster;
"""
WAIT = """
wait:
    bar.warp.sync -1;
again:
    mbarrier.try_wait.parity.shared::cta.b64 %p1, [%full], 0;
    @!%p1 bra again;
"""
MODULE = ".extern .shared .align 1024 .b8 image[];"


def tensor_map(driver: Driver, x: Tensor, box: tuple[int, ...], swizzle: int = 0, fill: int = 0):
    """Of a tensor with the innermost dimension last; `box` likewise."""
    strides = [s * x.element_size() for s in x.stride()[-2::-1]]
    return driver.tensor_map(x.data_ptr(), DATA_TYPES[x.dtype], x.shape[::-1], strides, box[::-1], swizzle, fill)


def coordinates(start: tuple[int, ...]) -> str:
    return "{" + ", ".join(map(str, start[::-1])) + "}"


def swizzled(linear: int, swizzle: int, base: int = BASE) -> int:
    """Offset from `base` of the byte that would lie at `linear` without the swizzle."""
    address = base + linear
    return (address ^ (address >> 7 & (1 << swizzle) - 1) << 4) - base


def load(
    driver: Driver, x: Tensor, box: tuple[int, ...], start: tuple[int, ...], swizzle: int = 0, fill: int = 0
) -> Tensor:
    """The box at `start`, as the bytes of shared memory after one copy."""
    out, rank = torch.empty(BUFFER, dtype=torch.uint8), len(box)
    body = (
        SETUP
        + f"""
    mbarrier.arrive.expect_tx.shared::cta.b64 _, [%full], {math.prod(box) * x.element_size()};
    mov.b64 %d1, m0;
    cvta.param.u64 %d2, %d1;
    cp.async.bulk.tensor.{rank}d.shared::cluster.global.mbarrier::complete_tx::bytes
        [%buffer], [%d2, {coordinates(start)}], [%full];
    """
        + WAIT
        + f"""
    mov.u32 %r1, 0;
copy:
    mad.lo.u32 %r2, %r1, 32, %t;
    mad.lo.u32 %r3, %r2, 16, %buffer;
    ld.shared.v4.u32 {{%r4, %r5, %r6, %r7}}, [%r3];
    mad.wide.u32 %d3, %r2, 16, %a0;
    st.global.v4.u32 [%d3], {{%r4, %r5, %r6, %r7}};
    add.u32 %r1, %r1, 1;
    setp.lt.u32 %p2, %r1, {BUFFER // 512};
    @%p2 bra copy;
    """
    )
    storage = x.untyped_storage()
    driver.register(storage.data_ptr(), storage.nbytes(), "x")
    run(driver, body, out, maps=[tensor_map(driver, x, box, swizzle, fill)], smem=BUFFER, module=MODULE)
    return out


def box_of(x: Tensor, box: tuple[int, ...], start: tuple[int, ...], fill: float = 0) -> Tensor:
    """The box at `start`, with `fill` where it lies outside."""
    out = torch.full(box, fill, dtype=x.dtype)
    for place in itertools.product(*map(range, box)):
        index = tuple(s + p for s, p in zip(start, place, strict=True))
        if all(0 <= i < n for i, n in zip(index, x.shape, strict=True)):
            out[place] = x[index]
    return out


def expected(part: Tensor, swizzle: int = 0) -> Tensor:
    image = torch.full((BUFFER,), 0xFF, dtype=torch.uint8)
    raw = part.contiguous().view(-1).view(torch.uint8)
    for linear in range(0, len(raw), 16):
        at = swizzled(linear, swizzle)
        image[at : at + 16] = raw[linear : linear + 16]
    return image


def numbers(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.arange(math.prod(shape)) % 200 + 1).view(shape).to(dtype)


SHAPES = {1: (37,), 2: (9, 20), 3: (5, 6, 12), 4: (3, 4, 5, 8), 5: (3, 2, 3, 4, 8)}
BOXES = {1: (8,), 2: (4, 8), 3: (2, 3, 8), 4: (2, 2, 3, 4), 5: (2, 2, 2, 3, 4)}


@pytest.mark.parametrize("rank", SHAPES)
def test_boxes_over_every_edge(driver: Driver, rank: int) -> None:
    """Inside, over the lower and the upper edge of each dimension, and wholly outside."""
    storage = numbers(*SHAPES[rank][:-1], -(-SHAPES[rank][-1] // 4) * 4)  # strides are multiples of 16 bytes
    x, box = storage[..., : SHAPES[rank][-1]], BOXES[rank]
    inside = tuple(min(1, n - b) for n, b in zip(x.shape, box, strict=True))
    starts = [inside]
    for dim in range(rank):
        for at in (-1, -box[dim] + 1, -box[dim], -(2**31), x.shape[dim] - 1, x.shape[dim], 2**31 - 1):
            starts.append((*inside[:dim], at, *inside[dim + 1 :]))
    starts += [tuple(-1 for _ in box), tuple(n - 1 for n in x.shape)]
    for start in starts:
        assert torch.equal(load(driver, x, box, start), expected(box_of(x, box, start)))


@pytest.mark.parametrize("swizzle", SPANS)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32])
def test_swizzles(driver: Driver, dtype: torch.dtype, swizzle: int) -> None:
    columns = SPANS[swizzle] // dtype.itemsize
    x = numbers(50, columns + 16, dtype=dtype)
    for start in ((3, 5), (-2, -3), (45, 20)):
        got = load(driver, x, (16, columns), start, swizzle)
        assert torch.equal(got, expected(box_of(x, (16, columns), start), swizzle))


def test_swizzle_follows_the_address_through_all_dimensions(driver: Driver) -> None:
    x = numbers(3, 5, 64, dtype=torch.bfloat16)
    assert torch.equal(load(driver, x, (3, 5, 64), (0, 0, 0), 3), expected(x, 3))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_fill_with_nan(driver: Driver, dtype: torch.dtype) -> None:
    x, box = numbers(6, 16, dtype=dtype), (4, 8)
    got = load(driver, x, box, (4, 12), fill=1)[: 32 * dtype.itemsize].view(dtype).view(box)
    wanted = box_of(x, box, (4, 12), math.nan)
    assert torch.equal(got.isnan(), wanted.isnan())
    assert torch.equal(got.nan_to_num(), wanted.nan_to_num())


def test_strides_need_not_grow(driver: Driver) -> None:
    x = numbers(4, 6, 8).transpose(0, 1)  # heads inside rows
    assert torch.equal(load(driver, x, (3, 2, 8), (2, 1, 0)), expected(box_of(x, (3, 2, 8), (2, 1, 0))))


def store(driver: Driver, x: Tensor, part: Tensor, start: tuple[int, ...], swizzle: int = 0, reduce: str = "") -> None:
    """One bulk store of a box held in shared memory; `x` is what it is stored to."""
    rank, image = part.dim(), expected(part, swizzle)
    opcode = f"cp{'.reduce' if reduce else ''}.async.bulk.tensor.{rank}d.global.shared::cta{reduce}.bulk_group"
    body = f"""
    .reg .b32 %buffer;
    mov.u32 %buffer, image;
    mov.u32 %r1, 0;
copy:
    mad.lo.u32 %r2, %r1, 32, %t;
    mad.wide.u32 %d3, %r2, 16, %a0;
    ld.global.v4.u32 {{%r4, %r5, %r6, %r7}}, [%d3];
    mad.lo.u32 %r3, %r2, 16, %buffer;
    st.shared.v4.u32 [%r3], {{%r4, %r5, %r6, %r7}};
    add.u32 %r1, %r1, 1;
    setp.lt.u32 %p2, %r1, {BUFFER // 512};
    @%p2 bra copy;
    fence.proxy.async.shared::cta;
    bar.warp.sync -1;
    setp.ne.u32 %p0, %t, 0;
    @%p0 ret;
    mov.b64 %d1, m0;
    cvta.param.u64 %d2, %d1;
    {opcode} [%d2, {coordinates(start)}], [%buffer];
    cp.async.bulk.commit_group;
    cp.async.bulk.wait_group 0;
    """
    storage = x.untyped_storage()
    driver.register(storage.data_ptr(), storage.nbytes(), "x")
    run(driver, body, image, maps=[tensor_map(driver, x, tuple(part.shape), swizzle)], smem=BUFFER, module=MODULE)


def put(x: Tensor, part: Tensor, start: tuple[int, ...], add: bool = False) -> None:
    for place in itertools.product(*map(range, part.shape)):
        index = tuple(s + p for s, p in zip(start, place, strict=True))
        if all(0 <= i < n for i, n in zip(index, x.shape, strict=True)):
            x[index] = x[index] + part[place] if add else part[place]


def between_canaries(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Storage, and a view into it that leaves bytes before, after and at the end of each row."""
    storage = torch.full((math.prod(shape[:-1]) * (shape[-1] + 16) + 64,), 0, dtype=dtype)
    storage.view(torch.uint8).fill_(CANARY)
    pitch, strides = shape[-1] + 16, [1]
    for n in (pitch, *shape[-2:0:-1]):
        strides.append(strides[-1] * n)
    return storage, storage.as_strided(shape, strides[: len(shape)][::-1], 32)


@pytest.mark.parametrize("rank", SHAPES)
def test_stores_clip_at_every_edge(driver: Driver, rank: int) -> None:
    box = BOXES[rank]
    for dim in range(rank):
        for at in (-1, -box[dim], SHAPES[rank][dim] - 1, SHAPES[rank][dim] - box[dim]):
            storage, x = between_canaries(*SHAPES[rank][:-1], 16)
            start, part = (*(0,) * dim, at, *(0,) * (rank - dim - 1)), numbers(*box)
            wanted = storage.clone()
            put(wanted.as_strided(x.shape, x.stride(), 32), part, start)
            store(driver, x, part, start)
            assert torch.equal(storage.view(torch.int32), wanted.view(torch.int32))


@pytest.mark.parametrize("swizzle", SPANS)
def test_stores_undo_the_swizzle(driver: Driver, swizzle: int) -> None:
    columns = SPANS[swizzle] // 2
    _, x = between_canaries(30, columns, dtype=torch.bfloat16)
    part = numbers(16, columns, dtype=torch.bfloat16)
    store(driver, x, part, (7, 0), swizzle)
    assert torch.equal(x[7:23], part)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_reduce_adds_inside_the_tensor(driver: Driver, dtype: torch.dtype) -> None:
    storage, x = between_canaries(6, 24, dtype=dtype)
    x.copy_(numbers(6, 24, dtype=dtype))
    wanted, part = storage.clone(), numbers(4, 16, dtype=dtype)
    put(wanted.as_strided(x.shape, x.stride(), 32), part, (4, 12), add=True)
    store(driver, x, part, (4, 12), reduce=".add")
    assert torch.equal(storage.view(torch.uint8), wanted.view(torch.uint8))


def test_multicast(driver: Driver) -> None:
    """One block's copy reaches the same place of every block of the mask, with the full bytes on each barrier."""
    x, out = numbers(8, 16), torch.full((4, 8, 16), -1.0)
    body = """
    .shared .align 8 .b64 full;
    .reg .b32 %buffer, %full;
    .reg .b16 %mask;
    mov.u32 %buffer, image;
    mov.u32 %full, full;
    mov.u32 %r8, %cluster_ctarank;
    setp.ne.u32 %p0, %t, 0;
    @%p0 bra ready;
    mbarrier.init.shared::cta.b64 [%full], 1;
    fence.mbarrier_init.release.cluster;
    setp.ne.u32 %p2, %r8, 3;
    @%p2 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%full], 512;
ready:
    bar.warp.sync -1;
    barrier.cluster.arrive.aligned;
    barrier.cluster.wait.aligned;
    setp.eq.u32 %p2, %r8, 3;
    @%p2 bra end;
    mov.u16 %mask, 7;
    mov.b64 %d1, m0;
    cvta.param.u64 %d2, %d1;
    setp.eq.u32 %p3, %r8, 1;
    setp.eq.and.u32 %p3, %t, 0, %p3;
    @%p3 cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster
        [%buffer], [%d2, {0, 0}], [%full], %mask;
again:
    mbarrier.try_wait.parity.shared::cta.b64 %p1, [%full], 0;
    @!%p1 bra again;
    mad.lo.u32 %r3, %t, 16, %buffer;
    ld.shared.v4.u32 {%r4, %r5, %r6, %r7}, [%r3];
    mad.lo.u32 %r9, %r8, 32, %t;
    mad.wide.u32 %d3, %r9, 16, %a0;
    st.global.v4.u32 [%d3], {%r4, %r5, %r6, %r7};
end:
    barrier.cluster.arrive.aligned;
    barrier.cluster.wait.aligned;
    """
    driver.register(x.data_ptr(), x.nbytes, "x")
    run(driver, body, out, maps=[tensor_map(driver, x, (8, 16))], grid=4, cluster=4, smem=512, module=MODULE)
    for rank in range(3):
        assert torch.equal(out[rank], x)
    assert (out[3] == -1).all()
    for launch in driver.report()["launches"][-1:]:  # on a GPU there is none
        assert launch["statistics"]["tma_bytes_in"] == 3 * 512


GOOD = {"data_type": 9, "dims": [64, 8, 3], "strides": [128, 1024], "box": [64, 8, 1], "swizzle": 3, "fill": 0}


@pytest.mark.simulated
@pytest.mark.parametrize(
    "reason,changes",
    [
        ("unknown data type", {"data_type": 13}),
        ("rank is not in 1..5", {"dims": [8] * 6, "strides": [16] * 5, "box": [8] * 6}),
        ("a dimension is not in 1..2^32", {"dims": [64, 0, 3]}),
        ("a dimension is not in 1..2^32", {"dims": [64, 2**32 + 1, 3]}),
        ("a stride is not a multiple of 16", {"strides": [128, 1032]}),
        ("a stride is not a multiple of 16 below 2^40", {"strides": [128, 1 << 40]}),
        ("a stride is 0", {"strides": [128, 0]}),
        ("a box side is not in 1..256", {"box": [64, 257, 1]}),
        ("a box side is not in 1..256", {"box": [64, 8, 0]}),
        ("not a multiple of 16 bytes", {"box": [4, 8, 1], "swizzle": 0}),
        ("exceeds the swizzle span", {"swizzle": 2}),
        ("below the swizzle span", {"box": [32, 8, 1]}),
        ("NaN fill of an integer type", {"data_type": 1, "fill": 1}),
        ("unknown out-of-bounds fill", {"fill": 2}),
        ("swizzle is none of", {"swizzle": 4}),
        ("address is null or not a multiple of 16", {"address": 0x1008}),
        ("address is null or not a multiple of 16", {"address": 0}),
    ],
)
def test_encode_refuses(driver: Driver, reason: str, changes: dict) -> None:
    arguments = {"address": 0x1000} | GOOD | changes
    with pytest.raises(DriverError) as error:
        driver.tensor_map(**arguments)
    assert error.value.code == 1
    assert reason in str(error.value)
    if len(arguments["dims"]) <= 5:
        for text in (f"dim2={arguments['dims'][2]}", f"box1={arguments['box'][1]}", f"swizzle={arguments['swizzle']}"):
            assert text in str(error.value)


def test_encode_accepts_the_limits(driver: Driver) -> None:
    driver.tensor_map(0x1000, **GOOD)
    driver.tensor_map(0x1000, 0, [2**32] * 5, [(1 << 40) - 16] * 4, [256, 256, 256, 1, 1])


def attempt(driver: Driver, x: Tensor, place: int = 0, rank: int = 2, before: str = "") -> str:
    """Message of a refused load into `image + place`."""
    body = (
        SETUP
        + f"""
    mbarrier.arrive.expect_tx.shared::cta.b64 _, [%full], 512;
    mov.b64 %d1, m0;
    cvta.param.u64 %d2, %d1;
    {before}
    add.u32 %buffer, %buffer, {place};
    cp.async.bulk.tensor.{rank}d.shared::cluster.global.mbarrier::complete_tx::bytes
        [%buffer], [%d2, {coordinates((0,) * rank)}], [%full];
    """
        + WAIT
    )
    with pytest.raises(DriverError) as error:
        run(driver, body, maps=[tensor_map(driver, x, (8, 16))], smem=1024, module=MODULE)
    return str(error.value)


@pytest.mark.simulated
def test_refused_copies(driver: Driver) -> None:
    x = numbers(8, 16)
    driver.register(x.data_ptr(), x.nbytes, "x")
    assert "716" in attempt(driver, x, place=64)
    assert "leaves the block's memory" in attempt(driver, x, place=640)
    assert "a map of rank 2 with 3 coordinates" in attempt(driver, x, rank=3)
    assert "aligned to 64 bytes" in attempt(driver, x, before="add.u64 %d2, %d2, 16;")
    assert "no mbarrier was initialised" in attempt(
        driver, x, before="add.u32 %full, %full, 0; mbarrier.inval.shared::cta.b64 [%full];"
    )


@pytest.mark.simulated
def test_a_map_of_freed_memory_is_refused(driver: Driver) -> None:
    x = np.ones(16, np.float32)
    other = torch.ones(4)
    driver.register(other.data_ptr(), other.nbytes, "other")
    assert "global memory out of bounds" in attempt(driver, torch.from_numpy(x).repeat(8).view(8, 16))
