// SPDX-License-Identifier: BSD-3-Clause
// Latent attention: out = softmax(scale (Q K^T + Qv V^T)) V with values of up to 512 columns, which
// are keys as well; many query heads share one of them.
//
// Warp 0 is the producer and warps 1 to 3 are guards, as in fwd.cuh. The first consumer warpgroup
// computes scores and probabilities, for itself in registers and for the second one in shared
// memory; each of them sums one half of the columns of V. README.md draws the schedule.
#pragma once

#include "config.h"
#include "epilogue.cuh"
#include "isolate.cuh"
#include "kv_source.cuh"
#include "mask.cuh"
#include "ring.cuh"
#include "scheduler.cuh"
#include "sm90/grid.cuh"
#include "sm90/mbarrier.cuh"
#include "sm90/regs.cuh"
#include "sm90/tma.cuh"
#include "sm90/wgmma.cuh"
#include "softcap.cuh"
#include "softmax.cuh"
#include "visible.cuh"

namespace fa3 {

template <MlaConfig C>
struct Mla {
    static constexpr int kM = C.block_m, kN = C.block_n, kStages = C.stages;
    static constexpr int kConsumerWarps = 8;
    static constexpr bool kThreadsCopy = C.threads_copy();
    static constexpr int kProducerRegisters = C.producer_registers();
    static constexpr int kConsumerRegisters = C.consumer_registers();
    static constexpr int kGuards = kThreadsCopy ? 4 : 2;
    static constexpr int kPanels = C.head_dim / kPanel, kPanelsV = C.head_dim_v / kPanel;
    static constexpr int kColumns = C.head_dim_v / 2;  // of V, of a consumer warpgroup
    static constexpr int kHalfPanels = kPanelsV / 2;
    static constexpr int kRowBytes = kPanel * 2;          // of a panel
    static constexpr int kRowGroupBytes = 8 * kRowBytes;  // the swizzle's period
    static constexpr int kStepBytes = 16 * 2;             // one MMA's 16 columns, along a row
    static constexpr int kQkSteps = C.head_dim / 16, kQvSteps = C.head_dim_v / 16;
    static constexpr int kPvSteps = kN / 16;
    static constexpr int kPanelBytes = kN * kRowBytes;
    static constexpr int kIsolation = 1;                  // named barriers, one for each consumer
    static_assert(kM == kWarpgroupRows && kN == kPanel);  // probabilities are one panel

    using Element = unsigned short;
    using Barrier = sm90::Mbarrier;
    using Places = cute::conditional_t<kThreadsCopy, RowPlaces<kN>, BoxPlaces<kN>>;
    static constexpr int kArrivals = kThreadsCopy ? 128 : 1;  // at kv_full, of K or V, beside bytes

    // What a thread of the first warpgroup leaves to its fellow of the second.
    struct SoftmaxState {
        float row_max[2], row_sum[2];
    };

    struct Smem {
        alignas(1024) Element q[kPanels][kM][kPanel];
        alignas(1024) Element qv[kPanelsV][kM][kPanel];
        alignas(1024) Element k[kStages][kPanels][kN][kPanel];
        alignas(1024) Element v[kStages][kPanelsV][kN][kPanel];
        union {
            alignas(1024) Element probabilities[kM][kN];
            SoftmaxState state[128];  // behind the last probabilities of a tile
        };
        float alpha[kM];  // what the second warpgroup multiplies its sums by
        Places places;
        Schedule schedule;
        Barrier q_full, q_empty;
        Barrier kv_full[kStages], kv_empty[kStages];
        Barrier p_full, p_empty;              // probabilities and alpha, or the state
        Barrier v_inspected[kStages];         // by the guards; of blocks that a mask cuts
        bool v_non_finite[kStages][kGuards];  // what each of them found
    };

