// SPDX-License-Identifier: BSD-3-Clause
// The forward: out = softmax(scale Q K^T) V, a tile of query rows at a time.
//
// Warp 0 is the producer, which loads by the copy engine. Warp 1 hands out tiles. Warps 2 and 3 are
// guards, which look for values that a mask must hide. With cp.async warps 0 to 3 are all of that.
// The other warpgroups are consumers, 64 query rows each.
// README.md draws the schedule.
#pragma once

#include "config.h"
#include "epilogue.cuh"
#include "isolate.cuh"
#include "kv_source.cuh"
#include "mask.cuh"
#include "ring.cuh"
#include "scheduler.cuh"
#include "seqlen.cuh"
#include "sm90/grid.cuh"
#include "sm90/mbarrier.cuh"
#include "sm90/regs.cuh"
#include "sm90/tma.cuh"
#include "sm90/wgmma.cuh"
#include "softcap.cuh"
#include "softmax.cuh"
#include "visible.cuh"

namespace fa3 {

// Consumer warpgroups issue their products in turn, so that the softmax of one runs beside the
// products of another. Named barrier kFirstTurn + w is met by warpgroup w, which waits, and the one
// in front of it, which does not.
constexpr int kFirstTurn = 1, kIsolation = 4;  // named barriers

template <int kWarpgroups>
struct Turns {
    int warpgroup;

    __device__ explicit Turns(int warpgroup) : warpgroup(warpgroup) {
        if (kWarpgroups > 1 && warpgroup == kWarpgroups - 1) pass();
    }

    __device__ void await() const {
        if (kWarpgroups > 1) sm90::sync_named(kFirstTurn + warpgroup, 256);
    }

    __device__ void pass() const {
        if (kWarpgroups > 1) sm90::arrive_named(kFirstTurn + (warpgroup + 1) % kWarpgroups, 256);
    }

    // The first warpgroup takes the turn that nobody uses: a barrier must not be left half met.
    __device__ void end() const {
        if (warpgroup == 0) await();
    }
};

template <FwdConfig C>
struct Fwd {
    static constexpr int kM = C.block_m, kN = C.block_n, kStages = C.stages;
    static constexpr int kConsumers = C.consumers(), kConsumerWarps = 4 * kConsumers;
    static constexpr bool kThreadsCopy = C.threads_copy();
    static constexpr int kGuards = kThreadsCopy ? 4 : 2;
    static constexpr int kPanels = C.panels(), kPanelsV = C.panels_v();
    static constexpr bool kMovesRegisters = C.moves_registers();
    static constexpr int kProducerRegisters = C.producer_registers();
    static constexpr int kConsumerRegisters = C.consumer_registers();
    // Wide accumulators are rescaled behind the next product's issue, where that costs no time.
    static constexpr bool kLateRescale = C.head_dim_v > 128;
    static constexpr int kRowBytes = kPanel * 2;          // of a panel
    static constexpr int kRowGroupBytes = 8 * kRowBytes;  // the swizzle's period
    static constexpr int kStepBytes = 16 * 2;             // one MMA's 16 columns of K, along a row
    static constexpr int kQkSteps = C.head_dim / 16, kPvSteps = kN / 16;
    static_assert(kM % kWarpgroupRows == 0 && kN % 16 == 0 && C.head_dim % 16 == 0 &&
                  C.head_dim_v % 32 == 0);

    using Element = unsigned short;
    using Barrier = sm90::Mbarrier;
    using Places = cute::conditional_t<kThreadsCopy, RowPlaces<kN>, BoxPlaces<kN>>;
    static constexpr int kArrivals = kThreadsCopy ? 128 : 1;  // at k_full, v_full, beside bytes

    struct Smem {
        alignas(1024) Element q[kPanels][kM][kPanel];
        alignas(1024) Element k[kStages][kPanels][kN][kPanel];
        alignas(1024) Element v[kStages][kPanelsV][kN][kPanel];
        Places places;
        Schedule schedule;
        Barrier q_full[kConsumers], q_empty;  // by boxes of Q
        Barrier k_full[kStages], k_empty[kStages];
        Barrier v_full[kStages], v_empty[kStages];
        Barrier v_inspected[kStages];         // by the guards; of blocks that a mask cuts
        bool v_non_finite[kStages][kGuards];  // what each of them found
    };

