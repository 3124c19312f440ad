# SPDX-License-Identifier: BSD-3-Clause
"""How far a result may be from the oracle: limits relative to eager torch and to one rounding of the output."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import reference
from .inputs import values


def bitwise_equal(a: Tensor, b: Tensor) -> bool:
    """Same dtype, shape and bytes; unlike torch.equal, +0 is not -0 and a NaN equals itself."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    a, b = (x.detach().contiguous().reshape(-1).view(torch.uint8) for x in (a, b))
    return torch.equal(a, b)


def rmse(x: Tensor, exact: Tensor) -> float:
    return (x.double() - exact.double()).square().mean().sqrt().item() if x.numel() else 0.0


def max_error(x: Tensor, exact: Tensor) -> float:
    return (x.double() - exact.double()).abs().max().item() if x.numel() else 0.0


def assert_bounded(
    name: str,
    actual: Tensor,
    exact: Tensor,
    eager: Tensor,
    dtype: torch.dtype,
    *,
    floor_ratio: float,
    eager_rmse_ratio: float = math.inf,
    max_ratio: float = 1.25,
    extra_atol: float = 0.0,
    factor: float = 1.0,
) -> None:
    """Error of `actual` against the fp64 `exact`, limited by that of `eager` and of rounding `exact` to `dtype`."""
    assert actual.shape == exact.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(exact.shape)}"
    finite = exact.isfinite()
    if not torch.equal(actual.isnan(), exact.isnan()):
        raise AssertionError(f"{name}: NaN in {int((actual.isnan() != exact.isnan()).sum())} wrong places")
    actual, exact, eager = actual[finite].double(), exact[finite].double(), eager[finite].double()
    error, eager_error = max_error(actual, exact), max_error(eager, exact)
    if dtype == torch.float32:
        limits = {"max error": (error, 2 * eager_error + 1e-6 * max_error(exact, torch.zeros_like(exact)))}
    else:
        rounded = exact.to(dtype)
        atol = 2 * max_error(rounded + 0.3 - 0.3, rounded) + 1e-5 + extra_atol
        limits = {
            "max error": (error, max_ratio * eager_error + atol),
            "RMSE (floor)": (rmse(actual, exact), floor_ratio * rmse(rounded, exact) + 1e-6),
            "RMSE (eager)": (rmse(actual, exact), eager_rmse_ratio * rmse(eager, exact) + 1e-6),
        }
    for kind, (found, limit) in limits.items():
        if not (math.isfinite(error) and (found <= factor * limit or math.isnan(limit))):
            raise AssertionError(f"{name}: {kind} {found:.3e} exceeds {factor * limit:.3e} ({dtype})")


def assert_lse(lse: Tensor, exact: Tensor, summed: float = 0.0, slack: float = 0.0) -> None:
    """1e-4 absolute, or a few ulp where the LSE is large; infinities and NaN exactly where the oracle has them.

    `summed`: the size of what was summed to a score, of which an ulp matters if it cancels. `slack`: more, absolute.
    """
    lse = lse.double()
    finite = exact.isfinite()
    assert torch.equal(lse[~finite].nan_to_num(nan=1.0), exact[~finite].nan_to_num(nan=1.0)), "lse: infinities differ"
    error = (lse[finite] - exact[finite]).abs()
    limit = (4 * 2**-23 * exact[finite].abs().clamp_min(summed) + 1e-5).clamp_min(1e-4) + slack
    assert bool((error <= limit).all()), f"lse: error {error.max().item():.3e}"


