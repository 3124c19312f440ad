// SPDX-License-Identifier: BSD-3-Clause
// The interpreter: splits of a warp, lowest program counter first.
#include <algorithm>

#include "exit_checks.h"
#include "machine.h"

namespace hopper_sim {

namespace {

constexpr size_t kNone = ~size_t{0};

size_t lowest_runnable(const std::vector<Split>& splits) {
    size_t best = kNone;
    for (size_t n = 0; n < splits.size(); ++n)
        if (!splits[n].blocked && (best == kNone || splits[n].pc < splits[best].pc)) best = n;
    return best;
}

size_t longest_waiting(const std::vector<Split>& splits) {
    size_t best = kNone;
    for (size_t n = 0; n < splits.size(); ++n)
        if (!splits[n].blocked && (best == kNone || splits[n].ran < splits[best].ran)) best = n;
    return best;
}

void merge_equal(std::vector<Split>& splits) {
    for (size_t a = 0; a + 1 < splits.size(); ++a)
        for (size_t b = a + 1; b < splits.size();) {
            if (splits[a].pc != splits[b].pc) {
                ++b;
                continue;
            }
            splits[a].mask |= splits[b].mask;
            splits[a].blocked = false;
            splits.erase(splits.begin() + static_cast<long>(b));
        }
}

// The first program counter at or after `pc` where another split stands.
u32 next_meeting(const std::vector<Split>& splits, size_t self) {
    u32 meeting = ~0u;
    for (size_t n = 0; n < splits.size(); ++n)
        if (n != self && splits[n].pc >= splits[self].pc) meeting = std::min(meeting, splits[n].pc);
    return meeting;
}

// Lanes that a collective instruction still misses.
u32 missing_lanes(Warp& w, const Instruction& i, u32 mask) {
    if (i.flow == Flow::aligned) return w.alive & ~mask;
    u32 members = w.reg<u32>(i.member_mask)[__builtin_ctz(mask)];
    if (mask & ~members)
        hazard(w, i, "membermask",
               format("lanes 0x%x execute it, the membermask is 0x%x", mask, members));
    return members & w.alive & ~mask;
}

enum class Outcome { next, blocked, resched };

class Runner {
  public:
    Runner(Warp& warp, u32 quantum)
        : w_(warp),
          code_(warp.cta->grid().kernel->code.data()),
          coverage_(warp.cta->grid().coverage.data()),
          quantum_(quantum) {}

    RunResult run() {
        for (Split& split : w_.splits) split.blocked = false;
        while (true) {
            merge_equal(w_.splits);
            if (w_.splits.empty()) return RunResult::done;
            // A split that spins for a whole quantum may be waiting for another one.
            size_t chosen =
                w_.out_of_turn ? longest_waiting(w_.splits) : lowest_runnable(w_.splits);
            if (chosen == kNone) return RunResult::blocked;
            w_.out_of_turn = quantum_ == 0 && w_.splits.size() > 1;
            if (quantum_ == 0) return RunResult::quantum;
            run_split(chosen);
        }
    }

  private:
    // Runs a split until it blocks, splits, ends, meets another or the quantum is over.
    void run_split(size_t chosen) {
        u32 meeting = w_.splits.size() > 1 ? next_meeting(w_.splits, chosen) : ~0u;
        Split& split = w_.splits[chosen];
        w_.running = &split;
        u32 pc = split.pc;
        while (quantum_ > 0) {
            const Instruction& i = code_[pc];
            u32 mask = split.mask;
            if (i.guard >= 0) {
                u32 p = w_.predicate(static_cast<u32>(i.guard));
                mask &= i.guard_negated ? ~p : p;
            }
            split.pc = pc;
            split.ran = w_.instructions;
            Outcome outcome = i.flow == Flow::plain ? plain(i, mask) : special(i, mask, chosen, pc);
            if (outcome == Outcome::blocked) {
                split.blocked = true;
                if (!split.counted) note_wait(split, i);
                return;
            }
            ++w_.instructions;
            --quantum_;
            if (coverage_ && mask) ++coverage_[pc_of(i)];
            if (outcome == Outcome::resched) return;
            split.counted = false;
            split.pc = ++pc;
            if (pc >= meeting) return;
        }
    }

