# SPDX-License-Identifier: BSD-3-Clause
"""FlashAttention-3: exact attention, forward and backward, fast on Hopper GPUs and the same everywhere else."""

from .api import flash_attn_func, flash_attn_kvpacked_func, flash_attn_qkvpacked_func, flash_attn_varlen_func
from .cache_api import flash_attn_with_kvcache, get_scheduler_metadata
from .errors import (
    CudaLaunchError,
    FlashAttn3Error,
    FlashAttn3TypeError,
    FlashAttn3ValueError,
    ToolchainError,
    UnsupportedError,
)
from .explain import warmup, why
from .merge_api import flash_attn_combine, merge_state
from .quant import quantize_fp8, rotate_fp8
from .status import check_errors

__version__ = "0.1.0"

__all__ = [
    "CudaLaunchError",
    "FlashAttn3Error",
    "FlashAttn3TypeError",
    "FlashAttn3ValueError",
    "ToolchainError",
    "UnsupportedError",
    "__version__",
    "check_errors",
    "flash_attn_combine",
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_with_kvcache",
    "get_scheduler_metadata",
    "merge_state",
    "quantize_fp8",
    "rotate_fp8",
    "warmup",
    "why",
]
