# SPDX-License-Identifier: BSD-3-Clause
"""Cases for Hopper kernels, and how they are run and judged; small enough for the simulator."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flash_attn3 import variants
from flash_attn3.testing import GradCheck, call, make_inputs
from flash_attn3.variants import BwdVariant, FwdVariant

BACKEND = "hopper"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
VARIANTS = {variant.name: variant for variant in variants.fwd_variants()}
BWD_VARIANTS = {variant.name: variant for variant in variants.bwd_variants()}
SHAPES = {f"{v.dtype}_d{v.head_dim}_v{v.head_dim_v}": v for v in VARIANTS.values()}  # what cases differ in
MASKS = {
    "full": {},
    "causal": {"causal": True},
    "left": {"window_size": (70, 0)},
    "right": {"window_size": (-1, 40)},
    "window": {"window_size": (17, 150)},
    "narrow": {"window_size": (0, 0)},
    "chunk": {"attention_chunk": 50},
    "causal chunk": {"causal": True, "attention_chunk": 100},
}
POLICIES = (
    "policy=eager",
    "policy=lazy,order=newest",
    "policy=lazy,order=oldest",
    "policy=random,seed=1",
    "policy=random,seed=2,cta_order=random,coresident=2",
    "policy=eager,first_try_fails=1",
    "policy=lazy,late=reads",
    "policy=lazy,late=writes",
    "policy=eager,elect=last,cta_order=backward",
)


def in_order(policy: str) -> str:
    """The policy with CTAs launched as the hardware does, which those that take turns rely on."""
    return ",".join(option for option in policy.split(",") if not option.startswith("cta_order"))


def named(choice: dict[str, Any]) -> str:
    return "-".join(str(value).replace(" ", "") for value in choice.values())


def inputs(shape: str, layout: str = "dense", narrower: int = 0, **sizes: Any) -> dict[str, Any]:
    """A case for the kernels of `shape`, with head dims smaller than theirs by `narrower`."""
    variant: FwdVariant = SHAPES[shape]
    dims = {"head_dim": variant.head_dim - narrower, "head_dim_v": variant.head_dim_v - narrower}
    return make_inputs(layout, dtype=DTYPES[variant.dtype], **dims | sizes)


def shape_of(variant: FwdVariant) -> str:
    return next(name for name in SHAPES if variant.name.startswith(f"fwd_{name}_"))


def bwd_shape_of(variant: BwdVariant) -> str:
    return f"{variant.dtype}_d{variant.head_dim}_v{variant.head_dim_v}"


def attend(case: dict[str, Any], **options: Any) -> tuple[Tensor, ...]:
    return call(case, backend=BACKEND, **options)


def check(case: dict[str, Any], **options: Any) -> tuple[Tensor, ...]:
    """The results of `case`, which are near the oracle's."""
    results = attend(case, **options)
    GradCheck(case).check_forward(*results)
    return results


def check_gradients(case: dict[str, Any], **options: Any) -> None:
    """Results and gradients of `case` are near the oracle's."""
    GradCheck(case).check(lambda leaves: attend(leaves, **options))


def extent(x: Tensor) -> int:
    """Bytes from the first to the last element."""
    if x.numel() == 0:
        return 0
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return (last + 1) * x.element_size()
