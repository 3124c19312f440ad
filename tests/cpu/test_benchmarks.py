# SPDX-License-Identifier: BSD-3-Clause
"""The benchmarks: no figure for a wrong result, fair turns, tables that say only what was measured."""

from __future__ import annotations

import argparse
import json
import sys
import time
from functools import partial
from pathlib import Path

import bench_bwd
import bench_cpu
import bench_decode
import bench_fwd
import contestants
import gate
import gpu_entry
import harness
import plots
import pytest
import readme_table
import shapes
import torch
from gate import expect, judge
from harness import QUICK, Case, Entry, Local, on_cpu, on_one_thread, timed
from peers import Peers
from shapes import DecodeShape, Shape, inputs

from flash_attn3 import reference

SHAPES = [
    Shape(2, 33, 4, 2, 16, 16, "fp32", causal=True),
    Shape(1, 40, 2, 2, 16, 8, "fp32", causal=True, window=5),
    Shape(2, 17, 2, 1, 16, 16, "fp32"),
    Shape(3, 0, 4, 2, 16, 16, "fp32", causal=True, lengths=(5, 1, 19)),
]


def attend(shape: Shape, tensors: dict, **wrong) -> dict[str, torch.Tensor]:
    """The oracle over the whole input, with gradients; `wrong` changes the question."""
    leaves = {name: tensors[name].double().requires_grad_() for name in "qkv"}
    question = {"causal": shape.causal, "window_size": (shape.window, -1)} | wrong
    if shape.lengths:
        question |= {"cu_seqlens_q": tensors["cu_seqlens"], "cu_seqlens_k": tensors["cu_seqlens"]}
    out = reference.attention(**leaves, **question).out
    grads = torch.autograd.grad(out, list(leaves.values()), tensors["dout"].double())
    named = zip(("out", "dq", "dk", "dv"), (out.detach(), *grads), strict=True)
    return {name: x.to(shape.torch_dtype) for name, x in named}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rows_at_once", [8, 1024])
def test_gate_accepts_the_right_result(monkeypatch, shape: Shape, rows_at_once: int) -> None:
    monkeypatch.setattr(gate, "ROWS_AT_ONCE", rows_at_once)
    tensors = inputs(shape, "cpu")
    expected = expect(shape, tensors, backward=True)
    assert {part.tensor for part in expected} == {"out", "dq", "dk", "dv"}
    assert judge(attend(shape, tensors), expected, shape.torch_dtype) is None


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("tensor", ["out", "dq", "dk", "dv"])
def test_gate_refuses_one_wrong_element_and_nan(shape: Shape, tensor: str) -> None:
    tensors = inputs(shape, "cpu")
    expected = expect(shape, tensors, backward=True)
    for value, reason in ((3.0, tensor), (torch.nan, "not finite")):
        result = attend(shape, tensors)
        result[tensor].view(-1)[-1] += value
        assert reason in judge(result, expected, shape.torch_dtype)


@pytest.mark.parametrize("wrong", [{"causal": False}, {"window_size": (4, -1)}, {"softmax_scale": 0.24}], ids=str)
def test_gate_refuses_another_question(wrong: dict) -> None:
    shape = SHAPES[1]
    tensors = inputs(shape, "cpu")
    assert judge(attend(shape, tensors, **wrong), expect(shape, tensors, backward=True), torch.float32)


def test_gate_refuses_one_wrong_row_in_bf16() -> None:
    shape = Shape(1, 512, 1, 1, 32, 32, "bf16")
    tensors = inputs(shape, "cpu")
    expected, result = expect(shape, tensors, backward=False), attend(shape, tensors)
    assert judge(result, expected, torch.bfloat16) is None
    result["out"][0, 300] *= 1.1
    assert "out" in judge(result, expected, torch.bfloat16)


def test_gate_of_decode_follows_the_page_table() -> None:
    shape = DecodeShape(3, 37, 4, 2, 16, page_size=8, dtype="fp32")
    tensors = shapes.decode_inputs(shape, "cpu")
    expected = gate.expect_decode(shape, tensors)
    question = {"seqused_k": tensors["cache_seqlens"], "page_table": tensors["page_table"]}
    out = reference.attention(tensors["q"].double(), tensors["k_cache"], tensors["v_cache"], **question).out
    assert judge({"out": out.float()}, expected, torch.float32) is None
    assert judge({"out": out.float().flip(0)}, expected, torch.float32)


