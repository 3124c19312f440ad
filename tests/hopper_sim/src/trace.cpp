// SPDX-License-Identifier: BSD-3-Clause
#include "trace.h"

#include <string>
#include <vector>

namespace hopper_sim {

namespace {

struct Span {
    SpanKind kind;
    u32 block, warp, line;
    u64 begin, end;
};

bool wanted = false;
std::vector<Span> spans;

}  // namespace

void note_span(const Warp& w, SpanKind kind, u32 line, u64 begin, u64 end) {
    if (wanted) spans.push_back({kind, w.cta->index[0], w.id, line, begin, end});
}

}  // namespace hopper_sim

using namespace hopper_sim;

extern "C" {

// Forgets all spans; whether launches from now on leave some.
void hopper_sim_trace(int on) {
    wanted = on;
    spans.clear();
}

// A line each: kind (0 waiting, 1 product, 2 copy), x of the block, warp, PTX line, begin, end.
// Valid until the next call.
const char* hopper_sim_spans() {
    static std::string text;
    text.clear();
    for (const Span& s : spans)
        text += format("%d\t%u\t%u\t%u\t%llu\t%llu\n", static_cast<int>(s.kind), s.block, s.warp,
                       s.line, static_cast<unsigned long long>(s.begin),
                       static_cast<unsigned long long>(s.end));
    return text.c_str();
}

}  // extern "C"