    static __device__ void run(const FwdParams& p) {
        extern __shared__ __align__(1024) char memory[];
        Smem& s = *reinterpret_cast<Smem*>(memory);
        const int warp = sm90::uniform(threadIdx.x / 32);
        if (warp == 0 && sm90::elect()) {
            sm90::prefetch(p.q_map);
            for (int i = 0; i < kAnnouncements; ++i) {
                sm90::init(s.schedule.full[i], 1);
                sm90::init(s.schedule.empty[i], kGuards + (kThreadsCopy ? 0 : 1) + kConsumerWarps);
            }
            for (Barrier& full : s.q_full) sm90::init(full, 1);
            sm90::init(s.q_empty, kConsumerWarps);
            if constexpr (!kThreadsCopy) {
                sm90::prefetch(p.k.map);
                sm90::prefetch(p.v.map);
                for (sm90::Mbarrier& found : s.places.found) sm90::init(found, 1);
            }
            for (int i = 0; i < kStages; ++i) {
                sm90::init(s.k_full[i], kArrivals);
                sm90::init(s.v_full[i], kArrivals);
                sm90::init(s.k_empty[i], kConsumerWarps);
                sm90::init(s.v_empty[i], kConsumerWarps + (kThreadsCopy ? 0 : kGuards));
                sm90::init(s.v_inspected[i], kGuards);
            }
            sm90::fence_init();
        }
        // Rows of Q that no head has, for `pack` that does not divide the tile: no copy writes
        // them.
        for (int row = kM / p.pack * p.pack + threadIdx.x / kPanel; row < kM;
             row += blockDim.x / kPanel) {
            for (int i = 0; i < kPanels; ++i) s.q[i][row][threadIdx.x % kPanel] = 0;
        }
        sm90::fence_async_proxy();
        __syncthreads();
        sm90::await_previous_kernels();  // nothing in global memory is touched before
        if (warp < 4) {
            if constexpr (kMovesRegisters) sm90::give_registers<kProducerRegisters>();
            if constexpr (kThreadsCopy) {
                produce_rows(p, s, warp);
            } else if (warp == 0) {
                if (sm90::elect()) produce(p, s);
            } else if (warp == 1) {
                TileScheduler<kN>{p, s.schedule}.announce_all(kM / p.pack);
            } else {
                guard(p, s, warp - 2);
            }
        } else {
            if constexpr (kMovesRegisters) sm90::take_registers<kConsumerRegisters>();
            consume(p, s, warp / 4 - 1);
        }
    }

    // By one thread.
    static __device__ void produce(const FwdParams& p, Smem& s) {
        using Tiles = WorkSource<1>;
        Ring<kStages> k, v;
        Ring<Places::kSlots> places_k, places_v;
        for (const Work* at = Tiles::first(s.schedule); at->exists();
             at = Tiles::next(s.schedule, *at, true)) {
            const Work& work = *at;
            const KeyBlocks blocks = work.blocks;
            if (blocks.empty()) continue;
            const int head_kv = work.tile.head * p.pack / (p.num_heads / p.num_heads_kv);
            const auto load_k = [&](int n) {
                if (p.page_table) sm90::wait(s.places.found[places_k.stage], places_k.phase);
                sm90::wait(s.k_empty[k.stage], k.phase ^ 1);
                sm90::arrive_expect(s.k_full[k.stage], sizeof(s.k[0]));
                load_boxes(p, p.k, work.seq, head_kv, n, s.places, places_k.stage, s.k[k.stage],
                           s.k_full[k.stage]);
                k.advance();
                places_k.advance();
            };
            const auto load_v = [&](int n) {
                sm90::wait(s.v_empty[v.stage], v.phase ^ 1);
                sm90::arrive_expect(s.v_full[v.stage], sizeof(s.v[0]));
                load_boxes(p, p.v, work.seq, head_kv, n, s.places, places_v.stage, s.v[v.stage],
                           s.v_full[v.stage]);
                v.advance();
                places_v.advance();
            };
            // K first, since the consumers let go of Q last; V lags one block behind K, as they
            // need it.
            load_k(blocks.hi - 1);
            load_q(p, s, work);
            for (int n = blocks.hi - 2; n >= blocks.lo; --n) {
                load_k(n);
                load_v(n + 1);
            }
            load_v(blocks.lo);
        }
    }

