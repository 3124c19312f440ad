// SPDX-License-Identifier: BSD-3-Clause
// wgmma: operands from descriptors or registers, groups that complete for a whole warpgroup at
// once.
#include "wgmma.h"

#include <algorithm>
#include <cstring>

#include "decode.h"
#include "memory.h"
#include "trace.h"

namespace hopper_sim {

MatrixDescriptor::MatrixDescriptor(u64 bits)
    : start(static_cast<u32>(bits & 0x3fff) << 4),
      leading(static_cast<u32>(bits >> 16 & 0x3fff) << 4),
      stride(static_cast<u32>(bits >> 32 & 0x3fff) << 4),
      swizzle_bits(bits >> 62 ? 4 - static_cast<u32>(bits >> 62) : 0),
      base_offset_zero((bits >> 49 & 7) == 0) {}

u32 MatrixDescriptor::k_major(u32 mn, u32 piece) const {
    u32 column = piece * (swizzle_bits ? kPieceBytes : leading);
    return swizzle(start + mn % 8 * kPieceBytes * units() + mn / 8 * stride + column, swizzle_bits);
}

u32 MatrixDescriptor::mn_major(u32 block, u32 k) const {
    if (swizzle_bits == 0) return start + block * stride + k % 8 * kPieceBytes + k / 8 * leading;
    u32 address = start + block % units() * kPieceBytes + block / units() * leading +
                  k % 8 * kPieceBytes * units() + k / 8 * stride;
    return swizzle(address, swizzle_bits);
}

namespace {

struct Shape {
    u32 n, k;
    ElementType type;
    bool a_transposed, b_transposed;
};

Shape shape_of(const Instruction& i) {
    return {static_cast<u32>(i.immediate), 32u / i.bytes, static_cast<ElementType>(i.variant),
            (i.option & 1) != 0, (i.option & 2) != 0};
}

// Reads 16 bytes at a time through a descriptor.
class OperandReader {
  public:
    OperandReader(Warp& w, const Instruction& i, u64 bits, ElementType type,
                  std::vector<u32>& pieces)
        : warp_(w), instruction_(i), descriptor_(bits), type_(type), pieces_(pieces) {
        if (!descriptor_.base_offset_zero)
            fail(kLaunchFailed, w, i, "the base offset of a matrix descriptor is not zero");
    }

    u32 k_major(u32 mn, u32 piece, float* to) { return read(descriptor_.k_major(mn, piece), to); }
    u32 mn_major(u32 block, u32 k, float* to) { return read(descriptor_.mn_major(block, k), to); }

  private:
    u32 read(u32 offset, float* to) {
        Cta& cta = *warp_.cta;
        if (offset < kReservedSmem || offset + kPieceBytes > cta.smem_end)
            fail(kIllegalAddress, warp_, instruction_,
                 format("a matrix descriptor reaches shared 0x%x, outside the block's memory",
                        offset));
        pieces_.push_back(offset / kPieceBytes);
        return convert_piece(cta.smem.get() + offset, type_, to);
    }

