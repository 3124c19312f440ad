# SPDX-License-Identifier: BSD-3-Clause
"""Other names that callers use for an argument; signatures show the canonical one only."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable

from .errors import FlashAttn3ValueError, message

ALIASES = {
    "sinks": "s_aux",
    "learnable_sink": "s_aux",
    "block_table": "page_table",
    "return_lse": "return_softmax_lse",
    "q_v": "qv",
}


def accepts_aliases(aliases: dict[str, str] = ALIASES) -> Callable[[Callable], Callable]:
    """Let the decorated function take the `aliases` of its parameters as keywords."""

    def decorate(fn: Callable) -> Callable:
        positions = {name: index for index, name in enumerate(inspect.signature(fn).parameters)}
        own = {alias: name for alias, name in aliases.items() if name in positions}

        @functools.wraps(fn)
        def wrapper(*args, **kwargs):
            for alias, name in own.items():
                if alias in kwargs:
                    if name in kwargs or len(args) > positions[name]:
                        expected = f"{name} under one name"
                        raise FlashAttn3ValueError(message(fn.__name__, alias, f"given together with {name}", expected))
                    kwargs[name] = kwargs.pop(alias)
            return fn(*args, **kwargs)

        return wrapper

    return decorate
