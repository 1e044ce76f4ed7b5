// Attention backward on tensor cores, up to 32 channels.
#include "attention_backward_mma.cuh"

namespace x_rope_cls::cuda {

template cudaError_t mma_backward<32>(DType, const MmaBackwardArgs&, cudaStream_t);

}  // namespace x_rope_cls::cuda
