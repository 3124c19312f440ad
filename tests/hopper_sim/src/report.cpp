// SPDX-License-Identifier: BSD-3-Clause
#include "report.h"

#include "machine.h"

namespace hopper_sim {

namespace {

constexpr size_t kMaxHazards = 50;
constexpr size_t kMaxInstructionText = 100;

std::string one_line(std::string_view text) {
    std::string out;
    for (char c : text.substr(0, kMaxInstructionText)) {
        bool blank = c == '\n' || c == '\t' || c == ' ';
        if (!blank)
            out += c;
        else if (!out.empty() && out.back() != ' ')
            out += ' ';
    }
    return out;
}

std::string json_hazard(const Hazard& h) {
    return "{\"kind\": " + json_string(h.kind) + ", \"message\": " + json_string(h.message) +
           ", \"where\": " + json_string(h.where) + ", \"other\": " + json_string(h.other) +
           format(", \"line\": %u, \"other_line\": %u, \"count\": %u}", h.line, h.other_line,
                  h.count);
}

std::string json_hazards(const std::vector<Hazard>& hazards) {
    std::string list;
    for (const Hazard& h : hazards) list += (list.empty() ? "" : ", ") + json_hazard(h);
    return "[" + list + "]";
}

}  // namespace

std::string json_string(const std::string& text) {
    std::string out = "\"";
    for (char c : text) {
        if (c == '"' || c == '\\')
            out += std::string("\\") + c;
        else if (static_cast<unsigned char>(c) < 0x20)
            out += format("\\u%04x", c);
        else
            out += c;
    }
    return out + "\"";
}

std::string place(const Warp& warp, const Instruction& i) {
    const Cta& cta = *warp.cta;
    std::string source = cta.grid().kernel->module->source_of(i);
    return format("%s cta (%u,%u,%u) warp %u  ptx %u  ",
                  cta.grid().kernel->name.substr(0, 80).c_str(), cta.index[0], cta.index[1],
                  cta.index[2], warp.id, i.line) +
           one_line(i.text) + (source.empty() ? "" : "  " + source);
}

static void record(std::vector<Hazard>& list, Warp& warp, const Instruction& i, const char* kind,
                   const std::string& message, const Warp* other_warp, const Instruction* other) {
    if (!warp.cta->grid().config.check) return;
    u32 other_line = other ? other->line : 0;
    for (Hazard& h : list)
        if (h.kind == kind && h.line == i.line && h.other_line == other_line) {
            ++h.count;
            return;
        }
    if (list.size() >= kMaxHazards) return;
    std::string by = other && other_warp ? place(*other_warp, *other) : "";
    list.push_back({kind, message, place(warp, i), by, i.line, other_line, 1});
}

void hazard(Warp& warp, const Instruction& i, const char* kind, const std::string& message,
            const Warp* other_warp, const Instruction* other) {
    record(warp.cta->grid().report->hazards, warp, i, kind, message, other_warp, other);
}

void warning(Warp& warp, const Instruction& i, const char* kind, const std::string& message,
             const Warp* other_warp, const Instruction* other) {
    record(warp.cta->grid().report->warnings, warp, i, kind, message, other_warp, other);
}

std::string LaunchReport::json() const {
    return "{\"kernel\": " + json_string(kernel) + ", \"config\": " + json_string(config) +
           format(", \"result\": %d, \"error\": ", result) + json_string(error) +
           ", \"hazards\": " + json_hazards(hazards) + ", \"warnings\": " + json_hazards(warnings) +
           ", \"statistics\": " + statistics.json() + "}";
}

}  // namespace hopper_sim
