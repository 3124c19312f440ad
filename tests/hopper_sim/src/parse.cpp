// SPDX-License-Identifier: BSD-3-Clause
// PTX text to a Module: comments, scopes, statements, module variables, entry headers, line
// information.
#include <algorithm>
#include <cctype>
#include <cstring>

#include "decode.h"

namespace hopper_sim {

// ".shared .align 16 .b8 name[544]", ".param .u32 name": also used for declarations in kernels.
Variable parse_variable(std::string_view statement) {
    Variable variable;
    auto parts = words(statement);
    for (size_t n = 0; n < parts.size(); ++n) {
        std::string_view part = parts[n];
        if (part == ".extern") variable.is_extern = true;
        if (part == ".align") variable.align = static_cast<u32>(parse_number(parts.at(n + 1), 4));
        u32 bytes = part[0] == '.' ? type_bytes(part.substr(1)) : 0;
        if (!bytes) continue;
        if (n + 1 >= parts.size()) break;
        variable.element_bytes = bytes;
        variable.align = std::max(variable.align, bytes);
        std::string name;
        for (size_t rest = n + 1; rest < parts.size(); ++rest) name += parts[rest];
        size_t bracket = name.find('[');
        variable.name = name.substr(0, bracket);
        variable.bytes = bytes;
        while (bracket != std::string::npos) {
            std::string count = name.substr(bracket + 1, name.find(']', bracket) - bracket - 1);
            if (count.empty()) variable.is_extern = true;
            variable.bytes *= count.empty() ? 0 : static_cast<u32>(parse_number(count, 4));
            bracket = name.find('[', bracket + 1);
        }
        return variable;
    }
    throw Error(kInvalidPtx, "not a variable: " + std::string(statement.substr(0, 120)));
}

namespace {

std::string without_comments(const std::string& text) {
    std::string out = text;
    for (size_t i = 0; i + 1 < out.size(); ++i) {
        if (out[i] == '/' && out[i + 1] == '/') {
            for (; i < out.size() && out[i] != '\n'; ++i) out[i] = ' ';
        } else if (out[i] == '/' && out[i + 1] == '*') {
            size_t end = std::min(out.find("*/", i + 2), out.size() - 2);
            for (; i < end + 2; ++i)
                if (out[i] != '\n') out[i] = ' ';
        }
    }
    return out;
}

bool starts_with_word(std::string_view text, std::string_view word) {
    return text.substr(0, word.size()) == word &&
           (text.size() == word.size() ||
            std::isspace(static_cast<unsigned char>(text[word.size()])));
}

bool is_label_char(char c) {
    return std::isalnum(static_cast<unsigned char>(c)) || c == '_' || c == '$' || c == '%';
}

class Parser {
  public:
    explicit Parser(Module& module) : module_(module), text_(module.text) {}

    void run() {
        try {
            while (skip_blanks()) top_level();
        } catch (const Error& error) {
            throw Error(error.code, "PTX line " + std::to_string(line_) + ": " + error.what());
        } catch (const std::exception& error) {
            throw Error(kInvalidPtx, "PTX line " + std::to_string(line_) + ": " + error.what());
        }
    }

  private:
    bool skip_blanks() {
        while (at_ < text_.size() && std::isspace(static_cast<unsigned char>(text_[at_])))
            line_ += text_[at_++] == '\n';
        return at_ < text_.size();
    }

    std::string_view rest() const { return text_.substr(at_); }

    // Text up to one of `stops` outside parentheses; the stop itself is not consumed.
    std::string_view until(std::string_view stops) {
        size_t start = at_;
        int depth = 0;
        for (; at_ < text_.size(); ++at_) {
            char c = text_[at_];
            if (depth == 0 && stops.find(c) != std::string_view::npos)
                return trim(text_.substr(start, at_ - start));
            depth += (c == '(') - (c == ')');
            line_ += c == '\n';
        }
        if (stops == "\n") return trim(text_.substr(start));
        throw Error(kInvalidPtx, "unexpected end of the text");
    }

    std::string_view rest_of_line() { return until("\n"); }

