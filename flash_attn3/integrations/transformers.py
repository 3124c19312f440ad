# SPDX-License-Identifier: BSD-3-Clause
"""Attention of Hugging Face transformers models: `register()`, then `attn_implementation="fa3"`.

transformers asks an attention implementation for two functions. `mask` is called once for each forward and kind of
layer, and says which keys exist; `attend` is called by each layer. Causality, windows, softcap and sinks reach `attend`
as arguments, so that a mask need only be, for s_q rows and s_k slots of keys,

    None: all slots hold keys, and the last row stands at the last of them;
    bounds (b, 1, 1, 3) int32: of each sequence, the rows that exist, the first slot and the end of the slots with keys;
    documents (1, 1, n + 1, 1) int32: the offsets of n sequences that are packed in b * s_q rows.

Four dimensions, because transformers passes on a 4-D mask as it is; int32, because a mask of somebody else is not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.utils.import_utils import is_tracing

from ..api import flash_attn_func, flash_attn_varlen_func
from ..autograd import autocast
from ..checks import Checks, received
from ..flash_attn_interface import _flash_attn_forward

CLAIMED = ("flash", "flex_attention", "sdpa", "eager", "paged|", "/")  # parts of names that transformers interprets


def register(name: str = "fa3") -> None:
    """Make `name` an attention implementation of transformers. Models that do not ask for it do not change.

        from transformers import AutoModelForCausalLM
        from flash_attn3.integrations import transformers as fa3

        fa3.register()
        model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="fa3", dtype="bfloat16")

    or `model.set_attn_implementation("fa3")`. Served: padding on either side, packed sequences (`position_ids` that
    restart, or `cu_seq_lens_*`), dynamic and static caches, sliding windows, softcap, sinks, grouped heads, gradients,
    `torch.compile(fullgraph=True)`. Refused with `UnsupportedError`: dropout, masks with holes, 4-D and
    other custom masks, more keys than a chunk holds, attention weights as an output, and continuous batching.

    A compiled forward cannot look for restarts in `position_ids`: it allows for one at each token, unless it is given
    an `attention_mask` (nothing is packed) or `cu_seq_lens_*`. A model that does not hand `position_ids` to its mask
    (GPT-OSS in transformers 5.23, with any implementation) needs `cu_seq_lens_*` for packed sequences.

    Args:
        name: passed to models as `attn_implementation`.
    """
    c = Checks("register")
    if not isinstance(name, str):
        c.fail_type("name", received(name), "a str")
    if not name or any(part in name for part in CLAIMED):
        c.fail("name", repr(name), f"a name without {', '.join(map(repr, CLAIMED))}, which transformers interprets")
    AttentionInterface.register(name, attend)
    AttentionMaskInterface.register(name, mask)


def attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    s_aux: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int | Tensor | None = None,
    max_length_k: int | Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer.

    Args:
        query, key, value: (b, h | h_kv, s_q | s_k, d | dv).
        attention_mask: see the module's docstring.
        sliding_window: w, of which a row sees its own key and w - 1 keys before (and, if not causal, after) it.
        cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k: packed sequences, instead of a mask.

    Returns:
        (out (b, s_q, h, dv), None).
    """
    c = Checks("fa3 attention")
    if dropout:
        c.unsupported("dropout", dropout, "0", "Set attention_dropout = 0 in the configuration of the model")
    for name in ("position_bias", "cache", "output_attentions"):
        if others.get(name) is not None and others[name] is not False:
            c.unsupported(name, "given", "None", "Choose another attn_implementation")
    side = -1 if sliding_window is None else sliding_window - 1
    options = dict(
        softmax_scale=scaling,
        causal=getattr(module, "is_causal", True) if is_causal is None else is_causal,
        window_size=(side, side),
        softcap=softcap or 0.0,
        s_aux=s_aux,
        num_splits=0,
    )
    q, k, v = autocast(*(x.transpose(1, 2) for x in (query, key, value)))
    if cu_seq_lens_q is not None:
        offsets = (cu_seq_lens_q.to(torch.int32), cu_seq_lens_k.to(torch.int32))
        out = _packed(q, k, v, *offsets, max_length_q, max_length_k, options)
    elif attention_mask is None:
        out = flash_attn_func(q, k, v, **options)
    elif _is_ours(attention_mask) and attention_mask.shape[3] == 1:
        offsets = attention_mask.flatten()
        out = _packed(q, k, v, offsets, offsets, q.shape[1], k.shape[1], options)
    elif _is_ours(attention_mask):
        out = _bounded(q, k, v, *attention_mask.flatten(1).unbind(1), options)
    else:
        c.unsupported("attention_mask", received(attention_mask), "a 2-D mask at the entry of the model, or none")
    return out, None


def _is_ours(attention_mask: Tensor) -> bool:
    return attention_mask.dtype == torch.int32 and attention_mask.ndim == 4


def _packed(q, k, v, offsets_q, offsets_k, max_q, max_k, options: dict) -> Tensor:
    """Each sequence, given by offsets into the b * s rows, attends to itself."""
    flat = (x.flatten(0, 1) for x in (q, k, v))
    return flash_attn_varlen_func(*flat, offsets_q, offsets_k, max_q, max_k, **options).unflatten(0, q.shape[:2])


