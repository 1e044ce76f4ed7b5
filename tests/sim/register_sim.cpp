// The operators in a namespace of their own, for CPU tensors, with the CUDA kernels in the
// simulator.
#include "torch/operators.h"

STABLE_TORCH_LIBRARY(x_rope_cls_sim, m) { x_rope_cls::ops::define_operators(m); }
STABLE_TORCH_LIBRARY_IMPL(x_rope_cls_sim, CPU, m) { x_rope_cls::ops::implement_operators(m); }