    void note_wait(Split& split, const Instruction& i) {
        Statistics& statistics = w_.cta->grid().report->statistics;
        Wait::Kind kind = split.wait.kind;
        split.counted = true;
        ++statistics.blocked[i.line];
        statistics.barrier_waits +=
            kind == Wait::named_barrier || kind == Wait::cluster_barrier || kind == Wait::mbarrier;
    }

    Outcome plain(const Instruction& i, u32 mask) {
        if (mask == 0) return Outcome::next;
        if (i.is_tagged && !w_.tags.empty()) check_tagged_registers(w_, i);
        return i.run(w_, i, mask) == Step::block ? Outcome::blocked : Outcome::next;
    }

    Outcome special(const Instruction& i, u32 mask, size_t chosen, u32& pc) {
        if (i.flow == Flow::branch) return branch(i, mask, chosen, pc);
        if (mask == 0) return Outcome::next;
        if (i.flow == Flow::exit) return exit(i, mask, chosen);
        if (u32 missing = missing_lanes(w_, i, mask)) {
            w_.wait_for(Wait::lanes, missing);
            return Outcome::blocked;
        }
        w_.next_epoch();  // orders the lanes
        return plain(i, mask);
    }

    Outcome branch(const Instruction& i, u32 taken, size_t chosen, u32& pc) {
        Split& split = w_.splits[chosen];
        u32 stay = split.mask & ~taken;
        if (taken == 0) return Outcome::next;
        if (stay == 0) {
            split.pc = i.target;
            if (w_.splits.size() > 1) return Outcome::resched;
            pc = i.target - 1;  // the caller steps over it
            return Outcome::next;
        }
        split.mask = stay;
        split.pc = pc + 1;
        w_.splits.push_back({i.target, taken, false, {}});
        return Outcome::resched;
    }

    Outcome exit(const Instruction& i, u32 mask, size_t chosen) {
        check_lane_exit(w_, i, mask);
        w_.alive &= ~mask;
        Split& split = w_.splits[chosen];
        split.mask &= ~mask;
        if (split.mask) return Outcome::next;
        w_.splits.erase(w_.splits.begin() + static_cast<long>(chosen));
        if (w_.splits.empty() && w_.cta->live_warps == 1) check_block_exit(w_, i);
        return Outcome::resched;
    }

    u32 pc_of(const Instruction& i) const { return static_cast<u32>(&i - code_); }

    Warp& w_;
    const Instruction* code_;
    u64* coverage_;
    u32 quantum_;
};

}  // namespace

RunResult run_warp(Warp& warp, u32 quantum) { return Runner(warp, quantum).run(); }

std::string describe_wait(const Warp& warp, const Split& split) {
    const Wait& wait = split.wait;
    const Cta& cta = *warp.cta;
    switch (wait.kind) {
        case Wait::lanes:
            return format("waits for lanes 0x%x of its warp", wait.id);
        case Wait::named_barrier: {
            const NamedBarrier& b = cta.named_barriers[wait.id];
            return format("waits at barrier %u: %u of %u threads are there", wait.id, b.arrived,
                          b.expected);
        }
        case Wait::cluster_barrier:
            return "waits at barrier.cluster";
        case Wait::mbarrier: {
            auto found = cta.mbarriers.find(wait.id & kOffsetMask);
            if (found == cta.mbarriers.end()) return "waits at an mbarrier that is gone";
            const Mbarrier& b = found->second;
            return format("waits at mbarrier ") + cta.name_of(wait.id & kOffsetMask) +
                   format(
                       " for parity %u: phase %u, %lld of %u arrivals pending, %lld bytes pending",
                       wait.detail, b.phase, static_cast<long long>(b.pending), b.expected,
                       static_cast<long long>(b.transactions));
        }
        case Wait::bulk_group:
            return format("waits for bulk groups: %u incomplete, %u allowed", wait.detail, wait.id);
        case Wait::async_group:
            return format("waits for cp.async groups: %u incomplete, %u allowed", wait.detail,
                          wait.id);
        case Wait::wgmma_group:
            return format("wgmma.wait_group %u: warp %u is behind", wait.id, wait.detail);
        case Wait::register_pool:
            return format("setmaxnreg %u: %lld registers are free, %u more are needed", wait.id,
                          static_cast<long long>(cta.register_pool),
                          (wait.id - warp.register_count) * kWarpSize);
        case Wait::nothing:
            break;
    }
    return "can run";
}

}  // namespace hopper_sim