    Warp& warp_;
    const Instruction& instruction_;
    MatrixDescriptor descriptor_;
    ElementType type_;
    std::vector<u32>& pieces_;
};

using RowsOfA = float[kMaxK][kWarpRows];

// One piece of 8 rows; returns its number of elements.
u32 read_rows(OperandReader& reader, u32 mn, u32 piece, PieceRows& rows) {
    u32 count = 0;
    for (u32 n = 0; n < 8; ++n) count = reader.k_major(mn + n, piece, rows[n]);
    return count;
}

void read_a_from_smem(OperandReader reader, const Shape& shape, u32 warp, RowsOfA& a) {
    if (shape.a_transposed) {
        for (u32 block = 0; block < 2; ++block)
            for (u32 k = 0; k < shape.k; ++k)
                reader.mn_major(2 * warp + block, k, &a[k][8 * block]);
        return;
    }
    PieceRows pieces;
    constexpr u8 kInOrder[8] = {0, 1, 2, 3, 4, 5, 6, 7};
    for (u32 row = 0; row < kWarpRows; row += 8)
        for (u32 piece = 0; piece < 2; ++piece) {
            u32 count = read_rows(reader, kWarpRows * warp + row, piece, pieces);
            transpose_rows(pieces, kInOrder, count, &a[piece * count][row], kWarpRows);
        }
}

// Register r of lane l: row l/4 + 8 (r & 1), elements k = (l % 4) * per + (r >> 1) * 4 * per and
// up.
void read_a_from_registers(Warp& w, const Instruction& i, const Shape& shape, RowsOfA& a) {
    u32 per = shape.k / 8;  // elements of a register
    for (u32 r = 0; r < 4; ++r)
        for (u32 lane = 0; lane < kWarpSize; ++lane) {
            u8 piece[kPieceBytes] = {};
            float values[16];
            std::memcpy(piece, &w.reg<u32>(i.data2[r])[lane], 4);
            convert_piece(piece, shape.type, values);
            u32 row = lane / 4 + 8 * (r & 1), k = lane % 4 * per + (r >> 1) * 4 * per;
            for (u32 e = 0; e < per; ++e) a[k + e][row] = values[e];
        }
}

void read_b(OperandReader reader, const Shape& shape, float* b) {
    constexpr u8 kEvenFirst[8] = {0, 2, 4, 6, 1, 3, 5, 7};
    if (shape.b_transposed) {
        float values[16];
        for (u32 block = 0; block < shape.n / 8; ++block)
            for (u32 k = 0; k < shape.k; ++k) {
                reader.mn_major(block, k, values);
                float* to = b + k * shape.n + 8 * block;
                for (u32 e = 0; e < 8; ++e) to[e] = values[kEvenFirst[e]];
            }
        return;
    }
    PieceRows pieces;
    for (u32 n = 0; n < shape.n; n += 8)
        for (u32 piece = 0; piece < 2; ++piece) {
            u32 count = read_rows(reader, n, piece, pieces);
            transpose_rows(pieces, kEvenFirst, count, b + piece * count * shape.n + n, shape.n);
        }
}

// The first of the four warps converts B; the others find it.
SharedOperand& shared_b(Warp& w, const Instruction& i, const Shape& shape, u64 bits) {
    SharedOperand& operand = w.cta->shared_operands[w.id / 4][w.wgmma_issued];
    if (operand.users++ == 0) {
        operand.descriptor = bits;
        u64& free = w.cta->tensor_core_free;
        const u64 begin = std::max(free, w.now());
        free = operand.end = begin + shape.n / 2;
        note_span(w, SpanKind::product, i.line, begin, free);
        operand.values.resize(static_cast<size_t>(shape.k) * shape.n);
        read_b(OperandReader(w, i, bits, shape.type, operand.pieces), shape, operand.values.data());
    } else if (operand.descriptor != bits) {
        hazard(w, i, "wgmma", "the warps of a warpgroup use different descriptors of B");
    }
    return operand;
}

// Reads of A belong to this warp, those of B to the warpgroup.
void check_operands(Warp& w, const Instruction& i, const std::vector<u32>& a,
                    const SharedOperand& b) {
    Shadow* shadow = w.cta->shadow.get();
    if (!shadow) return;
    Touch as = w.access(i, kSeveralLanes);
    as.agent = w.wgmma_agent;
    as.epoch = static_cast<u32>(w.wgmma_groups) + 1;
    for (u32 piece : a) shadow->async_read(w, i, piece, as, true);
    if (b.users > 1) return shadow->check_loads(w, i, b.pieces);
    for (u32 piece : b.pieces) shadow->async_read(w, i, piece, as);
}

// What Hopper is reported to do to fp8 accumulators: cut to a few fraction bits after each k = 32.
void cut_accumulators(float* const* d, size_t count, u32 bits) {
    u32 keep = ~((1u << (23 - bits)) - 1);
    for (size_t r = 0; r < count; ++r)
        for (u32 lane = 0; lane < kWarpSize; ++lane) {
            u32 u;
            std::memcpy(&u, &d[r][lane], 4);
            u &= keep;
            std::memcpy(&d[r][lane], &u, 4);
        }
}

Step multiply(Warp& w, const Instruction& i, u32 mask) {
    if (mask != kAllLanes) fail(kLaunchFailed, w, i, "wgmma with inactive lanes");
    if (w.id / 4 * 4 + 4 > w.cta->warps.size())
        fail(kLaunchFailed, w, i, "wgmma in an incomplete warpgroup");
    Shape shape = shape_of(i);
    WgmmaOperation operation;
    static thread_local RowsOfA rows;
    alignas(64) static thread_local float a[kMaxK][2][kWarpSize];
    if (i.data2.empty())
        read_a_from_smem(OperandReader(w, i, w.reg<u64>(i.a)[0], shape.type, operation.pieces),
                         shape, w.id % 4, rows);
    else
        read_a_from_registers(w, i, shape, rows);
    float sign = i.option & 4 ? -1.0f : 1.0f;
    for (u32 k = 0; k < shape.k; ++k)
        for (u32 row = 0; row < kWarpRows; ++row)
            std::fill_n(&a[k][row / 8][4 * (row % 8)], 4, sign * rows[k][row]);
    SharedOperand& b = shared_b(w, i, shape, w.reg<u64>(i.b)[0]);
    check_operands(w, i, operation.pieces, b);
    std::vector<float*> d(i.data.size());
    for (size_t r = 0; r < d.size(); ++r) d[r] = w.reg<float>(i.data[r]);
    multiply_accumulate(d.data(), a, b.values.data(), shape.n, shape.k, w.predicate(i.c) & 1);
    u32 bits = w.cta->grid().config.fp8_accumulator_bits;
    if (bits && i.bytes == 1) cut_accumulators(d.data(), d.size(), bits);
    Statistics& statistics = w.cta->grid().report->statistics;
    ++statistics.wgmma;
    ++statistics.role(w.id).wgmma;
    w.wgmma_open.end = b.end;
    statistics.macs += static_cast<u64>(kWarpRows) * shape.n * shape.k;
    if (b.users == 4) w.cta->shared_operands[w.id / 4].erase(w.wgmma_issued);
    use_tagged_registers(w, i);
    ++w.wgmma_issued;
    w.wgmma_open.operations.push_back(std::move(operation));
    return Step::next;
}

Step fence(Warp& w, const Instruction&, u32) {
    ++w.wgmma_fences;
    return Step::next;
}

Step commit(Warp& w, const Instruction&, u32) {
    w.wgmma_committed.push_back(std::move(w.wgmma_open));
    w.wgmma_open = WgmmaGroup();
    ++w.wgmma_groups;
    return Step::next;
}

// A group completes for the four warps together: not before all of them have committed it.
Step wait_group(Warp& w, const Instruction& i, u32) {
    s64 target = static_cast<s64>(w.wgmma_groups) - i.immediate;
    u32 first = w.id / 4 * 4,
        last = std::min<u32>(first + 4, static_cast<u32>(w.cta->warps.size()));
    for (u32 n = first; n < last; ++n) {
        const Warp& other = w.cta->warps[n];
        if (!other.done() && static_cast<s64>(other.wgmma_groups) < target)
            return w.wait_for(Wait::wgmma_group, static_cast<u32>(i.immediate), n);
    }
    while (static_cast<s64>(w.wgmma_committed.size()) > i.immediate) {
        w.wait_until(w.wgmma_committed.front().end, Stall::wgmma);
        w.wgmma_committed.pop_front();
    }
    if (target > 0) w.wgmma_completed = std::max(w.wgmma_completed, static_cast<u64>(target));
    if (target > 0) w.order.seen.raise(w.wgmma_agent, static_cast<u32>(target));
    return Step::next;
}

ElementType element_type(std::string_view name) {
    if (name == "bf16") return ElementType::bf16;
    if (name == "f16") return ElementType::f16;
    if (name == "e4m3") return ElementType::e4m3;
    if (name == "e5m2") return ElementType::e5m2;
    throw Error(kNotSupported, "wgmma on type " + std::string(name));
}

// "m64n128k16" for elements of `bytes`.
u32 parse_n(std::string_view shape, u32 bytes) {
    size_t n_at = shape.find('n'), k_at = shape.find('k');
    if (shape.substr(0, 3) != "m64" || n_at != 3 || k_at == std::string_view::npos)
        throw Error(kInvalidPtx, "shape of wgmma");
    u32 n = static_cast<u32>(parse_number(shape.substr(4, k_at - 4), 4));
    if (n < 8 || n > 256 || n % 8 || parse_number(shape.substr(k_at + 1), 4) != 32 / bytes)
        throw Error(kInvalidPtx, "shape of wgmma");
    return n;
}

void decode_multiply(Decode& d) {
    Instruction& i = d.i;
    std::string_view b_type = d.modifiers.take_last(), a_type = d.modifiers.take_last();
    std::string_view d_type = d.modifiers.take_last(), shape = d.modifiers.take_last();
    if (d_type != "f32" || a_type.empty() || a_type != b_type)
        throw Error(kNotSupported, "wgmma of these types");
    ElementType type = element_type(a_type);
    i.variant = static_cast<u8>(type);
    i.bytes = a_type[0] == 'e' ? 1 : 2;
    u32 n = parse_n(shape, i.bytes);
    i.immediate = n;
    bool a_in_registers = d.args.at(1)[0] == '{';
    size_t flags = i.bytes == 1 ? 0 : a_in_registers ? 1 : 2;
    d.expect_args(6 + flags, 6 + flags);
    i.data = d.read_vector(d.args[0], 4);
    d.write_vector(d.args[0], 4);
    if (i.data.size() != n / 2) throw Error(kInvalidPtx, "number of accumulators");
    if (a_in_registers) {
        i.data2 = d.read_vector(d.args[1], 4);
        if (i.data2.size() != 4) throw Error(kInvalidPtx, "number of registers of A");
    } else {
        i.a = d.read(1, 8);
    }
    i.b = d.read(2, 8);
    i.c = d.read(3, kPredicate);
    bool negative = (d.args[4] == "-1") != (d.args[5] == "-1");
    bool a_transposed = flags == 2 && d.literal(6), b_transposed = flags && d.literal(5 + flags);
    i.option = static_cast<u8>(a_transposed | b_transposed << 1 | negative << 2);
    i.run = multiply;
}

}  // namespace

void decode_wgmma(Decode& d) {
    if (!d.modifiers.take("sync") || !d.modifiers.take("aligned"))
        throw Error(kNotSupported, "wgmma without .sync.aligned");
    d.i.flow = Flow::aligned;
    d.i.role = Role::wgmma;
    if (d.modifiers.take("fence")) {
        d.expect_args(0, 0);
        d.i.run = fence;
    } else if (d.modifiers.take("commit_group")) {
        d.expect_args(0, 0);
        d.i.run = commit;
    } else if (d.modifiers.take("wait_group")) {
        d.expect_args(1, 1);
        d.i.immediate = static_cast<s64>(d.literal(0));
        d.i.run = wait_group;
    } else if (d.modifiers.take("mma_async")) {
        decode_multiply(d);
    } else {
        throw Error(kNotSupported, "wgmma operation of this kind");
    }
}

}  // namespace hopper_sim
