# SPDX-License-Identifier: BSD-3-Clause
"""Tools for tests of attention: inputs, the bounds that results must keep, comparison with the oracle, cases to try.

A *case* is a dict of arguments of `reference.attention`; `call` hands it to the public function that it fits:

    case = make_inputs("varlen", dtype=torch.bfloat16) | {"causal": True}
    GradCheck(case).check(call)
"""

from .bounds import GradCheck, assert_bounded, assert_lse, bitwise_equal, max_error, rmse
from .cases import boundary_sizes, call, pairwise, sizes
from .inputs import (
    draft_trees,
    lengths,
    make_inputs,
    offsets,
    packed_bits,
    poison,
    restrided,
    values,
    with_append,
    with_descales,
)

__all__ = [
    "GradCheck",
    "assert_bounded",
    "assert_lse",
    "bitwise_equal",
    "boundary_sizes",
    "call",
    "draft_trees",
    "lengths",
    "make_inputs",
    "max_error",
    "offsets",
    "packed_bits",
    "pairwise",
    "poison",
    "restrided",
    "rmse",
    "sizes",
    "values",
    "with_append",
    "with_descales",
]
