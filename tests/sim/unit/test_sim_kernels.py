# SPDX-License-Identifier: BSD-3-Clause
"""A compiled kernel, whole: through the simulator's own driver object and through flash_attn3._C."""

from __future__ import annotations

import ctypes
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests import hopper_sim

BFLOAT16, SWIZZLE_128B = 9, 3  # CUtensorMapDataType, CUtensorMapSwizzle
SMEM_BYTES = 131120  # sizeof(Smem) of gemm.cu

THROUGH_C = """
import struct, sys, torch
from flash_attn3 import _C

with open(sys.argv[1], "rb") as file:
    images = [b"\\x7fELF: a cubin", file.read()]  # the first is refused, the second tried
kernel = _C.Kernel("gemm", "gemm", images)
stamp = kernel.load(0)
assert (stamp.threads, stamp.block_m) == (384, 128)
m, n, k = 256, 128, 320
a, b = (torch.randint(-4, 5, (rows, k)).to(torch.bfloat16) for rows in (m, n))
c = torch.full((m, n), torch.nan, dtype=torch.bfloat16)
maps = b""
for tensor in (a, b, c):
    view = tensor.data_ptr(), tuple(tensor.shape), tensor.stride()
    maps += _C.encode_tensor_map("x", 9, 2, view, [128, 64], 3)
params = (maps + struct.pack("i", k)).ljust(stamp.params_bytes, b"\\0")
kernel.launch(params, (m // 128, n // 128, 1))
assert torch.equal(c, (a.float() @ b.float().T).to(torch.bfloat16))
print(_C.driver_path(), _C.driver_version())
"""


def integers(rows: int, columns: int) -> Tensor:
    """Small enough for exact sums in fp32."""
    return torch.randint(-4, 5, (rows, columns)).to(torch.bfloat16)


def arguments(driver: hopper_sim.Driver, a: Tensor, b: Tensor, c: Tensor) -> ctypes.Array:
    """GemmParams of gemm.cu."""
    maps = b""
    for name, tensor in (("a", a), ("b", b), ("c", c)):
        rows, columns = tensor.shape
        driver.register(tensor.data_ptr(), tensor.nbytes, name)
        encoded = driver.tensor_map(
            tensor.data_ptr(), BFLOAT16, [columns, rows], [2 * columns], [64, 128], SWIZZLE_128B
        )
        maps += bytes(encoded)
    return ctypes.create_string_buffer(maps + struct.pack("i", a.shape[1]), 512)


@pytest.mark.parametrize("k", [64, 192, 448])
@pytest.mark.parametrize("policy", ["eager", "lazy", "lazy,order=oldest", "random", "random,seed=2"])
def test_gemm(driver: hopper_sim.Driver, compiled: Callable[[str], str], policy: str, k: int) -> None:
    a, b, c = integers(256, k), integers(384, k), torch.full((256, 384), torch.nan, dtype=torch.bfloat16)
    driver.configure(f"policy={policy}")
    driver.load(compiled("gemm"), "gemm").launch((2, 3), 384, arguments(driver, a, b, c), smem=SMEM_BYTES)
    assert torch.equal(c, (a.float() @ b.float().T).to(torch.bfloat16))
    (launch,) = driver.report()["launches"]
    assert launch["hazards"] == []
    assert launch["statistics"]["macs"] == 256 * 384 * k


def test_gemm_through_the_package(compiled: Callable[[str], str], tmp_path: Path) -> None:
    pytest.importorskip("flash_attn3._C")
    (tmp_path / "gemm.ptx").write_text(compiled("gemm"))
    library = str(hopper_sim.build())
    done = subprocess.run(
        [sys.executable, "-c", THROUGH_C, str(tmp_path / "gemm.ptx")],
        env=os.environ | {"FLASH_ATTN3_LIBCUDA": library},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [library, "13000"]
