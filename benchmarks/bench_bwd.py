# SPDX-License-Identifier: BSD-3-Clause
"""The backward alone on a GPU, in TFLOP/s: ours, also deterministic, and the peers of the forward that have one."""

from __future__ import annotations

import sys
from functools import partial

from bench_fwd import cases
from gpu_entry import main

if __name__ == "__main__":
    sys.exit(main("bwd", __doc__, partial(cases, "bwd", "backward")))
