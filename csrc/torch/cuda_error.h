// Error codes of CUDA as exceptions.
#pragma once

#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

namespace x_rope_cls::ops {

inline void check_cuda(const char* op, cudaError_t error) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string(op) + ": CUDA error: " + cudaGetErrorString(error) + " (" +
                           cudaGetErrorName(error) + ")");
}

}  // namespace x_rope_cls::ops