class GradCheck:
    """The oracle's and the eager baseline's answers to one case, forward and backward, and whether others are near.

    Gradients enter through out and lse. Those of rows that see nothing are NaN: they must not matter.
    """

    def __init__(self, case: dict[str, Any], *, distribution: str = "normal", seed: int = 0) -> None:
        self.case = case
        self.distribution = distribution
        self.queries = case["qv"] if case.get("q") is None else case["q"]
        self.dtype = torch.bfloat16 if self.queries.dtype == torch.float8_e4m3fn else self.queries.dtype
        self.wrt = [name for name in ("q", "k", "v", "s_aux") if case.get(name) is not None]
        self.exact = reference.attention(**case)
        self.eager = reference.attention(**case, precision=self.dtype)
        self.blind = self.exact.num_keys <= 0  # (b, s_q) or (t_q,)
        rows = self.blind if self.blind.ndim == 1 else self.blind[:, None]  # of lse, (h, t_q) or (b, h, s_q)
        self.blind_lse = rows if case.get("s_aux") is None else self.exact.lse == -math.inf
        self.dout = values(self.exact.out.shape, self.dtype, seed=seed).to(self.queries.device)
        self.dlse = values(self.exact.lse.shape, torch.float32, seed=seed + 1).to(self.queries.device)

    @property
    def keys_per_row(self) -> int:
        """The fewest keys that a covered row sees."""
        covered = self.exact.num_keys[self.exact.num_keys >= 0]
        return int(covered.min()) if covered.numel() else 0

    def check_forward(self, out: Tensor, lse: Tensor, max_logits: Tensor | None = None, factor: float = 1.0) -> None:
        """`factor` widens the bounds of `out` for results merged from 16-bit partials."""
        slack = self._rotation_slack()
        assert_lse(lse, self.exact.lse, self._summed(), slack)
        nothing = out[self.blind]
        assert bitwise_equal(nothing, torch.zeros_like(nothing)), "out: rows that see nothing are not +0"
        if max_logits is not None:
            torch.testing.assert_close(max_logits.double(), self.exact.max_logits, rtol=1e-3, atol=1e-5)
        if self.queries.dtype == torch.float8_e4m3fn:
            error, scale = rmse(out, self.exact.out), rmse(self.exact.out, torch.zeros_like(self.exact.out))
            assert error <= 3e-2 * scale + 1e-6, f"out: relative RMSE {error / scale:.3e} exceeds 3e-2"
            return
        paper = self.distribution == "paper" and self.keys_per_row >= 1024
        assert_bounded(
            "out",
            out,
            self.exact.out,
            self.eager.out,
            self.dtype,
            max_ratio=1.5 if self.case.get("softcap") else 1.25,
            extra_atol=slack * self._norm("v"),
            floor_ratio=1.15 if paper else 1.5,
            eager_rmse_ratio=self._eager_rmse_ratio(0.65 if self._scale_is_power_of_two() else 0.5),
            factor=factor,
        )

    def check_backward(self, grads: dict[str, Tensor], stored: tuple[Tensor, Tensor] | None = None) -> None:
        """Gradients by name of the argument, for `dout` and `dlse` of this object.

        A backward reads (out, lse) back with the rounding of the forward, which is all that counts where terms
        cancel or elements are few. There, with those as `stored`, exact gradients are those of such a backward.
        """
        eager = self._gradients(self.dtype, self.dout, self.dlse)
        exact = self._gradients(torch.float64, self.dout, self.dlse)
        as_read = exact if stored is None else self._gradients(torch.float64, *self._as_read(*stored))
        for name, grad in grads.items():
            typical = self.distribution == "normal" and grad.numel() >= 4096
            for true in (exact, as_read) if typical else (as_read,):
                assert_bounded(
                    f"d{name}",
                    grad,
                    true[name],
                    eager[name],
                    self.dtype,
                    floor_ratio=3.0,
                    eager_rmse_ratio=self._eager_rmse_ratio(0.7),
                    extra_atol=3e-4 if self.case.get("softcap") else 0.0,
                )

    def check(self, fn: Callable[[dict[str, Any]], tuple[Tensor, Tensor]]) -> None:
        """Compare out, lse and all gradients of `fn`, which takes a case and returns (out, lse)."""
        leaves = {name: self.case[name].detach().requires_grad_() for name in self.wrt}
        out, lse = fn(self.case | leaves)
        stored = out.detach(), lse.detach()
        self.check_forward(*stored)
        self.check_backward(self._backward(leaves, out, lse, self.dout, self.dlse), stored)

    def _as_read(self, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
        """(dout, dlse) for which the oracle's gradients are those with P = exp(s - lse) and D = dout . out.

        An error of lse multiplies all that a row contributes, one of out changes D, and D is subtracted from dlse.
        """
        factor = torch.where(self.blind_lse, 1.0, torch.exp(self.exact.lse - lse))  # (b, h, s_q) or (h, t_q)
        shift = (self.dout * (out - self.exact.out)).sum(-1).mT
        return factor.mT[..., None] * self.dout, factor * (self.dlse - shift)

    def _gradients(self, precision: torch.dtype, dout: Tensor, dlse: Tensor) -> dict[str, Tensor]:
        exact = precision == torch.float64
        leaves = {
            name: self.case[name].detach().to(precision if exact else self.case[name].dtype).requires_grad_()
            for name in self.wrt
        }
        result = reference.attention(**self.case | leaves, precision=precision)
        return self._backward(leaves, result.out, result.lse, dout, dlse)

    def _backward(
        self, leaves: dict[str, Tensor], out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor
    ) -> dict[str, Tensor]:
        dout = dout.masked_fill(self.blind[..., None, None], math.nan).to(out.dtype)
        dlse = dlse.masked_fill(self.blind_lse, math.nan).to(lse.dtype)
        grads = torch.autograd.grad([out, lse], list(leaves.values()), [dout, dlse], allow_unused=True)
        return {
            name: torch.zeros_like(leaf) if grad is None else grad
            for (name, leaf), grad in zip(leaves.items(), grads, strict=True)
        }

    def _summed(self) -> float:
        """How large the sums |q| . |k| behind scores may be: the product of the largest norms, scaled."""
        products = [self._norm(x) * self._norm(y) for x, y in (("q", "k"), ("qv", "v")) if self.case.get(x) is not None]
        return sum(products) * (self.case.get("softmax_scale") or self.queries.shape[-1] ** -0.5)

    def _rotation_slack(self) -> float:
        """How far a score may move when a rotated element close to a tie is rounded to its other neighbour."""
        return 0.0 if self.case.get("rotary_cos") is None else torch.finfo(self.dtype).eps * self._summed()

    def _norm(self, name: str) -> float:
        """The largest norm of a row; what is poisoned does not count."""
        norms = self.case[name].float().nan_to_num(0.0, 0.0, 0.0).norm(dim=-1).flatten()
        descale = self.case.get(f"{name}_descale")
        return max(norms.tolist(), default=0.0) * (
            1.0 if descale is None else max(descale.flatten().tolist(), default=1.0)
        )

    def _eager_rmse_ratio(self, ratio: float) -> float:
        """Eager rounds each score once more; that shows once rows average over many similar keys."""
        typical = self.distribution == "normal" and self.case.get("softmax_scale") != 0
        return ratio if self.keys_per_row >= 512 and typical else math.inf

    def _scale_is_power_of_two(self) -> bool:
        scale = self.case.get("softmax_scale") or self.queries.shape[-1] ** -0.5
        return math.frexp(scale)[0] == 0.5
