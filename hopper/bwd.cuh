// SPDX-License-Identifier: BSD-3-Clause
// The backward, main kernel: a block of keys, whose K and V stay in shared memory, meets the
// queries that see it, a block of rows at a time.
//
//   S^T = K Q^T   P^T = exp(S^T - lse)   dV += P^T dO    dP^T = V dO^T
//   dS^T = P^T (dP^T - delta)            dK += dS^T Q    dQ^T = K^T dS^T, added up in global memory
//
// Warp 0 is the producer, warp 1 the writer of dQ; warps 2 and 3 are guards, which look for values
// that a mask must hide. The other warpgroups are consumers. README.md draws the schedule.
#pragma once

#include "bwd_epilogue.cuh"
#include "bwd_products.cuh"
#include "bwd_scores.cuh"
#include "bwd_work.cuh"
#include "isolate.cuh"
#include "ring.cuh"
#include "sm90/mbarrier.cuh"
#include "sm90/regs.cuh"
#include "sm90/tma.cuh"

namespace fa3 {

template <BwdConfig C>
struct Bwd {
    static constexpr int kM = C.block_m, kN = C.block_n;
    static constexpr int kStages = C.stages, kStagesDout = C.stages_dout;
    static constexpr int kConsumers = C.consumers, kConsumerWarps = 4 * kConsumers, kGuards = 2;
    static constexpr int kConsumerThreads = 128 * kConsumers;
    static constexpr int kPanels = C.panels(), kPanelsV = C.panels_v();
    static constexpr bool kSharesKeys = C.shares_keys();
    static constexpr int kProducerRegisters = C.producer_registers();
    static constexpr int kConsumerRegisters = C.consumer_registers();
    // Of a warpgroup: the passes that a step's scores take, and their queries; products that make
    // dK, dV and dQ^T, and their sizes.
    static constexpr int kPasses = kSharesKeys || kM <= kPanel ? 1 : kM / kPanel;
    static constexpr int kQueries = kSharesKeys ? kM / kConsumers : kM / kPasses;
    static constexpr int kTiles = kSharesKeys ? kPanels / kConsumers : 1;
    static constexpr int kTilesV = kSharesKeys ? (kPanelsV + kConsumers - 1) / kConsumers : 1;
    static constexpr int kColumns = kSharesKeys ? kPanel : C.head_dim;
    static constexpr int kColumnsV = kSharesKeys ? kPanel : C.head_dim_v;
    static constexpr bool kSharesPanel = kPanels < kConsumers;  // which share out its queries
    static constexpr int kTilesDq = kSharesPanel ? 1 : kPanels / kConsumers;
    static constexpr int kQueriesDq = patch_queries(C.head_dim, kM);
    static constexpr int kQueryPanels = (kM + kPanel - 1) / kPanel;
    // dQ goes through shared memory where there is room, and where its bandwidth allows.
    static constexpr bool kStaged = !kSharesKeys;
    static constexpr bool kDscores = C.dscores();
    static constexpr int kDeltaBytes = kDscores ? kM * sizeof(float) : 0;
    static constexpr int kProbs = 2;                      // where they begin in the exchange
    static constexpr int kBlockFloats = kM * C.head_dim;  // of dq_accum
    static_assert(kN == (kSharesKeys ? 1 : kConsumers) * kWarpgroupRows);
    static_assert(kSharesPanel == (C.head_dim == kPanel) && kPanels % kTilesDq == 0);

    using Element = unsigned short;
    using Barrier = sm90::Mbarrier;

