// What launch choices depend on. No CUDA types, so that host code can be tested without CUDA.
#pragma once

#include <cstdint>

namespace x_rope_cls::cuda {

struct Device {
  int32_t multiprocessors;
  int32_t shared_per_block;           // bytes, the most that a block may opt in to
  int32_t shared_per_multiprocessor;  // bytes
};

}  // namespace x_rope_cls::cuda