def _bounded(q, k, v, rows: Tensor, first: Tensor, end: Tensor, options: dict) -> Tensor:
    """The first `rows` rows of each sequence attend to its slots [first, end)."""
    if not _needs_grad(q, k, v, options["s_aux"]):
        bounds = dict(seqused_q=rows, seqused_k=end, leftpad_k=first)
        return _flash_attn_forward(q, k, v, **bounds, **options)[0]
    # left padding of a dense tensor has no gradient; as an offset into a packed one it has
    batch, s_q, s_k = q.shape[0], q.shape[1], k.shape[1]
    sequence = torch.arange(batch + 1, dtype=torch.int32, device=q.device)
    out = flash_attn_varlen_func(
        *(x.flatten(0, 1) for x in (q, k, v)),
        sequence * s_q,
        sequence * s_k + F.pad(first, (0, 1)),
        s_q,
        s_k,
        seqused_q=rows,
        seqused_k=end - first,
        **options,
    )
    return out.unflatten(0, (batch, s_q))


def _needs_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable | None = None,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool | None = None,
    use_vmap: bool = False,
    config: Any = None,
    device: torch.device | str = "cpu",
    **_: Any,
) -> Tensor | None:
    """None, bounds, or documents (see the module's docstring).

    Args:
        q_offset: position of row 0; a tensor with a static cache.
        kv_offset: position of slot 0.
        mask_function: whether (batch, head, row, key) is visible, without padding.
        attention_mask: (b, positions) bool, the keys that are no padding; missing positions at the end are False.
        local_size: size of the window, or of the chunk.
        allow_is_causal_skip: False if None cannot stand for a causal mask.
        allow_is_bidirectional_skip: as that, for a bidirectional mask; only given for one.
        use_vmap, config: whether mask_function is the user's; the model's configuration.
    """
    _refuse_other_masks(mask_function, use_vmap, local_size, config, kv_length + kv_offset)
    causal = allow_is_bidirectional_skip is None
    may_skip = allow_is_causal_skip if causal else allow_is_bidirectional_skip
    # the slot after that of the last row's own key, where rows have keys of their own
    end = q_offset + q_length - kv_offset if causal else kv_length
    may_skip = may_skip and not isinstance(end, Tensor) and end == kv_length
    if attention_mask is not None:
        keys = F.pad(attention_mask, (0, max(kv_offset + kv_length - attention_mask.shape[1], 0)))
        keys = keys[:, kv_offset : kv_offset + kv_length]
        if may_skip and not is_tracing(keys) and keys.all():
            return None
        return _bounds_of(keys, q_length, end, causal, local_size)
    if may_skip or not causal:
        return None
    if not isinstance(end, Tensor) and end == kv_length == q_length:
        return _documents(batch_size, q_length, mask_function, device)
    first = torch.zeros(batch_size, dtype=torch.int32, device=device)
    return _bounds(first + q_length, first, first + end)


def _refuse_other_masks(mask_function, use_vmap: bool, local_size: int | None, config: Any, positions: int) -> None:
    c = Checks("fa3 mask")
    if use_vmap or mask_function.__name__ == "or_mask":
        c.unsupported("mask_function", "a custom pattern", "a causal, windowed, bidirectional or packed one")
    chunked = local_size is not None and local_size != getattr(config, "sliding_window", None)
    if chunked and positions > local_size:
        c.unsupported("attention_chunk_size", local_size, f"at least the {positions} positions of keys")


def _bounds(rows: Tensor, first: Tensor, end: Tensor) -> Tensor:
    bounds = torch.stack((rows, first, end)).to(torch.int32)  # each (b,) is contiguous, as the kernels want it
    return bounds.t()[:, None, None]


def _bounds_of(keys: Tensor, q_length: int, causal_end: int | Tensor, causal: bool, window: int | None) -> Tensor:
    """Bounds of the slots (b, kv_length) that hold keys and, if causal, come before `causal_end`."""
    slots = torch.arange(1, keys.shape[1] + 1, device=keys.device)
    end = (keys * slots).amax(1)
    first = end - keys.sum(1)
    is_run = torch.where(keys, slots > first[:, None], True).all(1)
    if is_tracing(keys):
        end = torch.where(is_run, end, -1)  # out of range, which the kernels note and `check_errors` raises
    elif not is_run.all():
        c = Checks("fa3 mask")
        c.unsupported("attention_mask", "a mask with holes", "padding at the left, at the right, or both")
    rows = torch.full_like(end, q_length)
    if causal:
        end = end.clamp(max=causal_end)
        rows = (end - (causal_end - q_length)).clamp(0, q_length)
    elif window is not None:
        rows = end.clamp(0, q_length)
    return _bounds(rows, first, end)


def _documents(batch_size: int, length: int, mask_function: Callable, device: torch.device | str) -> Tensor | None:
    """Offsets of the sequences in a batch of `length` rows each; None if there is one in each.

    A row that does not see the key before it begins a sequence (or sees itself only, and may as well begin one).
    """
    row = torch.arange(length, device=device)[None]
    sequence = torch.arange(batch_size, device=device)[:, None]
    begins = ~mask_function(sequence, 0, row, row - 1) | (row == 0)
    begins = begins.expand(batch_size, length).flatten()
    total = batch_size * length
    if is_tracing(begins):  # the number of sequences is not known: empty ones follow
        starts = torch.where(begins, torch.arange(total, device=device), total).sort().values
    else:
        starts = begins.nonzero().flatten()
        if len(starts) == batch_size:
            return None
    return F.pad(starts, (0, 1), value=total).to(torch.int32)[None, None, :, None]