    struct Smem {
        alignas(1024) Element k[kPanels][kN][kPanel];
        alignas(1024) Element v[kPanelsV][kN][kPanel];
        alignas(1024) Element q[kStages][kPanels][kM][kPanel];
        alignas(1024) Element dout[kStagesDout][kPanelsV][kM][kPanel];
        // dS^T of this step and of the last one, which may still be read; where warpgroups share
        // keys, then P^T of both.
        alignas(1024) Element exchange[kSharesKeys ? 4 : 2][kQueryPanels][kN][kPanel];
        alignas(128) float dq[kStaged ? kConsumerThreads * kQueriesDq / 2 : 4];
        alignas(128) float lse[kStages][kM];
        alignas(128) float delta[kStagesDout][kM];
        KeyRange key_rows[kN];  // where each key is visible
        float key_scale[kN];    // scale_log2, or NaN for a key that is not finite
        bool dout_non_finite[kStagesDout][kGuards];
        Barrier k_full, v_full;
        Barrier q_full[kStages], q_empty[kStages], q_inspected[kStages];
        Barrier dout_full[kStagesDout], dout_empty[kStagesDout], dout_inspected[kStagesDout];
        Barrier dq_full, dq_empty;
    };

    template <bool kValue>
    struct Is {
        static constexpr bool value = kValue;
    };

    enum NamedBarrier { kExchange = 1, kIsolation, kOrder };

    static __device__ void run(const BwdParams& p) {
        extern __shared__ __align__(1024) char memory[];
        Smem& s = *reinterpret_cast<Smem*>(memory);
        const int warp = sm90::uniform(threadIdx.x / 32);
        if (warp == 0 && sm90::elect()) {
            sm90::init(s.k_full, 1);
            sm90::init(s.v_full, 1);
            for (int i = 0; i < kStages; ++i) {
                sm90::init(s.q_full[i], 1);
                sm90::init(s.q_empty[i], kConsumerWarps + kGuards);
                sm90::init(s.q_inspected[i], kGuards);
            }
            for (int i = 0; i < kStagesDout; ++i) {
                sm90::init(s.dout_full[i], 1);
                sm90::init(s.dout_empty[i], kConsumerWarps + kGuards);
                sm90::init(s.dout_inspected[i], kGuards);
            }
            sm90::init(s.dq_full, kConsumerWarps);
            sm90::init(s.dq_empty, 1);
            sm90::fence_init();
        }
        __syncthreads();
        const KeyWork work(p, blockIdx.x);
        if (work.n_block * kN >= work.seq.keys_written) return;
        KeyBlocks blocks = row_blocks<kM, kN>(p, work.seq, work.n_block);
        if (warp < 4) {
            sm90::give_registers<kProducerRegisters>();
            if (warp == 0) {
                if (sm90::elect()) produce(p, s, work, blocks);
            } else if (warp == 1) {
                if (C.dq && kStaged && p.dq.data && sm90::elect()) write_dq(p, s, work, blocks);
            } else {
                guard(p, s, work, blocks, warp - 2);
            }
        } else {
            sm90::take_registers<kConsumerRegisters>();
            consume(p, s, warp / 4 - 1);
        }
    }

