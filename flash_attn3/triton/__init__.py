# SPDX-License-Identifier: BSD-3-Clause
"""The Triton backend: every GPU that Triton drives, and the CPU under TRITON_INTERPRET=1."""
