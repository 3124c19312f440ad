// SPDX-License-Identifier: BSD-3-Clause
// What an opcode's decoder sees of a statement, and the table of opcode stems.
#include "decode.h"

namespace hopper_sim {

Modifiers::Modifiers(std::string_view opcode) {
    for (size_t start = 0; start <= opcode.size();) {
        size_t dot = std::min(opcode.find('.', start), opcode.size());
        parts_.push_back(opcode.substr(start, dot - start));
        start = dot + 1;
    }
}

bool Modifiers::take(std::string_view modifier) {
    for (size_t n = 1; n < parts_.size(); ++n)
        if (parts_[n] == modifier) {
            parts_.erase(parts_.begin() + static_cast<long>(n));
            return true;
        }
    return false;
}

std::string_view Modifiers::take_any(std::initializer_list<std::string_view> choices) {
    for (std::string_view choice : choices)
        if (take(choice)) return choice;
    return {};
}

std::string_view Modifiers::take_last() {
    if (parts_.size() < 2) return {};
    std::string_view last = parts_.back();
    parts_.pop_back();
    return last;
}

std::string Modifiers::rest() const {
    std::string text;
    for (size_t n = 1; n < parts_.size(); ++n) text += "." + std::string(parts_[n]);
    return text;
}

void Decode::expect_args(size_t least, size_t most) const {
    if (args.size() < least || args.size() > most)
        throw Error(kInvalidPtx,
                    format("%zu operands, expected %zu..%zu", args.size(), least, most));
}

u32 Decode::read(std::string_view text, u32 bytes) {
    u32 slot = decoder.operand(text, bytes);
    i.reads.push_back(slot);
    return slot;
}

u32 Decode::write(std::string_view text, u32 bytes) {
    if (text == "_") return decoder.allocate(bytes);
    const Decoder::Register* r = decoder.find(text);
    if (!r) throw Error(kInvalidPtx, "not a register: " + std::string(text));
    if (r->bytes != bytes)
        throw Error(kInvalidPtx, format("destination of %u bytes, expected %u", r->bytes, bytes));
    i.writes.push_back(r->slot);
    return r->slot;
}

u32 Decode::read_predicate(std::string_view text, bool& negated) {
    negated = !text.empty() && text[0] == '!';
    return read(text.substr(negated), kPredicate);
}

u32 Decode::width(std::string_view text, u32 otherwise) {
    const Decoder::Register* r = decoder.find(text);
    return r ? r->bytes : otherwise;
}

static std::vector<std::string_view> elements(std::string_view text) {
    if (text.empty() || text.front() != '{') return {text};
    return split(text.substr(1, text.size() - 2), ',');
}

std::vector<u32> Decode::read_vector(std::string_view text, u32 bytes) {
    std::vector<u32> slots;
    for (std::string_view element : elements(text)) slots.push_back(read(element, bytes));
    return slots;
}

std::vector<u32> Decode::write_vector(std::string_view text, u32 bytes) {
    std::vector<u32> slots;
    for (std::string_view element : elements(text)) slots.push_back(write(element, bytes));
    return slots;
}

void Decode::address(std::string_view text) {
    if (text.size() < 2 || text.front() != '[')
        throw Error(kInvalidPtx, "not an address: " + std::string(text));
    std::string_view base = trim(text.substr(1, text.size() - 2));
    i.offset = 0;
    size_t plus = base.find('+');
    if (plus != std::string_view::npos) {
        i.offset = static_cast<s64>(parse_number(trim(base.substr(plus + 1)), 8));
        base = trim(base.substr(0, plus));
    } else if (size_t minus = base.find('-', 1); minus != std::string_view::npos) {
        i.offset = static_cast<s64>(parse_number(base.substr(minus), 8));
        base = trim(base.substr(0, minus));
    }
    u32 natural = decoder.is_symbol(base) ? decoder.symbol_bytes(base) : 8;
    i.base_bytes = static_cast<u8>(width(base, natural));
    i.base = read(base, i.base_bytes);
}

u32 Decode::plain_address(std::string_view text, u32 bytes) {
    if (text.size() < 2 || text.front() != '[')
        throw Error(kInvalidPtx, "not an address: " + std::string(text));
    return read(trim(text.substr(1, text.size() - 2)), bytes);
}

u64 Decode::literal(size_t arg) const {
    if (!is_number(args.at(arg)))
        throw Error(kInvalidPtx, "not a constant: " + std::string(args[arg]));
    return parse_number(args[arg], 8);
}

Space Decode::take_space() {
    std::string_view space = modifiers.take_any(
        {"global", "shared", "shared::cta", "shared::cluster", "param", "const", "local"});
    if (space.empty()) return Space::generic;
    switch (space[0]) {
        case 's':
            return Space::shared;
        case 'p':
            return Space::param;
        case 'l':
            return Space::local;
        default:
            return Space::global;  // constants live in host memory as well
    }
}

u32 Decode::take_type() {
    std::string_view type = modifiers.take_last();
    u32 bytes = type_bytes(type);
    if (!bytes) throw Error(kNotSupported, "unknown type " + std::string(type));
    i.bytes = static_cast<u8>(bytes);
    i.is_signed = type[0] == 's';
    return bytes;
}

StemDecoder find_stem(std::string_view stem) {
    static const std::unordered_map<std::string_view, StemDecoder> kStems = {
        {"mov", decode_mov},
        {"setp", decode_setp},
        {"selp", decode_selp},
        {"cvt", decode_cvt},
        {"lop3", decode_lop3},
        {"ld", decode_load},
        {"ldu", decode_load},
        {"st", decode_store},
        {"atom", decode_atomic},
        {"red", decode_atomic},
        {"cvta", decode_cvta},
        {"mapa", decode_mapa},
        {"ldmatrix", decode_matrix_access},
        {"stmatrix", decode_matrix_access},
        {"shfl", decode_shfl},
        {"vote", decode_vote},
        {"elect", decode_elect},
        {"activemask", decode_activemask},
        {"match", decode_match},
        {"redux", decode_redux},
        {"bar", decode_barrier},
        {"barrier", decode_barrier},
        {"fence", decode_fence},
        {"membar", decode_fence},
        {"prefetch", decode_hint},
        {"prefetchu", decode_hint},
        {"nanosleep", decode_hint},
        {"pmevent", decode_hint},
        {"createpolicy", decode_createpolicy},
        {"setmaxnreg", decode_setmaxnreg},
        {"trap", decode_trap},
        {"griddepcontrol", decode_griddepcontrol},
        {"mbarrier", decode_mbarrier},
        {"cp", decode_cp},
        {"wgmma", decode_wgmma},
    };
    auto found = kStems.find(stem);
    return found == kStems.end() ? nullptr : found->second;
}

}  // namespace hopper_sim
