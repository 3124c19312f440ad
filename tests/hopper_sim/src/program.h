// SPDX-License-Identifier: BSD-3-Clause
// A decoded PTX module: kernels as arrays of instructions whose operands are byte offsets into a
// warp's register file.
#pragma once

#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "base.h"

namespace hopper_sim {

struct Warp;
struct Instruction;

enum class Step : u8 { next, block };
using Handler = Step (*)(Warp&, const Instruction&, u32 mask);

enum class Flow : u8 {
    plain,
    branch,
    exit,
    aligned,  // needs all live lanes of the warp together
    masked,   // needs the live lanes of a membermask together
};
enum class Space : u8 { generic, global, shared, param, local };
enum class Role : u8 { other, move, wgmma };

struct Instruction {
    Handler run = nullptr;
    u32 dst = 0, a = 0, b = 0, c = 0, d = 0;  // register slots
    s32 guard = -1;                           // predicate slot of @p
    bool guard_negated = false;
    Flow flow = Flow::plain;
    Role role = Role::other;
    bool has_tag_copy = false;  // a mov of one register to another
    bool is_tagged = false;     // uses registers of wgmma, but is none
    u32 target = 0;             // branch
    u32 member_mask = 0;        // slot, Flow::masked
    // Memory operands: [base + offset], `data` elements of `bytes` in registers of
    // `register_bytes`.
    Space space = Space::generic;
    u8 bytes = 0, register_bytes = 0, base_bytes = 0;
    bool is_signed = false, has_dst = false, ordered = false;
    bool acquires = false, releases = false;  // accesses with these semantics
    u8 variant = 0, option = 0;               // meaning belongs to the handler
    u32 base = 0;
    s64 offset = 0, immediate = 0;
    std::vector<u32> data, data2;    // { } operands
    std::vector<u32> reads, writes;  // all register slots, for the checks on registers
    std::vector<u32> tagged_reads, tagged_writes;  // of them, those numbered in register_tags.h
    u32 line = 0;                                  // in the PTX text
    s32 source = -1;                               // index into Module::positions
    std::string_view text;
};

// A position of -lineinfo; `parent` is the position it was inlined at.
struct SourcePosition {
    u32 file = 0, line = 0, column = 0;
    s32 parent = -1;
};

struct Variable {
    std::string name;
    u32 bytes = 0, align = 1, element_bytes = 1;
    bool is_extern = false;
    u32 offset = 0;         // of a parameter, a shared or a local variable
    u8* storage = nullptr;  // of a global or constant
};

// A slot whose value is known only when a warp starts.
struct StartValue {
    enum Kind { special_register, shared_symbol, parameter_symbol } kind;
    u32 slot, register_bytes;
    u32 value;  // SpecialRegister, or offset
};

struct Unsupported {
    u32 line;
    std::string reason;
};

struct Module;

struct Kernel {
    std::string name;
    const Module* module = nullptr;
    std::vector<Variable> parameters;
    std::vector<Variable> shared;  // in order of their offsets
    u32 parameter_bytes = 0;
    u32 static_smem = 0;     // bytes after the reserved KiB
    u32 dynamic_offset = 0;  // of the extern array
    u32 local_bytes = 0;
    u32 max_threads = 0, min_blocks = 0, max_registers = 0;
    u32 cluster[3] = {0, 0, 0};  // .reqnctapercluster
    u32 largest_setmaxnreg = 0;
    u32 tagged_registers = 0;
    std::vector<Instruction> code;
    std::vector<u8> register_image;  // constants in place, the rest 0xff
    std::vector<StartValue> start_values;
    std::vector<Unsupported> unsupported;
};

struct Module {
    explicit Module(std::string text);
    ~Module();
    Module(const Module&) = delete;

    std::string source_of(
        const Instruction& i) const;      // "file:line < file:line", empty without -lineinfo
    std::string listing(u32 line) const;  // the PTX line

    std::string text;  // comments replaced by blanks
    std::map<std::string, std::unique_ptr<Kernel>, std::less<>> kernels;
    std::map<std::string, Variable, std::less<>> variables;  // .global and .const
    std::map<std::string, Variable, std::less<>> module_shared;
    std::vector<SourcePosition> positions;
    std::map<u32, std::string> files;
};

}  // namespace hopper_sim
