# SPDX-License-Identifier: BSD-3-Clause
"""Peak memory that one attention call needs beyond its inputs, of this process: run it once per measurement."""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import resource
from pathlib import Path

import torch
import torch.nn.functional as F

import flash_attn3


def reset_high_water_mark() -> None:
    """Linux: the mark falls to what is resident now. Elsewhere it stays, and the figure is a lower bound."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def high_water_mark() -> float:
    """MiB."""
    try:
        return int(re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def attend(implementation: str, seqlen: int, causal: bool, backward: bool) -> float:
    """MiB beyond the inputs (b 1, h 1, d 64, fp32)."""
    q, k, v = (torch.randn(1, seqlen, 1, 64, requires_grad=backward) for _ in range(3))
    dout = torch.randn(q.shape)
    reset_high_water_mark()
    before = high_water_mark()
    if implementation == "flash":
        out = flash_attn3.flash_attn_func(q, k, v, causal=causal, backend="cpu")
    else:
        out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=causal).transpose(1, 2)
    if backward:
        out.backward(dout)
    return high_water_mark() - before


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("implementation", choices=("flash", "sdpa"))
    p.add_argument("seqlen", type=int)
    p.add_argument("--causal", action="store_true")
    p.add_argument("--backward", action="store_true")
    args = p.parse_args()
    attend(args.implementation, 128, args.causal, args.backward)  # loads code and starts threads
    print(json.dumps({"extra_mib": attend(args.implementation, args.seqlen, args.causal, args.backward)}))


if __name__ == "__main__":
    main()
