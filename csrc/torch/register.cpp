// The operators' schemas, and their kernels for CPU tensors.
#include "operators.h"
#include "pool_projected.h"

STABLE_TORCH_LIBRARY(x_rope_cls, m) {
  x_rope_cls::ops::define_operators(m);
  x_rope_cls::ops::define_pool_projected(m);
}
STABLE_TORCH_LIBRARY_IMPL(x_rope_cls, CPU, m) {
  x_rope_cls::ops::implement_operators(m);
  x_rope_cls::ops::implement_pool_projected(m);
}
