// Random cases of each kernel: run it with the ISA in use and compare it with the naive loops.
#pragma once

#include <cstdint>

namespace x_rope_cls::test {

// True: all results are right. Otherwise what is wrong has been printed.
bool run_rope_case(uint64_t seed);
bool run_attention_case(uint64_t seed);
bool run_pooling_case(uint64_t seed);

}  // namespace x_rope_cls::test
