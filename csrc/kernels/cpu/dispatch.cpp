#include "dispatch.h"

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iterator>

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

// What this machine runs: the instructions the processor has, where the operating system saves the
// registers they use.
struct Features {
  bool avx2 = false;         // with FMA and F16C
  bool avx512 = false;       // F, BW, DQ and VL
  bool avx512_bf16 = false;  // the same, BF16 and VNNI, which all processors with BF16 have
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
  constexpr uint32_t kAvx512VnniBit = 1u << 11;
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
  const bool vnni = has_all(ecx, kAvx512VnniBit);
  if (features.avx512 && vnni && subleaves >= 1 &&
      __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx)) {
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
  bool Features::* needs;    // null: nothing
};

// All variants there are, slowest first: a cap is a place in this order.
constexpr Variant kVariants[] = {
    {"generic", &generic::kTable, nullptr},
#if defined(X_ROPE_CLS_HAVE_avx2x16)
    // The 16-lane sources with AVX2 instructions, for tests. Wherever it runs, avx2 does, which is
    // faster and comes later: it is never chosen by itself.
    {"avx2x16", &avx2x16::kTable, &Features::avx2},
#endif
#if defined(X_ROPE_CLS_HAVE_avx2)
    {"avx2", &avx2::kTable, &Features::avx2},
#else
    {"avx2", nullptr, &Features::avx2},
#endif
#if defined(X_ROPE_CLS_HAVE_avx512)
    {"avx512", &avx512::kTable, &Features::avx512},
#else
    {"avx512", nullptr, &Features::avx512},
#endif
#if defined(X_ROPE_CLS_HAVE_avx512_bf16)
    {"avx512_bf16", &avx512_bf16::kTable, &Features::avx512_bf16},
#else
    {"avx512_bf16", nullptr, &Features::avx512_bf16},
#endif
};

bool usable(const Variant& variant) {
  static const Features features = detect();
  return variant.table != nullptr && (variant.needs == nullptr || features.*variant.needs);
}

const Variant* find(const char* name) {
  for (const Variant& variant : kVariants) {
    if (std::strcmp(variant.name, name) == 0) {
      return &variant;
    }
  }
  return nullptr;
}

// The best variant that runs here, up to `cap`; null: whichever.
const KernelTable* best(const Variant* cap) {
  const KernelTable* result = &generic::kTable;
  for (const Variant& variant : kVariants) {
    if (usable(variant)) {
      result = variant.table;
    }
    if (&variant == cap) {
      break;
    }
  }
  return result;
}

// Null-terminated names of the variants that are built.
struct BuiltNames {
  const char* list[std::size(kVariants) + 1] = {};

  BuiltNames() {
    size_t count = 0;
    for (const Variant& variant : kVariants) {
      if (variant.table != nullptr) {
        list[count++] = variant.name;
      }
    }
  }
};
struct Choice {
  std::atomic<const KernelTable*> table;
  char warning[256] = "";

  Choice() {
    const char* cap_name = std::getenv("X_ROPE_CLS_CPU_ISA");
    const bool capped = cap_name != nullptr && cap_name[0] != '\0';
    const Variant* cap = capped ? find(cap_name) : nullptr;
    table.store(best(cap), std::memory_order_relaxed);
    if (capped && cap == nullptr) {
      complain(cap_name);
    }
  }

 private:
  void complain(const char* got) {
    char names[96] = "";
    for (const Variant& variant : kVariants) {
      const size_t length = std::strlen(names);
      std::snprintf(names + length, sizeof(names) - length, length == 0 ? "%s" : ", %s",
                    variant.name);
    }
    std::snprintf(warning, sizeof(warning),
                  "X_ROPE_CLS_CPU_ISA must be one of %s, got '%.64s'; it is ignored and %s is used",
                  names, got, table.load(std::memory_order_relaxed)->name);
  }
};

Choice& choice() {
  static Choice instance;
  return instance;
}

// Made when the library is loaded, so that a later change of the environment has no effect.
[[maybe_unused]] const Choice& chosen_at_load = choice();

}  // namespace

const KernelTable& kernels() { return *choice().table.load(std::memory_order_relaxed); }

const char* const* built_isas() {
  static const BuiltNames names;
  return names.list;
}

bool isa_supported(const char* name) {
  const Variant* variant = find(name);
  return variant != nullptr && usable(*variant);
}

bool select_isa(const char* name) {
  if (!isa_supported(name)) {
    return false;
  }
  choice().table.store(find(name)->table, std::memory_order_relaxed);
  return true;
}

const char* isa_warning() { return choice().warning; }

}  // namespace x_rope_cls::cpu
