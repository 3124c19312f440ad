// SPDX-License-Identifier: BSD-3-Clause
// Eight neighbouring elements of a type known at run time: for kernels that wait for memory, where
// a uniform branch costs nothing.
#pragma once

#include "sm90/math.cuh"

namespace fa3 {

__device__ inline int element_bytes(Dtype dtype) {
    return dtype == Dtype::fp32 ? 4 : dtype == Dtype::e4m3 ? 1 : 2;
}

__device__ inline float load_element(const char* from, Dtype dtype) {
    if (dtype == Dtype::fp32) return *reinterpret_cast<const float*>(from);
    if (dtype == Dtype::e4m3) {
        float low, high;
        sm90::unpack_e4m3(*reinterpret_cast<const unsigned char*>(from), low, high);
        return low;
    }
    const unsigned short bits = *reinterpret_cast<const unsigned short*>(from);
    return dtype == Dtype::bf16 ? sm90::to_float<Dtype::bf16>(bits)
                                : sm90::to_float<Dtype::fp16>(bits);
}

struct Chunk {
    unsigned words[kChunk];  // as in memory: the first 2, 4 or 8 hold it

    // The first `count` elements; all of them by wide accesses if the address is `aligned` to the
    // chunk's bytes, or to 16.
    __device__ void load(const char* from, Dtype dtype, bool aligned, int count = kChunk) {
        if (aligned && count == kChunk) {
            load_wide(from, dtype);
        } else if (dtype == Dtype::fp32) {
#pragma unroll
            for (int i = 0; i < kChunk; ++i) {
                words[i] = i < count ? reinterpret_cast<const unsigned*>(from)[i] : 0;
            }
        } else if (dtype == Dtype::e4m3) {
            load_narrow<unsigned char>(from, count);
        } else {
            load_narrow<unsigned short>(from, count);
        }
    }

    __device__ void store(char* to, Dtype dtype, bool aligned, int count = kChunk) const {
        if (aligned && count == kChunk) {
            store_wide(to, dtype);
        } else if (dtype == Dtype::fp32) {
#pragma unroll
            for (int i = 0; i < kChunk; ++i) {
                if (i < count) reinterpret_cast<unsigned*>(to)[i] = words[i];
            }
        } else if (dtype == Dtype::e4m3) {
            store_narrow<unsigned char>(to, count);
        } else {
            store_narrow<unsigned short>(to, count);
        }
    }

    __device__ void unpack(Dtype dtype, float (&x)[kChunk]) const {
#pragma unroll
        for (int i = 0; i < kChunk; i += 2) {
            const unsigned pair = words[i / 2];
            if (dtype == Dtype::fp32) {
                x[i] = __uint_as_float(words[i]);
                x[i + 1] = __uint_as_float(words[i + 1]);
            } else if (dtype == Dtype::e4m3) {
                sm90::unpack_e4m3(words[i / 4] >> 8 * (i % 4), x[i], x[i + 1]);
            } else if (dtype == Dtype::bf16) {
                x[i] = sm90::to_float<Dtype::bf16>(pair);
                x[i + 1] = sm90::to_float<Dtype::bf16>(pair >> 16);
            } else {
                x[i] = sm90::to_float<Dtype::fp16>(pair);
                x[i + 1] = sm90::to_float<Dtype::fp16>(pair >> 16);
            }
        }
    }

    // Rounded to nearest even; e4m3 saturates.
    __device__ void pack(Dtype dtype, const float (&x)[kChunk]) {
#pragma unroll
        for (int i = 0; i < kChunk; i += 2) {
            if (dtype == Dtype::fp32) {
                words[i] = __float_as_uint(x[i]);
                words[i + 1] = __float_as_uint(x[i + 1]);
            } else if (dtype == Dtype::e4m3) {
                const unsigned pair = sm90::pack_e4m3(x[i], x[i + 1]);
                words[i / 4] = i % 4 == 0 ? pair : words[i / 4] | pair << 16;
            } else if (dtype == Dtype::bf16) {
                words[i / 2] = sm90::pack<Dtype::bf16>(x[i], x[i + 1]);
            } else {
                words[i / 2] = sm90::pack<Dtype::fp16>(x[i], x[i + 1]);
            }
        }
    }

  private:
    __device__ void load_wide(const char* from, Dtype dtype) {
        const uint4* wide = reinterpret_cast<const uint4*>(from);
        if (dtype == Dtype::e4m3) {
            const uint2 pair = *reinterpret_cast<const uint2*>(from);
            words[0] = pair.x, words[1] = pair.y;
            return;
        }
        const uint4 low = wide[0];
        words[0] = low.x, words[1] = low.y, words[2] = low.z, words[3] = low.w;
        if (dtype != Dtype::fp32) return;
        const uint4 high = wide[1];
        words[4] = high.x, words[5] = high.y, words[6] = high.z, words[7] = high.w;
    }

    __device__ void store_wide(char* to, Dtype dtype) const {
        uint4* wide = reinterpret_cast<uint4*>(to);
        if (dtype == Dtype::e4m3) {
            *reinterpret_cast<uint2*>(to) = {words[0], words[1]};
            return;
        }
        wide[0] = {words[0], words[1], words[2], words[3]};
        if (dtype == Dtype::fp32) wide[1] = {words[4], words[5], words[6], words[7]};
    }

    // Elements of type T, of which a word holds kPerWord.
    template <typename T>
    __device__ void load_narrow(const char* from, int count) {
        constexpr int kPerWord = 4 / sizeof(T);
#pragma unroll
        for (int i = 0; i < kChunk; ++i) {
            const unsigned element = i < count ? reinterpret_cast<const T*>(from)[i] : 0;
            const unsigned placed = element << 8 * sizeof(T) * (i % kPerWord);
            words[i / kPerWord] = i % kPerWord == 0 ? placed : words[i / kPerWord] | placed;
        }
    }

    template <typename T>
    __device__ void store_narrow(char* to, int count) const {
        constexpr int kPerWord = 4 / sizeof(T);
#pragma unroll
        for (int i = 0; i < kChunk; ++i) {
            if (i >= count) break;
            reinterpret_cast<T*>(to)[i] = words[i / kPerWord] >> 8 * sizeof(T) * (i % kPerWord);
        }
    }
};

}  // namespace fa3