    static __device__ void run(const FwdParams& p) {
        extern __shared__ __align__(1024) char memory[];
        Smem& s = *reinterpret_cast<Smem*>(memory);
        const int warp = sm90::uniform(threadIdx.x / 32);
        if (warp == 0 && sm90::elect()) {
            for (int i = 0; i < kAnnouncements; ++i) {
                sm90::init(s.schedule.full[i], 1);
                sm90::init(s.schedule.empty[i], kGuards + (kThreadsCopy ? 0 : 1) + kConsumerWarps);
            }
            sm90::init(s.q_full, 1);
            sm90::init(s.q_empty, 4);
            sm90::init(s.p_full, 4);
            sm90::init(s.p_empty, 4);
            if constexpr (!kThreadsCopy) {
                for (Barrier& found : s.places.found) sm90::init(found, 1);
            }
            for (int i = 0; i < kStages; ++i) {
                sm90::init(s.kv_full[i], (p.has_q ? 2 : 1) * kArrivals);
                sm90::init(s.kv_empty[i], kConsumerWarps + (kThreadsCopy ? 0 : kGuards));
                sm90::init(s.v_inspected[i], kGuards);
            }
            sm90::fence_init();
        }
        // Rows of Q that no head has, for `pack` that does not divide the tile: no copy writes
        // them.
        for (int row = kM / p.pack * p.pack + threadIdx.x / kPanel; row < kM;
             row += blockDim.x / kPanel) {
            s.q[0][row][threadIdx.x % kPanel] = 0;
            for (int i = 0; i < kPanelsV; ++i) s.qv[i][row][threadIdx.x % kPanel] = 0;
        }
        sm90::fence_async_proxy();
        __syncthreads();
        sm90::await_previous_kernels();  // nothing in global memory is touched before
        if (warp < 4) {
            sm90::give_registers<kProducerRegisters>();
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
            sm90::take_registers<kConsumerRegisters>();
            if (warp < 8) {
                score(p, s);
            } else {
                follow(p, s);
            }
        }
    }

    // By one thread.
    static __device__ void produce(const FwdParams& p, Smem& s) {
        using Tiles = WorkSource<1>;
        Ring<kStages> kv;
        Ring<Places::kSlots> places;
        for (const Work* at = Tiles::first(s.schedule); at->exists();
             at = Tiles::next(s.schedule, *at, true)) {
            const Work& work = *at;
            const KeyBlocks blocks = work.blocks;
            if (!blocks.empty()) load_q(p, s, work);
            const int head_kv = work.tile.head * p.pack / (p.num_heads / p.num_heads_kv);
            const auto load = [&](const KeyTensor& x, int n, auto& to) {
                sm90::arrive_expect(s.kv_full[kv.stage], sizeof(to));
                load_boxes(p, x, work.seq, head_kv, n, s.places, places.stage, to,
                           s.kv_full[kv.stage]);
            };
            for (int n = blocks.hi - 1; n >= blocks.lo; --n) {
                if (p.page_table) sm90::wait(s.places.found[places.stage], places.phase);
                sm90::wait(s.kv_empty[kv.stage], kv.phase ^ 1);
                if (p.has_q) load(p.k, n, s.k[kv.stage]);
                load(p.v, n, s.v[kv.stage]);
                kv.advance();
                places.advance();
            }
        }
    }

    static __device__ void load_q(const FwdParams& p, Smem& s, const Work& work) {
        sm90::wait(s.q_empty, work.loads & 1 ^ 1);
        const int panels = (p.has_q ? kPanels : 0) + (p.has_qv ? kPanelsV : 0);
        sm90::arrive_expect(s.q_full, panels * work.positions * p.pack * kRowBytes);
        const auto load = [&](const CUtensorMap& map, auto& to, int panel) {
            sm90::load(map, s.q_full, sm90::CacheHint::EVICT_FIRST, to, panel * kPanel, 0,
                       work.seq.first_row + work.position, work.tile.head, work.seq.q_batch);
        };
        for (int i = 0; i < kPanels && p.has_q; ++i) load(p.q_map, s.q[i], i);
        for (int i = 0; i < kPanelsV && p.has_qv; ++i) load(p.qv_map, s.qv[i], i);
    }

