// Launchers that are not there yet, so that the others can be linked; their operators are not
// registered for CUDA.
#include "launch.h"

namespace x_rope_cls::cuda {

#ifndef X_ROPE_CLS_CUDA_ATTENTION
int64_t attention_workspace(const AttentionParams&, const Device&) { return 0; }
cudaError_t attention_forward(const AttentionParams&, const Device&, void*, cudaStream_t) {
  return cudaErrorNotSupported;
}
#endif
#ifndef X_ROPE_CLS_CUDA_ATTENTION_BACKWARD
int64_t attention_backward_workspace(const AttentionBackwardParams&, const Device&) { return 0; }
cudaError_t attention_backward(const AttentionBackwardParams&, const Device&, void*, cudaStream_t) {
  return cudaErrorNotSupported;
}
#endif
#ifndef X_ROPE_CLS_CUDA_POOL
int64_t pool_workspace(const PoolParams&, const Device&) { return 0; }
cudaError_t pool_forward(const PoolParams&, const Device&, void*, cudaStream_t) {
  return cudaErrorNotSupported;
}
int64_t pool_backward_workspace(const PoolBackwardParams&, const Device&) { return 0; }
cudaError_t pool_backward(const PoolBackwardParams&, const Device&, void*, cudaStream_t) {
  return cudaErrorNotSupported;
}
#endif

}  // namespace x_rope_cls::cuda
