# SPDX-License-Identifier: BSD-3-Clause
"""Generic accesses to shared memory: what orders those of two warps, and those of two lanes."""

from __future__ import annotations

import faults
import ptx
import pytest
import torch
from faults import Fault

from tests import hopper_sim

POLICIES = ["eager", "lazy", "random", "random,seed=2,quantum=3", "eager,starve=1", "eager,starve=2"]
WRITE, READ = "@%p5 st.shared.b32 [%s], 1;", "@%p5 ld.shared.b32 %r1, [%s];"


def warps(first: str, second: str, before: str = "") -> str:
    """Two warps; %p5 is true in lane 0 of each."""
    return f"""{faults.START}
setp.lt.u32 %p3, %t, 32;
and.b32 %r9, %t, 31;
setp.eq.u32 %p5, %r9, 0;
{before}
@!%p3 bra second;
{first}
bra.uni end;
second:
{second}
end:
"""


def race(first: str, second: str, before: str = "") -> Fault:
    return Fault("race", warps(first, second, before), 64)


SYNC, ARRIVE = "\nbar.sync 1, 64; // needed\n", "\nbar.arrive 1, 64; // needed\n"
CLUSTER = "\nbarrier.cluster.arrive.aligned; // needed\nbarrier.cluster.wait.aligned; // needed\n"
MBARRIER_ARRIVE = "\n@%p1 mbarrier.arrive.shared::cta.b64 _, [%bar]; // needed\n"
SPIN = """
spin: ld.acquire.cta.shared.b32 %r2, [%s+64]; // needed
setp.ne.u32 %p6, %r2, 1; // needed
@%p6 bra spin; // needed
"""

RACES = {
    "bar.sync": race(WRITE + SYNC, SYNC + READ),
    "bar.arrive": race(WRITE + ARRIVE, SYNC + READ),
    "read, then write": race(READ + ARRIVE, SYNC + WRITE),
    "write, then write": race(WRITE + SYNC, SYNC + WRITE),
    "the middle of a vector": race(
        "st.shared.v4.b32 [%slot], {0, 0, 0, 0};" + SYNC, SYNC + "ld.shared.b32 %r1, [%s+20];"
    ),
    "stmatrix": race("stmatrix.sync.aligned.x1.m8n8.shared.b16 [%slot], {%t};" + SYNC, SYNC + READ),
    "ldmatrix": race(SYNC + WRITE, "ldmatrix.sync.aligned.x1.m8n8.shared.b16 {%r1}, [%s];" + SYNC),
    "barrier.cluster": race(WRITE + CLUSTER, CLUSTER + READ),
    "mbarrier": race(WRITE + MBARRIER_ARRIVE, faults.wait(0, "// needed") + READ, faults.BARRIERS),
    "release and acquire": race(
        WRITE + "\n@%p5 st.release.cta.shared.b32 [%s+64], 1; // needed\n",
        SPIN + READ,
        "@%p1 st.shared.b32 [%s+64], 0;\nbar.sync 0;",
    ),
    "atom": race(
        WRITE + "\n@%p5 atom.add.shared.u32 %r1, [%s+64], 1; // needed\n",
        SPIN + READ,
        "@%p1 st.shared.b32 [%s+64], 0;\nbar.sync 0;",
    ),
    "cp.async": Fault(
        "write-locked",
        warps(
            "cp.async.ca.shared.global [%slot], [%a0], 16;\ncp.async.commit_group;\ncp.async.wait_group 0;" + SYNC,
            SYNC + READ,
        ),
        64,
    ),
    "a bulk store of what another wrote": Fault(
        "read-locked",
        warps(
            WRITE + "\nfence.proxy.async.shared::cta;" + SYNC,
            SYNC + "@%p5 cp.async.bulk.global.shared::cta.bulk_group [%a0], [%s], 16;\n"
            "cp.async.bulk.commit_group;\ncp.async.bulk.wait_group 0;",
            "st.shared.v4.b32 [%slot], {0, 0, 0, 0};\nfence.proxy.async.shared::cta;\nbar.sync 0;",
        ),
        64,
    ),
    "a lane reads what another wrote": Fault(
        "lane-race",
        faults.START + "st.shared.b32 [%slot], %t;\nbar.warp.sync 0xffffffff; // needed\nxor.b32 %r1, %slot, 16;\n"
        "ld.shared.b32 %r2, [%r1];",
        32,
    ),
    "a lane writes what another read": Fault(
        "lane-race",
        faults.START + "ld.shared.b32 %r2, [%slot];\nbar.warp.sync 0xffffffff; // needed\nxor.b32 %r1, %slot, 16;\n"
        "st.shared.b32 [%r1], 0;",
        32,
    ),
    "lanes write different values": Fault(
        "lane-race",
        faults.START + "mov.u32 %r1, 5;\nmov.u32 %r1, %t; // fault\nst.shared.b32 [%s], %r1;",
        32,
    ),
}


def run(driver: hopper_sim.Driver, body: str, threads: int) -> None:
    ptx.run(driver, body, torch.zeros(1024, dtype=torch.int32), block=threads, module=faults.SHARED)


@pytest.mark.parametrize("policy", ["eager", "random", "eager,starve=1"])
@pytest.mark.parametrize("name", RACES)
def test_race_is_found(driver: hopper_sim.Driver, name: str, policy: str) -> None:
    fault = RACES[name]
    driver.configure(f"policy={policy},quiet=1")
    with pytest.raises(hopper_sim.DriverError, match=f"hazard (race|{fault.kind})"):
        run(driver, fault.faulty(), fault.threads)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", RACES)
def test_ordered_accesses_raise_no_alarm(driver: hopper_sim.Driver, name: str, policy: str) -> None:
    fault = RACES[name]
    driver.configure(f"policy={policy}")
    run(driver, fault.corrected(), fault.threads)


def test_bytes_of_a_word_are_apart(driver: hopper_sim.Driver) -> None:
    body = (
        faults.START + "add.u32 %r1, %s, %t;\ncvt.u16.u32 %h1, %t;\nst.shared.u8 [%r1], %h1;\nld.shared.u8 %h2, [%r1];"
    )
    run(driver, body, 64)


def test_many_readers_before_a_write(driver: hopper_sim.Driver) -> None:
    """Every one of them counts, not only the last."""
    body = faults.START + "ld.shared.b32 %r1, [%s];\nsetp.lt.u32 %p3, %t, 224;\n"
    body += "@%p3 bar.sync 1, 256;\n@!%p3 bar.arrive 1, 256;\n@%p1 st.shared.b32 [%s], 1;"
    run(driver, body, 256)
    driver.configure("quiet=1")
    with pytest.raises(hopper_sim.DriverError, match=r"hazard race: @?.*st\.shared\.b32 overwrites what was read"):
        run(
            driver,
            body.replace("bar.arrive 1, 256", "bar.arrive 2, 256").replace("bar.sync 1, 256", "bar.sync 1, 224"),
            256,
        )


def test_races_can_be_left_out(driver: hopper_sim.Driver) -> None:
    driver.configure("races=0")
    run(driver, RACES["bar.sync"].faulty(), 64)
