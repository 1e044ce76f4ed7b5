// The CUDA launchers behind the table through which the cases call kernels: linked in place of the
// CPU's dispatch, with cudart from tests/cudasim (CUDASIM_HOST_POINTERS=1) or a GPU whose kernels
// reach host memory. -DX_ROPE_CLS_CUDA_ATTENTION_BACKWARD and the like say which launchers exist.
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "kernels/cpu/dispatch.h"
#include "kernels/cuda/launch.h"

namespace x_rope_cls::cpu {
namespace {

using cuda::Device;

void expect_success(cudaError_t error, const char* what) {
  if (error == cudaSuccess) error = cudaDeviceSynchronize();
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(error));
  std::exit(1);
}

Device device() {
  Device d{};
  expect_success(cuda::query_device(&d), "query_device");
  return d;
}

#ifdef X_ROPE_CLS_CUDA_ROPE
void rope(const RopeParams* calls, int64_t count, const Parallel&) {
  expect_success(cuda::rope(calls, static_cast<int>(count), nullptr), "rope");
}
void rope_table_grad(const RopeTableGradParams& p, const Parallel&) {
  expect_success(cuda::rope_table_grad(p, nullptr), "rope_table_grad");
}
#endif
#ifdef X_ROPE_CLS_CUDA_ATTENTION
int64_t attention_workspace(const AttentionParams& p, int64_t) {
  return cuda::attention_workspace(p, device());
}
void attention_forward(const AttentionParams& params, const Parallel&, void* workspace) {
  AttentionParams p = params;
  const auto seed = static_cast<int64_t>(p.seed);
  p.seed_data = &seed;
  p.seed = 0;
  expect_success(cuda::attention_forward(p, device(), workspace, nullptr), "attention_forward");
}
#endif
#ifdef X_ROPE_CLS_CUDA_ATTENTION_BACKWARD
int64_t attention_backward_workspace(const AttentionBackwardParams& p, int64_t) {
  return cuda::attention_backward_workspace(p, device());
}
void attention_backward(const AttentionBackwardParams& params, const Parallel&, void* workspace) {
  AttentionBackwardParams p = params;
  const auto seed = static_cast<int64_t>(p.forward.seed);
  p.forward.seed_data = &seed;
  p.forward.seed = 0;
  expect_success(cuda::attention_backward(p, device(), workspace, nullptr), "attention_backward");
}
#endif
#ifdef X_ROPE_CLS_CUDA_POOL
int64_t pool_workspace(const PoolParams& p, int64_t) { return cuda::pool_workspace(p, device()); }
void pool_forward(const PoolParams& p, const Parallel&, void* workspace) {
  expect_success(cuda::pool_forward(p, device(), workspace, nullptr), "pool_forward");
}
int64_t pool_backward_workspace(const PoolBackwardParams& p, int64_t) {
  return cuda::pool_backward_workspace(p, device());
}
void pool_backward(const PoolBackwardParams& p, const Parallel&, void* workspace) {
  expect_success(cuda::pool_backward(p, device(), workspace, nullptr), "pool_backward");
}
#endif

KernelTable make_table() {
  KernelTable t{};
  t.name = "cuda";
#ifdef X_ROPE_CLS_CUDA_ROPE
  t.rope = rope;
  t.rope_table_grad = rope_table_grad;
#endif
#ifdef X_ROPE_CLS_CUDA_ATTENTION
  t.attention_workspace = attention_workspace;
  t.attention_forward = attention_forward;
#endif
#ifdef X_ROPE_CLS_CUDA_ATTENTION_BACKWARD
  t.attention_backward_workspace = attention_backward_workspace;
  t.attention_backward = attention_backward;
#endif
#ifdef X_ROPE_CLS_CUDA_POOL
  t.pool_workspace = pool_workspace;
  t.pool_forward = pool_forward;
  t.pool_backward_workspace = pool_backward_workspace;
  t.pool_backward = pool_backward;
#endif
  return t;
}

}  // namespace

const KernelTable& kernels() {
  static const KernelTable table = make_table();
  return table;
}
const char* const* built_isas() {
  static const char* const names[] = {"cuda", nullptr};
  return names;
}
bool isa_supported(const char*) { return true; }
bool select_isa(const char*) { return true; }
const char* isa_warning() { return ""; }

}  // namespace x_rope_cls::cpu
