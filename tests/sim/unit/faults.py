# SPDX-License-Identifier: BSD-3-Clause
"""Kernels with exactly one fault, and their corrected twins.

A line that ends in `// needed` is missing from the faulty kernel; one that ends in `// fault` is only in that.
"""

from __future__ import annotations

from dataclasses import dataclass

SHARED = ".shared .align 1024 .b8 s[16384];\n.shared .align 8 .b64 bar[4];\n"

START = """
.reg .f32 %f<16>;
.reg .b32 %s, %bar, %slot;
mov.u32 %s, s;
mov.u32 %bar, bar;
shl.b32 %slot, %t, 4;
add.u32 %slot, %slot, %s;
setp.eq.u32 %p1, %t, 0;
"""

# Thread 0 makes the mbarriers; then all know them.
BARRIERS = """
@%p1 mbarrier.init.shared::cta.b64 [%bar], 1;
@%p1 mbarrier.init.shared::cta.b64 [%bar+8], 1;
@%p1 fence.mbarrier_init.release.cluster;
bar.sync 0;
"""

LOAD = """
@%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%bar], 2048;
@%p1 cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%s], [%a0], 2048, [%bar];
"""


def wait(parity: int, tag: str = "", barrier: str = "%bar") -> str:
    return f"""
{{ again: mbarrier.try_wait.parity.shared::cta.b64 %p9, [{barrier}], {parity}; @!%p9 bra again; }} {tag}
"""


# 128 threads write 4 KiB from s on, and the async proxy may read it.
FILL = """
st.shared.v4.b32 [%slot], {0, 0, 0, 0};
st.shared.v4.b32 [%slot+2048], {0, 0, 0, 0};
fence.proxy.async.shared::cta;
bar.sync 0;
"""

# Unswizzled descriptors of A (64 x 16 at s) and B (8 x 16 behind it): 128 bytes from one core matrix to the next.
DESCRIPTORS = """
cvt.u64.u32 %d1, %s;
shr.u64 %d1, %d1, 4;
or.b64 %d1, %d1, 0x1000080000;
add.u64 %d2, %d1, 128;
setp.ne.u32 %p2, 0, 0;
"""

WGMMA = """wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%f0, %f1, %f2, %f3}, %d1, %d2, %p2, 1, 1, 0, 0;
"""
WGMMA_REGISTERS = """wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%f0, %f1, %f2, %f3}, {%r1, %r2, %r3, %r4}, \
%d2, %p2, 1, 1, 0;
"""
FENCE, COMMIT = "wgmma.fence.sync.aligned;\n", "wgmma.commit_group.sync.aligned;\n"
DONE = "wgmma.wait_group.sync.aligned 0;\n"
MATRICES = START + FILL + DESCRIPTORS

STORE = """
@%p1 cp.async.bulk.global.shared::cta.bulk_group [%a0], [%s], 512;
@%p1 cp.async.bulk.commit_group;
"""


@dataclass(frozen=True)
class Fault:
    kind: str  # of the hazard
    body: str
    threads: int = 128
    message: str = ""  # part of the hazard's message
    cluster: int = 1

    def corrected(self) -> str:
        return "\n".join(line for line in self.body.splitlines() if not line.endswith("// fault"))

    def faulty(self) -> str:
        return "\n".join(line for line in self.body.splitlines() if not line.endswith("// needed"))


