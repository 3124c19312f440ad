# SPDX-License-Identifier: BSD-3-Clause
"""Calls that differ from an earlier one in the contents of their tensors only: checked once, then replayed.

A decode step takes microseconds, and its checks longer than that. They look at metadata alone, so their verdict holds
for every call with the same metadata: a plan keeps it, together with the places that each tensor of the problem came
from. The plan holds no tensor. A call that makes new tensors on its way (casts, copies, lengths from an integer) is
checked each time. Under a mode, a trace or a profiler, and with subclasses of Tensor, calls go through the dispatcher.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from . import autograd, env, extension, ops
from .call import Call, Result, results, run
from .checks import Checks
from .problem import AppendProblem, AttentionProblem, assembled

_is_grad_enabled, _is_deterministic = torch.is_grad_enabled, torch.are_deterministic_algorithms_enabled
MAX_PLANS = 256  # for each function
BOUNDS = ("max_seqlen_q", "max_seqlen_k")  # may differ in each step; no part of what a call means

Problem = AttentionProblem | AppendProblem

_plans: list[dict[bytes, Plan]] = []  # of each function


def replayed(fn: Callable[..., Call]) -> Callable[..., Result]:
    """Make a function that checks its arguments and returns a `Call` one that runs it."""
    signature = inspect.signature(fn)
    parameters = tuple(signature.parameters)
    key_of = _call_key(parameters)
    plans: dict[bytes, Plan] = {}
    _plans.append(plans)

    @functools.wraps(fn)
    def wrapper(*args, **kwargs):
        if not ops.is_plain() or key_of is None:
            return run(fn(*args, **kwargs))
        key = key_of(args, kwargs, (_is_grad_enabled(), _is_deterministic(), env.backend, env.batch_invariant))
        if key is None:
            return run(fn(*args, **kwargs))
        plan = plans.get(key)
        values = (*args, *kwargs.values())
        if plan is not None:
            return plan.run(values)
        call = fn(*args, **kwargs)
        if call.problem.q.is_meta:
            return run(call)
        plan = _plan(call, (*parameters[: len(args)], *kwargs), values)
        if plan is not None:
            if len(plans) >= MAX_PLANS:
                plans.clear()
            plans[key] = plan
        return run(call, autograd.DIFFERENTIABLE if call.needs_grad else ops.DIRECT)

    wrapper.__signature__ = signature.replace(return_annotation="Result")
    return wrapper


def _call_key(parameters: tuple[str, ...]) -> Any:
    """Makes the key of a call, of all that its checks look at; None without `_C`."""
    if extension.unavailable_reason() is not None:
        return None
    return extension.load().CallKey(parameters, (Tensor, Parameter), frozenset(BOUNDS))


class Template(NamedTuple):
    """A problem without its tensors."""

    kind: type[Problem]
    fields: dict[str, Any]  # all in order; those that are bound hold None
    bound: tuple[tuple[str, int], ...]  # the field, and the position of its value among the arguments

    def fill(self, values: tuple) -> Problem:
        fields = self.fields.copy()
        for name, position in self.bound:
            fields[name] = values[position]
        return assembled(self.kind, fields)


class Plan(NamedTuple):
    """A call without its tensors."""

    checks: Checks
    append_checks: Checks | None
    backend: str
    problem: Template
    append: Template | None
    out: int | None
    needs_grad: bool
    want_lse: bool
    want_max_logits: bool

    def run(self, values: tuple) -> Result:
        """Past all that is at work under a check level only, and what the call does not ask for."""
        if self.needs_grad or self.append is not None or self.out is not None:
            return run(self.call(values), autograd.DIFFERENTIABLE if self.needs_grad else ops.DIRECT)
        attended = ops.DIRECT.fwd(self.problem.fill(values), self.backend)
        return results(attended, self.want_lse, self.want_max_logits)

    def call(self, values: tuple) -> Call:
        return Call(
            self.checks,
            self.problem.fill(values),
            self.backend,
            self.needs_grad,
            None if self.out is None else values[self.out],
            None if self.append is None else self.append.fill(values),
            self.append_checks,
            self.want_lse,
        )


def _plan(call: Call, names: tuple[str, ...], values: tuple) -> Plan | None:
    """The plan of `call`, if it is a function of metadata and all its tensors are arguments."""
    p = call.problem
    tensors = [x for x in values if isinstance(x, Tensor)]
    reads_contents = any(x.ndim == 0 for x in tensors)
    reads_bounds = any(x is not None and x.ndim == 3 for x in (p.q_descale, p.k_descale, p.v_descale))
    if reads_contents or reads_bounds:
        return None
    positions = {id(x): position for position, x in enumerate(values) if isinstance(x, Tensor)}
    bounds = {name: position for position, name in enumerate(names) if name in BOUNDS and type(values[position]) is int}
    problem = _template(p, positions, bounds)
    append = None if call.append is None else _template(call.append, positions, {})
    if problem is None or (call.append is not None and append is None):
        return None
    out = None if call.out is None else positions[id(call.out)]
    wanted = call.needs_grad, call.want_lse, p.return_max_logits
    return Plan(call.checks, call.append_checks, call.backend, problem, append, out, *wanted)


def _template(problem: Problem, positions: dict[int, int], bounds: dict[str, int]) -> Template | None:
    vars(problem).update((name, getattr(problem, name)) for name in problem.DERIVED)
    fields, bound = dict(vars(problem)), list(bounds.items())
    for name, x in fields.items():
        if isinstance(x, Tensor):
            if id(x) not in positions:
                return None
            bound.append((name, positions[id(x)]))
    return Template(type(problem), fields | {name: None for name, _ in bound}, tuple(bound))
