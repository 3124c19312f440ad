# SPDX-License-Identifier: BSD-3-Clause
"""Everything is declared in pyproject.toml; this file is where compiled extensions attach."""

from setuptools import setup

setup()
