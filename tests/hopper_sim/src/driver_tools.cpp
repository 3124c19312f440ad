// SPDX-License-Identifier: BSD-3-Clause
// The side door for tools that look at PTX texts.
#include "driver.h"

using namespace hopper_sim;

extern "C" {

// The instructions of a PTX text, one line each: offset, length, PTX line, kernel, source lines.
// Valid until the next call.
const char* hopper_sim_instructions(const char* ptx) {
    static std::string text;
    text.clear();
    int result = guarded([&] {
        Module module{std::string(ptx)};
        for (auto& [name, kernel] : module.kernels)
            for (const Instruction& i : kernel->code)
                if (i.text != "}")
                    text += format("%td\t%zu\t%u\t", i.text.data() - module.text.data(),
                                   i.text.size(), i.line) +
                            name + "\t" + module.source_of(i) + "\n";
    });
    return result ? nullptr : text.c_str();
}

}  // extern "C"