FAULTS = {
    # asynchronous accesses and generic ones
    "ld before the load has ended": Fault(
        "write-locked", START + BARRIERS + LOAD + wait(0, "// needed") + "ld.shared.b32 %r1, [%slot];", 32
    ),
    "st before the load has ended": Fault(
        "write-locked",
        START + BARRIERS + LOAD + wait(0, "// needed") + "st.shared.b32 [%slot], %t;" + wait(0),
        32,
        "st.shared.b32 overwrites data of a load",
    ),
    "a load onto a load": Fault(
        "write-locked", START + BARRIERS + LOAD + wait(0, "// needed") + "ld.shared.b32 %r1, [%s];" + LOAD + wait(1), 32
    ),
    "wgmma before the load has ended": Fault(
        "write-locked",
        MATRICES + BARRIERS + LOAD + "bar.sync 0;" + wait(0, "// needed") + FENCE + WGMMA + COMMIT + DONE + wait(0),
    ),
    "one warp of a warpgroup does not wait": Fault(
        "write-locked",
        MATRICES
        + BARRIERS
        + LOAD
        + "bar.sync 0;\nsetp.lt.u32 %p3, %t, 96; // fault\n@!%p3 bra over; // fault\n"
        + wait(0)
        + "over: // fault\n"
        + FENCE
        + WGMMA
        + COMMIT
        + DONE
        + wait(0),
    ),
    "a load onto what wgmma reads": Fault(
        "read-locked",
        MATRICES
        + BARRIERS
        + FENCE
        + WGMMA
        + COMMIT
        + DONE.replace("\n", " // needed\n")
        + "bar.sync 0;"
        + LOAD
        + DONE
        + wait(0),
        message="cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes overwrites what may still be read",
    ),
    "st onto what a bulk store reads": Fault(
        "read-locked",
        START + FILL + STORE + "@%p1 cp.async.bulk.wait_group.read 0; // needed\n"
        "@%p1 st.shared.b32 [%s], 0;\n@%p1 cp.async.bulk.wait_group 0;",
    ),
    "a lane waits for the store of another": Fault(
        "read-locked",
        START
        + FILL
        + STORE
        + "setp.eq.u32 %p3, %t, 1; // fault\n@%p3 cp.async.bulk.wait_group.read 0; // fault\n"
        + "@%p1 cp.async.bulk.wait_group.read 0; // needed\nbar.sync 0;\nst.shared.b32 [%slot], 0;\n"
        + "@%p1 cp.async.bulk.wait_group 0;",
    ),
    "a bulk store of what st wrote": Fault(
        "proxy-fence",
        START
        + "st.shared.v4.b32 [%slot], {0, 0, 0, 0};\nfence.proxy.async.shared::cta; // needed\nbar.sync 0;"
        + STORE
        + "@%p1 cp.async.bulk.wait_group 0;",
    ),
    "only one lane has fenced": Fault(
        "proxy-fence",
        START + "st.shared.v4.b32 [%slot], {0, 0, 0, 0};\nfence.proxy.async.shared::cta; // needed\n"
        "@%p1 fence.proxy.async.shared::cta; // fault\nbar.sync 0;\nsetp.eq.u32 %p1, %t, 64;"
        + STORE
        + "@%p1 cp.async.bulk.wait_group 0;",
    ),
    "the fence comes before the write": Fault(
        "proxy-fence",
        START + "fence.proxy.async.shared::cta;\nst.shared.v4.b32 [%slot], {0, 0, 0, 0};\n"
        "fence.proxy.async; // needed\nbar.sync 0;" + STORE + "@%p1 cp.async.bulk.wait_group 0;",
    ),
    "a fence of global memory alone": Fault(
        "proxy-fence",
        START + "st.shared.v4.b32 [%slot], {0, 0, 0, 0};\nfence.proxy.async; // needed\n"
        "fence.proxy.async.global; // fault\nbar.sync 0;" + STORE + "@%p1 cp.async.bulk.wait_group 0;",
    ),
    "wgmma reads what stmatrix wrote": Fault(
        "proxy-fence",
        MATRICES + "stmatrix.sync.aligned.x4.m8n8.shared.b16 [%slot], {%t, %t, %t, %t};\n"
        "fence.proxy.async.shared::cta; // needed\nbar.sync 0;\n" + FENCE + WGMMA + COMMIT + DONE,
    ),
    "a load onto what st wrote": Fault(
        "proxy-fence",
        START
        + BARRIERS
        + "st.shared.b32 [%slot], 0;\nfence.proxy.async.shared::cta; // needed\nbar.sync 0;"
        + LOAD
        + wait(0),
    ),
    # memory
    "a bulk store of what nobody wrote": Fault(
        "uninitialized",
        START
        + FILL.replace("[%slot]", "[%slot]").replace("bar.sync 0;", "bar.sync 0;")
        + "add.u32 %s, %s, 8192; // fault\n"
        + STORE
        + "@%p1 cp.async.bulk.wait_group 0;",
    ),
    "loaded twice, never read": Fault(
        "unread",
        START
        + BARRIERS
        + LOAD
        + wait(0)
        + "ld.shared.b32 %r1, [%slot]; // needed\n"
        + LOAD
        + wait(1)
        + "ld.shared.b32 %r1, [%slot];",
        32,
    ),
    # mbarriers
    "a barrier nobody else has seen": Fault(
        "mbarrier-init",
        START + "@%p1 mbarrier.init.shared::cta.b64 [%bar], 64;\nbar.sync 0; // needed\n"
        "mbarrier.arrive.shared::cta.b64 _, [%bar];" + wait(0),
        64,
    ),
    "a load onto a barrier with no fence": Fault(
        "mbarrier-init",
        START + "@%p1 mbarrier.init.shared::cta.b64 [%bar], 1;\n"
        "@%p1 fence.mbarrier_init.release.cluster; // needed\nbar.sync 0;" + LOAD + wait(0),
        32,
        "no fence.mbarrier_init",
    ),
    "one arrival too many": Fault(
        "mbarrier",
        START + "@%p1 mbarrier.init.shared::cta.b64 [%bar], 2;\nbar.sync 0;\n"
        "@%p1 mbarrier.arrive.shared::cta.b64 _, [%bar];\n"
        "@%p1 mbarrier.arrive.shared::cta.b64 _, [%bar], 2; // fault\n"
        "@%p1 mbarrier.arrive.shared::cta.b64 _, [%bar]; // needed\n",
        32,
        "more than 2 arrivals",
    ),
    "initialised twice": Fault(
        "mbarrier", START + BARRIERS + "@%p1 mbarrier.init.shared::cta.b64 [%bar], 1; // fault", 32, "live already"
    ),
    "a store onto a barrier": Fault(
        "mbarrier", START + BARRIERS + "@%p1 st.shared.b32 [%bar], 0; // fault\n@%p1 st.shared.b32 [%bar+16], 0;", 32
    ),
    "more bytes than a barrier counts": Fault(
        "mbarrier",
        START + BARRIERS + "@%p1 mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%bar], 1048576; // fault\n"
        "@%p1 mbarrier.complete_tx.relaxed.cta.shared::cta.b64 [%bar], 1048576; // fault",
        32,
        "beyond the range",
    ),
    # bar
    "two counts at one barrier": Fault(
        "named-barrier",
        START + "setp.lt.u32 %p3, %t, 32;\n@%p3 bar.sync 1, 128; // fault\n@%p3 bar.sync 1, 64; // needed\n"
        "@!%p3 bar.sync 1, 64;\n@%p3 bar.arrive 1, 128; // fault",
        64,
        "counts 128 and 64",
    ),
    "one warp arrives twice": Fault(
        "named-barrier",
        START + "bar.arrive 1, 64; // fault\nbar.arrive 1, 64; // fault\nbar.sync 2, 32;",
        32,
        "arrives twice",
    ),
    # wgmma
    "no fence before the first wgmma": Fault(
        "wgmma-fence", MATRICES + FENCE.replace("\n", " // needed\n") + WGMMA + COMMIT + DONE
    ),
    "no fence after a change of an accumulator": Fault(
        "wgmma-fence",
        MATRICES
        + FENCE
        + WGMMA
        + COMMIT
        + DONE
        + "add.f32 %f0, %f0, %f0;\n"
        + FENCE.replace("\n", " // needed\n")
        + WGMMA
        + COMMIT
        + DONE,
    ),
    "no fence after a change of A": Fault(
        "wgmma-fence",
        MATRICES
        + FENCE
        + "mov.u32 %r1, 0;\nmov.u32 %r2, 0;\nmov.u32 %r3, 0;\nmov.u32 %r4, 0;\n"
        + FENCE.replace("\n", " // needed\n")
        + WGMMA_REGISTERS
        + COMMIT
        + DONE,
    ),
    "an accumulator read before the wait": Fault(
        "wgmma-registers",
        MATRICES + FENCE + WGMMA + COMMIT + DONE.replace("\n", " // needed\n") + "add.f32 %f5, %f0, %f1;\n" + DONE,
        message="reads an accumulator",
    ),
    "an accumulator, renamed, read before the wait": Fault(
        "wgmma-registers",
        MATRICES
        + FENCE
        + WGMMA
        + COMMIT
        + "mov.f32 %f7, %f2;\n"
        + DONE.replace("\n", " // needed\n")
        + "add.f32 %f5, %f7, %f7;\n"
        + DONE,
    ),
    "an accumulator read after the wait for an older group": Fault(
        "wgmma-registers",
        MATRICES
        + FENCE
        + WGMMA
        + COMMIT
        + WGMMA.replace("%f0, %f1, %f2, %f3", "%f4, %f5, %f6, %f7")
        + COMMIT
        + "wgmma.wait_group.sync.aligned 1;\n"
        + DONE.replace("\n", " // needed\n")
        + "add.f32 %f8, %f4, %f5;\n"
        + DONE,
    ),
    "A changed before the wait": Fault(
        "wgmma-registers",
        MATRICES
        + "mov.u32 %r1, 0;\nmov.u32 %r2, 0;\nmov.u32 %r3, 0;\nmov.u32 %r4, 0;\n"
        + FENCE
        + WGMMA_REGISTERS
        + COMMIT
        + DONE.replace("\n", " // needed\n")
        + "mov.u32 %r2, 5;\n"
        + DONE,
        message="reads as A",
    ),
    # the end
    "a bulk store nobody waited for": Fault(
        "exit", START + FILL + STORE + "@%p1 cp.async.bulk.wait_group.read 0; // needed"
    ),
    "a load nobody waited for": Fault("exit", START + BARRIERS + LOAD + wait(0, "// needed"), 32, "nobody waited for"),
    "bytes that never come": Fault(
        "exit", START + BARRIERS + "@%p1 mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%bar], 16; // fault", 32
    ),
    "wgmma in flight": Fault("exit", MATRICES + FENCE + WGMMA + COMMIT + DONE.replace("\n", " // needed\n")),
    "cp.async in flight": Fault(
        "exit",
        START
        + "cp.async.ca.shared.global [%slot], [%a0], 16;\ncp.async.commit_group;\ncp.async.wait_group 0; // needed",
        32,
    ),
    # lanes
    "shfl from a lane that takes no part": Fault(
        "shfl",
        START + "mov.u32 %r3, 1;\nsetp.lt.u32 %p3, %t, 16;\nmov.u32 %r2, 20; // fault\nmov.u32 %r2, 10; // needed\n"
        "@%p3 shfl.sync.idx.b32 %r1, %t, %r2, 31, 0xffff;",
        32,
    ),
    "a lane outside its membermask": Fault(
        "membermask", START + "bar.warp.sync 0xffff; // fault\nbar.warp.sync 0xffffffff;", 32
    ),
    # clusters
    "a block leaves before its peer arrives": Fault(
        "peer-exit",
        START
        + BARRIERS
        + "mov.u32 %r1, %cluster_ctarank;\nxor.b32 %r2, %r1, 1;\nmapa.shared::cluster.u32 %r3, %bar, %r2;\n"
        "barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;\n"
        "@%p1 mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%r3];\n"
        "barrier.cluster.arrive.aligned; // needed\nbarrier.cluster.wait.aligned; // needed\n",
        32,
        cluster=2,
    ),
}
