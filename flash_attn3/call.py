# SPDX-License-Identifier: BSD-3-Clause
"""A call that passed its checks, and its run."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from . import debug, ops, runtime, validate
from .checks import Checks
from .problem import AppendProblem, AttentionProblem

Result = Tensor | tuple[Tensor, ...]


class Call(NamedTuple):
    """What a public function made of its arguments."""

    checks: Checks
    problem: AttentionProblem
    backend: str
    needs_grad: bool = False
    out: Tensor | None = None  # written instead of a new tensor
    append: AppendProblem | None = None  # written to the cache first; with rotary tables q is rotated too
    append_checks: Checks | None = None  # has the caller's names of what is appended
    want_lse: bool = False


def call(c: Checks, p: AttentionProblem, backend: str | None, **options) -> Call:
    """The call of a validated problem, on the backend that serves it."""
    needs_grad = validate.gradients(c, p)
    return Call(c, p, runtime.choose(c.fn, p, backend, needs_grad).backend, needs_grad, **options)


def results(attended: tuple[Tensor, Tensor, Tensor], lse: bool, max_logits: bool) -> Result:
    """out, (out, lse) or (out, lse, max_logits)."""
    if max_logits:
        return attended
    return attended[:2] if lse else attended[0]


def run(call: Call, via: ops.Operations = ops.DISPATCHED) -> Result:
    """The results of `call`, as many as it wants."""
    return results(attend(call, via), call.want_lse, call.problem.return_max_logits)


def attend(call: Call, via: ops.Operations = ops.DISPATCHED) -> tuple[Tensor, Tensor, Tensor | None]:
    """Append, rotate, attend: (out, lse, max_logits)."""
    c, p, out = call.checks, call.problem, call.out
    if out is not None:
        _check_memory(call, out)
    debug.before(c, p)
    if call.append is not None:
        q = via.append_kv(call.append, call.backend)
        if call.append.q is not None:
            p = p.with_q(q)
    if out is None:
        out, lse, max_logits = via.fwd(p, call.backend)
    else:
        lse, max_logits = via.fwd_out(p, call.backend, out)
    debug.after(c, p, out, lse)
    return out, lse, max_logits


def _check_memory(call: Call, out: Tensor) -> None:
    """`out` shares no byte with an input."""
    call.checks.writable("out", out, {name: x for name, x in vars(call.problem).items() if isinstance(x, Tensor)})
    if (a := call.append) is not None:
        new = {"k": a.k, "v": a.v, "rotary_cos": a.rotary_cos, "rotary_sin": a.rotary_sin}
        call.append_checks.writable("out", out, new)
