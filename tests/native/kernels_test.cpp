// Random cases of every kernel on every ISA of this machine, for runs under sanitizers:
//   kernels_test [cases of each kernel and ISA] [first seed] [rope, attention or pooling; all]
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "cases.h"
#include "kernels/cpu/dispatch.h"

namespace {

struct Kind {
  const char* name;
  bool (*run)(uint64_t seed);
};
const Kind kKinds[] = {{"rope", x_rope_cls::test::run_rope_case},
                       {"attention", x_rope_cls::test::run_attention_case},
                       {"pooling", x_rope_cls::test::run_pooling_case}};

}  // namespace

int main(int argc, char** argv) {
  const uint64_t cases = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 100;
  const uint64_t first = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 0;
  const char* const only = argc > 3 ? argv[3] : nullptr;
  unsigned long long passed = 0, failed = 0;
  for (const char* const* isa = x_rope_cls::cpu::built_isas(); *isa != nullptr; ++isa) {
    if (!x_rope_cls::cpu::select_isa(*isa)) {
      std::printf("%s: not run, this machine does not have it\n", *isa);
      continue;
    }
    const unsigned long long before = failed, passed_before = passed;
    for (uint64_t seed = first; seed < first + cases; ++seed) {
      for (const Kind& kind : kKinds) {
        if (only != nullptr && std::strcmp(only, kind.name) != 0) continue;
        ++(kind.run(seed) ? passed : failed);
      }
    }
    std::printf("%s: %llu cases, %llu failed\n", *isa, passed - passed_before + failed - before,
                failed - before);
    std::fflush(stdout);
  }
  std::printf("%llu passed, %llu failed\n", passed, failed);
  return failed == 0 && passed > 0 ? 0 : 1;
}
