// Launchers of the CUDA kernels: the parameter structs of csrc/kernels with pointers to device
// memory. They check nothing (the operators do), allocate nothing and never synchronise, so that a
// CUDA graph can capture them; every launch is followed by cudaGetLastError, whose code comes back.
//
// `workspace`: device memory of the bytes that the *_workspace function of the same call returned,
// 256-byte aligned, uninitialised; a null pointer where that was 0.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../attention.h"
#include "../pooling.h"
#include "../rope.h"
#include "device.h"

namespace x_rope_cls::cuda {

// Of the current device.
cudaError_t query_device(Device* device);

// rope.cu. Up to two tensors (q and k) in one launch.
cudaError_t rope(const RopeParams* calls, int count, cudaStream_t stream);
cudaError_t rope_table_grad(const RopeTableGradParams& params, cudaStream_t stream);

// attention_forward.cu
int64_t attention_workspace(const AttentionParams& params, const Device& device);
cudaError_t attention_forward(const AttentionParams& params, const Device& device, void* workspace,
                              cudaStream_t stream);

// attention_backward.cu
int64_t attention_backward_workspace(const AttentionBackwardParams& params, const Device& device);
cudaError_t attention_backward(const AttentionBackwardParams& params, const Device& device,
                               void* workspace, cudaStream_t stream);

// pooling_forward.cu
int64_t pool_workspace(const PoolParams& params, const Device& device);
cudaError_t pool_forward(const PoolParams& params, const Device& device, void* workspace,
                         cudaStream_t stream);

// pooling_backward.cu
int64_t pool_backward_workspace(const PoolBackwardParams& params, const Device& device);
cudaError_t pool_backward(const PoolBackwardParams& params, const Device& device, void* workspace,
                          cudaStream_t stream);

}  // namespace x_rope_cls::cuda
