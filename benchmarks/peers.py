# SPDX-License-Identifier: BSD-3-Clause
"""Other builds of FlashAttention-3, each in a process of its own, as contestants.

`--peers DIR` names a folder with `manifest.json` and compressed libraries. A peer that cannot be loaded is reported
with its message. Processes make their inputs from the same seed, so only small parts of results travel.
"""

from __future__ import annotations

import json
import lzma
import multiprocessing
import tempfile
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from gate import Expected, judge_parts
from shapes import DecodeShape, Shape

STARTUP_SECONDS = 120


@dataclass(frozen=True)
class Peer:
    """An entry of the manifest."""

    name: str
    library: Path
    load: dict[str, Any]
    capabilities: dict[str, Any]

    def lacks(self, shape: Shape | DecodeShape, work: str) -> str | None:
        """Why this peer has no kernel for the work, or None."""
        able = self.capabilities
        dims = str(shape.d) if getattr(shape, "dv", shape.d) == shape.d else f"{shape.d}/{shape.dv}"
        needs = {
            f"dtype {shape.dtype}": shape.dtype in able["dtypes"],
            f"head dim {dims}": dims in able["head_dims"],
            "backward": work == "forward" or able["bwd"],
        }
        if isinstance(shape, DecodeShape):
            needs["a page table"] = not shape.page_size or able["paged"]
            needs["splits"] = able["split"]
        else:
            needs["windows"] = shape.window < 0 or "window" in able["masks"]
            needs["ragged lengths"] = not shape.lengths or able["varlen"]
            needs["dense calls"] = bool(shape.lengths) or not able.get("only_varlen")
        missing = [what for what, present in needs.items() if not present]
        return f"has no {missing[0]}" if missing else None


def listed(folder: Path | None) -> list[Peer]:
    if folder is None:
        return []
    manifest = json.loads((folder / "manifest.json").read_text())
    return [
        Peer(name, folder / entry["file"], entry["load"], entry["capabilities"]) for name, entry in manifest.items()
    ]


class PeerError(RuntimeError):
    """What went wrong in the peer's process."""


class Process:
    """The peer's process: answers `prepare`, `parts` and `sample`."""

    def __init__(self, peer: Peer):
        self.peer = peer
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(peer, theirs), daemon=True)
        self.process.start()
        theirs.close()

    def ask(self, *request: Any) -> Any:
        try:
            self.connection.send(request)
            answer = self.connection.recv()
        except (EOFError, OSError):
            raise PeerError(f"the process of {self.peer.name} died") from None
        if isinstance(answer, PeerError):
            raise answer
        return answer

    def close(self) -> None:
        self.connection.close()
        self.process.join(timeout=10)
        self.process.kill()


@dataclass
class Remote:
    """A peer that prepared one case."""

    name: str
    process: Process
    flops: int = 0
    bytes: int = 0

    def check(self, expected: list[Expected], dtype: torch.dtype) -> str | None:
        finite, arrays = self.process.ask("parts", [(part.tensor, part.index) for part in expected])
        if not finite:
            return "a result is not finite"
        parts = [torch.from_numpy(a).to(part.value.device, dtype) for a, part in zip(arrays, expected, strict=True)]
        return judge_parts(parts, expected, dtype)

    def sample(self, iterations: int) -> float:
        return self.process.ask("sample", iterations)


class Peers:
    """All peers of a folder. Processes start on first use and stay until `close`."""

    def __init__(self, folder: Path | None):
        self.peers = listed(folder)
        self.processes: dict[str, Process] = {}

    def enter(self, shape: Shape | DecodeShape, work: str, cold: bool) -> tuple[list[Remote], dict[str, str]]:
        """Those that take part, and why the others do not."""
        remotes, absent = [], {}
        for peer in self.peers:
            if why := peer.lacks(shape, work):
                absent[peer.name] = f"unavailable: {why}"
                continue
            try:
                process = self.process_of(peer)
                process.ask("prepare", shape, work, cold)
            except PeerError as error:
                absent[peer.name] = f"not loadable: {error}"
                continue
            remotes.append(Remote(peer.name, process, **counts(shape, work)))
        return remotes, absent

    def process_of(self, peer: Peer) -> Process:
        process = self.processes.get(peer.name)
        if process is None or not process.process.is_alive():
            process = self.processes[peer.name] = Process(peer)
        return process

    def close(self) -> None:
        for process in self.processes.values():
            process.close()


def counts(shape: Shape | DecodeShape, work: str) -> dict[str, int]:
    from contestants import WORK

    return {"bytes": shape.bytes()} if isinstance(shape, DecodeShape) else {"flops": shape.flops(WORK[work])}


def serve(peer: Peer, connection: Connection) -> None:
    """The life of a peer's process."""
    with tempfile.TemporaryDirectory() as folder:
        worker = None
        while True:
            try:
                request, *arguments = connection.recv()
            except EOFError:
                return
            try:
                worker = worker or load(peer, Path(folder))
                connection.send(getattr(worker, request)(*arguments))
            except Exception as error:  # whatever a foreign library raises belongs into the results
                connection.send(PeerError(f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}"))


def load(peer: Peer, folder: Path) -> Any:
    import peer_calls

    library = folder / "peer.so"
    library.write_bytes(lzma.decompress(peer.library.read_bytes()))
    torch.zeros(1, device="cuda")  # brings libcudart and libtorch_cuda into the process before the library needs them
    return peer_calls.KINDS[peer.load["kind"]](peer, library)
