// SPDX-License-Identifier: BSD-3-Clause
// Where a sequence lies in its tensors. Whatever the index tensors hold, no row outside of the
// tensors is touched.
#pragma once

#include "status.cuh"

namespace fa3 {

__device__ inline int clamp(int x, int top) { return min(max(x, 0), top); }

// The part of sequence n in [b, length, ...], or of packed rows [length, ...].
struct Extent {
    int batch, first, size;

    __device__ Extent(const int* cu_seqlens, int n, int length)
        : Extent(cu_seqlens, n, length, Argument{}, Quiet{}) {}

    template <typename Tell>
    __device__ Extent(const int* cu_seqlens, int n, int length, Argument argument, const Tell& tell)
        : batch(cu_seqlens ? 0 : n), first(0), size(length) {
        if (!cu_seqlens) return;
        first = clamp(cu_seqlens[n], 0, length, argument, tell);
        const int end = cu_seqlens[n + 1];
        size = max(min(end, length), first) - first;
        if (first + size != end) tell(argument);
    }
};

struct Sequence {
    int q_batch, k_batch;     // batch entries; with pages, k_batch is a row of their table
    int first_row, num_rows;  // query rows that attend
    int rows_written;         // these and the unused rows behind them, which are zeros
    int first_key, num_keys;  // the slot of the first key
    int num_all_keys;         // over all context-parallel ranks
    int keys_written;         // of the backward: these and the unused keys behind them

    template <typename Tell = Quiet>
    __device__ Sequence(const FwdParams& p, int n, const Tell& tell = {}) {
        const Extent q(p.cu_seqlens_q, n, p.seqlen_q, Argument::cu_seqlens_q, tell);
        const Extent k(p.cu_seqlens_k, n, p.seqlen_k, Argument::cu_seqlens_k, tell);
        q_batch = q.batch;
        first_row = q.first;
        rows_written = q.size;
        num_rows = used(p.seqused_q, n, q.size, Argument::seqused_q, tell);
        k_batch = p.kv_batch_idx ? p.kv_batch_idx[n] : k.batch;
        const bool known = 0 <= k_batch && k_batch < p.cache_rows;  // else it has no keys
        if (!known) tell(Argument::kv_batch_idx);
        const int capacity = known ? k.size : 0;
        const Extent fresh(p.cu_seqlens_k_new, n, p.cu_seqlens_k_new ? kUnbounded : p.seqlen_k_new);
        int slots = used(p.seqused_k, n, capacity, Argument::seqused_k, tell);
        const int padding =
            p.leftpad_k ? used(p.leftpad_k, n, slots, Argument::leftpad_k, tell) : 0;
        slots += fresh.size;  // none without seqused_k
        if (slots > capacity) {
            tell(Argument::seqused_k);
            slots = capacity;
        }
        first_key = k.first + padding;
        num_keys = slots - padding;
        num_all_keys = num_keys;
        if (p.cp_tot_seqused_k) {
            num_all_keys =
                used(p.cp_tot_seqused_k, n, kUnbounded, Argument::cp_tot_seqused_k, tell);
        }
        keys_written = k.size;
        if (p.tree_rows >= 0 && rows_written > p.tree_rows) tell(Argument::tree_mask);
    }

    template <typename Tell = Quiet>
    __device__ Sequence(const BwdParams& p, int n, const Tell& tell = {}) {
        const Extent q(p.cu_seqlens_q, n, p.seqlen_q, Argument::cu_seqlens_q, tell);
        const Extent k(p.cu_seqlens_k, n, p.seqlen_k, Argument::cu_seqlens_k, tell);
        q_batch = q.batch;
        first_row = q.first;
        rows_written = q.size;
        num_rows = used(p.seqused_q, n, q.size, Argument::seqused_q, tell);
        k_batch = k.batch;
        first_key = k.first;
        keys_written = k.size;
        num_keys = used(p.seqused_k, n, k.size, Argument::seqused_k, tell);
    }

  private:
    // Of `capacity` rows or keys.
    template <typename Tell>
    static __device__ int used(const int* lengths, int n, int capacity, Argument argument,
                               const Tell& tell) {
        return lengths ? clamp(lengths[n], 0, capacity, argument, tell) : capacity;
    }
};

// Tells the host of the sequences that had to be clamped, each looked at by one thread of the
// launch: the others clamp in silence.
template <typename Params>
__device__ void note_clamps(const Params& p, int thread, int num_threads) {
    if (!p.status) return;
#pragma unroll 1
    for (int n = thread; n < p.batch; n += num_threads) Sequence(p, n, Noted{p.status});
}

}  // namespace fa3