    std::string_view braces() {
        size_t start = at_;
        int depth = 0;
        for (; at_ < text_.size(); ++at_) {
            depth += (text_[at_] == '{') - (text_[at_] == '}');
            line_ += text_[at_] == '\n';
            if (depth == 0) {
                ++at_;
                return text_.substr(start, at_ - start);
            }
        }
        throw Error(kInvalidPtx, "a brace is not closed");
    }

    void top_level() {
        for (const char* word : {".version", ".target", ".address_size"})
            if (starts_with_word(rest(), word)) {
                rest_of_line();
                return;
            }
        if (starts_with_word(rest(), ".file")) return file(rest_of_line());
        if (starts_with_word(rest(), ".section")) {
            until("{");
            braces();
            return;
        }
        std::string_view head = until(";{=");
        if (head.find(".entry") != std::string_view::npos) return entry(head);
        if (head.find(".func") != std::string_view::npos) return function();
        if (head.find(".shared") == std::string_view::npos &&
            head.find(".global") == std::string_view::npos &&
            head.find(".const") == std::string_view::npos)
            throw Error(kInvalidPtx, "unknown statement: " + std::string(head.substr(0, 120)));
        variable(head);
    }

    void file(std::string_view statement) {
        auto parts = words(statement);
        size_t open = statement.find('"'), close = statement.rfind('"');
        if (parts.size() < 3 || open == std::string_view::npos) return;
        module_.files[static_cast<u32>(parse_number(parts[1], 4))] =
            std::string(statement.substr(open + 1, close - open - 1));
    }

    // Functions are skipped: a call of one is an unknown opcode of the kernel that makes it.
    void function() {
        if (text_[at_] == '{')
            braces();
        else
            ++at_;
    }

    void variable(std::string_view head) {
        Variable v = parse_variable(head);
        std::string_view values;
        if (text_[at_] == '=') {
            ++at_;
            values = until(";");
        }
        ++at_;
        if (head.find(".shared") != std::string_view::npos) {
            module_.module_shared[v.name] = v;
            return;
        }
        v.storage = new u8[v.bytes + 64]();
        if (!values.empty() && values[0] == '{') values = values.substr(1, values.rfind('}') - 1);
        u32 offset = 0;
        for (std::string_view value : split(values, ',')) {
            if (!is_number(value)) throw Error(kNotSupported, "initialiser " + std::string(value));
            u64 bits = parse_number(value, v.element_bytes);
            std::memcpy(v.storage + offset, &bits, v.element_bytes);
            offset += v.element_bytes;
        }
        module_.variables[v.name] = v;
    }

    void entry(std::string_view head) {
        auto kernel = std::make_unique<Kernel>();
        kernel->module = &module_;
        size_t name = head.find(".entry") + 6, open = head.find('(', name);
        size_t close = open == std::string_view::npos ? name : head.rfind(')');
        std::string_view attributes =
            open == std::string_view::npos ? std::string_view() : head.substr(close + 1);
        kernel->name = std::string(words(head.substr(name, open - name)).front());
        if (open != std::string_view::npos)
            for (std::string_view p : split(head.substr(open + 1, close - open - 1), ','))
                parameter(*kernel, p);
        launch_bounds(*kernel, open == std::string_view::npos ? head.substr(name) : attributes);
        if (text_[at_] != '{') {  // a declaration
            ++at_;
            return;
        }
        body(*kernel);
        std::string key = kernel->name;
        module_.kernels[key] = std::move(kernel);
    }

    static void parameter(Kernel& kernel, std::string_view statement) {
        Variable v = parse_variable(statement);
        kernel.parameter_bytes = (kernel.parameter_bytes + v.align - 1) / v.align * v.align;
        v.offset = kernel.parameter_bytes;
        kernel.parameter_bytes += v.bytes;
        kernel.parameters.push_back(std::move(v));
    }

    static void launch_bounds(Kernel& kernel, std::string_view attributes) {
        auto numbers = [&](std::string_view directive, u32(&out)[3]) {
            size_t at = attributes.find(directive);
            if (at == std::string_view::npos) return false;
            std::string_view list = attributes.substr(at + directive.size());
            list = list.substr(0, list.find('.'));
            size_t n = 0;
            out[0] = out[1] = out[2] = 1;
            for (std::string_view value : split(list, ',')) {
                if (n < 3 && is_number(value)) out[n++] = static_cast<u32>(parse_number(value, 4));
            }
            return true;
        };
        u32 value[3];
        for (const char* directive : {".maxntid", ".reqntid"})
            if (numbers(directive, value)) kernel.max_threads = value[0] * value[1] * value[2];
        if (numbers(".minnctapersm", value)) kernel.min_blocks = value[0];
        if (numbers(".maxnreg", value)) kernel.max_registers = value[0];
        numbers(".reqnctapercluster", kernel.cluster);
    }

