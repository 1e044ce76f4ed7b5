// Contract of the loops that measure what the machine can do. One thread each; the caller repeats,
// times and runs them side by side.
#pragma once

#include <cstdint>

namespace x_rope_cls {

struct LimitKernels {
  // Independent fused multiply-adds (multiply and add where there is no FMA) in registers.
  // Returns the floating-point operations done.
  double (*fma_float32)(int64_t iterations);
  // bfloat16 dot products into float32; null where the ISA has none.
  double (*dot_bfloat16)(int64_t iterations);
  // Dot products of 16-bit integers into 32-bit ones; null where the ISA has none.
  double (*dot_int16)(int64_t iterations);
  // Streams bytes (a multiple of 4096, 64-byte aligned) from one place to another.
  void (*copy)(void* to, const void* from, int64_t bytes);
  // Reads bytes; the return value keeps the loads alive.
  uint64_t (*read)(const void* from, int64_t bytes);
};

}  // namespace x_rope_cls
