# SPDX-License-Identifier: BSD-3-Clause
"""What each schedule brings to light by its effect alone: with the checks off, a fault shows in the result or hangs."""

from __future__ import annotations

from dataclasses import dataclass

import faults
import ptx
import pytest
import torch
from faults import BARRIERS, FILL, LOAD, START, STORE, wait
from torch import Tensor

from tests import hopper_sim

RESULT = "\nmul.wide.u32 %d5, %t, 4;\nadd.u64 %d5, %d5, %a1;\n"


def run(driver: hopper_sim.Driver, body: str, options: str, threads: int = 128, **launch: int) -> Tensor | str:
    """What the kernel leaves in its second tensor, or how it failed. The first holds 0, 1, 2, ..."""
    source, result = torch.arange(1024, dtype=torch.int32), torch.full((1024,), -7, dtype=torch.int32)
    driver.reset()
    driver.configure(f"check=0,quiet=1,{options}")
    try:
        ptx.run(driver, body, source, result, block=threads, module=faults.SHARED, **launch)
    except hopper_sim.DriverError as error:
        return str(error)
    return result


SECOND_LOAD = LOAD.replace("[%bar]", "[%r8]").replace("[%s]", "[%r9]").replace("[%a0]", "[%d6]")
TWO_LOADS = (
    START + BARRIERS + "add.u64 %d6, %a0, 2048;\nadd.u32 %r8, %bar, 8;\nadd.u32 %r9, %s, 2048;" + LOAD + SECOND_LOAD
)
READ_SECOND = "\nld.shared.b32 %r1, [%slot+2048];" + RESULT + "st.global.b32 [%d5], %r1;\n"
LOADED = torch.arange(512, 640, 4, dtype=torch.int32)


@dataclass(frozen=True)
class Hidden:
    body: str
    expected: Tensor  # the result of the schedules in `hiding`; those in `showing` give another, or fail
    showing: list[str]
    hiding: list[str]
    threads: int = 128


HIDDEN = {
    "no wait for a load": Hidden(
        START + BARRIERS + LOAD + "ld.shared.b32 %r1, [%slot];" + RESULT + "st.global.b32 [%d5], %r1;",
        torch.arange(0, 128, 4, dtype=torch.int32),
        ["policy=lazy", "policy=lazy,order=oldest"],
        ["policy=eager"],
        threads=32,
    ),
    "one wait for two loads": Hidden(
        TWO_LOADS + wait(0) + READ_SECOND + wait(0, barrier="%r8"),
        LOADED,
        ["policy=lazy,order=oldest", "delay=SITE"],
        ["policy=eager", "policy=lazy,order=newest"],
        threads=32,
    ),
    "the first try alone counts": Hidden(
        TWO_LOADS
        + "mbarrier.try_wait.parity.shared::cta.b64 %p9, [%r8], 0;\nmov.u32 %r1, -1;\n"
        + "@%p9 ld.shared.b32 %r1, [%slot+2048];"
        + RESULT
        + "st.global.b32 [%d5], %r1;"
        + wait(0)
        + wait(0, barrier="%r8"),
        LOADED,
        ["first_try_fails=1"],
        ["policy=eager", "policy=lazy"],
        threads=32,
    ),
    "staging memory used again too soon": Hidden(
        START + FILL + STORE.replace("%a0", "%a1") + "st.shared.b32 [%slot], 9;\n@%p1 cp.async.bulk.wait_group 0;",
        torch.zeros(128, dtype=torch.int32),
        ["late=reads", "policy=lazy"],
        ["policy=eager"],
    ),
    "a wait for reads, not for writes": Hidden(
        START
        + FILL
        + STORE.replace("%a0", "%a1")
        + "@%p1 cp.async.bulk.wait_group.read 0;\nbar.sync 0;\nld.global.b32 %r1, [%a1];"
        + RESULT
        + "st.global.b32 [%d5+2048], %r1;",
        torch.zeros(128, dtype=torch.int32),
        ["late=writes", "late=reads"],
        ["policy=eager"],
    ),
    "issued by the leader, waited for by lane 0": Hidden(
        START
        + FILL
        + "elect.sync %r2|%p1, 0xffffffff;\nsetp.gt.u32 %p3, %t, 31;\n@%p3 bra end;\n"
        + STORE.replace("%a0", "%a1")
        + "setp.eq.u32 %p1, %t, 0;\n@%p1 cp.async.bulk.wait_group 0;\nbar.warp.sync 0xffffffff;\n"
        + "ld.global.b32 %r1, [%a1];"
        + RESULT
        + "st.global.b32 [%d5+2048], %r1;\nend:",
        torch.zeros(32, dtype=torch.int32),
        ["elect=last,policy=lazy"],
        ["policy=lazy"],
    ),
    "a stage filled before it is free": Hidden(
        START
        + "setp.lt.u32 %p3, %t, 32;\n@!%p3 bra consumer;\nst.shared.b32 [%slot], 1;\nbar.arrive 1, 64;\n"
        + "st.shared.b32 [%slot], 2;\nbra.uni end;\nconsumer: bar.sync 1, 64;\nld.shared.b32 %r1, [%slot+-512];"
        + RESULT
        + "st.global.b32 [%d5+-128], %r1;\nend:",
        torch.ones(32, dtype=torch.int32),
        ["starve=2"],
        ["starve=1,quantum=1"],
        threads=64,
    ),
    "no barrier after the initialisation": Hidden(
        START
        + "@%p1 mbarrier.init.shared::cta.b64 [%bar], 128;\nmbarrier.arrive.shared::cta.b64 _, [%bar];"
        + wait(0)
        + RESULT
        + "st.global.b32 [%d5], %t;",
        torch.arange(128, dtype=torch.int32),
        ["policy=random,seed=1", "starve=1"],
        ["policy=eager"],
    ),
}


