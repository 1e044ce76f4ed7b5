// Attention backward on tensor cores, up to 128 channels.
#include "attention_backward_mma.cuh"

namespace x_rope_cls::cuda {

template cudaError_t mma_backward<128>(DType, const MmaBackwardArgs&, cudaStream_t);

}  // namespace x_rope_cls::cuda