    static __device__ int box_of(const FwdParams& p, const Work& work, int warpgroup) {
        return p.q_box_positions < work.positions ? warpgroup : 0;
    }

    static __device__ void load_q(const FwdParams& p, Smem& s, const Work& work) {
        sm90::wait(s.q_empty, work.loads & 1 ^ 1);
        const int positions = p.q_box_positions;
        for (int box = 0; box <= box_of(p, work, kConsumers - 1); ++box) {
            sm90::arrive_expect(s.q_full[box], kPanels * positions * p.pack * kRowBytes);
            for (int i = 0; i < kPanels; ++i) {
                sm90::load(p.q_map, s.q_full[box], sm90::CacheHint::EVICT_FIRST,
                           s.q[i][box * kWarpgroupRows], i * kPanel, 0,
                           work.seq.first_row + work.position + box * positions, work.tile.head,
                           work.seq.q_batch);
            }
        }
    }

    // A mask hides keys of a block from some rows of the tile, and the sequence's end from all:
    // there V must be finite, or the consumers must know that it is not.
    static __device__ void guard(const FwdParams& p, Smem& s, int guard) {
        clear_uncovered(p, guard);
        using Tiles = WorkSource<32>;
        Ring<kStages> v, inspected;
        Ring<Places::kSlots> slot;
        for (const Work* at = Tiles::first(s.schedule); at->exists();
             at = Tiles::next(s.schedule, *at, threadIdx.x % 32 == 0)) {
            const Work& work = *at;
            const KeyBlocks& blocks = work.blocks;
            const auto find = [&](int n) {
                if (p.page_table && guard == 0 && n >= blocks.lo)
                    s.places.find(p, work.seq, n, slot);
            };
            if (!blocks.empty()) find(blocks.hi - 1);
            find(blocks.hi - 2);
            for (int n = blocks.hi - 1; n >= blocks.lo; --n) {
                find(n - 2);
                sm90::wait(s.v_full[v.stage], v.phase);
                if (blocks.cut(n)) inspect(s, work, n, v, inspected, guard);
                // Of every block: a guard that fell behind would mistake one phase for another.
                if (threadIdx.x % 32 == 0) sm90::arrive(s.v_empty[v.stage]);
                v.advance();
            }
        }
        note_clamped(p, guard);
    }

    // Producer and guards in one: four warps copy, and look at V one block behind its load.
    static __device__ void produce_rows(const FwdParams& p, Smem& s, int warp) {
        using Tiles = WorkSource<32>;
        const bool leader = warp == 0 && sm90::elect();  // loads Q
        Ring<kStages> k, v, looked_at, inspected;
        const TileScheduler<kN> scheduler{p, s.schedule};  // of warp 0
        if (warp == 0) {
            scheduler.begin(kM / p.pack);
            scheduler.announce();
        }
        clear_uncovered(p, warp);
        for (const Work* at = Tiles::first(s.schedule); at->exists();
             at = Tiles::next(s.schedule, *at, threadIdx.x % 32 == 0)) {
            if (warp == 0) scheduler.announce();
            const Work& work = *at;
            const KeyBlocks& blocks = work.blocks;
            const auto look_at = [&](int n) {
                if (n >= blocks.hi) return;
                if (blocks.cut(n)) {
                    sm90::wait(s.v_full[looked_at.stage], looked_at.phase);
                    inspect(s, work, n, looked_at, inspected, warp);
                }
                looked_at.advance();
            };
            if (!blocks.empty()) {
                const int head_kv = work.tile.head * p.pack / (p.num_heads / p.num_heads_kv);
                RowLoader<kN> loader(p, s.places, work.seq, head_kv, warp, blocks);
                for (int n = blocks.hi - 1; n >= blocks.lo - 1; --n) {
                    loader.advance(n);
                    if (n >= blocks.lo) {
                        sm90::wait(s.k_empty[k.stage], k.phase ^ 1);
                        loader.load(p.k, p.head_dim, n, s.k[k.stage], s.k_full[k.stage]);
                        k.advance();
                    }
                    if (n == blocks.hi - 1) {
                        if (leader) load_q(p, s, work);
                        continue;
                    }
                    sm90::wait(s.v_empty[v.stage], v.phase ^ 1);
                    loader.load(p.v, p.head_dim_v, n + 1, s.v[v.stage], s.v_full[v.stage]);
                    v.advance();
                    look_at(n + 2);
                }
                look_at(blocks.lo);
            }
        }
        note_clamped(p, warp);
    }

