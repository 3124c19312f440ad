# SPDX-License-Identifier: BSD-3-Clause
"""Text that is on every machine: the sources of Python's standard library."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

MAX_CHARACTERS = 2_000_000


def standard_library() -> Tensor:
    """The top-level modules, in alphabetical order, as ASCII codes (n,) int64."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    text, size = [], 0
    for path in sorted(folder.glob("*.py")):
        text.append(path.read_bytes().decode("utf-8", "replace").encode("ascii", "replace"))
        size += len(text[-1])
        if size >= MAX_CHARACTERS:
            break
    if not text:
        raise FileNotFoundError(f"no Python sources in {folder}, the standard library of this interpreter")
    return torch.frombuffer(bytearray(b"".join(text)), dtype=torch.uint8).long()


def batches(corpus: Tensor, batch_size: int, seqlen: int, seed: int) -> Iterator[Tensor]:
    """Random excerpts (batch_size, seqlen + 1), endlessly; the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(len(corpus) - seqlen, (batch_size,), generator=generator)
        yield corpus[starts[:, None] + torch.arange(seqlen + 1)]
