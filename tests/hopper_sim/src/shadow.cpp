// SPDX-License-Identifier: BSD-3-Clause
#include "shadow.h"

#include <map>

#include "machine.h"

namespace hopper_sim {

namespace {

constexpr u32 kWord = 4, kWordsOfPiece = kPieceBytes / kWord;

// Bytes of word `word` that [offset, offset + bytes) covers, a bit each.
u8 byte_mask(u32 word, u32 offset, u32 bytes) {
    u32 first = std::max(offset, word * kWord), last = std::min(offset + bytes, (word + 1) * kWord);
    return static_cast<u8>(((1u << (last - first)) - 1) << (first - word * kWord));
}

u8 half_mask(u32 offset) { return offset % kPieceBytes < 8 ? 1 : 2; }

std::string opcode(const Instruction& i) {
    std::string_view text = i.text;
    if (text[0] == '@') text = text.substr(text.find_first_of(" \t") + 1);
    return std::string(text.substr(0, text.find_first_of(" \t;")));
}

const char* author(const Touch& other, const Cluster& cluster) {
    static thread_local std::string text;
    const Agents::Entry& entry = cluster.agents[other.agent];
    text = format("warp %u", entry.warp ? entry.warp->id : 0);
    return text.c_str();
}

void complain(const Cta& cta, Warp& w, const Instruction& i, const char* kind, u32 offset,
              const std::string& what, const Touch& other) {
    const Cluster& cluster = *cta.cluster;
    const Warp* other_warp = cluster.agents[other.agent].warp;
    hazard(w, i, kind,
           opcode(i) + " " + what + " shared " + cta.name_of(offset) + ", " +
               format("by %s", author(other, cluster)),
           other_warp, &cluster.grid->kernel->code[other.code]);
}

}  // namespace

Shadow::Shadow(Cta& cta, u32 bytes, bool races)
    : cta_(cta),
      races_(races),
      pieces_(bytes / kPieceBytes + 1),
      words_(pieces_.size() * kWordsOfPiece) {}

void Shadow::set_mbarrier(u32 offset, bool live) {
    u8& halves = pieces_[offset / kPieceBytes].mbarriers;
    u8 half = half_mask(offset);
    halves = live ? halves | half : halves & ~half;
}

void Shadow::check_load(Warp& w, const Instruction& i, u32 piece, const char* verb) {
    const Touch& load = pieces_[piece].write;
    if (load && !w.has_seen(load))
        complain(cta_, w, i, "write-locked", piece * kPieceBytes,
                 std::string(verb) + " data of a load whose completion it has not seen:", load);
}

void Shadow::check_readers(Warp& w, const Instruction& i, u32 piece) {
    for (const Touch& read : pieces_[piece].reads)
        if (read && !w.has_seen(read))
            complain(cta_, w, i, "read-locked", piece * kPieceBytes,
                     "overwrites what may still be read asynchronously:", read);
}

// Generic writes below an access by the async proxy.
void Shadow::check_proxy(Warp& w, const Instruction& i, u32 piece, const char* verb) {
    for (u32 word = piece * kWordsOfPiece; word < (piece + 1) * kWordsOfPiece; ++word) {
        const Touch& write = words_[word].write;
        if (!write) continue;
        if (!w.has_seen(write))
            complain(cta_, w, i, "race", word * kWord,
                     std::string(verb) + " what was written without an order between them:", write);
        else if (!w.cta->cluster->proxied(w, write, kFenceSharedProxy))
            complain(cta_, w, i, "proxy-fence", word * kWord,
                     std::string(verb) + " what was written with no fence.proxy.async in between:",
                     write);
        else
            continue;
        return;
    }
}

// Generic reads below an asynchronous write.
void Shadow::check_words(Warp& w, const Instruction& i, u32 piece) {
    for (u32 word = piece * kWordsOfPiece; word < (piece + 1) * kWordsOfPiece; ++word)
        check_word_readers(w, i, word, Touch{~0u, 0, w.agent, kSeveralLanes, 0xf});
}

// A conflict is an unseen access, or one by another lane of this warp since its last .sync.
void Shadow::check_word(Warp& w, const Instruction& i, u32 word, Touch as, const char* verb) {
    const Touch& write = words_[word].write;
    if (!write || !(write.bytes & as.bytes)) return;
    if (!w.has_seen(write))
        complain(cta_, w, i, "race", word * kWord,
                 std::string(verb) + " what was written without an order between them:", write);
    else if (write.agent == as.agent && write.epoch == as.epoch && write.lane != as.lane &&
             write.lane != kSeveralLanes)
        complain(
            cta_, w, i, "lane-race", word * kWord,
            std::string(verb) +
                format(" in lane %u what lane %u wrote, no .sync in between:", as.lane, write.lane),
            write);
}

void Shadow::check_word_readers(Warp& w, const Instruction& i, u32 word, Touch as) {
    const Word& state = words_[word];
    auto check = [&](const Touch& read) {
        if (!read || !(read.bytes & as.bytes)) return;
        if (!w.has_seen(read))
            complain(cta_, w, i, "race", word * kWord,
                     "overwrites what was read without an order between them:", read);
        else if (read.agent == as.agent && read.epoch == as.epoch && read.lane != as.lane)
            complain(cta_, w, i, "lane-race", word * kWord,
                     format("overwrites in lane %u what lane %d read, no .sync in between:",
                            as.lane, read.lane == kSeveralLanes ? -1 : read.lane),
                     read);
    };
    check(state.read);
    if (state.several_readers)
        for (const Touch& read : readers_[word]) check(read);
}

void Shadow::remember_reader(Warp& w, u32 word, Touch as) {
    Word& state = words_[word];
    auto merge = [&](Touch& old) {
        bool same = old.agent == as.agent && old.epoch == as.epoch;
        if (same && old.lane != as.lane) as.lane = kSeveralLanes;
        if (same) as.bytes |= old.bytes;
        old = as;
    };
    if (!state.read || w.has_seen(state.read)) return merge(state.read);
    state.several_readers = true;
    for (Touch& read : readers_[word])
        if (read.agent == as.agent) return merge(read);
    readers_[word].push_back(as);
}

void Shadow::read(Warp& w, const Instruction& i, u32 offset, u32 bytes, u8 lane) {
    Touch as = w.access(i, lane);
    for (u32 word = offset / kWord; word * kWord < offset + bytes; ++word) {
        Piece& piece = pieces_[word / kWordsOfPiece];
        check_load(w, i, word / kWordsOfPiece, "reads");
        piece.unread = false;
        if (!races_) continue;
        as.bytes = byte_mask(word, offset, bytes);
        if (piece.generic) check_word(w, i, word, as, "reads");
        piece.generic = true;
        remember_reader(w, word, as);
    }
}

void Shadow::write(Warp& w, const Instruction& i, u32 offset, u32 bytes, u8 lane, bool harmless) {
    Touch as = w.access(i, lane);
    for (u32 word = offset / kWord; word * kWord < offset + bytes; ++word) {
        u32 index = word / kWordsOfPiece;
        Piece& piece = pieces_[index];
        check_load(w, i, index, "overwrites");
        check_readers(w, i, index);
        if (piece.mbarriers & half_mask(word * kWord))
            hazard(w, i, "mbarrier", "a store overwrites the mbarrier at " + cta_.name_of(offset));
        as.bytes = byte_mask(word, offset, bytes);
        Word& state = words_[word];
        bool again = harmless && state.write.code == as.code && state.write.agent == as.agent;
        if (races_ && piece.generic && !again) {
            check_word(w, i, word, as, "overwrites");
            check_word_readers(w, i, word, as);
        }
        bool shared = state.write.epoch == as.epoch && state.write.agent == as.agent;
        if (shared && state.write.lane != as.lane) as.lane = kSeveralLanes;
        if (shared) as.bytes |= state.write.bytes;
        state = {as, {}, false};
        piece.generic = piece.written = true;
        piece.unread = false;
    }
}

void Shadow::synchronise(Warp& w, const Instruction& i, u32 offset, bool reads, bool writes) {
    u32 word = offset / kWord;
    check_load(w, i, word / kWordsOfPiece, "accesses");
    if (writes) check_readers(w, i, word / kWordsOfPiece);
    Touch as = w.access(i, kSeveralLanes);
    Order& order = synchronisers_[word];
    if (reads) w.order.join(order);
    if (races_) check_word(w, i, word, as, "updates");
    if (writes) w.release(order);
    words_[word] = {};
    Piece& piece = pieces_[word / kWordsOfPiece];
    piece.written |= writes;
    piece.unread = false;
}

void Shadow::async_read(Warp& w, const Instruction& i, u32 index, Touch as, bool garbage) {
    Piece& piece = pieces_[index];
    check_load(w, i, index, "reads");
    if (!piece.written && !garbage)
        hazard(w, i, "uninitialized",
               opcode(i) + " reads shared " + cta_.name_of(index * kPieceBytes) +
                   ", which nobody has written");
    if (piece.copied && piece.write && !cta_.cluster->proxied(w, piece.write, kFenceSharedProxy))
        warning(w, i, "proxy-fence",
                opcode(i) + " reads what cp.async wrote with no fence.proxy.async in between",
                cta_.cluster->agents[piece.write.agent].warp,
                &cta_.grid().kernel->code[piece.write.code]);
    if (piece.generic) check_proxy(w, i, index, "reads");
    piece.unread = false;
    Touch* slot = &piece.reads[0];
    for (Touch& read : piece.reads) {
        if (read.agent == as.agent || !read) {
            slot = &read;
            break;
        }
        if (w.has_seen(read)) slot = &read;
    }
    *slot = as;
}

void Shadow::replace(Piece& piece, u32 index, Touch as, bool copied) {
    if (piece.generic)
        for (u32 n = 0; n < kWordsOfPiece; ++n) words_[index * kWordsOfPiece + n] = {};
    u8 mbarriers = piece.mbarriers;
    piece = {};
    piece.write = as;
    piece.written = piece.unread = true;
    piece.copied = copied;
    piece.mbarriers = mbarriers;
}

bool Shadow::async_write(Warp& w, const Instruction& i, u32 index, Touch as) {
    Piece& piece = pieces_[index];
    check_load(w, i, index, "overwrites");
    check_readers(w, i, index);
    if (piece.mbarriers)
        hazard(w, i, "mbarrier",
               "a load overwrites the mbarrier at " + cta_.name_of(index * kPieceBytes));
    if (piece.generic) {
        check_proxy(w, i, index, "overwrites");
        check_words(w, i, index);
    }
    bool unread = piece.unread && piece.write && w.has_seen(piece.write);
    replace(piece, index, as, false);
    return !unread;
}

void Shadow::report_unread(Warp& w, const Instruction& i, u32 piece, const Touch& load) {
    complain(cta_, w, i, "unread", piece * kPieceBytes,
             "overwrites data that nobody has read:", load);
}

void Shadow::copy_write(Warp& w, const Instruction& i, u32 index, Touch as) {
    Piece& piece = pieces_[index];
    bool same_group =
        piece.copied && piece.write.agent == as.agent && piece.write.epoch == as.epoch;
    if (same_group) return;
    check_load(w, i, index, "overwrites");
    check_readers(w, i, index);
    if (piece.generic) {
        for (u32 word = index * kWordsOfPiece; word < (index + 1) * kWordsOfPiece; ++word)
            check_word(w, i, word, w.access(i, as.lane), "overwrites");
        check_words(w, i, index);
    }
    replace(piece, index, as, true);
}

void Shadow::check_loads(Warp& w, const Instruction& i, const std::vector<u32>& pieces) {
    Touch last;
    for (u32 piece : pieces) {
        const Touch& load = pieces_[piece].write;
        if (load.agent == last.agent && load.epoch == last.epoch) continue;
        last = load;
        check_load(w, i, piece, "reads");
    }
}

const Touch* Shadow::unread_load() const {
    std::map<std::pair<Agent, u32>, const Touch*> loads;  // null: something of it was read
    for (const Piece& piece : pieces_) {
        if (!piece.write || piece.copied) continue;
        auto [load, fresh] = loads.try_emplace({piece.write.agent, piece.write.code}, &piece.write);
        if (!piece.unread) load->second = nullptr;
    }
    for (auto& [key, load] : loads)
        if (load) return load;
    return nullptr;
}

}  // namespace hopper_sim
