# SPDX-License-Identifier: BSD-3-Clause
"""The main job: train a small character model on flash_attn3 and on SDPA, generate with a cache, check all of it.

`python -m flash_attn3` runs it. It needs no download and, on two CPU cores, less than two minutes.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from .. import __version__, api, why
from . import attend
from .checks import TOLERANCES, Checks
from .corpus import batches, standard_library
from .decoding import Generation, decode, recompute
from .model import ModelConfig
from .training import Trainer, learning_rate, precision

BATCH_SIZE = 8
SEQLEN = 256
PROMPT_LENGTH = 64


def missing_packages() -> list[str]:
    return [name for name in ("matplotlib", "tqdm") if importlib.util.find_spec(name) is None]


def train(ours: Trainer, theirs: Trainer, excerpts: Iterator[Tensor], steps: int, checks: Checks) -> None:
    """Both take every step on the same batch, one after the other, so that noise of the machine hits both."""
    from tqdm import tqdm

    device = ours.device
    probe = next(excerpts).to(device)
    checks.gradients("before training", ours.gradient(probe), theirs.gradient(probe))
    with tqdm(range(steps), desc="  training", unit="step", mininterval=0.5) as progress:
        for step in progress:
            batch = next(excerpts).to(device)
            for trainer in (ours, theirs):
                trainer.step(batch, learning_rate(step, steps))
            losses = {trainer.name: f"{trainer.losses[-1]:.4f}" for trainer in (ours, theirs)}
            progress.set_postfix(losses, refresh=False)
    checks.loss_curves(ours.losses, theirs.losses)
    checks.learning(ours.losses)
    theirs.model.load_state_dict(ours.model.state_dict())
    checks.gradients("after training", ours.gradient(probe), theirs.gradient(probe))


def generate(
    ours: Trainer, theirs: Trainer, prompts: Tensor, num_new: int, backend: str | None, checks: Checks
) -> list[Generation]:
    """By cached decoding on flash_attn3, and by full recomputation on SDPA; both by the trained model."""
    model, device = ours.model, ours.device

    def cache() -> attend.FlashWithCache:
        return attend.FlashWithCache(model.config, len(prompts), device, precision(device), backend)

    decode(model, cache(), prompts, min(4, num_new))  # warm-up
    decoded = decode(model, cache(), prompts, num_new)
    recomputed = recompute(model, theirs.attend, prompts, decoded.tokens)
    checks.generation(decoded, recomputed)
    return [decoded, recomputed]


def chosen_backend(config: ModelConfig, device: torch.device, backend: str | None) -> str:
    q = torch.empty(1, SEQLEN, config.num_heads, config.head_dim, device=device, dtype=precision(device))
    return why(api.flash_attn_func, q, q, q, causal=True, backend=backend).backend


def print_sample(prompt: Tensor, continuation: Tensor) -> None:
    before, after = (bytes(tokens.tolist()).decode("ascii", "replace") for tokens in (prompt, continuation))
    print("The first of the prompts, and after >>> what the model adds, greedy:")
    print("", *f"{before}>>>{after}".splitlines(), sep="\n  | ")


def print_speeds(speeds: dict[str, dict[str, float]]) -> None:
    print("Speed, tokens/s:")
    for what, values in speeds.items():
        (ours, ours_value), (theirs, theirs_value) = values.items()
        ratio = ours_value / theirs_value
        print(f"  {what:9} {ours} {ours_value:10,.0f}   {theirs} {theirs_value:10,.0f}   ratio {ratio:.2f}")


def run(device: torch.device, steps: int, num_new: int, backend: str | None, out: Path, seed: int) -> int:
    """The exit code: 0 if every check passed, 1 if one failed."""
    config = ModelConfig()
    if num_new > (most := config.max_seqlen - PROMPT_LENGTH):
        raise ValueError(f"--tokens {num_new}; expected at most {most}")
    chosen = chosen_backend(config, device, backend)
    print(
        f"flash_attn3 {__version__}, backend {chosen}, device {device}, {precision(device)}, torch {torch.__version__}"
    )
    flash = attend.flash(config, device, backend)
    ours = Trainer.seeded("flash_attn3", config, flash, device, seed)
    theirs = Trainer.seeded("SDPA", config, attend.sdpa(config, device), device, seed)
    parameters = sum(p.numel() for p in ours.model.parameters())
    print(f"A character GPT of {parameters:,} parameters on Python's standard library, {steps} steps:")
    checks = Checks(TOLERANCES[precision(device)])
    excerpts = batches(standard_library(), BATCH_SIZE, SEQLEN, seed)
    train(ours, theirs, excerpts, steps, checks)
    prompts = next(excerpts)[:, :PROMPT_LENGTH].to(device)
    decoded, recomputed = generate(ours, theirs, prompts, num_new, backend, checks)
    print_sample(prompts[0], decoded.tokens[0])
    speeds = {
        "training": {t.name: t.tokens_per_second(BATCH_SIZE * SEQLEN) for t in (ours, theirs)},
        "decoding": {"with cache": decoded.tokens_per_second, "recompute": recomputed.tokens_per_second},
    }
    print_speeds(speeds)
    save_plot(out / "flash_attn3.png", f"flash_attn3 {__version__}, {chosen} backend", ours, theirs, speeds)
    if checks.failed:
        print(f"FAILED: {', '.join(checks.failed)}")
        return 1
    print("All checks passed.")
    return 0


def save_plot(path: Path, title: str, ours: Trainer, theirs: Trainer, speeds: dict[str, dict[str, float]]) -> None:
    from . import plot

    path.parent.mkdir(parents=True, exist_ok=True)
    plot.save(path, title, {ours.name: ours.losses, theirs.name: theirs.losses}, speeds)
    print(f"Plot: {path}")
