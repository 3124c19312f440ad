# SPDX-License-Identifier: BSD-3-Clause
"""`python -m flash_attn3 build`: compile kernels before they are first used, and show what the compiler says."""

from __future__ import annotations

import argparse
import difflib
import sys

from .. import variants
from ..errors import ToolchainError
from . import batch, find, obtain, sources, toolchain
from .manifest import Artifact

PURPOSE = "compile Hopper kernels into the user's cache, and show what the compiler says of them"
EPILOG = "Exit code 0: all is well, 1: a kernel does not compile or fails --check, 2: unknown kernel, or no compiler."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    parser.add_argument("names", nargs="*", metavar="NAME", help="kernels to compile; --list shows those in use")
    parser.add_argument("--all", action="store_true", help="every kernel")
    parser.add_argument("--list", action="store_true", help="print the kernels, and which are compiled, and stop")
    parser.add_argument("--check", action="store_true", help="fail on spills, stack and warnings that cost speed")
    parser.add_argument("-j", "--jobs", type=_jobs, default=batch.default_jobs(), help="compilers at once")


def _jobs(text: str) -> int:
    jobs = int(text)
    if jobs < 1:
        raise argparse.ArgumentTypeError(f"{jobs} is not at least 1")
    return jobs


def run(args: argparse.Namespace) -> int:
    if args.list + args.all + bool(args.names) != 1 or (args.list and args.check):
        return _refuse("give names of kernels, or --all, or --list alone")
    if args.list:
        for variant in variants.all_variants():
            print(variant.name, "compiled" if find(variant) else "-", *variants.notes(variant.name), sep="  ")
        return 0
    chosen = list(variants.all_variants()) if args.all else list(map(variants.by_name, dict.fromkeys(args.names)))
    if None in chosen:
        return _refuse("; ".join(map(_unknown, (name for name in args.names if variants.by_name(name) is None))))
    if not all(map(find, chosen)):
        try:
            toolchain.find()
            sources.include_folders()
        except ToolchainError as error:
            return _refuse(str(error))
    results = dict(batch.compile_all(chosen, args.jobs, obtain))
    made = {variant: results[variant] for variant in chosen if isinstance(results[variant], Artifact)}
    if made:
        print(batch.table(made))
    for variant in chosen:
        if variant not in made:
            print(results[variant], file=sys.stderr)
    good = sum(not artifact.report.complaints for artifact in made.values())
    if args.check:
        print(f"check: {good} of {len(chosen)} kernels pass")
    return int(len(made) < len(chosen) or (args.check and good < len(chosen)))


def _unknown(name: str) -> str:
    known = [variant.name for variant in variants.all_variants()]
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0)
    return f"no kernel {name!r}; the nearest is {nearest[0]}, and --list shows all"


def _refuse(message: str) -> int:
    print(message if message.startswith("flash_attn3:") else f"flash_attn3: {message}", file=sys.stderr)
    return 2
