# SPDX-License-Identifier: BSD-3-Clause
"""ld, st, cvta, mapa in every state space, and what they refuse."""

from __future__ import annotations

import ctypes

import pytest
import torch
from ptx import HEADER, poison, run

from tests.hopper_sim import Driver, DriverError

BYTES = torch.arange(256, dtype=torch.int32).mul(37).to(torch.uint8)
ILLEGAL_ADDRESS, MISALIGNED_ADDRESS = 700, 716


@pytest.mark.parametrize(
    "kind", ["s8", "u8", "b8", "s16", "u16", "b16", "s32", "u32", "b32", "f32", "s64", "u64", "b64"]
)
def test_load_extends_to_the_register(driver: Driver, kind: str) -> None:
    bits = int(kind[1:])
    for register_bits, letter in ((16, "h"), (32, "r"), (64, "d")):
        if register_bits < bits or (kind == "f32" and register_bits != 32):
            continue
        out = poison(32, dtype={16: torch.int16, 32: torch.int32, 64: torch.int64}[register_bits])
        body = f"""
        mad.wide.u32 %d0, %t, {bits // 8}, %a0;
        ld.global.{kind} %{letter}1, [%d0];
        mad.wide.u32 %d0, %t, {register_bits // 8}, %a1;
        st.global.b{register_bits} [%d0], %{letter}1;
        """
        run(driver, body, BYTES, out)
        source = BYTES[: 32 * bits // 8].numpy().view(f"{'i' if kind[0] == 's' else 'u'}{bits // 8}")
        assert torch.equal(out, torch.from_numpy(source.astype(f"i{register_bits // 8}")))


@pytest.mark.parametrize("kind", ["u8", "u16", "u32", "u64"])
def test_store_cuts_to_the_type(driver: Driver, kind: str) -> None:
    bits = int(kind[1:])
    out = torch.zeros(256, dtype=torch.uint8)
    value = 0x1122334455667788
    body = f"""
    mov.u64 %d1, {value};
    mul.wide.u32 %d0, %t, 8;
    add.u64 %d0, %d0, %a0;
    st.global.{kind} [%d0], %d1;
    """
    run(driver, body, out)
    assert bytes(out.numpy()) == ((value % (1 << bits)).to_bytes(bits // 8, "little")).ljust(8, b"\0") * 32


@pytest.mark.parametrize(
    "kind,count", [("b8", 4), ("b16", 2), ("b16", 4), ("b32", 2), ("b32", 4), ("f32", 4), ("b64", 2)]
)
@pytest.mark.parametrize("space", ["global", "shared", "local", ""])
def test_vectors(driver: Driver, space: str, kind: str, count: int) -> None:
    """Load from global, store to and load from a space, store to global; elements are reversed on the way."""
    bits, letter = int(kind[1:]), {8: "h", 16: "h", 32: "r", 64: "d"}[int(kind[1:])]
    vector, bytes_ = f"v{count}.{kind}", count * bits // 8
    registers = [f"%{letter}{n}" for n in range(10, 10 + count)]
    listed, reverse = ", ".join(registers), ", ".join(registers[::-1])
    address = {"shared": "mov.u32 %r1, buffer; mad.lo.u32 %r1, %t, 16, %r1;", "local": "mov.u32 %r1, stack;"}
    place = "[%d2]" if space in ("", "global") else "[%r1]"
    source, out = BYTES.repeat(2), poison(32 * bytes_, dtype=torch.uint8)
    body = f"""
    .shared .align 16 .b8 buffer[512];
    .local .align 16 .b8 stack[16];
    {address.get(space, "")}
    mad.wide.u32 %d0, %t, {bytes_}, %a0;
    mad.wide.u32 %d2, %t, {bytes_}, %a1;
    ld.global.{vector} {{{listed}}}, [%d0];
    st{"." * bool(space)}{space}.{vector} {place}, {{{reverse}}};
    ld{"." * bool(space)}{space}.{vector} {{{listed}}}, {place};
    st.global.{vector} [%d2], {{{listed}}};
    """
    run(driver, body, source, out)
    wanted = source[: 32 * bytes_].view(32, count, bits // 8).flip(1).flatten()
    assert torch.equal(out, wanted)


def test_offsets_and_symbols(driver: Driver) -> None:
    out = poison(8, dtype=torch.int32)
    body = """
    .shared .align 4 .b8 first[12];
    .shared .align 4 .u32 second[2];
    setp.ne.u32 %p0, %t, 0;
    @%p0 ret;
    st.shared.u32 [first+4], 11;
    st.shared.u32 [second+4], 22;
    mov.u32 %r1, second;
    ld.shared.u32 %r2, [%r1+-8];
    ld.shared.u32 %r3, [%r1+4];
    add.u64 %d1, %a0, 16;
    st.global.v2.u32 [%d1+-16], {%r2, %r3};
    """
    run(driver, body, out)
    assert out[:2].tolist() == [11, 22]


def test_shared_memory_starts_after_the_reserved_kib(driver: Driver) -> None:
    """Static variables from byte 1024 in order of appearance, then the dynamic array with its alignment."""
    out = poison(3, dtype=torch.int32)
    body = """
    .shared .align 4 .b8 small[20];
    .shared .align 64 .b8 aligned[4];
    mov.u32 %r1, small;
    mov.u32 %r2, aligned;
    mov.u32 %r3, dynamic;
    setp.eq.u32 %p0, %t, 0;
    @%p0 st.global.u32 [%a0], %r1;
    @%p0 st.global.u32 [%a0+4], %r2;
    @%p0 st.global.u32 [%a0+8], %r3;
    """
    run(driver, body, out, smem=64, module=".extern .shared .align 1024 .b8 dynamic[];")
    assert out.tolist() == [1024, 1088, 2048]


def test_generic_addresses(driver: Driver) -> None:
    """One pointer reaches shared, local and global memory; cvta.to gives the space's own address back."""
    out = poison(32, 4, dtype=torch.int32)
    body = """
    .shared .align 16 .b8 buffer[512];
    .local .align 16 .b8 stack[16];
    mov.u32 %r1, buffer;
    mad.lo.u32 %r1, %t, 16, %r1;
    cvt.u64.u32 %d1, %r1;
    cvta.shared.u64 %d2, %d1;
    mov.u64 %d3, stack;
    cvta.local.u64 %d4, %d3;
    mad.wide.u32 %d5, %t, 16, %a0;
    cvta.to.global.u64 %d6, %d5;
    st.u32 [%d2], %t;
    ld.shared.u32 %r2, [%r1];
    add.u32 %r3, %t, 100;
    st.u32 [%d4+4], %r3;
    ld.local.u32 %r4, [stack+4];
    st.u32 [%d5], %r2;
    st.global.u32 [%d6+4], %r4;
    cvta.to.shared.u64 %d7, %d2;
    sub.u64 %d7, %d7, %d1;
    cvt.u32.u64 %r5, %d7;
    cvta.to.local.u64 %d8, %d4;
    sub.u64 %d8, %d8, %d3;
    cvt.u32.u64 %r6, %d8;
    st.v2.u32 [%d5+8], {%r5, %r6};
    """
    run(driver, body, out)
    lanes = torch.arange(32, dtype=torch.int32)
    assert torch.equal(out, torch.stack([lanes, lanes + 100, 0 * lanes, 0 * lanes], 1))


def test_constants_and_initialised_globals(driver: Driver) -> None:
    module = """
    .const .align 4 .b8 table[8] = {1, 2, 3, 4, 0xff, 0, 0, 128};
    .visible .global .align 4 .u32 counters[3] = {7, 0x10};
    .global .align 4 .f32 scale = 0f3fc00000;
    """
    out = poison(6, dtype=torch.int32)
    body = """
    setp.ne.u32 %p0, %t, 0;
    @%p0 ret;
    ld.const.v2.u32 {%r1, %r2}, [table];
    ld.global.u32 %r3, [counters];
    ld.global.u32 %r4, [counters+4];
    ld.global.u32 %r5, [counters+8];
    ld.global.f32 %r6, [scale];
    add.u32 %r3, %r3, 1;
    st.global.u32 [counters], %r3;
    st.global.v4.u32 [%a0], {%r1, %r2, %r3, %r4};
    st.global.v2.u32 [%a0+16], {%r5, %r6};
    """
    run(driver, body, out, module=module)
    assert out.tolist() == [0x04030201, 0x800000FF - (1 << 32), 8, 16, 0, 0x3FC00000]


def test_parameters(driver: Driver) -> None:
    """A struct by value, read in pieces and through a generic address."""
    text = (
        HEADER
        + """
    .visible .entry k(.param .u8 small, .param .align 16 .b8 packed[24], .param .f32 real, .param .u64 out) {
        .reg .b16 %h<4>; .reg .b32 %r<8>; .reg .b64 %d<4>; .reg .pred %p<2>;
        mov.u32 %r0, %tid.x;
        setp.ne.u32 %p0, %r0, 0;
        @%p0 ret;
        ld.param.u64 %d0, [out];
        ld.param.u8 %h0, [small];
        ld.param.v2.u32 {%r1, %r2}, [packed+8];
        ld.param.s8 %r3, [packed+1];
        ld.param.f32 %r4, [real];
        mov.b64 %d1, packed;
        cvta.param.u64 %d2, %d1;
        ld.u32 %r5, [%d2+20];
        cvt.u32.u16 %r6, %h0;
        st.global.v4.u32 [%d0], {%r1, %r2, %r3, %r4};
        st.global.v2.u32 [%d0+16], {%r5, %r6};
        ret;
    }"""
    )
    out = poison(6, dtype=torch.int32)
    driver.register(out.data_ptr(), out.nbytes, "out")
    packed = bytes([0, 0xFE]).ljust(8, b"\0") + b"".join(n.to_bytes(4, "little") for n in (5, 6, 7, 8))
    arguments = [ctypes.c_uint8(200), ctypes.create_string_buffer(packed, 24), ctypes.c_float(1.5)]
    driver.load(text, "k").launch(1, 32, *arguments, out.data_ptr())
    assert out.tolist() == [5, 6, -2, 0x3FC00000, 8, 200]


@pytest.mark.simulated
def test_memory_starts_poisoned(driver: Driver) -> None:
    out = torch.zeros(32, 2, dtype=torch.int32)
    body = """
    .shared .align 4 .b8 buffer[128];
    .local .align 4 .b8 stack[8];
    mov.u32 %r1, buffer;
    ld.shared.u32 %r2, [%r1];
    ld.local.u32 %r3, [stack];
    mad.wide.u32 %d0, %t, 8, %a0;
    st.global.v2.u32 [%d0], {%r2, %r3};
    """
    run(driver, body, out)
    assert (out == -1).all()


def test_memory_of_other_blocks_of_the_cluster(driver: Driver) -> None:
    """mapa and shared::cluster, by 32-bit and by generic address."""
    out = poison(4, 32, 2, dtype=torch.int32)
    body = """
    .shared .align 4 .b8 mine[128];
    mov.u32 %r1, mine;
    mad.lo.u32 %r1, %t, 4, %r1;
    mov.u32 %r2, %cluster_ctarank;
    mad.lo.u32 %r3, %r2, 1000, %t;
    st.shared.u32 [%r1], %r3;
    barrier.cluster.arrive.aligned;
    barrier.cluster.wait.aligned;
    add.u32 %r4, %r2, 1;
    and.b32 %r4, %r4, 3;
    mapa.shared::cluster.u32 %r5, %r1, %r4;
    ld.shared::cluster.u32 %r6, [%r5];
    cvt.u64.u32 %d1, %r1;
    cvta.shared.u64 %d2, %d1;
    xor.b32 %r4, %r4, 2;
    mapa.u64 %d3, %d2, %r4;
    ld.u32 %r7, [%d3];
    mad.lo.u32 %r8, %r2, 32, %t;
    mad.wide.u32 %d0, %r8, 8, %a0;
    st.global.v2.u32 [%d0], {%r6, %r7};
    barrier.cluster.arrive.aligned;
    barrier.cluster.wait.aligned;
    """
    run(driver, body, out, grid=4, cluster=4)
    lanes = torch.arange(32)
    for rank in range(4):
        assert torch.equal(out[rank, :, 0], ((rank + 1) % 4 * 1000 + lanes).int())
        assert torch.equal(out[rank, :, 1], (((rank + 1) % 4 ^ 2) * 1000 + lanes).int())


def refused(driver: Driver, body: str, *arguments: torch.Tensor | int, **launch: object) -> DriverError:
    with pytest.raises(DriverError) as error:
        run(driver, body, *arguments, **launch)
    return error.value


@pytest.mark.simulated
@pytest.mark.parametrize("opcode", ["ld.global.u32 %r1, [%d0]", "st.global.u32 [%d0], %r1", "ld.u32 %r1, [%d0]"])
@pytest.mark.parametrize("offset", [-4, 124, -(1 << 40)])
def test_global_out_of_bounds(driver: Driver, opcode: str, offset: int) -> None:
    x = torch.zeros(32, dtype=torch.int32)[1:-1].clone()
    error = refused(driver, f"add.u64 %d0, %a0, {offset};\n{opcode};", x)
    assert error.code == ILLEGAL_ADDRESS
    assert opcode in str(error) and "ptx" in str(error)
    if abs(offset) < 1000:
        assert f"offset {offset} of a0, {x.nbytes} bytes" in str(error)


@pytest.mark.simulated
def test_the_last_bytes_of_the_address_space_are_out_of_bounds(driver: Driver) -> None:
    x = torch.zeros(4, dtype=torch.int32)
    assert refused(driver, "mov.u64 %d0, -8;\nld.global.v2.u64 {%d1, %d2}, [%d0+-8];", x).code == ILLEGAL_ADDRESS


@pytest.mark.simulated
@pytest.mark.parametrize("place", [0, 1020, 1024 + 128, 1 << 24])
def test_shared_out_of_bounds(driver: Driver, place: int) -> None:
    body = f".shared .align 4 .b8 mine[128];\nmov.u32 %r2, mine;\nmov.u32 %r0, {place};\nst.shared.u32 [%r0], %r1;"
    error = refused(driver, body)
    assert error.code == ILLEGAL_ADDRESS
    assert ("no shared memory" if place >> 24 else "0x400..0x480") in str(error)


@pytest.mark.simulated
def test_local_out_of_bounds(driver: Driver) -> None:
    body = ".local .align 4 .b8 stack[16];\nmov.u64 %d0, 16;\nld.local.u32 %r1, [%d0];"
    assert refused(driver, body).code == ILLEGAL_ADDRESS


@pytest.mark.simulated
@pytest.mark.parametrize("kind,bytes_", [("u16", 2), ("u32", 4), ("u64", 8), ("v2.u32", 8), ("v4.u32", 16)])
def test_misaligned(driver: Driver, kind: str, bytes_: int) -> None:
    x = torch.zeros(64, dtype=torch.int32)
    registers = {"v2.u32": "{%r1, %r2}", "v4.u32": "{%r1, %r2, %r3, %r4}", "u64": "%d1", "u16": "%h1"}.get(kind, "%r1")
    body = f"""
    .shared .align 16 .b8 mine[64];
    add.u64 %d0, %a0, {bytes_ // 2};
    mov.u32 %r0, mine;
    add.u32 %r0, %r0, {bytes_ // 2};
    """
    error = refused(driver, body + f"ld.global.{kind} {registers}, [%d0];", x)
    assert error.code == MISALIGNED_ADDRESS and f"{bytes_} bytes" in str(error)
    error = refused(driver, body + f"ld.shared.{kind} {registers}, [%r0];", x)
    assert error.code == MISALIGNED_ADDRESS and f"{bytes_} bytes" in str(error)


@pytest.mark.simulated
def test_a_register_of_the_wrong_width_is_refused(driver: Driver) -> None:
    assert "lacks" in str(refused(driver, "ld.global.u64 %r1, [%a0];", torch.zeros(4)))
