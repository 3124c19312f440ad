# SPDX-License-Identifier: BSD-3-Clause
"""`python -m tests.hopper_sim [build]` builds the simulator and prints, last, the path of the library;
`python -m tests.hopper_sim lacks FILE.ptx...` lists what these files need and the simulator lacks."""

from __future__ import annotations

import argparse
from pathlib import Path

from .build import build
from .driver import Driver


def lacks(files: list[Path]) -> int:
    driver = Driver()
    missing = 0
    for path in files:
        lines = driver.unsupported(path.read_text())
        missing += len(lines)
        print(f"{path}: {len(lines) or 'nothing'} missing", *lines, sep="\n  ")
    return int(missing > 0)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.hopper_sim", description=__doc__)
    commands = parser.add_subparsers(dest="command")
    commands.add_parser("build", help="build the library and print its path (the default)")
    command = commands.add_parser("lacks", help="list what PTX files need and the simulator lacks")
    command.add_argument("files", nargs="+", type=Path)
    arguments = parser.parse_args()
    if arguments.command == "lacks":
        return lacks(arguments.files)
    print(build())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
