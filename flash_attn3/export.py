# SPDX-License-Identifier: BSD-3-Clause
"""Folders that let other packages find flash_attn3 under the names they look for; nothing is installed.

`compat` writes the distribution `flash_attn_3`, upstream's name, whose modules re-export flash_attn3. `hub` writes a
kernel repository for the `kernels` library: a copy of this package with operators of its own.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

from . import __version__
from .build import sources
from .errors import FlashAttn3ValueError, message

LICENSE = "BSD-3-Clause"
HEADER = f"# SPDX-License-Identifier: {LICENSE}\n"
COMPAT_VERSION = "3.0.0"  # of upstream's distribution, which callers compare with
FEATURES = (
    *("BACKWARD", "SPLIT", "PAGEDKV", "APPENDKV", "LOCAL", "SOFTCAP", "PACKGQA", "FP16", "FP8", "VARLEN", "CLUSTER"),
    *("HDIM64", "HDIM96", "HDIM128", "HDIM192", "HDIM256", "HDIMDIFF64", "HDIMDIFF192", "SM8x"),
)
REEXPORT = f'''{HEADER}"""The functions of flash_attn3 under upstream's module name."""

import flash_attn_3._C  # noqa: F401  (defines torch.ops.flash_attn_3)
from flash_attn3.flash_attn_interface import *  # noqa: F403
'''
COMPAT = {
    "pyproject.toml": f"""[build-system]
requires = ["setuptools>=64"]
build-backend = "setuptools.build_meta"

[project]
name = "flash_attn_3"
version = "{COMPAT_VERSION}"
description = "flash_attn3 under the distribution and module names of upstream FlashAttention-3"
dependencies = ["flash_attn3>={__version__}"]

[tool.setuptools]
packages = ["flash_attn_3"]
py-modules = ["flash_attn_config", "flash_attn_interface"]
""",
    "flash_attn_interface.py": REEXPORT,
    "flash_attn_3/flash_attn_interface.py": REEXPORT,
    "flash_attn_config.py": f'''{HEADER}"""What a build of upstream would leave out; here nothing is."""

CONFIG = {{"build_flags": {{f"FLASHATTENTION_DISABLE_{{name}}": False for name in {FEATURES}}}}}
''',
    "flash_attn_3/flash_attn_config.py": f"{HEADER}from flash_attn_config import *  # noqa: F403\n",
    "flash_attn_3/__init__.py": f'{HEADER}__version__ = "{COMPAT_VERSION}"\n',
    # Where upstream's wheel is installed too, Python prefers its extension module of this name to this file.
    "flash_attn_3/_C.py": f'''{HEADER}"""torch.ops.flash_attn_3, unless something else has defined it."""

from flash_attn3.compat import raw_ops

raw_ops.define()
''',
}

HUB_NAME = "flash-attn3"
HUB_BACKENDS = ("cpu", "cuda")
HUB_OMITS = (
    "__main__.py",
    "__pycache__",
    "batch.py",
    "command.py",
    "demo",
    "export.py",
    "info.py",
    "integrations",
    "testing",
)


def compat(folder: Path) -> None:
    """Write the distribution `flash_attn_3`, to be installed with `pip install FOLDER`."""
    _create(folder)
    for name, text in COMPAT.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def hub(folder: Path) -> None:
    """Write a kernel repository: use it with LOCAL_KERNELS="kernels-community/flash-attn3=FOLDER"."""
    _create(folder)
    for backend in HUB_BACKENDS:
        variant = folder / "build" / f"torch-{backend}"
        shutil.copytree(Path(__file__).parent, variant, ignore=shutil.ignore_patterns(*HUB_OMITS))
        shutil.copytree(sources.kernel_folder(), variant / sources.INSTALLED, dirs_exist_ok=True)
        with (variant / "__init__.py").open("a") as init:
            init.write("\nfrom . import flash_attn_interface  # noqa: E402, F401  (callers read it as an attribute)\n")
        metadata = {
            "id": f"flash_attn3_{backend}_{_digest(variant)}",  # the name of the module, and so of its operators
            "name": HUB_NAME,
            "version": 1,
            "license": LICENSE,
            "python-depends": [],
            "backend": {"type": backend},
        }
        (variant / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")


def _create(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FlashAttn3ValueError(message("export", "DIR", folder, "a new or an empty folder"))
    folder.mkdir(parents=True, exist_ok=True)


def _digest(folder: Path) -> str:
    """A short hash of the names and contents of all files."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(f"{path.relative_to(folder).as_posix()}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]
