// SPDX-License-Identifier: BSD-3-Clause
// Where a sequence lies in its tensors. Whatever the index tensors hold, no row outside of the
// tensors is touched.
#pragma once

#include "params.h"

namespace fa3 {

__device__ inline int clamp(int x, int top) { return min(max(x, 0), top); }

// The part of sequence n in [b, length, ...], or of packed rows [length, ...].
struct Extent {
    int batch, first, size;

    __device__ Extent(const int* cu_seqlens, int n, int length)
        : batch(cu_seqlens ? 0 : n), first(cu_seqlens ? clamp(cu_seqlens[n], length) : 0) {
        size = cu_seqlens ? max(clamp(cu_seqlens[n + 1], length) - first, 0) : length;
    }
};

struct Sequence {
    int q_batch, k_batch;     // batch entries in the tensor maps, out and lse
    int first_row, num_rows;  // query rows that attend
    int rows_written;         // these and the unused rows behind them, which are zeros
    int first_key, num_keys;

    __device__ Sequence(const FwdParams& p, int n) {
        const Extent q(p.cu_seqlens_q, n, p.seqlen_q), k(p.cu_seqlens_k, n, p.seqlen_k);
        q_batch = q.batch;
        first_row = q.first;
        rows_written = q.size;
        num_rows = p.seqused_q ? clamp(p.seqused_q[n], q.size) : q.size;
        const Extent fresh(p.cu_seqlens_k_new, n, p.cu_seqlens_k_new ? kUnbounded : p.seqlen_k_new);
        const int used =
            p.seqused_k ? min(clamp(p.seqused_k[n], k.size) + fresh.size, k.size) : k.size;
        const int padding = p.leftpad_k ? clamp(p.leftpad_k[n], used) : 0;
        k_batch = k.batch;
        first_key = k.first + padding;
        num_keys = used - padding;
    }
};

}  // namespace fa3
