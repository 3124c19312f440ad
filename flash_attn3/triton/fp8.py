# SPDX-License-Identifier: BSD-3-Clause
"""e4m3 as bits, for Triton converts fp8 on some architectures only: exact widening, rounding, block scales."""

from __future__ import annotations

import triton
import triton.language as tl

SCALE_BLOCK = tl.constexpr(128)  # tokens that share one descale


@triton.jit
def widen(bits, dtype: tl.constexpr):
    """e4m3 `bits` (uint8) as fp16 or bf16; any other tensor as it is. Exact: both hold all e4m3 values."""
    if bits.dtype != tl.uint8:
        return bits
    else:
        magnitude = (bits & 0x7F).to(tl.uint16)
        sign = (bits & 0x80).to(tl.uint16)
        # Moved into the fields of fp16, the value is too small by the difference of the biases, 2^(15 - 7).
        value = ((sign << 8) | (magnitude << 7)).to(tl.float16, bitcast=True) * 256.0
        return tl.where(magnitude == 0x7F, float("nan"), value).to(dtype)


@triton.jit
def narrow(x):
    """fp32 x as e4m3 bits: nearest even, saturated at 448, NaN kept."""
    magnitude = tl.minimum(tl.abs(x), 448.0)
    bits = magnitude.to(tl.int32, bitcast=True)
    # 20 mantissa bits go: add just under half, and the last kept bit to break ties to even. Exponent bias 127 -> 7.
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - ((127 - 7) << 3)
    # Below 2^-6 values are multiples of 2^-9, the unit of the last place of 2^14.
    subnormal = (magnitude + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    code = tl.where(magnitude < 0.015625, subnormal, normal)
    code = tl.where(x != x, 0x7F, code)
    sign = (x.to(tl.int32, bitcast=True) >> 24) & 0x80
    return (code | sign).to(tl.uint8)


@triton.jit
def load_scale(scale, token, num_blocks, stride_block):
    """Descales of `token`s of one head: one for each block of tokens, or with stride 0 one for all."""
    block = tl.minimum(token // SCALE_BLOCK, num_blocks - 1)
    return tl.load(scale + block * stride_block)
