// SPDX-License-Identifier: BSD-3-Clause
// ld, st, cvta, mapa, ldmatrix and stmatrix.
#include "memory.h"

#include <cstring>

#include "allocation.h"
#include "decode.h"
#include "exit_checks.h"

namespace hopper_sim {

void fail(Result code, Warp& w, const Instruction& i, const std::string& message) {
    throw Error(code, message + "\n  " + place(w, i));
}

SharedPlace shared_place(Warp& w, const Instruction& i, u64 address, u32 bytes) {
    u32 rank = static_cast<u32>(address >> kRankShift),
        offset = static_cast<u32>(address) & kOffsetMask;
    auto& ctas = w.cta->cluster->ctas;
    auto hex = static_cast<unsigned long long>(address);
    if (address >> 32 || rank >= ctas.size())
        fail(kIllegalAddress, w, i, format("no shared memory at 0x%llx", hex));
    Cta* cta = ctas[rank].get();
    if (offset < kReservedSmem || offset + bytes > cta->smem_end)
        fail(kIllegalAddress, w, i,
             format("shared memory out of bounds: 0x%llx (+%u), the block has 0x%x..0x%x", hex,
                    bytes, kReservedSmem, cta->smem_end));
    if (offset % bytes)
        fail(kMisalignedAddress, w, i, format("misaligned: %u bytes at shared 0x%llx", bytes, hex));
    return {cta, offset};
}

u8* global_range(Warp& w, const Instruction& i, u64 address, u64 bytes) {
    u64 into_parameters = address - reinterpret_cast<u64>(w.cta->grid().parameters);
    u64 parameter_bytes = w.cta->grid().kernel->parameter_bytes;
    bool is_parameter =
        into_parameters < parameter_bytes && bytes <= parameter_bytes - into_parameters;
    if (!is_parameter && !allocations().contains(address, bytes))
        fail(kIllegalAddress, w, i,
             format("global memory out of bounds: %llu bytes at ",
                    static_cast<unsigned long long>(bytes)) +
                 allocations().describe(address));
    return reinterpret_cast<u8*>(address);
}

static u8* local_place(Warp& w, const Instruction& i, u64 offset, u32 bytes, u32 lane) {
    u32 size = w.cta->grid().kernel->local_bytes;
    if (offset > size || bytes > size - offset)
        fail(kIllegalAddress, w, i, "local memory out of bounds");
    return w.cta->local_storage.get() + static_cast<u64>(w.id * kWarpSize + lane) * size + offset;
}

// Writes are entered by whoever knows the value: note_write.
static void note(Shadow& shadow, Warp& w, const Instruction& i, u32 offset, u32 bytes, u32 lane,
                 Access access) {
    bool together = i.flow == Flow::aligned, orders = i.ordered || access == Access::atomic;
    if (orders)
        shadow.synchronise(w, i, offset, access != Access::write, access != Access::read);
    else if (access == Access::read)
        shadow.read(w, i, offset, bytes, together ? kSeveralLanes : static_cast<u8>(lane));
    else if (together)
        shadow.write(w, i, offset, bytes, kSeveralLanes, false);
}

void note_write(Warp& w, const Instruction& i, u64 address, u32 bytes, u32 lane, bool harmless) {
    if (i.space == Space::generic && address >> 44 != kGenericShared >> 44) return;
    SharedPlace at = shared_place(w, i, address & ~kGenericShared, bytes);
    if (at.cta->shadow && !i.ordered)
        at.cta->shadow->write(w, i, at.offset, bytes, static_cast<u8>(lane), harmless);
}

static void note_global(Warp& w, const Instruction& i, u64 address, u32 bytes, Access access) {
    GlobalOrder& global = *w.cta->grid().global;
    if (i.ordered || access == Access::atomic)
        global.synchronise(w, i, address, bytes, access != Access::write, access != Access::read);
    else if (access == Access::read)
        global.read(w, i, address, bytes);
    else
        global.write(w, i, address, bytes);
}

u8* locate(Warp& w, const Instruction& i, u64 address, u32 bytes, u32 lane, Access access) {
    Space space = i.space;
    if (space == Space::generic) {
        if (address >> 44 == kGenericShared >> 44)
            space = Space::shared, address -= kGenericShared;
        else if (address >> 44 == kGenericLocal >> 44)
            space = Space::local, address -= kGenericLocal;
        else
            space = Space::global;
    }
    if (space == Space::shared) {
        SharedPlace at = shared_place(w, i, address, bytes);
        if (at.cta != w.cta) note_remote(w, i, *at.cta);
        if (at.cta->shadow) note(*at.cta->shadow, w, i, at.offset, bytes, lane, access);
        return at.cta->smem.get() + at.offset;
    }
    if (address % bytes)
        fail(kMisalignedAddress, w, i,
             format("misaligned: %u bytes at 0x%llx", bytes,
                    static_cast<unsigned long long>(address)));
    if (space == Space::local) return local_place(w, i, address, bytes, lane);
    u8* place = global_range(w, i, address, bytes);
    if (space == Space::global && w.cta->grid().global) note_global(w, i, address, bytes, access);
    return place;
}

namespace {

template <class Register>
Register extended(const u8* from, u32 bytes, bool is_signed) {
    u64 value = 0;
    std::memcpy(&value, from, bytes);
    u32 shift = 64 - 8 * bytes;
    if (is_signed) value = static_cast<u64>(static_cast<s64>(value << shift) >> shift);
    return static_cast<Register>(value);
}

void note_banks(Warp& w, const Instruction& i, u32 mask, u32 bytes) {
    if (i.space != Space::shared) return;
    u32 offsets[kWarpSize];
    for (u32 lane = 0; lane < kWarpSize; ++lane)
        offsets[lane] = static_cast<u32>(lane_address(w, i, lane));
    w.cta->grid().report->statistics.note_banks(i.line, offsets, mask, bytes);
}

template <class Register>
Step load(Warp& w, const Instruction& i, u32 mask) {
    u32 count = static_cast<u32>(i.data.size());
    note_banks(w, i, mask, i.bytes * count);
    for (; mask; mask &= mask - 1) {
        u32 lane = static_cast<u32>(__builtin_ctz(mask));
        const u8* from =
            locate(w, i, lane_address(w, i, lane), i.bytes * count, lane, Access::read);
        for (u32 n = 0; n < count; ++n, from += i.bytes)
            w.reg<Register>(i.data[n])[lane] = extended<Register>(from, i.bytes, i.is_signed);
    }
    return Step::next;
}

template <class Register>
Step store(Warp& w, const Instruction& i, u32 mask) {
    u32 count = static_cast<u32>(i.data.size());
    note_banks(w, i, mask, i.bytes * count);
    for (; mask; mask &= mask - 1) {
        u32 lane = static_cast<u32>(__builtin_ctz(mask));
        u8* to = locate(w, i, lane_address(w, i, lane), i.bytes * count, lane, Access::write);
        bool harmless = true;
        for (u32 n = 0; n < count; ++n, to += i.bytes) {
            harmless &= std::memcmp(to, &w.reg<Register>(i.data[n])[lane], i.bytes) == 0;
            std::memcpy(to, &w.reg<Register>(i.data[n])[lane], i.bytes);
        }
        if (i.space == Space::shared || i.space == Space::generic)
            note_write(w, i, lane_address(w, i, lane), i.bytes * count, lane, harmless);
    }
    return Step::next;
}

template <auto F>
Step convert_address(Warp& w, const Instruction& i, u32 mask) {
    auto convert = [&](auto* d, auto* a) {
        using T = std::remove_pointer_t<decltype(d)>;
        each_lane(mask, [=](u32 lane) { d[lane] = static_cast<T>(F(a[lane])); });
    };
    if (i.bytes == 8)
        convert(w.reg<u64>(i.dst), w.reg<u64>(i.a));
    else
        convert(w.reg<u32>(i.dst), w.reg<u32>(i.a));
    return Step::next;
}

template <class T>
Step map_rank(Warp& w, const Instruction& i, u32 mask) {
    T* d = w.reg<T>(i.dst);
    const T* a = w.reg<T>(i.a);
    const u32* rank = w.reg<u32>(i.b);
    each_lane(mask, [=](u32 lane) {
        d[lane] = (a[lane] & ~(static_cast<T>(0xff) << kRankShift)) | static_cast<T>(rank[lane])
                                                                          << kRankShift;
    });
    return Step::next;
}

// Matrix m takes its row addresses from lanes 8m..8m+7; lane l holds row l/4, columns 2(l%4) and
// the next.
Step access_matrices(Warp& w, const Instruction& i, u32) {
    bool stores = i.option, transposed = i.variant;
    note_banks(w, i, static_cast<u32>((1ull << 8 * i.data.size()) - 1), 16);
    u8* rows[kWarpSize];
    for (u32 lane = 0; lane < 8 * i.data.size(); ++lane)
        rows[lane] =
            locate(w, i, lane_address(w, i, lane), 16, lane, stores ? Access::write : Access::read);
    for (u32 m = 0; m < i.data.size(); ++m) {
        u32* fragment = w.reg<u32>(i.data[m]);
        for (u32 lane = 0; lane < kWarpSize; ++lane)
            for (u32 half = 0; half < 2; ++half) {
                u32 row = lane / 4, column = 2 * (lane % 4) + half;
                if (transposed) std::swap(row, column);
                u8* element = rows[8 * m + row] + 2 * column;
                u8* part = reinterpret_cast<u8*>(&fragment[lane]) + 2 * half;
                std::memcpy(stores ? element : part, stores ? part : element, 2);
            }
    }
    return Step::next;
}

// Cache and ordering modifiers that have no meaning here, apart from those of the memory model.
void take_memory_hints(Decode& d) {
    std::string_view order = d.modifiers.take_any({"relaxed", "acquire", "release", "volatile"});
    d.i.ordered = !order.empty();
    d.i.acquires = order == "acquire";
    d.i.releases = order == "release";
    for (const char* hint : {"weak",
                             "cta",
                             "cluster",
                             "gpu",
                             "sys",
                             "nc",
                             "ca",
                             "cg",
                             "cs",
                             "lu",
                             "cv",
                             "wb",
                             "wt",
                             "L1::no_allocate",
                             "L1::evict_normal",
                             "L1::evict_last",
                             "L1::evict_first",
                             "L1::evict_unchanged",
                             "L2::128B",
                             "L2::256B",
                             "L2::64B",
                             "mmio"})
        d.modifiers.take(hint);
}

// Registers of `data`: as wide as the first one named, or as the type.
u32 data_width(Decode& d, std::string_view text) {
    u32 bytes = std::max<u32>(d.i.bytes, 2);
    std::string_view list = text[0] == '{' ? text.substr(1, text.size() - 2) : text;
    for (std::string_view name : split(list, ',')) bytes = std::max(bytes, d.width(name, 0));
    return bytes;
}

void check_vector(Decode& d, std::string_view count, size_t found) {
    size_t expected = count == "v2" ? 2 : count == "v4" ? 4 : count == "v8" ? 8 : 1;
    if (found != expected || expected * d.i.bytes > 16)
        throw Error(kInvalidPtx, format("%zu elements of %u bytes", found, d.i.bytes));
}

}  // namespace

void decode_load(Decode& d) {
    bool hinted = d.modifiers.take("L2::cache_hint");
    d.expect_args(2 + hinted, 2 + hinted);
    u32 type = d.take_type();
    std::string_view vector = d.modifiers.take_any({"v2", "v4", "v8"});
    d.i.space = d.take_space();
    take_memory_hints(d);
    (void)type;
    d.address(d.args[1]);
    if (hinted) d.read(2, 8);
    d.i.register_bytes = static_cast<u8>(data_width(d, d.args[0]));
    d.i.data = d.write_vector(d.args[0], d.i.register_bytes);
    check_vector(d, vector, d.i.data.size());
    d.i.run = d.i.register_bytes == 2 ? load<u16> : d.i.register_bytes == 4 ? load<u32> : load<u64>;
}

void decode_store(Decode& d) {
    if (d.modifiers.take("async")) throw Error(kNotSupported, "st.async");
    bool hinted = d.modifiers.take("L2::cache_hint");
    d.expect_args(2 + hinted, 2 + hinted);
    d.take_type();
    std::string_view vector = d.modifiers.take_any({"v2", "v4", "v8"});
    d.i.space = d.take_space();
    if (d.i.space == Space::param) throw Error(kNotSupported, "st.param");
    take_memory_hints(d);
    d.address(d.args[0]);
    if (hinted) d.read(2, 8);
    d.i.register_bytes = static_cast<u8>(data_width(d, d.args[1]));
    d.i.data = d.read_vector(d.args[1], d.i.register_bytes);
    check_vector(d, vector, d.i.data.size());
    d.i.run = d.i.register_bytes == 2   ? store<u16>
              : d.i.register_bytes == 4 ? store<u32>
                                        : store<u64>;
}

void decode_cvta(Decode& d) {
    d.expect_args(2, 2);
    bool to_space = d.modifiers.take("to");
    u32 bytes = d.take_type();
    d.i.space = d.take_space();
    d.i.role = Role::move;
    d.i.a = d.read(1, bytes);
    d.i.dst = d.write(0, bytes);
    if (d.i.space == Space::shared)
        d.i.run = to_space ? convert_address<[](u64 a) { return a - kGenericShared; }>
                           : convert_address<[](u64 a) { return a + kGenericShared; }>;
    else if (d.i.space == Space::local)
        d.i.run = to_space ? convert_address<[](u64 a) { return a - kGenericLocal; }>
                           : convert_address<[](u64 a) { return a + kGenericLocal; }>;
    else
        d.i.run = convert_address<[](u64 a) { return a; }>;
}

void decode_mapa(Decode& d) {
    d.expect_args(3, 3);
    bool shared = d.modifiers.take("shared::cluster");
    u32 bytes = d.take_type();
    if (!shared && bytes != 8) throw Error(kInvalidPtx, "a generic mapa of 32 bits");
    d.i.a = d.read(1, bytes);
    d.i.b = d.read(2, 4);
    d.i.dst = d.write(0, bytes);
    d.i.run = bytes == 4 ? map_rank<u32> : map_rank<u64>;
}

void decode_matrix_access(Decode& d) {
    d.expect_args(2, 2);
    bool stores = d.modifiers.stem() == "stmatrix";
    std::string_view count = d.modifiers.take_any({"x1", "x2", "x4"});
    bool known = d.modifiers.take("sync") && d.modifiers.take("aligned") &&
                 d.modifiers.take("m8n8") && d.modifiers.take("b16") && !count.empty();
    if (!known) throw Error(kNotSupported, "matrix access of this shape");
    d.i.variant = d.modifiers.take("trans");
    d.i.space = d.take_space();
    d.i.option = stores;
    d.i.flow = Flow::aligned;
    d.address(d.args[stores ? 0 : 1]);
    d.i.data = stores ? d.read_vector(d.args[1], 4) : d.write_vector(d.args[0], 4);
    if (d.i.data.size() != static_cast<size_t>(count[1] - '0'))
        throw Error(kInvalidPtx, "number of matrices");
    d.i.run = access_matrices;
}

}  // namespace hopper_sim
