# SPDX-License-Identifier: BSD-3-Clause
"""Global memory: what orders the accesses of two blocks, and those of two grids that may overlap."""

from __future__ import annotations

import faults
import ptx
import pytest
import torch
from faults import Fault

from tests import hopper_sim

START = """
.reg .b32 %block, %v, %flag, %s, %slot;
mov.u32 %s, s;
shl.b32 %slot, %t, 4;
add.u32 %slot, %slot, %s;
mov.u32 %block, %ctaid.x;
setp.eq.u32 %p1, %t, 0;
setp.eq.u32 %p2, %block, 0;
"""
SPIN = """
spin: ld{order}.global.b32 %flag, [%a0+256];
setp.ne.u32 %p3, %flag, 1;
@%p3 bra spin;
"""
READ = "@%p1 ld.global.b32 %v, [%a0];\n"


def blocks(first: str, second: str) -> Fault:
    return Fault("global-race", f"{START}\n@!%p2 bra second;\n{first}\nbra.uni end;\nsecond:\n{second}\nend:\n", 32)


WRITE = "@%p1 st.global.b32 [%a0], 5;\n"
FENCE = "fence.acq_rel.gpu; // needed\n"
RAISE = "@%p1 red.relaxed.gpu.global.add.u32 [%a0+256], 1;\n"
STAGE = "st.shared.v4.b32 [%slot], {0, 0, 0, 0};\nfence.proxy.async;\nbar.warp.sync 0xffffffff;\n"
STORE = "@%p1 cp.async.bulk.global.shared::cta.bulk_group [%a0], [%s], 16;\n@%p1 cp.async.bulk.commit_group;\n"

FAULTS = {
    "no release": blocks(WRITE + FENCE + RAISE, SPIN.format(order=".acquire.gpu") + READ),
    "no acquire": blocks(WRITE + "fence.acq_rel.gpu;\n" + RAISE, SPIN.format(order=".relaxed.gpu") + FENCE + READ),
    "release relaxed": blocks(
        WRITE + "@%p1 st.release.gpu.global.b32 [%a0+256], 1; // needed\n"
        "@%p1 st.relaxed.gpu.global.b32 [%a0+256], 1; // fault\n",
        SPIN.format(order=".acquire.gpu") + READ,
    ),
    "a fence of the block alone": blocks(
        WRITE + FENCE + "fence.acq_rel.cta; // fault\n" + RAISE, SPIN.format(order=".acquire.gpu") + READ
    ),
    "two write": blocks(
        WRITE + "fence.acq_rel.gpu;\n" + RAISE, SPIN.format(order=".acquire.gpu").replace("\n", " // needed\n") + WRITE
    ),
    "a bulk store has been read, not written": blocks(
        STAGE + STORE + "@%p1 cp.async.bulk.wait_group 0; // needed\n@%p1 cp.async.bulk.wait_group.read 0; // fault\n"
        "fence.acq_rel.gpu;\n" + RAISE,
        SPIN.format(order=".acquire.gpu") + READ,
    ),
}
ADD = STORE.replace(
    "cp.async.bulk.global.shared::cta.bulk_group", "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32"
)
WAITED = "@%p1 cp.async.bulk.wait_group 0;\n"
SUMS = {
    "without a release": blocks(
        STAGE + ADD + WAITED + FENCE + RAISE, SPIN.format(order=".acquire.gpu") + STAGE + ADD + WAITED
    ),
    "without an acquire": blocks(
        STAGE + ADD + WAITED + "fence.acq_rel.gpu;\n" + RAISE,
        SPIN.format(order=".relaxed.gpu") + FENCE + STAGE + ADD + WAITED,
    ),
    "whose source has been read": blocks(
        STAGE + ADD + "@%p1 cp.async.bulk.wait_group 0; // needed\n@%p1 cp.async.bulk.wait_group.read 0; // fault\n"
        "fence.acq_rel.gpu;\n" + RAISE,
        SPIN.format(order=".acquire.gpu") + STAGE + ADD + WAITED,
    ),
}
POLICIES = ["coresident=2", "policy=random,coresident=2", "policy=lazy,coresident=2"]


def memory() -> torch.Tensor:
    return torch.zeros(256, dtype=torch.int32)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", FAULTS)
