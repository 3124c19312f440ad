# SPDX-License-Identifier: BSD-3-Clause
"""What the main job proves: rules with their reasons, each decided once and printed.

Two correct implementations of attention differ by rounding only. In fp32 that moves the gradient of this model by
about 1e-6 of its norm, and training does not amplify it: the loss curves of SDPA's own two CPU kernels stay within
1e-6 of each other over 150 steps (measured). A bound of 1e-4 (four decimals) is far above the one and far below what
a wrong mask, scale or head does, which is 1e-2 and more. In bf16, rounding is 2^16 times coarser than in fp32 and part
of the result averages out; 3e-2 leaves the same room.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .decoding import Generation


@dataclass(frozen=True)
class Tolerance:
    loss: float  # absolute, in nats per character, at every step
    gradient: float  # norm of the difference over the norm
    logits: float  # largest difference over the largest logit


TOLERANCES = {
    torch.float32: Tolerance(loss=1e-4, gradient=1e-4, logits=1e-4),
    torch.bfloat16: Tolerance(loss=3e-2, gradient=3e-2, logits=3e-2),
}


@dataclass
class Checks:
    tolerance: Tolerance
    failed: list[str] = field(default_factory=list)

    def record(self, name: str, passed: bool, detail: str) -> None:
        print(f"  [{'ok' if passed else 'FAILED'}] {name}: {detail}")
        if not passed:
            self.failed.append(name)

    def gradients(self, when: str, ours: Tensor, theirs: Tensor) -> None:
        difference = float((ours - theirs).norm() / theirs.norm())
        detail = f"relative difference {difference:.1e}, allowed {self.tolerance.gradient:.0e}"
        self.record(f"gradients {when}", difference <= self.tolerance.gradient, detail)

    def loss_curves(self, ours: list[float], theirs: list[float]) -> None:
        difference = float((torch.tensor(ours) - torch.tensor(theirs)).abs().max())
        detail = f"largest difference {difference:.1e} over {len(ours)} steps, allowed {self.tolerance.loss:.0e}"
        self.record("loss curves", difference <= self.tolerance.loss, detail)

    def learning(self, losses: list[float]) -> None:
        self.record("learning", losses[-1] < losses[0], f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")

    def generation(self, decoded: Generation, recomputed: Generation) -> None:
        """Equal tokens; another one only where the two best logits are closer than the logits are exact."""
        allowed = self.tolerance.logits * float(recomputed.logits.abs().max())
        difference = float((decoded.logits - recomputed.logits).abs().max())
        equal = decoded.tokens == recomputed.tokens
        best = recomputed.logits.amax(-1)
        chosen = recomputed.logits.gather(-1, decoded.tokens[..., None])[..., 0]
        detail = f"{int(equal.sum())} of {equal.numel()} equal, logits within {difference:.1e}, allowed {allowed:.1e}"
        passed = difference <= allowed and bool((equal | (best - chosen <= allowed)).all())
        self.record("generated tokens", passed, detail)
