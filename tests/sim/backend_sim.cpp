// The operators on CPU tensors with the CUDA launchers in the simulator. Kernels may touch the
// tensors' memory and the workspace, both to the byte; reports become the texts of exceptions.
#include <cudasim.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "kernels/cuda/launch.h"
#include "ranges.h"
#include "torch/backend.h"
#include "torch/cuda_error.h"

namespace x_rope_cls::ops {
namespace {

// Of exactly so many bytes, full of NaN.
class Workspace {
 public:
  explicit Workspace(int64_t bytes) {
    if (bytes < 0) throw std::runtime_error("a workspace must have at least 0 bytes");
    if (bytes > 0) check_cuda("workspace", cudaMalloc(&memory_, static_cast<size_t>(bytes)));
  }
  ~Workspace() { cudaFree(memory_); }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  void* get() const { return memory_; }

 private:
  void* memory_ = nullptr;
};

std::string take_report() {
  std::vector<char> text(cudasim_take_report(nullptr, 0) + 1);
  cudasim_take_report(text.data(), text.size());
  return text.data();
}

// `error`: what the launcher returned.
void finish(const char* op, cudaError_t error) {
  const cudaError_t later = cudaDeviceSynchronize();
  cudaGetLastError();
  const std::string report = take_report();
  if (error == cudaSuccess && later != cudaSuccess) {
    throw std::runtime_error(std::string(op) + ": the launcher hides an error: " + report);
  }
  try {
    check_cuda(op, error);
  } catch (const std::runtime_error& e) {
    throw std::runtime_error(std::string(e.what()) + "\n" + report);
  }
}

cuda::Device device() {
  cuda::Device d{};
  check_cuda("query_device", cuda::query_device(&d));
  return d;
}

}  // namespace

void run_rope(const RopeParams* calls, int count, const Tensor& /*like*/) {
  const sim::Ranges ranges(calls, count);
  finish("rope", cuda::rope(calls, count, nullptr));
}

void run_rope_table_grad(const RopeTableGradParams& p, const Tensor& /*like*/) {
  const sim::Ranges ranges(p);
  finish("rope_table_grad", cuda::rope_table_grad(p, nullptr));
}

void set_seed(const Tensor& seed, AttentionParams& p) {
  p.seed_data = static_cast<const int64_t*>(seed.data_ptr());
}

void run_attention_forward(const AttentionParams& p, const Tensor& /*like*/) {
  const sim::Ranges ranges(p);
  const Workspace workspace(cuda::attention_workspace(p, device()));
  finish("rope_attention", cuda::attention_forward(p, device(), workspace.get(), nullptr));
}

void run_attention_backward(const AttentionBackwardParams& p, const Tensor& /*like*/) {
  const sim::Ranges ranges(p);
  const Workspace workspace(cuda::attention_backward_workspace(p, device()));
  finish("rope_attention_backward",
         cuda::attention_backward(p, device(), workspace.get(), nullptr));
}

void prepare_output(const Tensor& /*t*/) {}

void run_pool_forward(const PoolParams& p, const Tensor& /*like*/) {
  const sim::Ranges ranges(p);
  const Workspace workspace(cuda::pool_workspace(p, device()));
  finish("late_cls_pool", cuda::pool_forward(p, device(), workspace.get(), nullptr));
}

void run_pool_backward(const PoolBackwardParams& p, const Tensor& /*like*/) {
  const sim::Ranges ranges(p);
  const Workspace workspace(cuda::pool_backward_workspace(p, device()));
  finish("late_cls_pool_backward", cuda::pool_backward(p, device(), workspace.get(), nullptr));
}

}  // namespace x_rope_cls::ops