def site(body: str) -> int:
    """The PTX line of the second load."""
    lines = ptx.kernel(body, 2, module=faults.SHARED).splitlines()
    return [n for n, line in enumerate(lines, 1) if "mbarrier::complete_tx" in line][1]


@pytest.mark.parametrize("name", HIDDEN)
def test_a_schedule_shows_the_fault(driver: hopper_sim.Driver, name: str) -> None:
    case = HIDDEN[name]
    body, expected, threads = case.body, case.expected, case.threads
    place = slice(512, 512 + len(expected)) if "%d5+2048" in body else slice(len(expected))
    for options in case.hiding:
        result = run(driver, body, options, threads)
        assert isinstance(result, Tensor), result
        assert torch.equal(result[place], expected), options
    for options in case.showing:
        if "SITE" in options:
            options = options.replace("SITE", str(site(body)))
        result = run(driver, body, options, threads)
        assert isinstance(result, str) or not torch.equal(result[place], expected), options


CHAIN = """
mov.u32 %r1, %ctaid.x;
mul.wide.u32 %d1, %r1, 4;
add.u64 %d1, %d1, %a1;
setp.eq.u32 %p2, %r1, 0;
@%p2 bra mine;
spin: ld.acquire.gpu.global.b32 %r2, [%d1+-4];
setp.eq.s32 %p3, %r2, -7;
@%p3 bra spin;
mine: st.release.gpu.global.b32 [%d1], %r1;
"""


def test_order_of_blocks(driver: hopper_sim.Driver) -> None:
    """A block that waits for the one before it hangs where it comes first and alone."""
    expected = torch.arange(4, dtype=torch.int32)
    for options in ("cta_order=forward", "cta_order=backward,coresident=4", "cta_order=random,coresident=4,seed=5"):
        result = run(driver, CHAIN, options, 1, grid=4)
        assert isinstance(result, Tensor) and torch.equal(result[:4], expected), options
    for options in ("cta_order=backward", "cta_order=backward,coresident=3"):
        assert "budget is spent" in run(driver, CHAIN, f"{options},budget=100000", 1, grid=4)


def test_null_launches_nothing(driver: hopper_sim.Driver) -> None:
    result = run(driver, "this is no PTX;", "policy=null")
    assert isinstance(result, Tensor) and torch.equal(result, torch.full((1024,), -7, dtype=torch.int32))
    assert driver.report()["launches"] == []


def test_a_random_schedule_can_be_repeated(driver: hopper_sim.Driver) -> None:
    """The order in which warps add to a list depends on the seed alone."""
    body = START + "atom.add.global.u32 %r1, [%a0], 1;" + RESULT + "st.global.b32 [%d5], %r1;"
    found = {seed: run(driver, body, f"policy=random,quantum=2,seed={seed}") for seed in (1, 2, 3)}
    for seed, result in found.items():
        again = run(driver, body, f"policy=random,quantum=2,seed={seed}")
        assert isinstance(result, Tensor) and isinstance(again, Tensor)
        assert torch.equal(result, again)
    assert not torch.equal(found[1], found[2]) or not torch.equal(found[1], found[3])


@pytest.mark.parametrize("options", ["policy=slow", "speed=1", "seed", "seed=x", "delay=-"])
def test_unknown_options_are_refused(driver: hopper_sim.Driver, options: str) -> None:
    with pytest.raises(hopper_sim.DriverError, match=r"hopper_sim_config: 1: (no such|not a number)"):
        driver.configure(options)


def test_options_from_the_replay_line(driver: hopper_sim.Driver) -> None:
    """The last value of each counts; what is printed can be given back."""
    driver.configure("policy=lazy,order=oldest")
    driver.configure("policy=random,seed=7")
    ptx.run(driver, "")
    text = driver.report()["launches"][0]["config"]
    assert text == "order=oldest,policy=random,seed=7"
    driver.configure(f"reset,{text}")
    ptx.run(driver, "")
    assert driver.report()["launches"][1]["config"] == text
