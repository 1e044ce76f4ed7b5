// The operators on CUDA: the launchers, on the tensors' device and torch's current stream there.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>

#include <optional>
#include <vector>

#include "../kernels/cuda/launch.h"
#include "backend.h"
#include "cuda_error.h"
#include "params.h"

namespace x_rope_cls::ops {
namespace {

using torch::headeronly::ScalarType;

// One call of an operator: while it lives, the tensors' device is the current one.
class Call {
 public:
  Call(const char* op, const Tensor& like)
      : op_(op),
        like_(like),
        guard_(like.get_device_index()),
        stream_(torch::stable::accelerator::getCurrentStream(like.get_device_index())) {
    // The runtime in this library is a copy of its own: tell it too, whatever torch's one knows.
    check(cudaSetDevice(like.get_device_index()));
  }

  cudaStream_t stream() const { return static_cast<cudaStream_t>(stream_.nativeHandle()); }
  cuda::Device device() const {
    cuda::Device d{};
    check(cuda::query_device(&d));
    return d;
  }
  void check(cudaError_t error) const { check_cuda(op_, error); }

  // From torch's allocator, which keeps it for work on this stream and inside CUDA graphs; valid
  // until the next call.
  void* workspace(int64_t bytes) {
    if (bytes == 0) return nullptr;
    memory_ = empty_of(like_, {bytes}, ScalarType::Byte);
    return memory_->data_ptr();
  }

 private:
  const char* op_;
  const Tensor& like_;
  torch::stable::accelerator::DeviceGuard guard_;
  torch::stable::accelerator::Stream stream_;
  std::optional<Tensor> memory_;
};

}  // namespace

void run_rope(const RopeParams* calls, int count, const Tensor& like) {
  const Call call("rope", like);
  call.check(cuda::rope(calls, count, call.stream()));
}

void run_rope_table_grad(const RopeTableGradParams& p, const Tensor& like) {
  const Call call("rope_table_grad", like);
  call.check(cuda::rope_table_grad(p, call.stream()));
}

void set_seed(const Tensor& seed, AttentionParams& p) {
  p.seed_data = static_cast<const int64_t*>(seed.data_ptr());
}

void run_attention_forward(const AttentionParams& p, const Tensor& like) {
  Call call("rope_attention", like);
  const cuda::Device device = call.device();
  void* const workspace = call.workspace(cuda::attention_workspace(p, device));
  call.check(cuda::attention_forward(p, device, workspace, call.stream()));
}

void run_attention_backward(const AttentionBackwardParams& p, const Tensor& like) {
  Call call("rope_attention_backward", like);
  const cuda::Device device = call.device();
  void* const workspace = call.workspace(cuda::attention_backward_workspace(p, device));
  call.check(cuda::attention_backward(p, device, workspace, call.stream()));
}

void prepare_output(const Tensor& /*t*/) {}  // the allocator keeps memory

void run_pool_forward(const PoolParams& p, const Tensor& like) {
  Call call("late_cls_pool", like);
  const cuda::Device device = call.device();
  void* const workspace = call.workspace(cuda::pool_workspace(p, device));
  call.check(cuda::pool_forward(p, device, workspace, call.stream()));
}

void run_pool_backward(const PoolBackwardParams& p, const Tensor& like) {
  Call call("late_cls_pool_backward", like);
  const cuda::Device device = call.device();
  void* const workspace = call.workspace(cuda::pool_backward_workspace(p, device));
  call.check(cuda::pool_backward(p, device, workspace, call.stream()));
}

}  // namespace x_rope_cls::ops
