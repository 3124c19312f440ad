# SPDX-License-Identifier: BSD-3-Clause
"""What tests on a GPU share. Without a GPU they are skipped by tests/conftest.py, which says so."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch


@pytest.fixture(autouse=True)
def expected_fallback() -> Iterator[None]:
    """On a Hopper GPU another backend is announced once; that is not what these tests are about."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="flash_attn3 runs on the")
        yield


@pytest.fixture
def no_sync():
    """A context in which every synchronisation with the device raises."""

    @contextmanager
    def guard() -> Iterator[None]:
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")

    return guard