    static __device__ void guard(const FwdParams& p, Smem& s, int guard) {
        clear_uncovered(p, guard);
        using Tiles = WorkSource<32>;
        Ring<kStages> kv, inspected;
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
                sm90::wait(s.kv_full[kv.stage], kv.phase);
                if (blocks.cut(n)) inspect(s, work, n, kv, inspected, guard);
                // Of every block: a guard that fell behind would mistake one phase for another.
                if (threadIdx.x % 32 == 0) sm90::arrive(s.kv_empty[kv.stage]);
                kv.advance();
            }
        }
        note_clamped(p, guard);
    }

    // Producer and guards in one: four warps copy, and look at V before they load the next block.
    static __device__ void produce_rows(const FwdParams& p, Smem& s, int warp) {
        using Tiles = WorkSource<32>;
        const bool leader = warp == 0 && sm90::elect();  // loads Q
        Ring<kStages> kv, looked_at, inspected;
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
                    sm90::wait(s.kv_full[looked_at.stage], looked_at.phase);
                    inspect(s, work, n, looked_at, inspected, warp);
                }
                looked_at.advance();
            };
            if (!blocks.empty()) {
                const int head_kv = work.tile.head * p.pack / (p.num_heads / p.num_heads_kv);
                RowLoader<kN> loader(p, s.places, work.seq, head_kv, warp, blocks);
                if (leader) load_q(p, s, work);
                for (int n = blocks.hi - 1; n >= blocks.lo; --n) {
                    loader.advance(n);
                    look_at(n + 1);  // its scores are issued before the stage of block n is free
                    sm90::wait(s.kv_empty[kv.stage], kv.phase ^ 1);
                    Barrier& full = s.kv_full[kv.stage];
                    if (p.has_q) loader.load(p.k, p.head_dim, n, s.k[kv.stage], full);
                    loader.load(p.v, p.head_dim_v, n, s.v[kv.stage], full);
                    kv.advance();
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

    // Of V[n], which is there. As in fwd.cuh; but here scores wait for it, since V is a key too.
    static __device__ void inspect(Smem& s, const Work& work, int n, const Ring<kStages>& kv,
                                   Ring<kStages>& inspected, int guard) {
        const int lane = threadIdx.x % 32;
        const bool found = inspect_values<C.dtype>(s.v[kv.stage], work.seq.num_keys - n * kN,
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

    // V as a consumer sees it, which sums one half of its columns.
    struct Values {
        Smem& s;
        const int half;
        const uint64_t tiles;
        Ring<kStages> ring, inspected;

        __device__ Values(Smem& s, int half)
            : s(s),
              half(half),
              tiles(sm90::descriptor(s.v[0][half * kHalfPanels], kRowGroupBytes,
                                     sizeof(s.v[0][0]))) {}

        // Of step i of the product with the block at the ring's stage.
        __device__ uint64_t operand(int i) const {
            return tiles + (ring.stage * sizeof(s.v[0]) + i * 2 * kRowGroupBytes >> 4);
        }

        // Whether a block that a mask cuts has values that are not finite.
        __device__ bool await_inspection() {
            sm90::wait(s.v_inspected[inspected.stage], inspected.phase);
            bool found = false;
            for (int i = 0; i < kGuards; ++i) found |= s.v_non_finite[inspected.stage][i];
            inspected.advance();
            return found;
        }

        // After it, V is finite; what was not has been added to the rows that see it.
        __device__ void isolate(float (&acc)[kColumns / 2], const VisibleKeys& visible,
                                int first_key) const {
            Element(&v)[kHalfPanels][kN][kPanel] =
                reinterpret_cast<Element(&)[kHalfPanels][kN][kPanel]>(
                    s.v[ring.stage][half * kHalfPanels]);
            add_non_finite<C.dtype>(v, acc, visible, first_key, threadIdx.x % 32);
            sm90::sync_named(kIsolation + half, 128);  // all have read
            clear_non_finite<C.dtype>(v, threadIdx.x % 128, 128);
            sm90::fence_async_proxy();
            sm90::sync_named(kIsolation + half, 128);  // all is clear
        }

        __device__ void release() {
            if (threadIdx.x % 32 == 0) sm90::arrive(s.kv_empty[ring.stage]);
            ring.advance();
        }
    };

    static __device__ void await_block(Smem& s, const Ring<kStages>& ring) {
        sm90::wait(s.kv_full[ring.stage], ring.phase);
        if constexpr (kThreadsCopy) sm90::fence_async_proxy();
    }

    // acc += A B^T, both with 16 columns a step.
    template <int kSteps>
    static __device__ void multiply(float (&acc)[kN / 2], uint64_t a, uint64_t b, bool accumulate) {
#pragma unroll
        for (int i = 0; i < kSteps; ++i) {
            const int offset = i * 16 / kPanel * kPanelBytes + i * kStepBytes % kRowBytes;
            sm90::mma<C.dtype>(acc, a + (offset >> 4), b + (offset >> 4), i > 0 || accumulate);
        }
    }

    static __device__ void score(const FwdParams& p, Smem& s) {
        const int thread = threadIdx.x % 128, lane = thread % 32;
        const int row = thread / 32 * 16 + lane / 4;  // and row + 8
        const bool leader = lane == 0;                // arrives for its warp
        const uint64_t q_tile = sm90::descriptor(s.q, kRowGroupBytes, 0);
        const uint64_t qv_tile = sm90::descriptor(s.qv, kRowGroupBytes, 0);
        const uint64_t k_tiles = sm90::descriptor(s.k, kRowGroupBytes, 0);
        const uint64_t v_tiles = sm90::descriptor(s.v, kRowGroupBytes, 0);
        Ring<1> handed;      // probabilities, to the other consumer
        Ring<kStages> keys;  // of the scores, a block ahead of `values`
        Values values(s, 0);
        using Tiles = WorkSource<32>;
        for (const Work* at = Tiles::first(s.schedule); at->exists();
             at = Tiles::next(s.schedule, *at, lane == 0)) {
            const Work& work = *at;
            const KeyBlocks& blocks = work.blocks;
            float acc_s[kN / 2], acc_o[kColumns / 2] = {};
            uint32_t probabilities[kN / 4];  // acc_s as the A operand of the second product
            Softmax softmax{p.scale_log2};
            if (!blocks.empty()) {
                VisibleKeys visible(p, work, row);
                visible.find();
                bool non_finite = false;  // in the block whose scores were issued last
                const auto begin = [](auto& acc) {
                    sm90::pin(acc);
                    sm90::mma_fence();
                };
                const auto issue_scores = [&](int n) {
                    await_block(s, keys);
                    // V is a key, too: it must not change any more.
                    non_finite = blocks.cut(n) && values.await_inspection();
                    const uint64_t k_tile = k_tiles + (keys.stage * sizeof(s.k[0]) >> 4);
                    const uint64_t v_tile = v_tiles + (keys.stage * sizeof(s.v[0]) >> 4);
                    // A branch around whole groups: one inside of a group would cost an arrive
                    // more.
                    if (!p.has_qv) {
                        begin(acc_s);
                        multiply<kQkSteps>(acc_s, q_tile, k_tile, false);
                        sm90::mma_commit();
                    } else if (!p.has_q) {
                        begin(acc_s);
                        multiply<kQvSteps>(acc_s, qv_tile, v_tile, false);
                        sm90::mma_commit();
                    } else {
                        begin(acc_s);
                        multiply<kQkSteps>(acc_s, q_tile, k_tile, false);
                        multiply<kQvSteps>(acc_s, qv_tile, v_tile, true);
                        sm90::mma_commit();
                    }
                    keys.advance();
                };
                const auto issue_pv = [&] {
                    begin(acc_o);
#pragma unroll
                    for (int i = 0; i < kPvSteps; ++i)
                        sm90::mma<C.dtype>(acc_o, probabilities + 4 * i, values.operand(i), true);
                    sm90::mma_commit();
                };
                const auto hand_over = [&](auto&& store) {
                    sm90::wait(s.p_empty, handed.phase ^ 1);
                    store();
                    sm90::fence_async_proxy();
                    __syncwarp();
                    if (leader) sm90::arrive(s.p_full);
                    handed.advance();
                };
                sm90::wait(s.q_full, work.loads & 1);
                issue_scores(blocks.hi - 1);
                sm90::mma_wait<0>();
                sm90::pin(acc_s);
#pragma unroll 1
                for (int n = blocks.hi - 1; n >= blocks.lo; --n) {
                    if (p.softcap_scale > 0.f) cap(acc_s, p.softcap_scale);
                    if (blocks.cut(n)) hide(acc_s, visible, n * kN + 2 * (lane % 4));
                    softmax.update(acc_s);
#pragma unroll
                    for (int i = 0; i < kN / 4; ++i)
                        probabilities[i] = sm90::pack<C.dtype>(acc_s[2 * i], acc_s[2 * i + 1]);
                    hand_over([&] { store_step(s, probabilities, softmax.alpha, row, lane); });
                    rescale(acc_o, softmax.alpha);
                    if (non_finite) values.isolate(acc_o, visible, n * kN);
                    issue_pv();
                    if (n > blocks.lo) {
                        issue_scores(n - 1);
                        sm90::mma_wait<1>();
                        values.release();
                    }
                    sm90::mma_wait<0>();
                    sm90::pin(acc_s);
                    sm90::pin(acc_o);
                }
                if (leader) sm90::arrive(s.q_empty);
                values.release();
                hand_over([&] {
                    for (int h = 0; h < 2; ++h) {
                        s.state[thread].row_max[h] = softmax.row_max[h];
                        s.state[thread].row_sum[h] = softmax.row_sum[h];
                    }
                });
            }
            finish_tile<C.dtype>(p, work, row, lane, softmax, acc_o);
        }
    }

    // Probabilities as the A operand, in the copy engine's swizzle, and alpha.
    static __device__ void store_step(Smem& s, const uint32_t (&probabilities)[kN / 4],
                                      const float (&alpha)[2], int row, int lane) {
#pragma unroll
        for (int i = 0; i < kN / 4; ++i) {
            const int r = row + 8 * (i % 2), chunk = i / 2 ^ r % 8;
            *reinterpret_cast<uint32_t*>(&s.probabilities[r][8 * chunk + 2 * (lane % 4)]) =
                probabilities[i];
        }
        if (lane % 4 == 0) s.alpha[row] = alpha[0], s.alpha[row + 8] = alpha[1];
    }

    static __device__ void follow(const FwdParams& p, Smem& s) {
        const int thread = threadIdx.x % 128, lane = thread % 32;
        const int row = thread / 32 * 16 + lane / 4;  // and row + 8
        const uint64_t p_tile = sm90::descriptor(s.probabilities, kRowGroupBytes, 0);
        Ring<1> handed;
        Values values(s, 1);
        using Tiles = WorkSource<32>;
        for (const Work* at = Tiles::first(s.schedule); at->exists();
             at = Tiles::next(s.schedule, *at, lane == 0)) {
            const Work& work = *at;
            const KeyBlocks& blocks = work.blocks;
            float acc_o[kColumns / 2] = {};
            Softmax softmax{p.scale_log2};
            if (!blocks.empty()) {
                VisibleKeys visible(p, work, row);
                visible.find();
                const auto release = [&] {
                    __syncwarp();
                    if (lane == 0) sm90::arrive(s.p_empty);
                    handed.advance();
                };
#pragma unroll 1
                for (int n = blocks.hi - 1; n >= blocks.lo; --n) {
                    await_block(s, values.ring);
                    const bool non_finite = blocks.cut(n) && values.await_inspection();
                    sm90::wait(s.p_full, handed.phase);
                    const float alpha[2] = {s.alpha[row], s.alpha[row + 8]};
                    rescale(acc_o, alpha);
                    if (non_finite) values.isolate(acc_o, visible, n * kN);
                    sm90::pin(acc_o);
                    sm90::mma_fence();
#pragma unroll
                    for (int i = 0; i < kPvSteps; ++i) {
                        sm90::mma<C.dtype, sm90::Major::K, sm90::Major::MN>(
                            acc_o, p_tile + (i * kStepBytes >> 4), values.operand(i), true);
                    }
                    sm90::mma_commit();
                    sm90::mma_wait<0>();
                    sm90::pin(acc_o);
                    release();
                    values.release();
                }
                sm90::wait(s.p_full, handed.phase);
                for (int h = 0; h < 2; ++h) {
                    softmax.row_max[h] = s.state[thread].row_max[h];
                    softmax.row_sum[h] = s.state[thread].row_sum[h];
                }
                release();
            }
            finish_tile<C.dtype>(p, work, row, lane, softmax, acc_o, kColumns);
        }
    }
};

}  // namespace fa3
