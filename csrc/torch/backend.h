// What the operators need of a device. The operators' sources are compiled once for each backend
// and linked with one of backend_cpu.cpp and backend_cuda.cpp (tests/sim has a third).
//
// `like`: a tensor of the call, for its device. A run_* function returns when the kernels have run
// (CPU) or are queued on the current stream (CUDA); the pointers in the parameters must stay valid
// until then, in the way that torch's allocator means it.
#pragma once

#include "../kernels/attention.h"
#include "../kernels/pooling.h"
#include "../kernels/rope.h"
#include "../kernels/rows.h"
#include "checks.h"

namespace x_rope_cls::ops {

void run_rope(const RopeParams* calls, int count, const Tensor& like);  // one or two
void run_rope_table_grad(const RopeTableGradParams& p, const Tensor& like);

// Where the kernels of this backend look for the seed of dropout: never waits for a device.
void set_seed(const Tensor& seed, AttentionParams& p);
void run_attention_forward(const AttentionParams& p, const Tensor& like);
void run_attention_backward(const AttentionBackwardParams& p, const Tensor& like);

// Called before a kernel fills a large fresh tensor.
void prepare_output(const Tensor& t);

void run_pool_forward(const PoolParams& p, const Tensor& like);
void run_pool_backward(const PoolBackwardParams& p, const Tensor& like);

// CPU alone.
void run_rows_product(const RowsProductParams& p, const Tensor& like);
void run_rows_outer(const RowsOuterParams& p, const Tensor& like);

}  // namespace x_rope_cls::ops