    static __device__ void produce(const BwdParams& p, Smem& s, const KeyWork& work,
                                   const KeyBlocks& blocks) {
        using sm90::CacheHint;
        auto steps = work.steps(blocks);
        if (!steps.any()) return;
        const int first_key = work.seq.first_key + work.n_block * kN;
        sm90::arrive_expect(s.k_full, sizeof(s.k));
        for (int i = 0; i < kPanels; ++i) {
            sm90::load(p.k_map, s.k_full, CacheHint::EVICT_FIRST, s.k[i], i * kPanel, first_key,
                       work.head_kv, work.seq.k_batch);
        }
        if constexpr (kDscores) {
            sm90::arrive_expect(s.v_full, sizeof(s.v));
            for (int i = 0; i < kPanelsV; ++i) {
                sm90::load(p.v_map, s.v_full, CacheHint::EVICT_FIRST, s.v[i], i * kPanel, first_key,
                           work.head_kv, work.seq.k_batch);
            }
        }
        sm90::await_previous_kernels();
        Ring<kStages> q;
        Ring<kStagesDout> dout;
        for (; steps.any(); steps.advance()) {
            const int row = work.seq.first_row + steps.m_block * kM;
            const long long at =
                workspace_block(p, work.seq, work.batch, steps.head, steps.m_block) * kM;
            sm90::wait(s.q_empty[q.stage], q.phase ^ 1);
            sm90::arrive_expect(s.q_full[q.stage], sizeof(s.q[0]) + sizeof(s.lse[0]));
            for (int i = 0; i < kPanels; ++i) {
                sm90::load(p.q_map, s.q_full[q.stage], CacheHint::EVICT_LAST, s.q[q.stage][i],
                           i * kPanel, row, steps.head, work.seq.q_batch);
            }
            sm90::load_bytes(s.lse[q.stage], p.lse_log2 + at, sizeof(s.lse[0]), s.q_full[q.stage]);
            q.advance();
            sm90::wait(s.dout_empty[dout.stage], dout.phase ^ 1);
            sm90::arrive_expect(s.dout_full[dout.stage], sizeof(s.dout[0]) + kDeltaBytes);
            for (int i = 0; i < kPanelsV; ++i) {
                sm90::load(p.dout_map, s.dout_full[dout.stage], CacheHint::EVICT_LAST,
                           s.dout[dout.stage][i], i * kPanel, row, steps.head, work.seq.q_batch);
            }
            if constexpr (kDscores) {
                sm90::load_bytes(s.delta[dout.stage], p.delta + at, kDeltaBytes,
                                 s.dout_full[dout.stage]);
            }
            dout.advance();
        }
    }

    // Adds what the consumers have staged; in a fixed order of key blocks if that is wanted.
    static __device__ void write_dq(const BwdParams& p, Smem& s, const KeyWork& work,
                                    const KeyBlocks& blocks) {
        sm90::await_previous_kernels();
        unsigned phase = 0;
        for (auto steps = work.steps(blocks); steps.any(); steps.advance(), phase ^= 1) {
            const long long block =
                workspace_block(p, work.seq, work.batch, steps.head, steps.m_block);
            int* const semaphore = p.semaphores ? p.semaphores + block : nullptr;
            sm90::wait(s.dq_full, phase);
            if (semaphore) sm90::await_turn(semaphore, turn_of<kM, kN>(p, work, steps.m_block));
            sm90::add_floats(p.dq_accum + block * kBlockFloats, s.dq, kBlockFloats * 4,
                             sm90::CacheHint::EVICT_LAST);
            sm90::commit_stores();
            if (semaphore) {
                sm90::wait_stores();  // complete, not only read
                __threadfence();
                sm90::pass_turn(semaphore);
            } else {
                sm90::wait_stores_read();
            }
            sm90::arrive(s.dq_empty);
        }
    }