@pytest.mark.parametrize("decodes", [0, 3, 20])
def test_gate_of_a_composition(decodes: int) -> None:
    """A piece of a prompt alone, beside decode tokens, and decode tokens alone."""
    shape = shapes.Composition(decodes, budget=20, context=13, h=4, h_kv=2, d=16, page_size=8, dtype="fp32")
    assert sum(shape.new) == 20 and len(shape.new) == decodes + (decodes < 20)
    tensors = shapes.composition_inputs(shape, "cpu")
    expected = gate.expect_composition(shape, tensors)
    with torch.no_grad():
        out = contestants.flash_composition(shape, tensors, "cpu")()
    assert judge({"out": out}, expected, torch.float32) is None
    assert judge({"out": out.flip(0)}, expected, torch.float32)
    assert shape.flops() == 4 * 4 * 16 * sum(13 * n + n * (n + 1) // 2 for n in shape.new)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [-1, 0, 3, 40])
@pytest.mark.parametrize("n", [0, 1, 4, 33])
def test_visible_pairs(n: int, causal: bool, window: int) -> None:
    count = sum((not causal or j <= i) and (window < 0 or j >= i - window) for i in range(n) for j in range(n))
    assert shapes.visible_pairs(n, causal, window) == count


def test_flops_count_all_sequences_and_query_heads() -> None:
    shape = Shape(2, 0, 8, 2, 16, 32, causal=True, lengths=(3, 5))
    assert shape.flops() == 2 * 8 * (16 + 32) * (6 + 15)
    assert shape.flops(shapes.BACKWARD) == 2.5 * shape.flops()


def test_contestants_take_turns() -> None:
    calls: list[str] = []
    contestants = [Local(name, partial(calls.append, name), on_cpu) for name in "abc"]
    samples = harness.race(contestants, harness.Effort(warmup=0, sample=0, least_rounds=3, most_rounds=3))
    assert [len(taken) for taken in samples] == [3, 3, 3]
    assert calls[3:] == list("abcbcacab")


def case_of(*contestants: Local) -> Case:
    exact = torch.ones(1, 2, 1, 4, dtype=torch.float64)
    expected = [gate.Expected("out", (slice(None),), exact)]
    return Case("fwd", "row", "column", timed(lambda: Entry(list(contestants), expected, torch.float32)))


def giving(name: str, value: float, **counts: int) -> Local:
    return Local(name, lambda: torch.full((1, 2, 1, 4), value), on_cpu, lambda out: {"out": out}, **counts)


def failing() -> torch.Tensor:
    raise RuntimeError("no kernel image\nis available")


def test_no_figure_for_a_wrong_or_failing_result() -> None:
    broken = Local("broken", failing, on_cpu, lambda out: {"out": out})
    rows = case_of(giving("right", 1.0, flops=10), giving("wrong", 1.1), broken).measure(QUICK)
    by_name = {row["contestant"]: row for row in rows}
    assert by_name["right"]["status"] == "ok" and by_name["right"]["tflops"] > 0
    assert by_name["wrong"].keys() == {"contestant", "status"} and by_name["wrong"]["status"].startswith("wrong: ")
    assert by_name["broken"]["status"] == "unavailable: RuntimeError: no kernel image"


@pytest.mark.parametrize(("value", "code"), [(1.0, 0), (1.1, 1)])
def test_a_wrong_result_of_ours_is_the_exit_code(tmp_path, value: float, code: int) -> None:
    args = argparse.Namespace(quick=True, list=False, only="", out=tmp_path, seconds=1.0)
    cases = [case_of(giving("flash_attn3 cpu", value), giving("SDPA", 1.0))]
    assert harness.main("fwd", cases, "cpu", args) == code
    (path,) = tmp_path.glob("fwd-*-quick.json")
    report = json.loads(path.read_text())
    assert report["quick"] and report["device"] and "commit" in report
    assert [row["status"][:5] for row in report["cases"][0]["rows"] if row["contestant"] == "SDPA"] == ["ok"]


def report_of(bench: str, **values: float) -> dict:
    rows = [{"contestant": name, "status": "ok", "tflops": x, "ms": 1 / x} for name, x in values.items()]
    cases = [{"table": bench, "row": "D64", "column": "S 512", "rows": rows}]
    facts = {"device": "H100", "torch": "2.11", "commit": "abc", "started": "2026-01-01T00:00:00", "cases": cases}
    return {"bench": bench, "quick": False} | facts


def test_tables(tmp_path: Path) -> None:
    found = {"fwd": [report_of("fwd", flash_attn3=300.0, cuBLAS=790.0, SDPA=200.0)]}
    text = "a\n<!-- table:fwd -->\nold\n<!-- /table -->\nb\n<!-- table:bwd -->\n<!-- /table -->\n"
    written = readme_table.write(text, found)
    assert "| D64 | 300 (1.50) |" in written and "old" not in written
    assert "<!-- table:bwd -->\nnot measured\n<!-- /table -->" in written
    assert written.startswith("a\n") and "\nb\n" in written
    assert readme_table.write(written, found) == written
    decode = report_of("decode")
    rows = [{"contestant": name, "status": "ok", "gbps": x} for name, x in (("flash_attn3", 60.0), ("copy", 80.0))]
    decode["cases"][0]["rows"] = rows
    decode["cases"].append({"table": "splitfuse", "row": "768 tokens", "column": "64 decodes", "rows": []})
    assert "| D64 | 60, 75% of copy |" in readme_table.table("decode", [decode])
    assert "| 768 tokens | not measured |" in readme_table.table("splitfuse", [decode])
    with pytest.raises(SystemExit, match="table:other"):
        readme_table.write("<!-- table:other -->\n<!-- /table -->", found)


def test_table_of_a_case_nobody_of_ours_ran() -> None:
    assert "| D64 | not measured |" in readme_table.table("fwd", [report_of("fwd", SDPA=200.0)])
    assert "| D64 | not measured |" in readme_table.table("cpu", [report_of("cpu", SDPA=200.0)])


def test_table_of_a_case_whose_peer_was_wrong() -> None:
    report = report_of("cpu", flash_attn3=0.25)
    assert "| D64 | 4 ms (no peer) |" in readme_table.table("cpu", [report])
    report["cases"][0]["rows"].append({"contestant": "SDPA", "status": "wrong: dk has RMSE 1"})
    assert "| D64 | 4 ms (SDPA: wrong) |" in readme_table.table("cpu", [report])


def test_quick_runs_enter_no_table(tmp_path: Path) -> None:
    for name, quick in (("a", True), ("b", False)):
        (tmp_path / f"{name}.json").write_text(json.dumps(report_of("fwd") | {"quick": quick}))
    assert len(readme_table.reports(tmp_path)["fwd"]) == 1


def test_plots(tmp_path, monkeypatch) -> None:
    for bench in ("fwd", "cpu"):
        report = report_of(bench, flash_attn3=300.0, SDPA=200.0)
        if bench == "fwd":
            report["cases"] += report_of("splitfuse", flash_attn3=300.0, copy=900.0)["cases"]
        (tmp_path / f"{bench}.json").write_text(json.dumps(report))
    monkeypatch.setattr(sys, "argv", ["plots.py", "--results", str(tmp_path)])
    assert plots.main() == 0
    assert {path.name for path in tmp_path.glob("*.png")} == {"fwd-h100.png", "fwd-h100-splitfuse.png", "cpu-h100.png"}


@pytest.mark.parametrize(
    ("bench", "cases"),
    [
        ("fwd", partial(bench_fwd.cases, "fwd", "forward")),
        ("bwd", partial(bench_bwd.cases, "bwd", "backward")),
        ("decode", bench_decode.cases),
    ],
)
def test_gpu_benchmarks_list_and_refuse(monkeypatch, capsys, tmp_path, bench: str, cases) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["bench", "--list"])
    assert gpu_entry.main(bench, "", cases) == 0
    names = capsys.readouterr().out.splitlines()
    assert len(names) == len(set(names)) > 40
    monkeypatch.setattr(sys, "argv", ["bench", "--quick", "--out", str(tmp_path)])
    assert gpu_entry.main(bench, "", cases) == 2
    assert "needs a CUDA GPU" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_cpu_benchmark_covers_its_sets_and_runs(tmp_path) -> None:
    names = [case.name for case in bench_cpu.cases(quick=False)]
    assert len(names) == len(set(names))
    for part in (
        "causal D128, bf16, forward+backward, S 8192",
        "window 256",
        "GQA 8:1",
        "32 ragged",
        "paged",
        "memory",
    ):
        assert any(part in name for name in names), part
    args = argparse.Namespace(quick=True, list=False, only="GQA|paged", out=tmp_path, seconds=1.0)
    assert harness.main("cpu", bench_cpu.cases(quick=True), "cpu", args, clock="wall time") == 0
    (path,) = tmp_path.glob("*.json")
    report = json.loads(path.read_text())
    assert {row["status"] for row in harness.all_rows(report)} == {"ok"}
    assert all(bool(case["rows"]) == ("GQA" in case["row"] or "paged" in case["row"]) for case in report["cases"])
    table = readme_table.table("cpu", [report])
    assert "wall time" in table and "not measured" in table


def test_cpu_time_of_one_thread_is_not_that_of_the_clock() -> None:
    assert on_one_thread(lambda: time.sleep(0.05), 2) < 0.02 < on_cpu(lambda: time.sleep(0.05), 2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="how a peer fails without a GPU")
def test_a_peer_that_cannot_be_loaded_says_so(tmp_path: Path) -> None:
    (tmp_path / "peer.so.xz").write_bytes(b"")
    able = {"dtypes": ["bf16"], "head_dims": ["64"], "masks": ["full", "causal"], "bwd": False, "varlen": True}
    entry = {"file": "peer.so.xz", "load": {"kind": "torch", "namespace": "x"}, "capabilities": able}
    (tmp_path / "manifest.json").write_text(json.dumps({"other-fa3": entry}))
    peers = Peers(tmp_path)
    shape = Shape(1, 16, 1, 1, 64, 64)
    remotes, absent = peers.enter(shape, "forward", cold=False)
    assert not remotes and absent["other-fa3"].startswith("not loadable: ")
    remotes, absent = peers.enter(shape, "backward", cold=False)
    assert not remotes and absent["other-fa3"] == "unavailable: has no backward"
    peers.close()
