# SPDX-License-Identifier: BSD-3-Clause
"""mbarrier: phases by arrivals and bytes, parities and tokens, remote arrivals, and misuse."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch
from ptx import poison, run

from tests.hopper_sim import Driver, DriverError

INIT = """
    .shared .align 8 .b64 bar;
    .reg .b32 %bar;
    mov.u32 %bar, bar;
    setp.ne.u32 %p0, %t, 0;
    @%p0 bra end;
    mbarrier.init.shared::cta.b64 [%bar], {count};
"""


class Model:
    """The state of an mbarrier as the PTX ISA describes it."""

    def __init__(self, count: int) -> None:
        self.phase, self.expected, self.pending, self.bytes = 0, count, count, 0

    def apply(self, opcode: str, operand: int) -> None:
        if opcode in ("expect_tx", "arrive.expect_tx"):
            self.bytes += operand
        if opcode == "complete_tx":
            self.bytes -= operand
        if opcode.startswith("arrive"):
            self.pending -= operand if opcode == "arrive" else 1
        if self.pending == 0 and self.bytes == 0:
            self.phase, self.pending = self.phase + 1, self.expected

    def passes(self, parity: int) -> bool:
        return self.phase % 2 != parity


OPCODES = {
    "arrive": "mbarrier.arrive.shared::cta.b64 _, [%bar], {};",
    "expect_tx": "mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%bar], {};",
    "arrive.expect_tx": "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%bar], {};",
    "complete_tx": "mbarrier.complete_tx.relaxed.cta.shared::cta.b64 [%bar], {};",
}


def script(model: Model, draw: random.Random, steps: int) -> Iterator[tuple[str, int]]:
    """Legal operations, bytes before their expectation among them."""
    for _ in range(steps):
        arrivals = ["arrive", "arrive", "arrive.expect_tx"] if model.pending else []
        opcode = draw.choice(["expect_tx", "complete_tx", *arrivals])
        operand = draw.choice([16, 48, 1024])
        if opcode == "arrive":
            operand = draw.randint(1, model.pending)
        if opcode == "complete_tx" and model.bytes > 0:
            operand = model.bytes
        if opcode == "expect_tx" and model.bytes < 0:
            operand = -model.bytes
        model.apply(opcode, operand)
        yield opcode, operand


@pytest.mark.parametrize("seed", range(12))
def test_scripts(driver: Driver, seed: int) -> None:
    """After each operation both parities are tested."""
    draw = random.Random(seed)
    count = draw.choice([1, 2, 5])
    model, body, wanted, steps = Model(count), INIT.format(count=count), [], 40
    for n, (opcode, operand) in enumerate(script(model, draw, steps)):
        body += OPCODES[opcode].format(operand) + "\n"
        for parity in (0, 1):
            body += f"""
            mbarrier.test_wait.parity.shared::cta.b64 %p1, [%bar], {parity};
            selp.u32 %r1, 1, 0, %p1;
            st.global.u32 [%a0+{8 * n + 4 * parity}], %r1;
            """
            wanted.append(int(model.passes(parity)))
    body += "mbarrier.inval.shared::cta.b64 [%bar];\nend:"
    out = poison(2 * steps, dtype=torch.int32)
    run(driver, body, out)
    assert out.tolist() == wanted
    assert model.phase > 1


def test_a_fresh_barrier_passes_parity_one(driver: Driver) -> None:
    out = poison(1, dtype=torch.int32)
    body = (
        INIT.format(count=3)
        + """
    mbarrier.try_wait.parity.shared::cta.b64 %p1, [%bar], 1, 1000;
    selp.u32 %r1, 1, 0, %p1;
    st.global.u32 [%a0], %r1;
    end:
    """
    )
    run(driver, body, out)
    assert out.tolist() == [1]


def test_tokens(driver: Driver) -> None:
    """A token passes when its phase is over; one of the current phase does not."""
    out = poison(4, dtype=torch.int32)
    body = (
        INIT.format(count=2)
        + """
    mbarrier.arrive.shared::cta.b64 %d1, [%bar];
    mbarrier.test_wait.shared::cta.b64 %p1, [%bar], %d1;
    mbarrier.arrive.release.cta.shared::cta.b64 %d2, [%bar];
    mbarrier.test_wait.acquire.cta.shared::cta.b64 %p2, [%bar], %d2;
    mbarrier.try_wait.shared::cta.b64 %p3, [%bar], %d1;
    mbarrier.arrive.expect_tx.shared::cta.b64 %d3, [%bar], 16;
    mbarrier.test_wait.shared::cta.b64 %p4, [%bar], %d3;
    mbarrier.complete_tx.shared::cta.b64 [%bar], 16;
    """
    )
    for n in range(4):
        body += f"selp.u32 %r1, 1, 0, %p{n + 1};\nst.global.u32 [%a0+{4 * n}], %r1;\n"
    run(driver, body + "end:", out)
    assert out.tolist() == [0, 1, 1, 0]


def test_generic_addresses(driver: Driver) -> None:
    out = poison(1, dtype=torch.int32)
    body = (
        INIT.format(count=1)
        + """
    cvt.u64.u32 %d1, %bar;
    cvta.shared.u64 %d1, %d1;
    mbarrier.arrive.b64 _, [%d1];
    mbarrier.try_wait.parity.b64 %p1, [%d1], 0;
    selp.u32 %r1, 1, 0, %p1;
    st.global.u32 [%a0], %r1;
    end:
    """
    )
    run(driver, body, out)
    assert out.tolist() == [1]


def test_all_lanes_arrive(driver: Driver) -> None:
    """Each lane is an arrival, and the wait is an acquire for what the others wrote."""
    out = poison(64, dtype=torch.int32)
    body = """
    .shared .align 8 .b64 bar;
    .shared .align 4 .b8 data[256];
    .reg .b32 %bar;
    mov.u32 %bar, bar;
    setp.eq.u32 %p0, %t, 0;
    @%p0 mbarrier.init.shared::cta.b64 [%bar], 64;
    bar.sync 0;
    mov.u32 %r1, data;
    mad.lo.u32 %r2, %t, 4, %r1;
    st.shared.u32 [%r2], %t;
    mbarrier.arrive.shared::cta.b64 _, [%bar];
    again:
    mbarrier.try_wait.parity.shared::cta.b64 %p1, [%bar], 0;
    @!%p1 bra again;
    xor.b32 %r3, %t, 63;
    mad.lo.u32 %r2, %r3, 4, %r1;
    ld.shared.u32 %r4, [%r2];
    mad.wide.u32 %d1, %t, 4, %a0;
    st.global.u32 [%d1], %r4;
    """
    run(driver, body, out, block=64)
    assert out.tolist() == [t ^ 63 for t in range(64)]


@pytest.mark.parametrize("policy", ["eager", "random,seed=2"])
def test_remote_arrivals(driver: Driver, policy: str) -> None:
    """Every block of a cluster arrives on the barrier of the first, by mapa."""
    driver.configure(f"policy={policy}")
    out = torch.zeros(1, dtype=torch.int32)
    body = """
    .shared .align 8 .b64 bar;
    .reg .b32 %bar;
    mov.u32 %bar, bar;
    mov.u32 %r1, %cluster_ctarank;
    setp.eq.u32 %p0, %t, 0;
    @%p0 mbarrier.init.shared::cta.b64 [%bar], 4;
    @%p0 fence.mbarrier_init.release.cluster;
    bar.warp.sync -1;
    barrier.cluster.arrive.aligned;
    barrier.cluster.wait.aligned;
    mapa.shared::cluster.u32 %r2, %bar, 0;
    @%p0 mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%r2];
    setp.ne.u32 %p1, %r1, 0;
    @%p1 bra end;
    again:
    mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 %p2, [%bar], 0;
    @!%p2 bra again;
    @%p0 st.global.u32 [%a0], 1;
    end:
    barrier.cluster.arrive.aligned;
    barrier.cluster.wait.aligned;
    """
    run(driver, body, out, grid=4, cluster=4)
    assert out.tolist() == [1]


@pytest.mark.simulated
@pytest.mark.parametrize("body,message", [
    ("mbarrier.init.shared::cta.b64 [%bar], 0;", "an mbarrier of count 0"),
    ("mbarrier.init.shared::cta.b64 [%bar], 1048576;", "an mbarrier of count 1048576"),
    ("mbarrier.init.shared::cta.b64 [%bar], 1;\nmbarrier.init.shared::cta.b64 [%bar], 1;", "is live already"),
    ("mbarrier.arrive.shared::cta.b64 _, [%bar];", "no mbarrier was initialised"),
    ("mbarrier.init.shared::cta.b64 [%bar], 1;\nmbarrier.inval.shared::cta.b64 [%bar];\n"
     "mbarrier.arrive.shared::cta.b64 _, [%bar];", "no mbarrier was initialised"),
    ("mbarrier.init.shared::cta.b64 [%bar], 2;\nmbarrier.arrive.shared::cta.b64 _, [%bar], 3;", "more than 2 arrivals"),
    ("mbarrier.init.shared::cta.b64 [%bar], 1;\nmbarrier.expect_tx.shared::cta.b64 [%bar], 1048576;",
     "beyond the range"),
    ("add.u32 %bar, %bar, 4;\nmbarrier.init.shared::cta.b64 [%bar], 1;", "misaligned: 8 bytes"),
])  # fmt: skip
def test_misuse(driver: Driver, body: str, message: str) -> None:
    begin = ".shared .align 8 .b8 bar[16];\n.reg .b32 %bar;\nmov.u32 %bar, bar;\nsetp.ne.u32 %p0, %t, 0;\n@%p0 ret;\n"
    with pytest.raises(DriverError, match=message):
        run(driver, begin + body)


@pytest.mark.simulated
@pytest.mark.parametrize("opcode,message", [
    ("mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r2], 1;", "a wait for an mbarrier of another block"),
    ("mbarrier.arrive.shared::cta.b64 %d1, [%r2];", "an mbarrier of another block gives no state"),
])  # fmt: skip
def test_only_arrivals_without_state_are_remote(driver: Driver, opcode: str, message: str) -> None:
    body = f"""
    .shared .align 8 .b64 bar;
    .reg .b32 %bar;
    mov.u32 %bar, bar;
    setp.eq.u32 %p0, %t, 0;
    @%p0 mbarrier.init.shared::cta.b64 [%bar], 1;
    @%p0 fence.mbarrier_init.release.cluster;
    barrier.cluster.arrive.aligned;
    barrier.cluster.wait.aligned;
    mov.u32 %r1, %cluster_ctarank;
    xor.b32 %r1, %r1, 1;
    mapa.shared::cluster.u32 %r2, %bar, %r1;
    @%p0 {opcode}
    """
    with pytest.raises(DriverError, match=message):
        run(driver, body, grid=2, cluster=2)


@pytest.mark.simulated
def test_a_phase_that_never_completes_is_a_deadlock(driver: Driver) -> None:
    body = (
        INIT.format(count=2)
        + """
    mbarrier.arrive.expect_tx.shared::cta.b64 _, [%bar], 64;
    again:
    mbarrier.try_wait.parity.shared::cta.b64 %p1, [%bar], 0;
    @!%p1 bra again;
    end:
    """
    )
    with pytest.raises(DriverError) as error:
        run(driver, body)
    assert error.value.code == 702
    for text in ("deadlock", "bar + 0x0", "parity 0", "phase 0", "1 of 2 arrivals pending", "64 bytes pending"):
        assert text in str(error.value)
