// The operators on CPU: the kernels of the instruction set in use, on torch's threads.
#include <torch/csrc/stable/ops.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <new>
#include <utility>

#include "../kernels/cpu/dispatch.h"
#include "../kernels/parallel.h"
#include "backend.h"

namespace x_rope_cls::ops {
namespace {

void run_on_torch_threads(void* /*context*/, int64_t workers,
                          void (*body)(void* argument, int64_t worker), void* argument) {
  torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) body(argument, worker);
  });
}

Parallel torch_threads() {
  return {static_cast<int64_t>(torch::stable::get_num_threads()), run_on_torch_threads, nullptr};
}

constexpr int64_t kPageBytes = 4096;
constexpr int64_t kHugePageBytes = 2 << 20;

// 64-byte aligned.
struct Memory {
  void* data = nullptr;
  int64_t bytes = 0;

  void allocate(int64_t wanted) {
    data = ::operator new(static_cast<size_t>(wanted), std::align_val_t{64});
    bytes = wanted;
  }
  void release() {
    ::operator delete(data, std::align_val_t{64});
    *this = {};
  }
};

// What a thread keeps for its next call: malloc may hand memory of this size back to the system,
// and a call would start with a page fault for every 4 KB.
constexpr int64_t kMostKept = 16 << 20;
struct KeptMemory {
  Memory memory;
  ~KeptMemory() { memory.release(); }
};
thread_local KeptMemory kept;

// Scratch memory, given back at the end of the scope.
class Workspace {
 public:
  explicit Workspace(int64_t bytes) : memory_(std::exchange(kept.memory, {})) {
    if (memory_.bytes >= bytes) return;
    memory_.release();
    memory_.allocate(bytes);
  }
  ~Workspace() {
    if (memory_.bytes <= kMostKept) std::swap(kept.memory, memory_);
    memory_.release();
  }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  void* get() const { return memory_.data; }

 private:
  Memory memory_;
};

}  // namespace

void run_rope(const RopeParams* calls, int count, const Tensor& /*like*/) {
  cpu::kernels().rope(calls, count, torch_threads());
}

void run_rope_table_grad(const RopeTableGradParams& p, const Tensor& /*like*/) {
  cpu::kernels().rope_table_grad(p, torch_threads());
}

void set_seed(const Tensor& seed, AttentionParams& p) {
  p.seed = static_cast<uint64_t>(*static_cast<const int64_t*>(seed.data_ptr()));
}

void run_attention_forward(const AttentionParams& p, const Tensor& /*like*/) {
  const Parallel threads = torch_threads();
  const Workspace workspace(cpu::kernels().attention_workspace(p, threads.workers));
  cpu::kernels().attention_forward(p, threads, workspace.get());
}

void run_attention_backward(const AttentionBackwardParams& p, const Tensor& /*like*/) {
  const Parallel threads = torch_threads();
  const Workspace workspace(cpu::kernels().attention_backward_workspace(p, threads.workers));
  cpu::kernels().attention_backward(p, threads, workspace.get());
}

void run_rows_product(const RowsProductParams& p, const Tensor& /*like*/) {
  const Parallel threads = torch_threads();
  const Workspace workspace(cpu::kernels().rows_product_workspace(p, threads.workers));
  cpu::kernels().rows_product(p, threads, workspace.get());
}

void run_rows_outer(const RowsOuterParams& p, const Tensor& /*like*/) {
  const Parallel threads = torch_threads();
  const Workspace workspace(cpu::kernels().rows_outer_workspace(p, threads.workers));
  cpu::kernels().rows_outer(p, threads, workspace.get());
}

// Memory fresh from the system comes in pages of 2 MB where the system lets programs ask for them
// (transparent_hugepage: madvise): one page fault in place of 512, each of which costs as much as
// writing several pages.
void prepare_output([[maybe_unused]] const Tensor& t) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  const int64_t bytes = t.numel() * static_cast<int64_t>(t.element_size());
  if (bytes < 2 * kHugePageBytes) return;
  // Whole pages alone.
  auto* const data = static_cast<char*>(t.data_ptr());
  const auto before = static_cast<int64_t>(reinterpret_cast<uintptr_t>(data) % kPageBytes);
  const int64_t skipped = before == 0 ? 0 : kPageBytes - before;
  const int64_t length = (bytes - skipped) / kPageBytes * kPageBytes;
  madvise(data + skipped, static_cast<size_t>(length), MADV_HUGEPAGE);  // no more than a wish
#endif
}

void run_pool_forward(const PoolParams& p, const Tensor& /*like*/) {
  const Parallel threads = torch_threads();
  const Workspace workspace(cpu::kernels().pool_workspace(p, threads.workers));
  cpu::kernels().pool_forward(p, threads, workspace.get());
}

void run_pool_backward(const PoolBackwardParams& p, const Tensor& /*like*/) {
  const Parallel threads = torch_threads();
  const Workspace workspace(cpu::kernels().pool_backward_workspace(p, threads.workers));
  cpu::kernels().pool_backward(p, threads, workspace.get());
}

}  // namespace x_rope_cls::ops