    static __device__ void clear_uncovered(const FwdParams& p, int guard) {
        clear_uncovered_rows(p, blockIdx.x * kGuards + guard, gridDim.x * kGuards,
                             threadIdx.x % 32);
    }

    // Last of all, since nobody waits for it.
    static __device__ void note_clamped(const FwdParams& p, int guard) {
        note_clamps(p, (blockIdx.x * kGuards + guard) * 32 + threadIdx.x % 32,
                    gridDim.x * kGuards * 32);
    }

    // Of V[n], which is there.
    static __device__ void inspect(Smem& s, const Work& work, int n, const Ring<kStages>& v,
                                   Ring<kStages>& inspected, int guard) {
        const int lane = threadIdx.x % 32;
        const bool found = inspect_values<C.dtype>(s.v[v.stage], work.seq.num_keys - n * kN,
                                                   guard * 32 + lane, kGuards * 32);
        sm90::fence_async_proxy();  // wgmma will read zeros that were written
        const bool any = __any_sync(0xffffffff, found);
        __syncwarp();  // a vote orders no memory
        if (lane == 0) {
            s.v_non_finite[inspected.stage][guard] = any;
            sm90::arrive(s.v_inspected[inspected.stage]);
        }
        inspected.advance();
    }

    static __device__ void consume(const FwdParams& p, Smem& s, int warpgroup) {
        const int thread = threadIdx.x % 128, lane = thread % 32;
        const Turns<C.ping_pong ? kConsumers : 1> turns(warpgroup);
        const uint64_t q_tile =
            sm90::descriptor(s.q[0][warpgroup * kWarpgroupRows], kRowGroupBytes, 0);
        const uint64_t k_tiles = sm90::descriptor(s.k, kRowGroupBytes, 0);
        const uint64_t v_tiles = sm90::descriptor(s.v, kRowGroupBytes, sizeof(s.v[0][0]));
        using Tiles = WorkSource<32>;
        Ring<kStages> k, v, inspected;
        for (const Work* at = Tiles::first(s.schedule); at->exists();
             at = Tiles::next(s.schedule, *at, lane == 0)) {
            const Work& work = *at;
            const KeyBlocks& blocks = work.blocks;
            const int row =
                warpgroup * kWarpgroupRows + thread / 32 * 16 + lane / 4;  // and row + 8
            float acc_s[kN / 2], acc_o[C.head_dim_v / 2] = {};
            uint32_t probabilities[kN / 4];  // acc_s as the A operand of the second product
            Softmax softmax{p.scale_log2};
            if (!blocks.empty()) {
                VisibleKeys visible(p, work, row);
                const auto mask = [&](int n) { hide(acc_s, visible, n * kN + 2 * (lane % 4)); };
                const auto no_mask = [](int) {};

                const auto issue_qk = [&] {
                    sm90::pin(acc_s);
                    sm90::mma_fence();
                    const uint64_t k_tile = k_tiles + (k.stage * sizeof(s.k[0]) >> 4);
#pragma unroll
                    for (int i = 0; i < kQkSteps; ++i) {
                        const int panel = i * 16 / kPanel, offset = i * kStepBytes % kRowBytes;
                        sm90::mma<C.dtype>(acc_s, q_tile + (panel * sizeof(s.q[0]) + offset >> 4),
                                           k_tile + (panel * sizeof(s.k[0][0]) + offset >> 4),
                                           i > 0);
                    }
                    sm90::mma_commit();
                };
                const auto issue_pv = [&] {
                    sm90::pin(acc_o);
                    sm90::mma_fence();
                    const uint64_t v_tile = v_tiles + (v.stage * sizeof(s.v[0]) >> 4);
#pragma unroll
                    for (int i = 0; i < kPvSteps; ++i) {
                        sm90::mma<C.dtype>(acc_o, probabilities + 4 * i,
                                           v_tile + (i * 2 * kRowGroupBytes >> 4), true);
                    }
                    sm90::mma_commit();
                };
                const auto release_k = [&] {
                    if (sm90::elect()) sm90::arrive(s.k_empty[k.stage]);
                    k.advance();
                };
                const auto release_v = [&] {
                    if (sm90::elect()) sm90::arrive(s.v_empty[v.stage]);
                    v.advance();
                };
                const auto update_softmax = [&](int n, auto&& hide_keys) {
                    if (p.softcap_scale > 0.f) cap(acc_s, p.softcap_scale);
                    hide_keys(n);
                    softmax.update(acc_s);
                };
                const auto pack_probabilities = [&] {
#pragma unroll
                    for (int i = 0; i < kN / 4; ++i)
                        probabilities[i] = sm90::pack<C.dtype>(acc_s[2 * i], acc_s[2 * i + 1]);
                };
                const auto await_k = [&] {
                    sm90::wait(s.k_full[k.stage], k.phase);
                    if constexpr (kThreadsCopy) sm90::fence_async_proxy();
                };
                const auto await_v = [&] {
                    sm90::wait(s.v_full[v.stage], v.phase);
                    if constexpr (kThreadsCopy) sm90::fence_async_proxy();
                };
                const auto step = [&](int n, auto&& hide_keys) {
                    await_k();
                    turns.await();
                    issue_qk();
                    if constexpr (kLateRescale) rescale(acc_o, softmax.alpha);
                    await_v();
                    issue_pv();
                    turns.pass();
                    sm90::mma_wait<1>();
                    sm90::pin(acc_s);
                    release_k();
                    update_softmax(n, hide_keys);
                    if constexpr (C.hold) sm90::hold(softmax.row_sum[0] + softmax.row_sum[1]);
                    sm90::mma_wait<0>();
                    sm90::pin(acc_o);
                    release_v();
                    pack_probabilities();  // only now: the second product read the old ones
                    if constexpr (!kLateRescale) rescale(acc_o, softmax.alpha);
                };

                // After it, V[n] is finite; what was not has been added to the rows that see it.
                const auto isolate = [&](int n) {
                    sm90::wait(s.v_inspected[inspected.stage], inspected.phase);
                    bool found = false;
                    for (int i = 0; i < kGuards; ++i) found |= s.v_non_finite[inspected.stage][i];
                    if (found) {
                        sm90::wait(s.v_full[v.stage], v.phase);
                        if constexpr (kLateRescale) {  // infinities must not meet a factor of 0
                            rescale(acc_o, softmax.alpha);
                            softmax.alpha[0] = softmax.alpha[1] = 1.f;
                        }
                        add_non_finite<C.dtype>(s.v[v.stage], acc_o, visible, n * kN, lane);
                        sm90::sync_named(kIsolation, 128 * kConsumers);  // all have read
                        clear_non_finite<C.dtype>(s.v[v.stage], warpgroup * 128 + thread,
                                                  128 * kConsumers);
                        sm90::fence_async_proxy();
                        sm90::sync_named(kIsolation, 128 * kConsumers);  // all is clear
                    }
                    inspected.advance();
                };

                visible.find();
                sm90::wait(s.q_full[box_of(p, work, warpgroup)], work.loads & 1);
                await_k();
                issue_qk();
                sm90::mma_wait<0>();
                sm90::pin(acc_s);
                release_k();
                update_softmax(blocks.hi - 1, mask);
                pack_probabilities();
                if (blocks.cut(blocks.hi - 1)) isolate(blocks.hi - 1);
                // Blocks that the right end of a mask cuts, whole ones, blocks that the left end
                // cuts. What a row sees is found twice: kept through the whole blocks, it would
                // cost registers there.
                for (int n = blocks.hi - 2, end = blocks.full_hi; n >= blocks.lo; end = blocks.lo) {
                    if (end == blocks.lo) visible.find();
#pragma unroll 1
                    for (; n >= end; --n) {
                        step(n, mask);
                        isolate(n);
                    }
                    end = blocks.full_lo;
#pragma unroll 1
                    for (; n >= end; --n) step(n, no_mask);
                }
                if (sm90::elect()) sm90::arrive(s.q_empty);
                if constexpr (kLateRescale) rescale(acc_o, softmax.alpha);
                await_v();
                issue_pv();
                sm90::mma_wait<0>();
                sm90::pin(acc_o);
                release_v();
            }
            finish_tile<C.dtype>(p, work, row, lane, softmax, acc_o);
        }
        turns.end();
    }
};

}  // namespace fa3
