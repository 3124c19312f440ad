# SPDX-License-Identifier: BSD-3-Clause
"""Every class of hazard: a kernel with exactly this fault, and its twin without."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from pathlib import Path

import faults
import pipeline
import ptx
import pytest
import torch

from tests import hopper_sim


def run(driver: hopper_sim.Driver, fault: faults.Fault, body: str) -> None:
    options = {} if fault.cluster == 1 else {"cluster": fault.cluster}
    memory = torch.zeros(1024, dtype=torch.int32)
    ptx.run(driver, body, memory, grid=fault.cluster, block=fault.threads, module=faults.SHARED, **options)


@pytest.mark.parametrize("name", faults.FAULTS)
def test_fault_is_found(driver: hopper_sim.Driver, name: str) -> None:
    fault = faults.FAULTS[name]
    driver.configure("quiet=1")
    with pytest.raises(hopper_sim.DriverError) as raised:
        run(driver, fault, fault.faulty())
    assert raised.value.code == 719
    (launch,) = driver.report()["launches"]
    first = launch["hazards"][0]
    assert first["kind"] == fault.kind, first
    assert fault.message in first["message"]


@pytest.mark.parametrize("policy", ["eager", "lazy", "lazy,order=oldest", "random", "random,seed=2,quantum=3"])
@pytest.mark.parametrize("name", faults.FAULTS)
def test_corrected_twin_raises_no_alarm(driver: hopper_sim.Driver, name: str, policy: str) -> None:
    fault = faults.FAULTS[name]
    driver.configure(f"policy={policy}")
    run(driver, fault, fault.corrected())
    assert not driver.report()["launches"][0]["hazards"]


BAD_ADDRESSES = {
    "shared memory below the block's": (700, "ld.shared.b32 %r1, [512];", "shared memory out of bounds"),
    "shared memory above the block's": (700, "st.shared.b32 [%s+16448], %t;", "shared memory out of bounds"),
    "shared, misaligned": (716, "st.shared.v4.b32 [%s+8], {%t, %t, %t, %t};", "misaligned"),
    "global, before": (700, "ld.global.b32 %r1, [%a0+-4];", "global memory out of bounds"),
    "global, behind": (700, "st.global.b32 [%a0+4096], %t;", "offset 4096 of a0, 4096 bytes"),
    "global, misaligned": (716, "ld.global.b64 %d1, [%a0+4];", "misaligned"),
    "a load from outside": (
        700,
        faults.BARRIERS + "add.u64 %a0, %a0, 2064;" + faults.LOAD,
        "global memory out of bounds",
    ),
    "a load that leaves shared memory": (
        700,
        faults.BARRIERS + "add.u32 %s, %s, 16384;" + faults.LOAD,
        "leaves the block's memory",
    ),
    "a load to a misaligned place": (716, faults.BARRIERS + "add.u32 %s, %s, 8;" + faults.LOAD, "multiple of 16"),
    "a descriptor outside": (
        700,
        faults.DESCRIPTORS + "add.u64 %d1, %d1, 1024;" + faults.FENCE + faults.WGMMA,
        "a matrix descriptor reaches shared",
    ),
    "no mbarrier": (719, "mbarrier.arrive.shared::cta.b64 _, [%bar];", "no mbarrier was initialised"),
    "a trap": (719, "trap;", "trap"),
}


@pytest.mark.parametrize("name", BAD_ADDRESSES)
def test_bad_address(driver: hopper_sim.Driver, name: str) -> None:
    code, body, message = BAD_ADDRESSES[name]
    driver.configure("quiet=1")
    with pytest.raises(hopper_sim.DriverError, match=message) as raised:
        ptx.run(driver, faults.START + body, torch.zeros(1024, dtype=torch.int32), block=128, module=faults.SHARED)
    assert raised.value.code == code
    assert "ptx" in str(raised.value)


def test_use_after_free(driver: hopper_sim.Driver) -> None:
    kernel = driver.load(ptx.kernel("ld.global.b32 %r1, [%a0];", 1), "k")
    driver.register(0, 0, "nothing")  # from now on unknown memory is an error
    address = ctypes.c_uint64()
    driver.call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(4096))
    kernel.launch(1, 32, address)
    driver.call("cuMemFree_v2", address)
    driver.configure("quiet=1")
    with pytest.raises(hopper_sim.DriverError, match="out of bounds") as raised:
        kernel.launch(1, 32, address)
    assert raised.value.code == 700


WAITS = {
    "bar.sync 3, 96": ("bar.sync 3, 96;", 64, "barrier 3: 64 of 96 threads are there"),
    "mbarrier": (
        faults.BARRIERS + faults.wait(0),
        64,
        r"mbarrier 0x4400 \(bar \+ 0x0\) for parity 0: phase 0, 1 of 1 arrivals pending, 0 bytes pending",
    ),
    "too few bytes": (
        faults.BARRIERS + faults.LOAD.replace("_, [%bar], 2048", "_, [%bar], 2064") + faults.wait(0),
        32,
        "0 of 1 arrivals pending, 16 bytes pending",
    ),
    "lanes": ("setp.lt.u32 %p3, %t, 16;\n@%p3 bar.warp.sync 0xffff0000;", 32, "waits for lanes 0xffff0000"),
    "a cluster": (
        "@%p1 bra over;\nbarrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;\nover: bar.sync 0;",
        32,
        "waits for lanes 0x1 of",
    ),
}


@pytest.mark.parametrize("policy", ["eager", "lazy", "random"])
@pytest.mark.parametrize("name", WAITS)
def test_a_deadlock_names_what_is_waited_for(driver: hopper_sim.Driver, name: str, policy: str) -> None:
    body, threads, message = WAITS[name]
    driver.configure(f"policy={policy},quiet=1")
    with pytest.raises(hopper_sim.DriverError, match=message) as raised:
        ptx.run(driver, faults.START + body, torch.zeros(1024), block=threads, module=faults.SHARED)
    assert raised.value.code == 702
    assert "deadlock\n  k cta (0,0,0) warp 0  ptx" in str(raised.value)


def test_a_deadlock_lists_warps_that_wait_for_the_same_once(driver: hopper_sim.Driver) -> None:
    driver.configure("quiet=1")
    with pytest.raises(hopper_sim.DriverError) as raised:
        ptx.run(driver, "bar.sync 3, 160;", block=128)
    assert str(raised.value).count("128 of 160 threads") == 1
    assert "and warps 1 2 3\n" in str(raised.value)


@pytest.mark.parametrize(("more", "hangs"), [(240, False), (248, True)])
def test_registers_are_shared_by_the_block(driver: hopper_sim.Driver, more: int, hangs: bool) -> None:
    """384 threads start with 168 registers each: 24 + 2 * 240 is what they have."""
    body = f"""
