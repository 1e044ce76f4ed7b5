#include "launch.h"

namespace x_rope_cls::cuda {

cudaError_t query_device(Device* device) {
  int current = 0;
  cudaError_t error = cudaGetDevice(&current);
  const auto get = [&](int32_t* value, cudaDeviceAttr attribute) {
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(value, attribute, current);
  };
  get(&device->multiprocessors, cudaDevAttrMultiProcessorCount);
  get(&device->shared_per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  get(&device->shared_per_multiprocessor, cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  return error;
}

}  // namespace x_rope_cls::cuda
