# SPDX-License-Identifier: BSD-3-Clause
"""wgmma: descriptors of every swizzle and major, types, sizes, A from registers, and its flags.

Matrices of small integers, whose sums are exact; the images of shared memory follow the canonical layouts of the PTX
ISA (asynchronous warpgroup-level matrix operations, shared memory matrix layout).
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from ptx import run
from torch import Tensor

from tests.hopper_sim import Driver, DriverError

TYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
SWIZZLES = (0, 32, 64, 128)  # bytes
LAYOUT_TYPE = {0: 0, 128: 1, 64: 2, 32: 3}
A_OFFSET, B_OFFSET, SMEM_BYTES = 0, 32768, 98304  # in dynamic shared memory
BASE = 1024  # its address: the hardware keeps the first KiB

COPY_IMAGE = f"""
    .reg .b32 %c<128>, %base, %i;
    mov.u32 %base, image;
    mov.u32 %i, %t;
copy:
    mul.wide.u32 %d0, %i, 16;
    add.u64 %d0, %d0, %a0;
    ld.global.v4.u32 {{%r0, %r1, %r2, %r3}}, [%d0];
    mad.lo.u32 %r4, %i, 16, %base;
    st.shared.v4.u32 [%r4], {{%r0, %r1, %r2, %r3}};
    add.u32 %i, %i, 128;
    setp.lt.u32 %p0, %i, {SMEM_BYTES // 16};
    @%p0 bra copy;
    fence.proxy.async.shared::cta;
    bar.sync 0;
"""


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where element (mn, k) of an operand lies, and the strides that say so in its descriptor."""

    swizzle: int
    mn_major: bool
    leading: int
    stride: int

    def place(self, start: int, mn: int, k: int, bytes_: int) -> int:
        span = self.swizzle or 16  # bytes of a row of the repeating pattern of 8 rows
        if not self.mn_major:
            column = k * bytes_
            linear = start + mn // 8 * self.stride + mn % 8 * span
            linear += column if self.swizzle else column // 16 * self.leading + column % 16
        elif self.swizzle:
            column = mn * bytes_
            linear = start + k // 8 * self.stride + k % 8 * span + column // span * self.leading + column % span
        else:
            column = mn * bytes_
            linear = start + k // 8 * self.leading + k % 8 * 16 + column // 16 * self.stride + column % 16
        mask = {0: 0, 32: 1, 64: 3, 128: 7}[self.swizzle]
        address = BASE + linear
        return (address ^ (address >> 7 & mask) << 4) - BASE

    def descriptor(self, start: int) -> int:
        fields = (BASE + start) >> 4 | self.leading >> 4 << 16 | self.stride >> 4 << 32
        return fields | LAYOUT_TYPE[self.swizzle] << 62


def layout(swizzle: int, mn_major: bool, mn: int, bytes_: int = 2) -> Layout:
    """Tightly packed: patterns of 8 rows one after the other."""
    pattern = 8 * (swizzle or 16)
    if not mn_major:
        return Layout(swizzle, False, leading=mn * 16 if not swizzle else 16, stride=pattern)
    if swizzle:
        across = -(-mn * bytes_ // swizzle)  # patterns along mn
        return Layout(swizzle, True, leading=pattern, stride=pattern * across)
    return Layout(0, True, leading=mn // 8 * 128, stride=128)


def write(image: np.ndarray, start: int, matrix: Tensor, where: Layout) -> None:
    raw = matrix.contiguous().view(torch.uint8).numpy()
    bytes_ = matrix.element_size()
    for mn in range(matrix.shape[0]):
        for k in range(matrix.shape[1]):
            at = where.place(start, mn, k, bytes_)
            image[at : at + bytes_] = raw[mn, k * bytes_ : (k + 1) * bytes_]


def fragments(matrix: Tensor) -> Tensor:
    """[64, n] -> [128 threads, n / 2], as the PTX ISA lays out D."""
    n = matrix.shape[1]
    parts = matrix.view(4, 2, 8, n // 8, 4, 2)  # warp, half, row, block, lane of the row, element
    return parts.permute(0, 2, 4, 3, 1, 5).reshape(128, n // 2).contiguous()


def from_fragments(registers: Tensor) -> Tensor:
    n = 2 * registers.shape[1]
    parts = registers.view(4, 8, 4, n // 8, 2, 2)
    return parts.permute(0, 4, 1, 3, 2, 5).reshape(64, n)


def a_registers(a: Tensor) -> Tensor:
    """[64, k] -> [128 threads, 4 registers]: register r holds row + 8 (r % 2), and k in the half r / 2."""
    per = 4 // a.element_size()
    parts = a.view(4, 2, 8, 2, 4, per)  # warp, row half, row, k half, lane of the row, element
    return parts.permute(0, 2, 4, 3, 1, 5).contiguous().view(128, 4 * per).view(torch.int32)


def integers(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    return torch.randint(-3, 4, (rows, columns)).to(dtype)


def multiply(
    driver: Driver,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    kind: str,
    a_layout: Layout | None,
    b_layout: Layout,
    scale_d: int = 1,
    signs: tuple[int, int] = (1, 1),
    before: str = "",
    block: int = 128,
) -> Tensor:
    """D of one wgmma; A comes from registers where it has no layout."""
    n, k = b.shape[0], 32 // b.element_size()
    image = np.full(SMEM_BYTES, 0xFF, np.uint8)
    write(image, B_OFFSET, b, b_layout)
    flags = []
    if a_layout:
        write(image, A_OFFSET, a, a_layout)
        operand_a = a_layout.descriptor(A_OFFSET)
        flags += [int(a_layout.mn_major)]
    else:
        operand_a = "{%r10, %r11, %r12, %r13}"
    flags = [*signs, *flags, int(b_layout.mn_major)] if a.element_size() == 2 else list(signs)
    registers = fragments(c.float()).clone()
    held = torch.zeros(128, 4, dtype=torch.int32) if a_layout else a_registers(a)
    listed = [f"%c{i}" for i in range(n // 2)]
    body = COPY_IMAGE + f"mad.wide.u32 %d1, %t, {2 * n}, %a1;\nmad.wide.u32 %d2, %t, 16, %a2;\n"
    body += "".join(f"ld.global.f32 {name}, [%d1+{4 * i}];\n" for i, name in enumerate(listed))
    body += f"""
    ld.global.v4.u32 {{%r10, %r11, %r12, %r13}}, [%d2];
    mov.u64 %d3, {operand_a if a_layout else 0};
    mov.u64 %d4, {b_layout.descriptor(B_OFFSET)};
    setp.ne.b32 %p1, {scale_d}, 0;
    {before}
    wgmma.fence.sync.aligned;
    wgmma.mma_async.sync.aligned.m64n{n}k{k}.f32.{kind}.{kind} {{{", ".join(listed)}}},
        {"%d3" if a_layout else operand_a}, %d4, %p1, {", ".join(map(str, flags))};
    wgmma.commit_group.sync.aligned;
    wgmma.wait_group.sync.aligned 0;
    """
    body += "".join(f"st.global.f32 [%d1+{4 * i}], {name};\n" for i, name in enumerate(listed))
    run(
        driver,
        body,
        torch.from_numpy(image),
        registers,
        held,
        block=block,
        smem=SMEM_BYTES,
        directives=f".maxntid {block}, 1, 1",
        module=".extern .shared .align 1024 .b8 image[];",
    )
    return from_fragments(registers)


def check(driver: Driver, kind: str, n: int, a_layout: Layout | None, b_layout: Layout) -> None:
    dtype = TYPES[kind]
    k = 32 // dtype.itemsize
    a, b, c = integers(64, k, dtype), integers(n, k, dtype), torch.randint(-9, 10, (64, n)).float()
    wanted = c + a.float() @ b.float().T
    assert torch.equal(multiply(driver, a, b, c, kind, a_layout, b_layout), wanted)


@pytest.mark.parametrize("b_major", ["K", "MN"])
@pytest.mark.parametrize("a_major", ["K", "MN"])
@pytest.mark.parametrize("b_swizzle", SWIZZLES)
@pytest.mark.parametrize("a_swizzle", SWIZZLES)
def test_descriptors(driver: Driver, a_swizzle: int, b_swizzle: int, a_major: str, b_major: str) -> None:
    a_layout, b_layout = layout(a_swizzle, a_major == "MN", 64), layout(b_swizzle, b_major == "MN", 128)
    check(driver, "bf16", 128, a_layout, b_layout)


@pytest.mark.parametrize("swizzle", SWIZZLES)
@pytest.mark.parametrize("kind", ["e4m3", "e5m2", "f16"])
def test_types(driver: Driver, kind: str, swizzle: int) -> None:
    check(driver, kind, 64, layout(swizzle, False, 64), layout(swizzle, False, 64))


@pytest.mark.parametrize("kind", TYPES)
def test_a_from_registers(driver: Driver, kind: str) -> None:
    check(driver, kind, 64, None, layout(128, False, 64))


def test_a_from_registers_and_b_mn_major(driver: Driver) -> None:
    check(driver, "bf16", 64, None, layout(128, True, 64))


@pytest.mark.parametrize("n", range(8, 257, 8))
def test_sizes(driver: Driver, n: int) -> None:
    check(driver, "bf16", n, layout(128, False, 64), layout(128, False, n))


@pytest.mark.parametrize("n", [8, 72, 176, 256])
def test_sizes_mn_major(driver: Driver, n: int) -> None:
    check(driver, "bf16", n, layout(128, True, 64), layout(128, True, n))


def test_spaced_strides(driver: Driver) -> None:
    """Groups of rows need not be adjacent."""
    spaced = Layout(128, False, leading=16, stride=2048)
    check(driver, "bf16", 64, dataclasses.replace(spaced, stride=3072), spaced)
    check(driver, "bf16", 64, Layout(0, False, leading=4096, stride=256), Layout(0, True, leading=2048, stride=256))
    check(driver, "bf16", 128, Layout(64, True, leading=4096, stride=1024), Layout(32, True, leading=1024, stride=512))


@pytest.mark.parametrize("step", range(4))
def test_steps_along_k_inside_the_swizzle(driver: Driver, step: int) -> None:
    """A tile of 64 columns is four steps: each adds 32 bytes to the start of the descriptor."""
    a, b, c = integers(64, 64, torch.bfloat16), integers(64, 64, torch.bfloat16), torch.zeros(64, 64)

    class Shifted(Layout):
        def descriptor(self, start: int) -> int:
            return super().descriptor(start) + 2 * step

    columns = slice(16 * step, 16 * step + 16)
    got = multiply(driver, a, b, c, "bf16", *[Shifted(128, False, leading=16, stride=1024)] * 2)
    assert torch.equal(got, a[:, columns].float() @ b[:, columns].float().T)


def test_scale_d_leaves_the_accumulators_unread(driver: Driver) -> None:
    a, b = integers(64, 16, torch.bfloat16), integers(64, 16, torch.bfloat16)
    c = torch.full((64, 64), torch.nan)
    got = multiply(driver, a, b, c, "bf16", layout(128, False, 64), layout(128, False, 64), scale_d=0)
    assert torch.equal(got, a.float() @ b.float().T)


@pytest.mark.parametrize("signs", [(1, -1), (-1, 1), (-1, -1)])
def test_negation(driver: Driver, signs: tuple[int, int]) -> None:
    a, b, c = integers(64, 16, torch.bfloat16), integers(64, 16, torch.bfloat16), torch.ones(64, 64)
    got = multiply(driver, a, b, c, "bf16", layout(128, False, 64), layout(128, False, 64), signs=signs)
    assert torch.equal(got, c + signs[0] * signs[1] * (a.float() @ b.float().T))


def test_sums_are_fused_in_fp32_in_the_order_of_k(driver: Driver) -> None:
    a, b, c = torch.randn(64, 16).bfloat16(), torch.randn(64, 16).bfloat16(), torch.randn(64, 64)
    got = multiply(driver, a, b, c, "bf16", layout(128, False, 64), layout(128, False, 64))
    wanted = c.clone()
    for k in range(16):  # a product of two bf16 is exact in fp32
        wanted = (wanted.double() + (a[:, k, None].float() * b[:, k].float()).double()).float()
    assert torch.equal(got, wanted)


@pytest.mark.simulated
def test_fp8_accumulators_of_few_bits(driver: Driver) -> None:
    """fp8_acc=13: cut towards zero to 13 fraction bits."""
    a, b = torch.zeros(64, 32, dtype=torch.float8_e4m3fn), torch.zeros(64, 32, dtype=torch.float8_e4m3fn)
    a[:, 0], b[:, 0] = 1.0, 1.0
    c = torch.full((64, 64), -(2.0**14) - 0.5)
    operands = a, b, c, "e4m3", layout(128, False, 64), layout(128, False, 64)
    assert (multiply(driver, *operands) == -16383.5).all()
    driver.configure("fp8_acc=13")
    assert (multiply(driver, *operands) == -16383.0).all()


def refused(driver: Driver, **changes: object) -> str:
    a, b, c = integers(64, 16, torch.bfloat16), integers(64, 16, torch.bfloat16), torch.ones(64, 64)
    arguments = {"a_layout": layout(128, False, 64), "b_layout": layout(128, False, 64)} | changes
    with pytest.raises(DriverError) as error:
        multiply(driver, a, b, c, "bf16", **arguments)
    return str(error.value)


@pytest.mark.simulated
def test_inactive_lanes_are_refused(driver: Driver) -> None:
    assert "inactive lanes" in refused(driver, before="setp.eq.u32 %p3, %t, 5; @%p3 exit;")


@pytest.mark.simulated
def test_an_incomplete_warpgroup_is_refused(driver: Driver) -> None:
    assert "incomplete warpgroup" in refused(driver, block=96)


@pytest.mark.simulated
def test_a_descriptor_outside_shared_memory_is_refused(driver: Driver) -> None:
    class Outside(Layout):
        def descriptor(self, start: int) -> int:
            return super().descriptor(start) + (SMEM_BYTES >> 4)

    message = refused(driver, b_layout=Outside(128, False, 16, 1024))
    assert "700: " in message and "outside the block's memory" in message


@pytest.mark.simulated
def test_a_base_offset_is_refused(driver: Driver) -> None:
    class Offset(Layout):
        def descriptor(self, start: int) -> int:
            return super().descriptor(start) | 1 << 49

    assert "base offset" in refused(driver, a_layout=Offset(128, False, 16, 1024))


@pytest.mark.simulated
@pytest.mark.parametrize("shape", ["m64n12k16", "m64n264k16", "m32n64k16", "m64n64k32"])
def test_unknown_shapes_are_refused(driver: Driver, shape: str) -> None:
    registers = ", ".join(f"%r{i}" for i in range(32))
    opcode = f"wgmma.mma_async.sync.aligned.{shape}.f32.bf16.bf16"
    with pytest.raises(DriverError, match="shape of wgmma"):
        run(driver, f"{opcode} {{{registers}}}, %d0, %d1, 1, 1, 1, 0, 0;", block=128)
