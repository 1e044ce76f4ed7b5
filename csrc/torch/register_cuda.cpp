// The operators' kernels for CUDA tensors; register.cpp has their schemas.
#include "operators.h"

STABLE_TORCH_LIBRARY_IMPL(x_rope_cls, CUDA, m) { x_rope_cls::ops::implement_operators(m); }