    // ".loc 2 378 9, function_name $L__info_string0, inlined_at 1 26 3"
    s32 location(std::string_view statement) {
        auto parts = words(statement);
        auto number = [&](size_t n) { return static_cast<u32>(std::atoi(parts.at(n).data())); };
        SourcePosition position{number(1), number(2), number(3), -1};
        for (size_t n = 4; n + 3 < parts.size(); ++n)
            if (parts[n] == "inlined_at") {
                SourcePosition at{number(n + 1), number(n + 2), number(n + 3), -1};
                for (s32 p = static_cast<s32>(module_.positions.size()); p-- > 0;) {
                    const SourcePosition& other = module_.positions[static_cast<size_t>(p)];
                    if (other.file == at.file && other.line == at.line &&
                        other.column == at.column) {
                        position.parent = p;
                        break;
                    }
                }
            }
        module_.positions.push_back(position);
        return static_cast<s32>(module_.positions.size()) - 1;
    }

    bool label(Decoder& decoder) {
        size_t end = at_;
        while (end < text_.size() && is_label_char(text_[end])) ++end;
        size_t colon = end;
        while (colon < text_.size() && (text_[colon] == ' ' || text_[colon] == '\t')) ++colon;
        bool found =
            end > at_ && colon + 1 < text_.size() && text_[colon] == ':' && text_[colon + 1] != ':';
        if (found) {
            decoder.label(text_.substr(at_, end - at_));
            at_ = colon + 1;
        }
        return found;
    }

    void body(Kernel& kernel) {
        Decoder decoder(module_, kernel);
        ++at_;
        s32 source = -1;
        for (int depth = 1; depth > 0;) {
            if (!skip_blanks()) throw Error(kInvalidPtx, "a kernel is not closed");
            char c = text_[at_];
            if (c == '{') {
                ++at_, ++depth;
                decoder.open_scope();
            } else if (c == '}') {
                ++at_;
                if (--depth > 0) decoder.close_scope();
            } else if (c == ';') {
                ++at_;
            } else if (starts_with_word(rest(), ".loc")) {
                source = location(rest_of_line());
            } else if (!label(decoder)) {
                statement(decoder, source);
            }
        }
        decoder.finish();
    }

    void statement(Decoder& decoder, s32 source) {
        u32 line = line_;
        std::string_view text = until(";");
        ++at_;
        if (text.empty()) return;
        if (text[0] == '.')
            decoder.directive(text);
        else
            decoder.instruction(text, line, source);
    }

    Module& module_;
    std::string_view text_;
    size_t at_ = 0;
    u32 line_ = 1;
};

}  // namespace

Module::Module(std::string ptx) : text(without_comments(ptx)) {
    if (text.find(".version") == std::string::npos)
        throw Error(kInvalidPtx, "PTX line 1: no .version directive");
    Parser(*this).run();
}

Module::~Module() {
    for (auto& [name, variable] : variables) delete[] variable.storage;
}

std::string Module::listing(u32 line) const {
    size_t at = 0;
    for (u32 n = 1; n < line && at != std::string::npos; ++n) at = text.find('\n', at) + 1;
    return std::string(trim(std::string_view(text).substr(at, text.find('\n', at) - at)));
}

std::string Module::source_of(const Instruction& i) const {
    std::string chain;
    for (s32 p = i.source; p >= 0; p = positions[static_cast<size_t>(p)].parent) {
        const SourcePosition& position = positions[static_cast<size_t>(p)];
        auto file = files.find(position.file);
        std::string name = file == files.end() ? format("file %u", position.file) : file->second;
        chain += (chain.empty() ? "" : " < ") + name + ":" + std::to_string(position.line);
    }
    return chain;
}

}  // namespace hopper_sim
