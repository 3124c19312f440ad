# SPDX-License-Identifier: BSD-3-Clause
"""The status word of a device: which index tensor held something that had to be clamped.

Kernels never read out of bounds, whatever an index tensor holds. When a clamp took effect, the bit of that
argument is set; the next call on the device raises once, without a synchronisation.
"""

from __future__ import annotations

import ctypes
import threading

import torch
from torch import Tensor

from .errors import FlashAttn3ValueError, message

# In the order of Argument in hopper/params.h.
ARGUMENTS = (
    "cu_seqlens_q",
    "cu_seqlens_k",
    "cu_seqlens_k_new",
    "seqused_q",
    "seqused_k",  # cache_seqlens
    "leftpad_k",  # cache_leftpad
    "page_table",
    "kv_batch_idx",  # cache_batch_idx
    "rotary_seqlens",
    "cp_tot_seqused_k",
    "scheduler_metadata",
    "tree_mask",
)
BITS = {argument: 1 << index for index, argument in enumerate(ARGUMENTS)}

_lock = threading.Lock()
_words: dict[torch.device, Tensor] = {}
_values: dict[torch.device, ctypes.c_int32] = {}  # their memory, which is read ten times faster so


def _word(device: torch.device) -> Tensor:
    """int32 (1,), for CUDA pinned, so that kernels write it and the host reads it without a synchronisation."""
    word = _words.get(device)
    if word is None:
        with _lock:
            word = _words.setdefault(device, torch.zeros(1, dtype=torch.int32, pin_memory=device.type == "cuda"))
            _values[device] = ctypes.c_int32.from_address(word.data_ptr())
    return word


def device_word(device: torch.device) -> Tensor | None:
    """The word that kernels on `device` set bits in (see `BITS`); None where the device has none."""
    return _word(device) if device.type in ("cpu", "cuda") else None


def note(argument: str) -> None:
    """Record that a clamp of `argument` took effect in a call on the CPU."""
    word = _word(torch.device("cpu"))
    with _lock:
        word[0] |= BITS[argument]


def raise_pending(device: torch.device) -> None:
    """Raise what an earlier call on `device` noted, once."""
    value = _values.get(device)
    if value is None or not (bits := value.value):
        return
    with _lock:
        value.value = 0
    names = ", ".join(argument for argument, bit in BITS.items() if bits & bit)
    expected = "lengths, offsets and page ids within the tensors they index, and metadata made for the same flags"
    hint = f"The contents were clamped by an earlier call on {device}, whose result is defined but likely not meant"
    raise FlashAttn3ValueError(message("flash_attn3", names, "out of range", expected, hint))


def check_errors(device: torch.device | str | int | None = None) -> None:
    """Wait for `device` (default: all that were used) and raise what its status word holds.

    Raises:
        FlashAttn3ValueError: an index tensor of an earlier call held values out of range.
    """
    for used in list(_words) if device is None else [torch.device(device)]:
        if used.type == "cuda":
            torch.cuda.synchronize(used)
            used = torch.device("cuda", torch.cuda.current_device() if used.index is None else used.index)
        raise_pending(used)
