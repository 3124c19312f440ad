// SPDX-License-Identifier: BSD-3-Clause
// From PTX statements to instructions. A Decoder holds the names of one kernel; a Decode is the
// view an opcode's decoder has of one statement.
#pragma once

#include <unordered_map>

#include "program.h"
#include "text.h"

namespace hopper_sim {

constexpr u32 kPredicate = 1;  // the width of a predicate register

enum SpecialRegister : u32 {
    kTid,  // three in a row: x, y, z
    kNtid = kTid + 3,
    kCtaid = kNtid + 3,
    kNctaid = kCtaid + 3,
    kClusterCtaid = kNctaid + 3,
    kClusterNctaid = kClusterCtaid + 3,
    kClusterid = kClusterNctaid + 3,
    kNclusterid = kClusterid + 3,
    kClusterCtarank = kNclusterid + 3,
    kClusterNctarank,
    kLaneid,
    kWarpid,
    kNwarpid,
    kSmid,
    kNsmid,
    kLanemaskEq,
    kLanemaskLe,
    kLanemaskLt,
    kLanemaskGe,
    kLanemaskGt,
    kDynamicSmemSize,
    kTotalSmemSize,
    kClock,
    kClock64,
    kGlobaltimer,
};

class Decoder {
  public:
    Decoder(Module& module, Kernel& kernel);

    void open_scope();
    void close_scope();
    void label(std::string_view name);
    void directive(std::string_view statement);  // .reg, .shared, .local
    void instruction(std::string_view statement, u32 line, s32 source);
    void finish();

    struct Register {
        u32 slot = 0, bytes = 0;
    };
    // Register of that name, or null.
    const Register* find(std::string_view name);
    // Slot of a register, an immediate, a special register or a symbol's address.
    u32 operand(std::string_view name, u32 bytes);
    u32 allocate(u32 bytes);
    bool is_symbol(std::string_view name) const;
    u32 symbol_bytes(std::string_view name) const;  // of its address: 4 for shared and local
    Kernel& kernel() { return kernel_; }

  private:
    struct Range {
        u32 bytes = 0, count = 0;
        std::vector<u32> slots;  // 0: not allocated yet
    };
    struct Scope {
        u32 id;
        std::unordered_map<std::string_view, Register> singles;
        std::unordered_map<std::string_view, Range> ranges;
    };
    struct PendingBranch {
        size_t instruction;
        std::string_view label;
        std::vector<u32> scopes;
    };

    void declare_registers(std::string_view statement);
    void decode(Instruction& i, std::string_view body);
    void branch(Instruction& i, std::string_view target);
    u32 constant(u64 value, u32 bytes);
    u32 start_value(StartValue::Kind kind, u32 value, u32 bytes);
    u32 symbol(std::string_view name, u32 bytes);
    const Variable* shared_variable(std::string_view name);
    void place_shared(Variable variable);
    void place_extern_arrays();
    void resolve_branches();

    Module& module_;
    Kernel& kernel_;
    std::vector<Scope> scopes_;
    u32 next_scope_ = 0;
    u32 register_bytes_ = 64;  // slot 0 means "none"
    u32 predicate_block_ = 0, predicates_free_ = 0;
    u32 extern_align_ = 16;
    std::unordered_map<std::string, u32> labels_;  // "scope:name"
    std::vector<PendingBranch> branches_;
    std::unordered_map<u64, u32> constants_[9];
    struct ConstantSlot {
        u64 value;
        u32 slot, bytes;
    };
    std::vector<ConstantSlot> constant_slots_;
    std::unordered_map<u64, u32> start_values_;
    std::vector<Variable> locals_;
};

// The modifiers of an opcode; what nobody took is an error.
class Modifiers {
  public:
    explicit Modifiers(std::string_view opcode);
    std::string_view stem() const { return parts_.front(); }
    bool take(std::string_view modifier);
    std::string_view take_any(std::initializer_list<std::string_view> choices);  // empty if none
    std::string_view take_last();
    std::string rest() const;

  private:
    std::vector<std::string_view> parts_;
};

struct Decode {
    Decoder& decoder;
    Instruction& i;
    Modifiers modifiers;
    std::string_view opcode;
    std::vector<std::string_view> args;

    void expect_args(size_t least, size_t most) const;
    u32 read(size_t arg, u32 bytes) { return read(args.at(arg), bytes); }
    u32 read(std::string_view text, u32 bytes);
    u32 write(size_t arg, u32 bytes) { return write(args.at(arg), bytes); }
    u32 write(std::string_view text, u32 bytes);
    u32 read_predicate(std::string_view text, bool& negated);
    // Width of the register called `text`, or `otherwise` for an immediate.
    u32 width(std::string_view text, u32 otherwise);
    std::vector<u32> read_vector(std::string_view text, u32 bytes);
    std::vector<u32> write_vector(std::string_view text, u32 bytes);
    // [register + offset]: sets base, base_bytes and offset.
    void address(std::string_view text);
    // The same, where only a register is allowed; the slot of a 32- or 64-bit address.
    u32 plain_address(std::string_view text, u32 bytes);
    u64 literal(size_t arg) const;
    Space take_space();
    u32 take_type();
};

// Exact opcodes with register operands only: arithmetic.
struct AluOpcode {
    Handler run;
    u8 widths[5];  // destination first; 0 ends the list
};
const AluOpcode* find_alu(std::string_view opcode);

using StemDecoder = void (*)(Decode&);
StemDecoder find_stem(std::string_view stem);

void decode_mov(Decode&);
void decode_setp(Decode&);
void decode_selp(Decode&);
void decode_cvt(Decode&);
void decode_lop3(Decode&);
void decode_load(Decode&);
void decode_store(Decode&);
void decode_atomic(Decode&);
void decode_cvta(Decode&);
void decode_mapa(Decode&);
void decode_matrix_access(Decode&);
void decode_shfl(Decode&);
void decode_vote(Decode&);
void decode_elect(Decode&);
void decode_activemask(Decode&);
void decode_match(Decode&);
void decode_redux(Decode&);
void decode_barrier(Decode&);
void decode_fence(Decode&);
void decode_hint(Decode&);
void decode_createpolicy(Decode&);
void decode_setmaxnreg(Decode&);
void decode_trap(Decode&);
void decode_griddepcontrol(Decode&);
void decode_mbarrier(Decode&);
void decode_cp(Decode&);
void decode_copy_arrival(Decode&);
void decode_wgmma(Decode&);

}  // namespace hopper_sim
