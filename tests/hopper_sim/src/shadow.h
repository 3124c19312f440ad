// SPDX-License-Identifier: BSD-3-Clause
// The last accesses to each place of a block's shared memory, and what is wrong with a new one.
#pragma once

#include <unordered_map>
#include <vector>

#include "order.h"

namespace hopper_sim {

struct Cta;
struct Instruction;
struct Warp;

class Shadow {
  public:
    Shadow(Cta& cta, u32 bytes, bool races);

    // ld, st and their kin by one lane, or by kSeveralLanes together (stmatrix). `harmless`: the
    // value is there already.
    void read(Warp& w, const Instruction& i, u32 offset, u32 bytes, u8 lane);
    void write(Warp& w, const Instruction& i, u32 offset, u32 bytes, u8 lane, bool harmless);
    // An access by which warps synchronise: it races with plain ones only.
    void synchronise(Warp& w, const Instruction& i, u32 offset, bool reads, bool writes);
    // 16 bytes by wgmma or a bulk copy. `as` is what later accesses must have seen. `garbage`: they
    // need not have been written (rows of A reach no other row of the result).
    void async_read(Warp& w, const Instruction& i, u32 piece, Touch as, bool garbage = false);
    // False if it replaces a load that nobody has read here.
    bool async_write(Warp& w, const Instruction& i, u32 piece, Touch as);
    void report_unread(Warp& w, const Instruction& i, u32 piece, const Touch& load);
    const Touch& load_at(u32 piece) const { return pieces_[piece].write; }
    // cp.async: asynchronous, but in the generic proxy.
    void copy_write(Warp& w, const Instruction& i, u32 piece, Touch as);
    // Another warp of the wgmma that read these pieces: it must have seen their loads as well.
    void check_loads(Warp& w, const Instruction& i, const std::vector<u32>& pieces);
    void set_mbarrier(u32 offset, bool live);
    // A load of which nobody has read anything, when the block ends.
    const Touch* unread_load() const;

  private:
    static constexpr size_t kReaders = 4;
    struct Piece {
        Touch write;  // by a load or cp.async
        Touch reads[kReaders];
        bool generic = false;  // words_ hold accesses since the last asynchronous write
        bool written = false, unread = false, copied = false;
        u8 mbarriers = 0;  // the halves that hold one, a bit each
    };
    struct Word {
        Touch write, read;
        bool several_readers = false;
    };

    void check_load(Warp& w, const Instruction& i, u32 piece, const char* verb);
    void check_readers(Warp& w, const Instruction& i, u32 piece);
    void check_proxy(Warp& w, const Instruction& i, u32 piece, const char* verb);
    void check_words(Warp& w, const Instruction& i, u32 piece);
    void check_word(Warp& w, const Instruction& i, u32 word, Touch as, const char* verb);
    void check_word_readers(Warp& w, const Instruction& i, u32 word, Touch as);
    void remember_reader(Warp& w, u32 word, Touch as);
    void replace(Piece& piece, u32 index, Touch as, bool copied);

    Cta& cta_;
    bool races_;
    std::vector<Piece> pieces_;
    std::vector<Word> words_;
    std::unordered_map<u32, std::vector<Touch>> readers_;  // of words with several
    std::unordered_map<u32, Order> synchronisers_;         // by word
};

}  // namespace hopper_sim
