# SPDX-License-Identifier: BSD-3-Clause
"""What the exports write, installed and loaded as their users do: in a process of its own, and beside the package."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import flash_attn3.flash_attn_interface
from flash_attn3 import FlashAttn3ValueError, export
from flash_attn3.__main__ import main
from flash_attn3.build import sources
from flash_attn3.testing import bitwise_equal, make_inputs

ROOT = Path(flash_attn3.__file__).parents[1]
CONSUMERS = """
import importlib.metadata, importlib.util
import torch

assert importlib.metadata.version("flash-attn-3") == "3.0.0"  # TransformerEngine
assert importlib.metadata.packages_distributions()["flash_attn_interface"] == ["flash_attn_3"]  # transformers
assert importlib.util.find_spec("flash_attn_3._C")  # xformers
assert not hasattr(torch.ops.flash_attn_3, "fwd")

from torch.nn.attention import activate_flash_attention_impl
activate_flash_attention_impl("FA3")

import flash_attn3, flash_attn_interface, flash_attn_config
from flash_attn_3 import flash_attn_interface as inner
for name in flash_attn3.flash_attn_interface.__all__:
    ours = getattr(flash_attn3.flash_attn_interface, name)
    assert getattr(flash_attn_interface, name) is ours and getattr(inner, name) is ours
assert flash_attn_config.CONFIG["build_flags"]["FLASHATTENTION_DISABLE_HDIM96"] is False
from flash_attn_3.flash_attn_config import CONFIG
assert CONFIG is flash_attn_config.CONFIG

def compatible(op, schema):  # xformers
    return op.default._schema.is_backward_compatible_with(torch._C.parse_schema("flash_attn_3::" + schema))

{schemas}
q = torch.randn(1, 7, 2, 16)
out, lse, *_ = torch.ops.flash_attn_3.fwd(q, q, q, is_causal=True)
assert torch.equal(out, flash_attn3.flash_attn_func(q, q, q, causal=True))
print("done")
"""
# As xformers 0.0.35 asks for them.
XFORMERS = {
    "fwd": "(Tensor q, Tensor k, Tensor v, Tensor(k_new!)? k_new=None, Tensor(v_new!)? v_new=None, Tensor? q_v=None, "
    "Tensor(out!)? out=None, Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, Tensor? cu_seqlens_k_new=None, "
    "Tensor? seqused_q=None, Tensor? seqused_k=None, int? max_seqlen_q=None, int? max_seqlen_k=None, "
    "Tensor? page_table=None, Tensor? kv_batch_idx=None, Tensor? leftpad_k=None, Tensor? rotary_cos=None, "
    "Tensor? rotary_sin=None, Tensor? seqlens_rotary=None, Tensor? q_descale=None, Tensor? k_descale=None, "
    "Tensor? v_descale=None, float? softmax_scale=None, bool is_causal=False, int window_size_left=-1, "
    "int window_size_right=-1, int attention_chunk=0, float softcap=0., bool is_rotary_interleaved=False, "
    "Tensor? scheduler_metadata=None, int num_splits=0, bool? pack_gqa=None, int sm_margin=0) "
    "-> (Tensor(out!), Tensor, Tensor, Tensor)",
    "bwd": "(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse, Tensor(dq!)? dq=None, "
    "Tensor(dk!)? dk=None, Tensor(dv!)? dv=None, Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, "
    "Tensor? seqused_q=None, Tensor? seqused_k=None, int? max_seqlen_q=None, int? max_seqlen_k=None, "
    "float? softmax_scale=None, bool is_causal=False, int window_size_left=-1, int window_size_right=-1, "
    "float softcap=0., bool deterministic=False, int sm_margin=0) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
}


def python(code: str, *paths: Path) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (*paths, ROOT))), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)


def test_compat_distribution(tmp_path: Path) -> None:
    """Installed by pip into a folder, then used by a process that knows upstream's names only."""
    assert main(["export-compat", str(tmp_path / "compat")]) == 0
    target = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*install, "--target", target, tmp_path / "compat"], check=True, timeout=120, capture_output=True)
    (names,) = target.glob("flash_attn_3-3.0.0.dist-info/top_level.txt")
    assert names.read_text().split() == ["flash_attn_3", "flash_attn_config", "flash_attn_interface"]
    checks = [
        f'assert compatible(torch.ops.flash_attn_3.{name}, "{name}{schema}")' for name, schema in XFORMERS.items()
    ]
    result = python(CONSUMERS.replace("{schemas}", "\n".join(checks)), target)
    assert result.returncode == 0 and result.stdout == "done\n", result.stderr


