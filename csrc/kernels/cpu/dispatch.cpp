#include "dispatch.h"

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace x_rope_cls::cpu {

// The variants' tables; CMakeLists.txt defines X_ROPE_CLS_HAVE_<name> for those that are built.
namespace generic {
extern const KernelTable kTable;
}
namespace avx2x16 {
extern const KernelTable kTable;
}
namespace avx2 {
extern const KernelTable kTable;
}
namespace avx512 {
extern const KernelTable kTable;
}
namespace avx512_bf16 {
extern const KernelTable kTable;
}

namespace {

#if defined(X_ROPE_CLS_HAVE_avx2x16)
constexpr const KernelTable* kAvx2x16 = &avx2x16::kTable;
#endif
#if defined(X_ROPE_CLS_HAVE_avx2)
constexpr const KernelTable* kAvx2 = &avx2::kTable;
#else
constexpr const KernelTable* kAvx2 = nullptr;
#endif
#if defined(X_ROPE_CLS_HAVE_avx512)
constexpr const KernelTable* kAvx512 = &avx512::kTable;
#else
constexpr const KernelTable* kAvx512 = nullptr;
#endif
#if defined(X_ROPE_CLS_HAVE_avx512_bf16)
constexpr const KernelTable* kAvx512Bf16 = &avx512_bf16::kTable;
#else
constexpr const KernelTable* kAvx512Bf16 = nullptr;
#endif

// What this machine runs: the instructions the processor has, where the operating system saves the
// registers they use.
struct Features {
  bool avx2 = false;         // with FMA and F16C
  bool avx512 = false;       // F, BW, DQ and VL
  bool avx512_bf16 = false;  // the same and BF16
};

#if defined(__x86_64__)
constexpr bool has_all(uint64_t word, uint64_t bits) { return (word & bits) == bits; }

uint64_t extended_control_register() {
  uint32_t low, high;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<uint64_t>(high) << 32) | low;
}

Features detect() {
  constexpr uint32_t kFma = 1u << 12, kOsXsave = 1u << 27, kAvx = 1u << 28, kF16c = 1u << 29;
  constexpr uint32_t kAvx2Bit = 1u << 5;
  constexpr uint32_t kAvx512Bits = (1u << 16) | (1u << 17) | (1u << 30) | (1u << 31);  // F DQ BW VL
  constexpr uint32_t kAvx512Bf16Bit = 1u << 5;
  constexpr uint64_t kYmmState = 0x06;  // SSE and AVX registers
  constexpr uint64_t kZmmState = 0xe6;  // and masks, upper halves, upper sixteen

  Features features;
  uint32_t eax, ebx, ecx, edx;
  if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx) || !has_all(ecx, kFma | kOsXsave | kAvx | kF16c)) {
    return features;
  }
  const uint64_t saved = extended_control_register();
  if (!has_all(saved, kYmmState) || !__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) {
    return features;
  }
  const uint32_t subleaves = eax;
  features.avx2 = has_all(ebx, kAvx2Bit);
  features.avx512 = features.avx2 && has_all(ebx, kAvx512Bits) && has_all(saved, kZmmState);
  if (features.avx512 && subleaves >= 1 && __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx)) {
    features.avx512_bf16 = has_all(eax, kAvx512Bf16Bit);
  }
  return features;
}
#else
Features detect() { return {}; }
#endif

struct Variant {
  const char* name;
  const KernelTable* table;  // null where this library was built without it
  bool runs_here;
};

// All variants there are, slowest first: a cap is a place in this order.
struct Variants {
  static constexpr int kMax = 5;
  Variant list[kMax];
  int count = 0;
  const char* built[kMax + 1] = {};

  Variants() {
    const Features features = detect();
    add("generic", &generic::kTable, true);
#if defined(X_ROPE_CLS_HAVE_avx2x16)
    // The 16-lane sources with AVX2 instructions, for tests: slower than avx2, so never chosen by
    // itself.
    add("avx2x16", kAvx2x16, features.avx2);
#endif
    add("avx2", kAvx2, features.avx2);
    add("avx512", kAvx512, features.avx512);
    add("avx512_bf16", kAvx512Bf16, features.avx512_bf16);
  }

  // Index of a name, or -1.
  int find(const char* name) const {
    for (int i = 0; i < count; ++i) {
      if (std::strcmp(list[i].name, name) == 0) {
        return i;
      }
    }
    return -1;
  }

  // The best variant that runs here, at most the one at index `cap`.
  const KernelTable* best(int cap) const {
    for (int i = cap; i > 0; --i) {
      if (list[i].table != nullptr && list[i].runs_here) {
        return list[i].table;
      }
    }
    return list[0].table;
  }

 private:
  void add(const char* name, const KernelTable* table, bool runs_here) {
    if (table != nullptr) {
      int end = 0;
      while (built[end] != nullptr) {
        ++end;
      }
      built[end] = name;
    }
    list[count++] = {name, table, runs_here};
  }
};

const Variants& variants() {
  static const Variants instance;
  return instance;
}

struct Choice {
  std::atomic<const KernelTable*> table;
  char warning[256] = "";

  Choice() {
    const Variants& all = variants();
    const char* cap_name = std::getenv("X_ROPE_CLS_CPU_ISA");
    int cap = all.count - 1;
    if (cap_name != nullptr && cap_name[0] != '\0') {
      const int found = all.find(cap_name);
      if (found >= 0) {
        cap = found;
      } else {
        complain(cap_name, all.best(cap)->name);
      }
    }
    table.store(all.best(cap), std::memory_order_relaxed);
  }

 private:
  void complain(const char* got, const char* used) {
    char names[96] = "";
    const Variants& all = variants();
    for (int i = 0; i < all.count; ++i) {
      const size_t length = std::strlen(names);
      std::snprintf(names + length, sizeof(names) - length, i == 0 ? "%s" : ", %s",
                    all.list[i].name);
    }
    std::snprintf(warning, sizeof(warning),
                  "X_ROPE_CLS_CPU_ISA must be one of %s, got '%.64s'; it is ignored and %s is used",
                  names, got, used);
  }
};

Choice& choice() {
  static Choice instance;
  return instance;
}

// Made when the library is loaded, so that a later change of the environment has no effect.
[[maybe_unused]] const Choice& kChosenAtLoad = choice();

}  // namespace

const KernelTable& kernels() { return *choice().table.load(std::memory_order_relaxed); }

const char* const* built_isas() { return variants().built; }

bool isa_supported(const char* name) {
  const int index = variants().find(name);
  return index >= 0 && variants().list[index].table != nullptr && variants().list[index].runs_here;
}

bool select_isa(const char* name) {
  if (!isa_supported(name)) {
    return false;
  }
  choice().table.store(variants().list[variants().find(name)].table, std::memory_order_relaxed);
  return true;
}

const char* isa_warning() { return choice().warning; }

}  // namespace x_rope_cls::cpu