def test_blocks(driver: hopper_sim.Driver, name: str, policy: str) -> None:
    fault = FAULTS[name]
    driver.configure(f"quiet=1,{policy}")
    ptx.run(driver, fault.corrected(), memory(), grid=2, module=faults.SHARED)
    with pytest.raises(
        hopper_sim.DriverError, match=r"hazard global-race: (reads|overwrites) global memory that block"
    ):
        ptx.run(driver, fault.faulty(), memory(), grid=2, module=faults.SHARED)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", SUMS)
def test_sums_in_an_order(driver: hopper_sim.Driver, name: str, policy: str) -> None:
    """Only where one is wanted: sums in any order are no race."""
    fault = SUMS[name]
    driver.configure(f"quiet=1,{policy}")
    ptx.run(driver, fault.faulty(), memory(), grid=2, module=faults.SHARED)
    driver.configure("ordered_sums=1")
    ptx.run(driver, fault.corrected(), memory(), grid=2, module=faults.SHARED)
    with pytest.raises(hopper_sim.DriverError, match="hazard global-race: overwrites global memory that block"):
        ptx.run(driver, fault.faulty(), memory(), grid=2, module=faults.SHARED)


def test_sums_onto_what_another_block_writes(driver: hopper_sim.Driver) -> None:
    fault = blocks(WRITE + FENCE + RAISE, SPIN.format(order=".acquire.gpu") + STAGE + ADD + WAITED)
    driver.configure("quiet=1,coresident=2")
    ptx.run(driver, fault.corrected(), memory(), grid=2, module=faults.SHARED)
    with pytest.raises(hopper_sim.DriverError, match="hazard global-race: adds to global memory that block"):
        ptx.run(driver, fault.faulty(), memory(), grid=2, module=faults.SHARED)


def test_neighbours_in_a_line_are_apart(driver: hopper_sim.Driver) -> None:
    body = START + "mul.wide.u32 %d1, %block, 2;\nadd.u64 %d1, %d1, %a0;\ncvt.u16.u32 %h1, %t;\n"
    ptx.run(driver, body + "@%p1 st.global.b16 [%d1], %h1;", memory(), grid=8, module=faults.SHARED)


def test_atomics_do_not_race(driver: hopper_sim.Driver) -> None:
    x = memory()
    ptx.run(driver, "red.global.add.u32 [%a0], 1;", x, grid=8)
    assert x[0] == 8 * 32


WRITER = "st.global.b32 [%a0], 5;\ngriddepcontrol.launch_dependents;"
WAIT = "griddepcontrol.wait; // needed\n"
DEPENDENT = {
    "read": WAIT + "ld.global.b32 %r1, [%a0];",
    "write": WAIT + "st.global.b32 [%a0], 6;",
    "write what is read": WAIT + "st.global.b32 [%a0+64], 6;",
    "add": START + STAGE + WAIT + ADD + WAITED,
    "load": faults.START
    + faults.BARRIERS
    + WAIT
    + faults.LOAD.replace("2048", "512")
    + faults.wait(0)
    + "ld.shared.b32 %r1, [%slot];",
    "another warp has waited": faults.START
    + "setp.gt.u32 %p3, %t, 31;\n@%p3 bra over;\ngriddepcontrol.wait;\nover:\nbar.sync 0; // needed\n"
    "ld.global.b32 %r1, [%a0];",
}


@pytest.mark.parametrize("name", DEPENDENT)
def test_programmatic_dependent_launch(driver: hopper_sim.Driver, name: str) -> None:
    """What the grid before touches is out of bounds before the wait, if the launch lets the two overlap."""
    fault, x = Fault("dependent-launch", DEPENDENT[name]), memory()
    driver.configure("quiet=1")

    def pair(body: str, programmatic: bool) -> None:
        ptx.run(driver, WRITER + "ld.global.b32 %r1, [%a0+64];", x)
        ptx.run(driver, body, x, block=64, module=faults.SHARED, programmatic=programmatic)

    pair(fault.corrected(), True)
    pair(fault.faulty(), False)
    with pytest.raises(hopper_sim.DriverError, match="hazard dependent-launch"):
        pair(fault.faulty(), True)


def test_a_grid_that_never_waits_has_nothing_behind_it(driver: hopper_sim.Driver) -> None:
    x = memory()
    ptx.run(driver, WRITER, x)
    ptx.run(driver, "st.global.b32 [%a0+512], 1;", x, programmatic=True)
    driver.configure("quiet=1")
    with pytest.raises(hopper_sim.DriverError, match="reads what an earlier grid writes"):
        ptx.run(driver, "ld.global.b32 %r1, [%a0];", x, programmatic=True)
