# SPDX-License-Identifier: BSD-3-Clause
"""`python -m flash_attn3`: the main job, or one of the subcommands."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from . import demo, env, export, info
from .build import command as build
from .errors import FlashAttn3Error

EXPORTS = {
    "export-compat": (export.compat, "write the distribution flash_attn_3, for packages that look for upstream's name"),
    "export-hub": (export.hub, "write a kernel repository for the kernels library (LOCAL_KERNELS)"),
}


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m flash_attn3",
        description="Train a small character model on flash_attn3 and on torch SDPA, generate text with a key-value "
        "cache, and check that everything agrees. Exit code 0: all checks passed, 1: one failed, 2: cannot run.",
    )
    p.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is one")
    p.add_argument("--steps", type=positive, default=120, help="training steps (default 120)")
    p.add_argument("--tokens", type=positive, default=128, help="characters to generate for each prompt (default 128)")
    p.add_argument("--backend", choices=env.BACKENDS, help="default: chosen by the package")
    p.add_argument("--out", type=Path, default=Path("out"), metavar="DIR", help="folder of the plot (default out)")
    p.add_argument("--seed", type=int, default=0, help="of weights and batches (default 0)")
    commands = p.add_subparsers(dest="command", metavar="command")
    report = commands.add_parser("info", help="what is installed, which backends work here, and why others do not")
    report.add_argument("--json", action="store_true", help="machine-readable")
    build.add_arguments(commands.add_parser("build", help=build.PURPOSE, description=build.PURPOSE))
    for name, (_, purpose) in EXPORTS.items():
        commands.add_parser(name, help=purpose).add_argument("folder", type=Path, metavar="DIR", help="new or empty")
    return p


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    if args.command == "info":
        print(info.as_json() if args.json else info.as_text())
        return 0
    if args.command == "build":
        return build.run(args)
    if args.command in EXPORTS:
        return run_export(args.command, args.folder)
    if missing := demo.missing_packages():
        return refuse(f"{' and '.join(missing)} missing; pip install 'flash_attn3[demo]'")
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        return refuse("--device cuda: torch sees no CUDA device (see `python -m flash_attn3 info`)")
    try:
        return demo.run(device, args.steps, args.tokens, args.backend, args.out, args.seed)
    except (FlashAttn3Error, ValueError) as error:
        return refuse(str(error))


def run_export(command: str, folder: Path) -> int:
    try:
        EXPORTS[command][0](folder)
    except (FlashAttn3Error, OSError) as error:
        return refuse(str(error))
    return 0


def refuse(message: str) -> int:
    print(f"flash_attn3: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
