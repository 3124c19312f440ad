// SPDX-License-Identifier: BSD-3-Clause
#include "decode.h"

#include <algorithm>
#include <cstring>

#include "register_tags.h"

namespace hopper_sim {

namespace {

const std::unordered_map<std::string_view, std::pair<u32, u32>>& special_registers() {
    static const auto names = [] {
        static const char* const kVectors[] = {"%tid",       "%ntid",          "%ctaid",
                                               "%nctaid",    "%cluster_ctaid", "%cluster_nctaid",
                                               "%clusterid", "%nclusterid"};
        static std::vector<std::string> storage;
        storage.reserve(64);
        std::unordered_map<std::string_view, std::pair<u32, u32>> map;  // name -> (register, bytes)
        for (u32 v = 0; v < 8; ++v)
            for (u32 axis = 0; axis < 3; ++axis) {
                storage.push_back(std::string(kVectors[v]) + "." + "xyz"[axis]);
                map[storage.back()] = {kTid + 3 * v + axis, 4};
            }
        static const std::pair<const char*, u32> kScalars[] = {
            {"%cluster_ctarank", kClusterCtarank},
            {"%cluster_nctarank", kClusterNctarank},
            {"%laneid", kLaneid},
            {"%warpid", kWarpid},
            {"%nwarpid", kNwarpid},
            {"%smid", kSmid},
            {"%nsmid", kNsmid},
            {"%lanemask_eq", kLanemaskEq},
            {"%lanemask_le", kLanemaskLe},
            {"%lanemask_lt", kLanemaskLt},
            {"%lanemask_ge", kLanemaskGe},
            {"%lanemask_gt", kLanemaskGt},
            {"%dynamic_smem_size", kDynamicSmemSize},
            {"%total_smem_size", kTotalSmemSize},
            {"%clock", kClock}};
        for (auto& [name, id] : kScalars) map[name] = {id, 4};
        map["%clock64"] = {kClock64, 8};
        map["%globaltimer"] = {kGlobaltimer, 8};
        return map;
    }();
    return names;
}

u32 align_up(u32 value, u32 unit) { return (value + unit - 1) / unit * unit; }

// "%r12" -> ("%r", 12); false if there are no digits at the end.
bool split_index(std::string_view name, std::string_view& prefix, u32& index) {
    size_t digits = name.size();
    while (digits > 0 && name[digits - 1] >= '0' && name[digits - 1] <= '9') --digits;
    if (digits == name.size() || name.size() - digits > 9) return false;
    prefix = name.substr(0, digits);
    index = 0;
    for (char c : name.substr(digits)) index = 10 * index + static_cast<u32>(c - '0');
    return true;
}

}  // namespace

Decoder::Decoder(Module& module, Kernel& kernel) : module_(module), kernel_(kernel) {
    scopes_.push_back({next_scope_++, {}, {}});
    kernel_.static_smem = kReservedSmem;  // a running offset until finish()
}

void Decoder::open_scope() { scopes_.push_back({next_scope_++, {}, {}}); }
void Decoder::close_scope() { scopes_.pop_back(); }

void Decoder::label(std::string_view name) {
    labels_[std::to_string(scopes_.back().id) + ":" + std::string(name)] =
        static_cast<u32>(kernel_.code.size());
}

u32 Decoder::allocate(u32 bytes) {
    if (bytes == kPredicate) {
        if (predicates_free_ == 0) {
            predicate_block_ = register_bytes_;
            register_bytes_ += 64;
            predicates_free_ = 16;
        }
        return predicate_block_ + 4 * (16 - predicates_free_--);
    }
    u32 slot = register_bytes_;
    register_bytes_ += kWarpSize * bytes;
    return slot;
}

void Decoder::declare_registers(std::string_view statement) {
    auto parts = words(statement);
    u32 bytes = type_bytes(parts.at(1).substr(1));
    if (!bytes) throw Error(kInvalidPtx, "unknown register type " + std::string(parts[1]));
    std::string_view names =
        statement.substr(static_cast<size_t>(parts[1].data() + parts[1].size() - statement.data()));
    for (std::string_view name : split(names, ',')) {
        size_t angle = name.find('<');
        if (angle == std::string_view::npos) {
            scopes_.back().singles[name] = {0, bytes};
        } else {
            u32 count = static_cast<u32>(std::atoi(name.data() + angle + 1));
            scopes_.back().ranges[name.substr(0, angle)] = {bytes, count, std::vector<u32>(count)};
        }
    }
}

const Decoder::Register* Decoder::find(std::string_view name) {
    static thread_local Register found;
    std::string_view prefix;
    u32 index = 0;
    bool indexed = split_index(name, prefix, index);
    for (auto scope = scopes_.rbegin(); scope != scopes_.rend(); ++scope) {
        auto single = scope->singles.find(name);
        if (single != scope->singles.end()) {
            if (!single->second.slot) single->second.slot = allocate(single->second.bytes);
            return &single->second;
        }
        if (!indexed) continue;
        auto range = scope->ranges.find(prefix);
        if (range != scope->ranges.end() && index < range->second.count) {
            u32& slot = range->second.slots[index];
            if (!slot) slot = allocate(range->second.bytes);
            found = {slot, range->second.bytes};
            return &found;
        }
    }
    return nullptr;
}

u32 Decoder::constant(u64 value, u32 bytes) {
    if (bytes < 8 && bytes > 1) value &= (1ull << (8 * bytes)) - 1;
    auto [entry, fresh] = constants_[bytes].try_emplace(value, 0);
    if (fresh) {
        entry->second = allocate(bytes);
        constant_slots_.push_back({value, entry->second, bytes});
    }
    return entry->second;
}

u32 Decoder::start_value(StartValue::Kind kind, u32 value, u32 bytes) {
    u64 key = static_cast<u64>(kind) << 60 | static_cast<u64>(bytes) << 40 | value;
    auto [entry, fresh] = start_values_.try_emplace(key, 0);
    if (fresh) {
        entry->second = allocate(bytes);
        kernel_.start_values.push_back({kind, entry->second, bytes, value});
    }
    return entry->second;
}

void Decoder::place_shared(Variable variable) {
    kernel_.static_smem = align_up(kernel_.static_smem, variable.align);
    variable.offset = kernel_.static_smem;
    kernel_.static_smem += variable.bytes;
    kernel_.shared.push_back(std::move(variable));
}

const Variable* Decoder::shared_variable(std::string_view name) {
    for (const Variable& v : kernel_.shared)
        if (v.name == name) return &v;
    auto found = module_.module_shared.find(name);
    if (found == module_.module_shared.end()) return nullptr;
    if (found->second.is_extern) {
        extern_align_ = std::max(extern_align_, found->second.align);
        Variable array = found->second;
        array.offset = kOffsetMask;  // known when all static variables are
        kernel_.shared.push_back(array);
    } else {
        place_shared(found->second);
    }
    return &kernel_.shared.back();
}

bool Decoder::is_symbol(std::string_view name) const {
    auto named = [&](const Variable& v) { return v.name == name; };
    return std::any_of(kernel_.shared.begin(), kernel_.shared.end(), named) ||
           std::any_of(locals_.begin(), locals_.end(), named) ||
           std::any_of(kernel_.parameters.begin(), kernel_.parameters.end(), named) ||
           module_.module_shared.count(name) || module_.variables.count(name);
}

u32 Decoder::symbol_bytes(std::string_view name) const {
    bool wide = module_.variables.count(name) ||
                std::any_of(kernel_.parameters.begin(), kernel_.parameters.end(),
                            [&](const Variable& v) { return v.name == name; });
    return wide ? 8 : 4;
}

u32 Decoder::symbol(std::string_view name, u32 bytes) {
    for (const Variable& v : locals_)
        if (v.name == name) return constant(v.offset, bytes);
    for (const Variable& v : kernel_.parameters)
        if (v.name == name) return start_value(StartValue::parameter_symbol, v.offset, bytes);
    if (const Variable* v = shared_variable(name))
        return start_value(StartValue::shared_symbol, v->offset, bytes);
    auto global = module_.variables.find(name);
    if (global != module_.variables.end())
        return constant(reinterpret_cast<u64>(global->second.storage), bytes);
    throw Error(kInvalidPtx, "unknown operand '" + std::string(name) + "'");
}

u32 Decoder::operand(std::string_view name, u32 bytes) {
    if (const Register* r = find(name)) {
        if (r->bytes != bytes)
            throw Error(kInvalidPtx,
                        format("register %.*s has %u bytes, the operand %u",
                               static_cast<int>(name.size()), name.data(), r->bytes, bytes));
        return r->slot;
    }
    if (is_number(name)) {
        u64 value = parse_number(name, bytes);
        return constant(bytes == kPredicate && value ? kAllLanes : value, bytes);
    }
    auto special = special_registers().find(name);
    if (special != special_registers().end()) {
        if (special->second.second != bytes && bytes != 8)
            throw Error(kInvalidPtx, "special register of another width: " + std::string(name));
        return start_value(StartValue::special_register, special->second.first, bytes);
    }
    return symbol(name, bytes);
}

void Decoder::directive(std::string_view statement) {
    std::string_view kind = words(statement).front();
    if (kind == ".reg") return declare_registers(statement);
    if (kind == ".pragma") return;
    if (kind != ".shared" && kind != ".local")
        throw Error(kInvalidPtx, "directive in a kernel: " + std::string(statement));
    Variable parse_variable(std::string_view);  // parse.cpp
    Variable variable = parse_variable(statement);
    if (kind == ".shared") return place_shared(std::move(variable));
    kernel_.local_bytes = align_up(kernel_.local_bytes, std::max(variable.align, 16u));
    variable.offset = kernel_.local_bytes;
    kernel_.local_bytes += variable.bytes;
    locals_.push_back(std::move(variable));
}

void Decoder::branch(Instruction& i, std::string_view target) {
    PendingBranch pending{kernel_.code.size(), target, {}};
    for (const Scope& scope : scopes_) pending.scopes.push_back(scope.id);
    branches_.push_back(std::move(pending));
    i.flow = Flow::branch;
}

void Decoder::instruction(std::string_view statement, u32 line, s32 source) {
    Instruction i;
    i.line = line;
    i.source = source;
    i.text = statement;
    try {
        std::string_view body = statement;
        if (body[0] == '@') {
            size_t end = body.find_first_of(" \t\n");
            std::string_view guard = body.substr(1, end - 1);
            i.guard_negated = guard[0] == '!';
            i.guard = static_cast<s32>(operand(guard.substr(i.guard_negated), kPredicate));
            i.reads.push_back(static_cast<u32>(i.guard));
            body = trim(body.substr(end));
        }
        decode(i, body);
    } catch (const Error& error) {
        kernel_.unsupported.push_back(
            {line, error.what() + (" in: " + std::string(statement.substr(0, 160)))});
    } catch (const std::out_of_range&) {
        kernel_.unsupported.push_back(
            {line, "too few operands in: " + std::string(statement.substr(0, 160))});
    }
    kernel_.code.push_back(std::move(i));
}

void Decoder::decode(Instruction& i, std::string_view body) {
    size_t end = body.find_first_of(" \t\n{[");
    std::string_view opcode = body.substr(0, end);
    Decode d{*this, i, Modifiers(opcode), opcode, {}};
    if (end != std::string_view::npos) d.args = split(body.substr(end), ',');
    if (opcode == "bra" || opcode == "bra.uni") return branch(i, d.args.at(0));
    if (opcode == "ret" || opcode == "exit" || opcode == "ret.uni") {
        i.flow = Flow::exit;
        return;
    }
    if (const AluOpcode* alu = find_alu(opcode)) {
        size_t count = 0;
        while (count < 5 && alu->widths[count]) ++count;
        d.expect_args(count, count);
        u32* fields[] = {&i.dst, &i.a, &i.b, &i.c, &i.d};
        for (size_t n = 1; n < count; ++n) *fields[n] = d.read(n, alu->widths[n]);
        i.dst = d.write(0, alu->widths[0]);
        i.run = alu->run;
        return;
    }
    StemDecoder decode_stem = find_stem(d.modifiers.stem());
    if (!decode_stem) throw Error(kNotSupported, "unknown opcode " + std::string(opcode));
    decode_stem(d);
    std::string unknown = d.modifiers.rest();
    if (!unknown.empty())
        throw Error(kNotSupported, "unknown modifiers " + unknown + " of " + std::string(opcode));
}

void Decoder::place_extern_arrays() {
    kernel_.dynamic_offset = align_up(kernel_.static_smem, extern_align_);
    for (Variable& v : kernel_.shared)
        if (v.offset == kOffsetMask) v.offset = kernel_.dynamic_offset;
    for (StartValue& value : kernel_.start_values)
        if (value.kind == StartValue::shared_symbol && value.value == kOffsetMask)
            value.value = kernel_.dynamic_offset;
    kernel_.static_smem -= kReservedSmem;
}

void Decoder::resolve_branches() {
    for (const PendingBranch& branch : branches_) {
        auto found = labels_.end();
        for (auto scope = branch.scopes.rbegin(); scope != branch.scopes.rend(); ++scope) {
            found = labels_.find(std::to_string(*scope) + ":" + std::string(branch.label));
            if (found != labels_.end()) break;
        }
        if (found == labels_.end())
            throw Error(kInvalidPtx, "no label " + std::string(branch.label));
        kernel_.code[branch.instruction].target = found->second;
    }
}

void Decoder::finish() {
    Instruction end;
    end.flow = Flow::exit;
    end.text = "}";
    end.line = kernel_.code.empty() ? 0 : kernel_.code.back().line;
    kernel_.code.push_back(end);
    resolve_branches();
    place_extern_arrays();
    number_tagged_registers(kernel_);
    kernel_.register_image.assign(register_bytes_, 0xff);
    for (const ConstantSlot& c : constant_slots_) {
        u8* place = kernel_.register_image.data() + c.slot;
        u32 bytes = c.bytes == kPredicate ? 4 : c.bytes,
            lanes = c.bytes == kPredicate ? 1 : kWarpSize;
        for (u32 lane = 0; lane < lanes; ++lane) std::memcpy(place + lane * bytes, &c.value, bytes);
    }
}

}  // namespace hopper_sim