def test_import_claims_nothing_and_loads_no_compiler() -> None:
    code = """
import sys, torch
import flash_attn3, flash_attn3.compat
assert not hasattr(torch.ops.flash_attn_3, "fwd")
assert "torch._dynamo" not in sys.modules
"""
    result = python(code)
    assert result.returncode == 0, result.stderr


def test_real_extension_module_wins(tmp_path: Path) -> None:
    """Operators that another library has defined stay."""
    export.compat(tmp_path / "compat")
    code = """
import torch
library = torch.library.Library("flash_attn_3", "DEF")
library.define("fwd(Tensor q) -> Tensor")
import flash_attn_interface
assert len(torch.ops.flash_attn_3.fwd.default._schema.arguments) == 1
"""
    result = python(code, tmp_path / "compat")
    assert result.returncode == 0, result.stderr


def load(variant: Path):
    """As the kernels library does: the folder of a variant as a module named by its metadata."""
    name = json.loads((variant / "metadata.json").read_text())["id"]
    spec = importlib.util.spec_from_file_location(name, variant / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def hub(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "hub"
    assert main(["export-hub", str(folder)]) == 0
    return folder


def test_hub_copy_beside_the_package(hub: Path) -> None:
    """Three copies in one process, each with operators of its own, give the same bits, forward and backward."""
    case = make_inputs("varlen", batch=3, seqlen_q=20, seqlen_k=30) | dict(causal=True)
    lengths = dict(max_seqlen_q=20, max_seqlen_k=30)
    results = []
    for module in (flash_attn3, *(load(hub / "build" / f"torch-{backend}") for backend in export.HUB_BACKENDS)):
        leaves = {name: case[name].clone().requires_grad_() for name in "qkv"}
        out = module.flash_attn_varlen_func(**case | leaves, **lengths, backend="cpu")
        grads = torch.autograd.grad(out, list(leaves.values()), torch.ones_like(out))
        results.append((out, *grads))
        assert callable(module.flash_attn_interface._flash_attn_forward)
        assert callable(module.flash_attn_interface._flash_attn_backward)
        assert hasattr(getattr(torch.ops, module.__name__), "fwd")
    for other in results[1:]:
        assert all(bitwise_equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_hub_copy_compiles_kernels_of_its_own(hub: Path) -> None:
    copies = [load(hub / "build" / f"torch-{backend}") for backend in export.HUB_BACKENDS]
    for module in copies:
        own = importlib.import_module(f"{module.__name__}.build.sources").kernel_folder()
        assert own.is_relative_to(Path(module.__file__).parent)
        original = {path.name: path.read_bytes() for path in sources.kernel_folder().rglob("*.*")}
        assert {path.name: path.read_bytes() for path in own.rglob("*.*")} == original


def test_hub_metadata(hub: Path) -> None:
    identities = set()
    for backend in export.HUB_BACKENDS:
        metadata = json.loads((hub / "build" / f"torch-{backend}" / "metadata.json").read_text())
        assert metadata["backend"] == {"type": backend} and metadata["python-depends"] == []
        assert metadata["id"].isidentifier()
        identities.add(metadata["id"])
    assert len(identities) == 2


def test_hub_copy_imports_nothing_but_torch_and_triton(hub: Path) -> None:
    allowed = {*sys.stdlib_module_names, "torch", "triton"}
    for path in (hub / "build" / "torch-cuda").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module]
            assert {name.split(".")[0] for name in names} <= allowed, path


def test_export_is_reproducible(hub: Path, tmp_path: Path) -> None:
    export.hub(tmp_path / "again")
    for path in hub.rglob("*"):
        if path.is_file() and path.suffix != ".pyc":
            assert path.read_bytes() == (tmp_path / "again" / path.relative_to(hub)).read_bytes(), path


@pytest.mark.parametrize("write", [export.compat, export.hub])
def test_a_folder_in_use_is_left_alone(write, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(FlashAttn3ValueError, match="expected a new or an empty folder"):
        write(tmp_path)
    assert main([f"export-{write.__name__}", str(tmp_path)]) == 2
    assert "expected a new or an empty folder" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