    // 0 times NaN is NaN: in blocks that a mask cuts, rows of Q and dO which see none of the keys
    // become zeros, and so does what is not finite in the others. Consumers add to dV what dO loses
    // by it; whoever sees the rest of a row that was not finite has an LSE or delta of NaN.
    static __device__ void guard(const BwdParams& p, Smem& s, const KeyWork& work, KeyBlocks blocks,
                                 int warp) {
        constexpr int kThreads = 32 * kGuards, kRounds = (kM + kThreads - 1) / kThreads;
        const int thread = threadIdx.x % kThreads;
        const bool leader = threadIdx.x % 32 == 0;
        if (any_weightless(p, work, blocks)) blocks.full_lo = blocks.full_hi = blocks.hi;
        const int first_key = work.n_block * kN, end_key = min(first_key + kN, work.seq.num_keys);
        Ring<kStages> q;
        Ring<kStagesDout> dout;
        for (auto steps = work.steps(blocks); steps.any(); steps.advance()) {
            const bool cut = blocks.cut(steps.m_block);
            bool kept[kRounds];
            sm90::wait(s.q_full[q.stage], q.phase);
            if (cut) {
                for (int i = 0; i < kRounds; ++i) {
                    const int row = thread + i * kThreads, position = steps.m_block * kM + row;
                    if (row >= kM) break;
                    const KeyRange visible = visible_keys(p, work.seq, position);
                    kept[i] = position < work.seq.num_rows && visible.lo < end_key &&
                              visible.hi > first_key && visible.lo < visible.hi &&
                              s.lse[q.stage][row] != kInfinity;
                    inspect_row<C.dtype>(s.q[q.stage], row, kept[i], true);
                }
                sm90::fence_async_proxy();
                __syncwarp();
            }
            if (leader) {
                sm90::arrive(s.q_inspected[q.stage]);
                sm90::arrive(s.q_empty[q.stage]);
            }
            q.advance();
            sm90::wait(s.dout_full[dout.stage], dout.phase);
            if (cut) {
                bool found = false;
                for (int i = 0; i < kRounds; ++i) {
                    const int row = thread + i * kThreads;
                    if (row >= kM) break;
                    found |= inspect_row<C.dtype>(s.dout[dout.stage], row, kept[i], false);
                }
                sm90::fence_async_proxy();
                const bool any = __any_sync(0xffffffff, found);
                __syncwarp();  // a vote orders no memory
                if (leader) s.dout_non_finite[dout.stage][warp] = any;
            }
            if (leader) {
                sm90::arrive(s.dout_inspected[dout.stage]);
                sm90::arrive(s.dout_empty[dout.stage]);
            }
            dout.advance();
        }
    }