setp.lt.u32 %p1, %t, 128;
@%p1 bra few;
setmaxnreg.inc.sync.aligned.u32 {more};
bra.uni end;
few: setmaxnreg.dec.sync.aligned.u32 24;
end:
"""
    driver.configure("quiet=1")

    def launch() -> None:
        ptx.run(driver, body + "bar.sync 0;", block=384, directives=".maxntid 384, 1, 1 .minnctapersm 1")

    if not hangs:
        return launch()
    with pytest.raises(hopper_sim.DriverError, match="setmaxnreg 248: 512 registers are free, 2560 more are needed"):
        launch()


def test_setmaxnreg_without_bounds_is_ignored_by_ptxas(driver: hopper_sim.Driver) -> None:
    driver.configure("quiet=1")
    with pytest.raises(hopper_sim.DriverError, match="ignores it"):
        ptx.run(driver, "setmaxnreg.dec.sync.aligned.u32 24;", block=128)


def test_equal_hazards_are_counted(driver: hopper_sim.Driver) -> None:
    driver.configure("quiet=1")
    body = """
mov.u32 %r2, 0;
again: bar.warp.sync 0xffff;
add.u32 %r2, %r2, 1;
setp.lt.u32 %p1, %r2, 5;
@%p1 bra again;
"""
    with pytest.raises(hopper_sim.DriverError):
        ptx.run(driver, faults.START + body, block=32, module=faults.SHARED)
    (hazard,) = driver.report()["launches"][0]["hazards"]
    assert (hazard["kind"], hazard["count"]) == ("membermask", 5)


def test_a_livelock_ends_with_the_budget(driver: hopper_sim.Driver) -> None:
    driver.configure("budget=10000,quiet=1")
    with pytest.raises(hopper_sim.DriverError, match="the instruction budget is spent") as raised:
        ptx.run(driver, "again: add.u32 %r1, %t, 1;\nbra again;")
    assert raised.value.code == 702


def test_a_report_names_ptx_line_source_lines_and_replay(
    driver: hopper_sim.Driver, compiled: Callable[[str], str]
) -> None:
    text = compiled("pipeline").replace("fence.proxy.async.shared::cta;", " " * 30)
    driver.configure("policy=random,seed=3,quiet=1")
    with pytest.raises(hopper_sim.DriverError) as raised:
        pipeline.run(driver, driver.load(text, "pipeline"))
    message = str(raised.value)
    source = (Path(__file__).parent / "kernels" / "pipeline.cu").read_text().splitlines()
    assert "hazard proxy-fence: cp.async.bulk.tensor.2d.global.shared::cta.bulk_group reads" in message
    chain, other = ([int(n) for n in re.findall(r"pipeline\.cu:(\d+)", line)] for line in message.splitlines()[1:3])
    assert '"r"(shared(from))' in source[chain[0] - 1]
    assert "store(c, s.c[half], column, row);" in source[chain[1] - 1]
    assert "write_half(s, c, d" in source[chain[2] - 1]
    assert '"r"(pair[1])' in source[other[0] - 1]
    assert message.endswith('replay: HOPPER_SIM="policy=random,quiet=1,seed=3"')
    ptx_line = int(re.findall(r"ptx (\d+)", message)[0])
    assert "cp.async.bulk.tensor.2d.global" in text.splitlines()[ptx_line - 1]
