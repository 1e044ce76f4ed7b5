// What this machine can do at most, measured with the loops of kernels/limits.h.
#pragma once

#include <cstdint>

namespace x_rope_cls {

struct Limits {
  double fma_float32;   // floating-point operations a second, a multiply-add counting two
  double dot_bfloat16;  // the same; 0 where the ISA has no bfloat16 dot product
  double dot_int16;     // the same for 16-bit integers
  double copy;          // bytes read plus bytes written a second
  double read;          // bytes a second
};

// Processors this process may run on.
int64_t usable_processors();

// Runs each loop for about so many seconds on so many threads at once, with the ISA in use. Memory
// loops stream through buffers much larger than the caches. The best repeat counts.
Limits measure_limits(int64_t threads, double seconds);

}  // namespace x_rope_cls