    static __device__ void consume(const BwdParams& p, Smem& s, int warpgroup) {
        const int thread = threadIdx.x % 128, warp = thread / 32, lane = thread % 32;
        const bool leader = lane == 0;  // arrives for its warp
        // Of the block's keys, this thread's are `key` and key + 8; of a step's queries, its scores
        // have those from `first_query` on.
        const int warp_key = (kSharesKeys ? 0 : warpgroup * kWarpgroupRows) + warp * 16;
        const int key = warp_key + lane / 4;
        const int own_query = kSharesKeys ? warpgroup * kQueries : 0;
        const int first_panel = kSharesKeys ? warpgroup * kTiles : 0;
        const int first_panel_v = kSharesKeys ? warpgroup * kTilesV : 0;
        const int first_panel_dq = kSharesPanel ? 0 : warpgroup * kTilesDq;
        const bool has_dv =
            C.dv && (kPanelsV == kConsumers * kTilesV || first_panel_v < kPanelsV);

        const uint64_t k_rows = sm90::descriptor(s.k[0][warp_key - warp * 16], kRowGroupBytes, 0);
        const uint64_t v_rows = sm90::descriptor(s.v[0][warp_key - warp * 16], kRowGroupBytes, 0);
        const uint64_t q_rows = sm90::descriptor(s.q[0][0][own_query], kRowGroupBytes, 0);
        const uint64_t dout_rows = sm90::descriptor(s.dout[0][0][own_query], kRowGroupBytes, 0);
        const uint64_t q_columns =
            sm90::descriptor(s.q[0][first_panel], kRowGroupBytes, sizeof(s.q[0][0]));
        const uint64_t dout_columns = sm90::descriptor(s.dout[0][has_dv ? first_panel_v : 0],
                                                       kRowGroupBytes, sizeof(s.dout[0][0]));
        const uint64_t k_columns = sm90::descriptor(s.k[first_panel_dq], kRowGroupBytes, 0);
        const uint64_t ds_rows = sm90::descriptor(s.exchange, kRowGroupBytes, 0);
        const uint64_t ds_columns = sm90::descriptor(s.exchange[0][kSharesPanel ? warpgroup : 0],
                                                     kRowGroupBytes, sizeof(s.exchange[0][0]));

        float acc_dk[kTiles][kColumns / 2] = {}, acc_dv[kTilesV][kColumnsV / 2] = {};
        float acc_s[kQueries / 2], acc_dp[kQueries / 2], acc_dq[kTilesDq][kQueriesDq / 2];
        unsigned probs[kPasses][kQueries / 4], dscores[kPasses][kQueries / 4];  // A operands
        // All that a step is counted by: its stages, and the parities of their uses.
        unsigned count = 0;
        const auto q_stage = [&] { return count % kStages; };
        const auto dout_stage = [&] { return count % kStagesDout; };
        const auto exchange_stage = [&] { return count % 2; };

        const auto await_q = [&](bool cut) {
            sm90::wait(s.q_full[q_stage()], count / kStages % 2);
            if (cut) sm90::wait(s.q_inspected[q_stage()], count / kStages % 2);
        };
        const auto issue_scores = [&](int pass) {
            const size_t first = q_stage() * sizeof(s.q[0]) + pass * kQueries * kRowBytes;
            issue_rows<C.dtype, C.head_dim>(acc_s, k_rows, sizeof(s.k[0]), q_rows + (first >> 4),
                                            sizeof(s.q[0][0]));
        };
        // Of the following those are issued that the wanted gradients need.
        const auto issue_dp = [&](int pass) {
            if (!kDscores) return;
            const size_t first = dout_stage() * sizeof(s.dout[0]) + pass * kQueries * kRowBytes;
            issue_rows<C.dtype, C.head_dim_v>(acc_dp, v_rows, sizeof(s.v[0]),
                                              dout_rows + (first >> 4), sizeof(s.dout[0][0]));
        };
        const auto share = [&](int buffer, const auto& operand, int first_query) {
            store_operand(s.exchange[buffer + exchange_stage()], operand, warp_key, first_query,
                          lane);
        };
        // Probabilities or dS^T times rows of a tile, from registers or from the exchange.
        const auto issue_gradient = [&](auto& acc, const unsigned* a, int buffer, uint64_t b,
                                        size_t b_tile_bytes) {
            if constexpr (kSharesKeys) {
                const size_t first = (buffer + exchange_stage()) * sizeof(s.exchange[0]);
                issue_mixed<C.dtype, kM>(acc, ds_rows + (first >> 4), sizeof(s.exchange[0][0]), b,
                                         b_tile_bytes);
            } else {
                issue_mixed<C.dtype, kQueries>(acc, a, b);
            }
        };
        const auto issue_dv = [&](int pass) {
            if (!C.dv) return;
            const size_t first = dout_stage() * sizeof(s.dout[0]) + pass * kQueries * kRowBytes;
            issue_gradient(acc_dv, probs[pass], kProbs, dout_columns + (first >> 4),
                           sizeof(s.dout[0][0]));
        };
        const auto issue_dk = [&](int pass) {
            if (!C.dk) return;
            const size_t first = q_stage() * sizeof(s.q[0]) + pass * kQueries * kRowBytes;
            issue_gradient(acc_dk, dscores[pass], 0, q_columns + (first >> 4), sizeof(s.q[0][0]));
        };
        const auto issue_dq = [&] {
            if (!C.dq) return;
            const size_t first = exchange_stage() * sizeof(s.exchange[0]);
            issue_columns<C.dtype, kN>(acc_dq, k_columns, sizeof(s.k[0]),
                                       ds_columns + (first >> 4));
        };

        // After it dO is finite; what was not has been added to the keys whose queries see them.
        const auto isolate = [&](const KeyRange(&visible)[2], int m_block) {
            if (has_dv) {
#pragma unroll
                for (int tile = 0; tile < kTilesV; ++tile) {
                    constexpr int kTilePanels = (kColumnsV + kPanel - 1) / kPanel;
                    using Tile = const Element(&)[kTilePanels][kM][kPanel];
                    add_non_finite<C.dtype>(
                        reinterpret_cast<Tile>(s.dout[dout_stage()][first_panel_v + tile]),
                        acc_dv[tile], visible, m_block * kM, lane);
                }
            }
            sm90::sync_named(kIsolation, kConsumerThreads);  // all have read
            clear_non_finite<C.dtype>(s.dout[dout_stage()], threadIdx.x - 128, kConsumerThreads);
            sm90::fence_async_proxy();
            sm90::sync_named(kIsolation, kConsumerThreads);  // all is clear
        };
        const auto add_dq = [&](const KeyWork& work, int head, int m_block) {
            if constexpr (kStaged) {
                sm90::wait(s.dq_empty, count % 2 ^ 1);
                float* to = s.dq + (warpgroup * 4 + warp) * kQueriesDq * 16 + lane * 4;
                for_each_patch(acc_dq[0], to, [](float* at, const float4& x) {
                    *reinterpret_cast<float4*>(at) = x;
                });
                sm90::fence_async_proxy();
                __syncwarp();
                if (leader) sm90::arrive(s.dq_full);
            } else {
                const long long block = workspace_block(p, work.seq, work.batch, head, m_block);
                if (p.semaphores) {
                    if (threadIdx.x == 128)
                        sm90::await_turn(p.semaphores + block, turn_of<kM, kN>(p, work, m_block));
                    sm90::sync_named(kOrder, kConsumerThreads);
                }
                float* to = p.dq_accum + block * kBlockFloats + lane * 4;
#pragma unroll
                for (int tile = 0; tile < kTilesDq; ++tile) {
                    const int first = (first_panel_dq + tile) * 4 + warp;
                    for_each_patch(acc_dq[tile], to + first * kQueriesDq * 16, sm90::add_floats4);
                }
                if (p.semaphores) {
                    __threadfence();
                    sm90::sync_named(kOrder, kConsumerThreads);
                    if (threadIdx.x == 128) sm90::pass_turn(p.semaphores + block);
                }
            }
        };

        {
            const KeyWork work(p, blockIdx.x);
            KeyBlocks blocks = row_blocks<kM, kN>(p, work.seq, work.n_block);
            auto steps = work.steps(blocks);
            const int first_key = work.n_block * kN;
            if (any_weightless(p, work, blocks)) blocks.full_lo = blocks.full_hi = blocks.hi;
            float scale[2] = {p.scale_log2, p.scale_log2};
            if (steps.any()) sm90::wait(s.k_full, 0);
            if (blocks.lo < blocks.full_lo || blocks.full_hi < blocks.hi) {
                // Keys that nobody sees become zeros, and so does what is not finite in the others.
                const int row = threadIdx.x - 128;
                if (row < kN) {
                    s.key_rows[row] = visible_rows(p, work.seq, first_key + row);
                    const bool seen = s.key_rows[row].lo < s.key_rows[row].hi;
                    s.key_scale[row] =
                        inspect_row<C.dtype>(s.k, row, seen, true) ? kNan : p.scale_log2;
                    sm90::fence_async_proxy();
                }
                sm90::sync_named(kExchange, kConsumerThreads);
                scale[0] = s.key_scale[key];
                scale[1] = s.key_scale[key + 8];
            }
            if (kDscores && steps.any()) sm90::wait(s.v_full, 0);
            const auto step = [&](auto is_cut) {
                constexpr bool kCut = decltype(is_cut)::value;
                const unsigned stage = count % kStagesDout, phase = count / kStagesDout % 2;
                const int head = steps.head, m_block = steps.m_block;
                steps.advance();
                await_q(kCut);
#pragma unroll
                for (int pass = 0; pass < kPasses; ++pass) {
                    issue_scores(pass);
                    if (pass == 0) {
                        sm90::wait(s.dout_full[stage], phase);
                        if constexpr (kCut) sm90::wait(s.dout_inspected[stage], phase);
                    }
                    issue_dp(pass);
                    sm90::mma_wait<kDscores ? 1 : 0>();
                    sm90::pin(acc_s);
                    const int first_query = own_query + pass * kQueries;
                    const float* lse = s.lse[q_stage()] + first_query + 2 * (lane % 4);
                    const float* delta = s.delta[stage] + first_query + 2 * (lane % 4);
                    if constexpr (kCut) {
                        const KeyRange visible[2] = {s.key_rows[key], s.key_rows[key + 8]};
                        const int first = m_block * kM + first_query + 2 * (lane % 4);
                        const SomeKept kept{kept_bits(visible[0], first),
                                            kept_bits(visible[1], first)};
                        make_probabilities<C>(acc_s, probs[pass], lse, scale, p.softcap_scale,
                                              kept);
                        sm90::mma_wait<0>();
                        if constexpr (kDscores) sm90::pin(acc_dp);
                        const bool (&found)[kGuards] = s.dout_non_finite[stage];
                        if (C.dv && pass == 0 && (found[0] || found[1])) isolate(visible, m_block);
                        if constexpr (!kSharesKeys) issue_dv(pass);
                        if (kDscores) make_dscores<C>(acc_s, acc_dp, dscores[pass], delta, kept);
                    } else {
                        make_probabilities<C>(acc_s, probs[pass], lse, scale, p.softcap_scale,
                                              AllKept{});
                        if constexpr (!kSharesKeys) issue_dv(pass);
                        if constexpr (kDscores) {
                            sm90::mma_wait<C.dv && !kSharesKeys ? 1 : 0>();
                            sm90::pin(acc_dp);
                            make_dscores<C>(acc_s, acc_dp, dscores[pass], delta, AllKept{});
                        }
                    }
                    if (C.dq || (C.dk && kSharesKeys)) share(0, dscores[pass], first_query);
                    if (C.dv && kSharesKeys) share(kProbs, probs[pass], first_query);
                    if (pass < kPasses - 1) issue_dk(pass);
                }
                if constexpr (C.dq || kSharesKeys) {
                    sm90::fence_async_proxy();
                    sm90::sync_named(kExchange, kConsumerThreads);
                }
                if constexpr (kSharesKeys) issue_dv(0);
                issue_dq();
                issue_dk(kPasses - 1);
                sm90::mma_wait<C.dk ? 1 : 0>();  // dV and dQ are there, dK still runs
                if constexpr (C.dv) pin_all(acc_dv);
                if constexpr (C.dq) pin_all(acc_dq);
                if (leader) sm90::arrive(s.dout_empty[stage]);
                if (C.dq && p.dq.data) add_dq(work, head, m_block);
                if constexpr (C.dk) sm90::mma_wait<0>(), pin_all(acc_dk);
                if (leader) sm90::arrive(s.q_empty[q_stage()]);
                ++count;
            };
            while (steps.any()) {
#pragma unroll 1
                while (steps.any() && blocks.cut(steps.m_block)) step(Is<true>{});
#pragma unroll 1
                while (steps.any() && !blocks.cut(steps.m_block)) step(Is<false>{});
            }
        }
        sm90::await_previous_kernels();
        sm90::release_next_kernel();
        const KeyWork work(p, blockIdx.x);
#pragma unroll
        for (int tile = 0; C.dk && tile < kTiles; ++tile) {
            store_key_gradient<C.dtype, kN>(p, work, p.dk, p.dk_parts, p.head_dim,
                                            (first_panel + tile) * kPanel, acc_dk[tile],
                                            p.softmax_scale, key, lane);
        }
#pragma unroll
        for (int tile = 0; tile < kTilesV; ++tile) {
            if (!has_dv) break;
            store_key_gradient<C.dtype, kN>(p, work, p.dv, p.dv_parts, p.head_dim_v,
                                            (first_panel_v + tile) * kPanel, acc_dv[tile], 1.f, key,
                                            lane);
        }
    }
};

}  // namespace fa3
