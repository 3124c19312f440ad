# SPDX-License-Identifier: BSD-3-Clause
"""The list of kernels, and the choice among them."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from toy import ToyVariant

from flash_attn3 import variants

ROOT = Path(__file__).parents[2]
WITHOUT_TORCH = """
import sys, types
package = types.ModuleType("flash_attn3")
package.__path__ = ["flash_attn3"]
sys.modules["flash_attn3"] = package
import flash_attn3.variants, flash_attn3.build.batch
print("torch" in sys.modules)
"""


def problem(dtype: torch.dtype, head_dim: int, head_dim_v: int | None = None, rows: int = 5) -> SimpleNamespace:
    q, v = torch.empty(2, rows, 4, head_dim, dtype=dtype), torch.empty(2, 9, 2, head_dim_v or head_dim, dtype=dtype)
    sizes = dict(num_heads=4, num_heads_kv=2, cu_seqlens_q=None, pack_gqa=None, page_table=None, qv=None)
    return SimpleNamespace(q=q, v=v, **sizes)


def test_names_are_unique_and_safe_for_file_systems() -> None:
    names = [variant.name for variant in variants.all_variants()]
    assert len(set(names)) == len(names) > 0
    assert all(re.fullmatch("[a-z0-9_]{1,128}", name) for name in names)


def test_every_variant_is_found_by_its_name() -> None:
    for variant in variants.all_variants():
        assert variants.by_name(variant.name) is variant
    assert variants.by_name("fwd") is None


def test_a_forward_that_is_not_in_the_list_is_found_by_its_name() -> None:
    other = variants.FwdVariant("bf16", 128, 128, block_n=176, ping_pong=False, hold=False)
    assert other not in variants.all_variants() and variants.by_name(other.name) == other
    for d, dv in variants.BLOCK_N:
        wide = variants.FwdVariant("fp16", d, dv, block_m=192, block_n=16, kv_source="cp_async")
        assert variants.by_name(wide.name) == wide


def test_tiles_have_room_and_the_next_ones_have_none_where_the_reason_says_so() -> None:
    for (d, dv), tile in variants.FWD_TILES.items():
        used = variants.FwdVariant("bf16", d, dv, block_n=tile.block_n)
        assert used.is_possible() and variants.notes(f"{used.name}, bwd")[0].endswith(tile.reason)
        more = int(tile.reason.split()[0])
        larger = dataclasses.replace(used, block_n=more)
        assert more > tile.block_n and larger.is_possible() == (" fit" in tile.reason)


@pytest.mark.parametrize(
    "change", [{"block_n": 208}, {"block_n": 120}, {"stages": 1}, {"stages": 4}, {"block_m": 96}, {"head_dim": 120}]
)
def test_no_kernel_that_products_or_shared_memory_rule_out(change: dict) -> None:
    assert variants.by_name(dataclasses.replace(variants.FwdVariant("bf16", 128, 128), **change).name) is None


@pytest.mark.parametrize("variant", variants.all_variants(), ids=lambda variant: variant.name)
def test_names_tell_variants_apart_by_every_field(variant: variants.Variant) -> None:
    for field in dataclasses.fields(variant):
        value = getattr(variant, field.name)
        change = not value if isinstance(value, bool) else value + 8 if isinstance(value, int) else value + "x"
        assert dataclasses.replace(variant, **{field.name: change}).name != variant.name


def test_stub_holds_the_configuration_between_two_includes() -> None:
    assert ToyVariant(threads=256, smem_bytes=0).stub() == (
        '#include "toy.cuh"\n'
        "using namespace fa3;\n"
        "constexpr ToyConfig kConfig{.threads = 256, .smem_bytes = 0};\n"
        '#include "toy_entry.cuh"\n'
    )
    assert ToyVariant().entry == "fa3_toy"


def test_enumerations_are_qualified_in_the_stub() -> None:
    stub = variants.FwdVariant("fp16", 64, 64, ping_pong=False).stub()
    assert ".dtype = Dtype::fp16" in stub and ".kv_source = KvSource::tma" in stub and ".ping_pong = false" in stub


@pytest.mark.parametrize("kind", list(dict.fromkeys(map(type, variants.all_variants()))))
def test_fields_are_those_of_the_configuration_in_their_order(kind: type[variants.Variant]) -> None:
    """Else the kernel would have a choice that the list of variants does not know."""
    text = (ROOT / "hopper" / "config.h").read_text()
    body = re.search(rf"struct {kind.config} {{(.*?)\n}};", text, re.DOTALL)[1]
    members = re.findall(r"^ {4}(?:\w+) (\w+)(?: = [\w:]+)?;", body, re.MULTILINE)
    assert members == [field.name for field in dataclasses.fields(kind)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("head_dim", "head_dim_v", "served_by"),
    [
        (8, 8, (64, 64)),
        (64, 64, (64, 64)),
        (72, 72, (96, 96)),
        (104, 104, (128, 128)),
        (128, 128, (128, 128)),
        (64, 128, (128, 128)),
        (192, 128, (192, 128)),
        (136, 136, (192, 192)),
        (256, 256, (256, 256)),
    ],
)
def test_smallest_kernel_that_holds_the_head_dims(dtype, head_dim, head_dim_v, served_by) -> None:
    p = problem(dtype, head_dim, head_dim_v)
    chosen = variants.select(p)
    assert (chosen.head_dim, chosen.head_dim_v) == served_by
    assert chosen.dtype == {torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    assert variants.supports(p) and variants.unsupported_reason(p) is None


@pytest.mark.parametrize(
    ("rows", "pack_gqa", "block_m"), [(32, None, 64), (33, None, 128), (64, False, 64), (65, False, 128)]
)
def test_small_tile_for_calls_with_few_rows(rows: int, pack_gqa: bool | None, block_m: int) -> None:
    """Two query heads share a KV head, and a tile where they are packed."""
    p = problem(torch.bfloat16, 64, rows=rows)
    p.pack_gqa = pack_gqa
    assert variants.select(p).block_m == block_m


def test_reason_names_what_was_wanted_and_the_nearest_kernel() -> None:
    largest = max(variants.fwd_variants(), key=lambda variant: (variant.dtype == "fp16", variant.head_dim))
    p = problem(torch.float16, 1024)
    assert variants.select(p) is None and not variants.supports(p)
    reason = variants.unsupported_reason(p)
    assert "float16 with head dims (1024, 1024)" in reason and largest.name in reason
    assert "float32 with head dims (64, 64)" in variants.unsupported_reason(problem(torch.float32, 64))


def test_selection_is_a_cached_lookup() -> None:
    variants.select(problem(torch.bfloat16, 64))
    before = variants._select.cache_info()
    variants.select(problem(torch.bfloat16, 64))
    after = variants._select.cache_info()
    assert (after.hits, after.misses) == (before.hits + 1, before.misses)


def test_list_and_build_do_without_torch() -> None:
    """setup.py reads them in an environment that has none."""
    command = [sys.executable, "-c", WITHOUT_TORCH]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert result.stdout == "False\n", result.stderr
