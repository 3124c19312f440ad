# SPDX-License-Identifier: BSD-3-Clause
"""Every feature of the Triton backend's forward on a GPU: the tests that its interpreter runs on the CPU."""

from __future__ import annotations

from test_triton_interpret import *  # noqa: F403

pytestmark = []  # not in the interpreter
