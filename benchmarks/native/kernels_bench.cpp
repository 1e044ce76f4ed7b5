// Every kernel on every ISA of this machine, one thread:
//   kernels_bench [--benchmark_filter=avx512/attention ...]
// Rates a second of processor time: "of_peak" is the share of the multiply-add peak of that ISA on
// one thread, measured at the start; GB counts the bytes that must be read and written.
#include <benchmark/benchmark.h>

#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <new>
#include <random>
#include <string>
#include <utility>

#include "kernels/cpu/dispatch.h"

namespace x_rope_cls::bench {

namespace {

using Counter = benchmark::Counter;

void run_here(void*, int64_t workers, void (*body)(void*, int64_t), void* argument) {
  for (int64_t worker = 0; worker < workers; ++worker) {
    body(argument, worker);
  }
}
constexpr Parallel kOneThread{1, run_here, nullptr};

// 64-byte aligned memory.
class Buffer {
 public:
  explicit Buffer(int64_t bytes) : data_(std::aligned_alloc(64, (bytes + 127) / 64 * 64)) {
    if (data_ == nullptr) {
      throw std::bad_alloc();
    }
  }
  void* data() const { return data_.get(); }

 private:
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  std::unique_ptr<void, Free> data_;
};

int64_t size_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

// Normally distributed elements, float32 or bfloat16.
class Values : public Buffer {
 public:
  Values(DType dtype, int64_t count, double deviation = 1.0) : Buffer(count * size_of(dtype)) {
    std::mt19937 engine(1);
    std::normal_distribution<float> normal(0.0f, static_cast<float>(deviation));
    for (int64_t i = 0; i < count; ++i) {
      const float value = normal(engine);
      char* to = static_cast<char*>(data()) + i * size_of(dtype);
      uint32_t bits;
      std::memcpy(&bits, &value, sizeof(bits));
      const auto upper = static_cast<uint16_t>(bits >> 16);
      dtype == DType::kFloat32 ? std::memcpy(to, &value, 4) : std::memcpy(to, &upper, 2);
    }
  }
};

// Tables of cos and sin that all batches and heads share.
class Tables {
 public:
  Tables(int64_t tokens, int64_t pairs)
      : pairs_(pairs), cos_(tokens * pairs * 4), sin_(tokens * pairs * 4) {
    for (int64_t i = 0; i < tokens * pairs; ++i) {
      const double rate =
          std::pow(1e4, -static_cast<double>(i % pairs) / static_cast<double>(pairs));
      const double angle = static_cast<double>(i / pairs) * rate;
      static_cast<float*>(cos_.data())[i] = static_cast<float>(std::cos(angle));
      static_cast<float*>(sin_.data())[i] = static_cast<float>(std::sin(angle));
    }
  }
  RotaryTable table() const {
    return {cos_.data(), sin_.data(), 0, 0, pairs_, 1, 0, 0, pairs_, 1, nullptr, 0, 0};
  }

 private:
  int64_t pairs_;
  Buffer cos_, sin_;
};

// Contiguous (1, heads, tokens, channels).
Tensor4 contiguous(const Buffer& buffer, int64_t heads, int64_t tokens, int64_t channels) {
  return {buffer.data(), heads * tokens * channels, tokens * channels, channels, 1};
}

// Selects the ISA, runs `once` over and over, and counts.
void measure(benchmark::State& state, const char* isa, double peak, double flops, double bytes,
             const std::function<void(const cpu::KernelTable&)>& once) {
  if (!cpu::select_isa(isa)) {
    state.SkipWithError("this machine does not have it");
    return;
  }
  const cpu::KernelTable& kernels = cpu::kernels();
  for (auto _ : state) {
    once(kernels);
    benchmark::ClobberMemory();
  }
  state.counters["GFLOP"] = Counter(flops / 1e9, Counter::kIsIterationInvariantRate);
  state.counters["of_peak"] = Counter(flops / peak, Counter::kIsIterationInvariantRate);
  state.counters["GB"] = Counter(bytes / 1e9, Counter::kIsIterationInvariantRate);
}

struct Isa {
  const char* name;
  double peak;  // floating-point operations a second
};

void rope(benchmark::State& state, Isa isa, DType dtype) {
  const int64_t heads = 8, tokens = state.range(0), head_dim = 64, pairs = 32;
  const int64_t count = heads * tokens * head_dim;
  const Values x(dtype, count);
  const Buffer y(count * size_of(dtype));
  const Tables tables(tokens, pairs);
  const RopeParams params{dtype,
                          contiguous(x, heads, tokens, head_dim),
                          contiguous(y, heads, tokens, head_dim),
                          tables.table(),
                          1,
                          heads,
                          tokens,
                          head_dim,
                          pairs,
                          true,
                          false};
  const auto flops = 3.0 * static_cast<double>(count);
  const auto bytes = 2.0 * static_cast<double>(count * size_of(dtype));
  measure(state, isa.name, isa.peak, flops, bytes,
          [&](const cpu::KernelTable& kernels) { kernels.rope(&params, 1, kOneThread); });
}

// q, k, v and everything that comes out, one head.
struct Attention {
  Attention(DType dtype, int64_t tokens, int64_t head_dim)
      : count(tokens * head_dim),
        q(dtype, count),
        k(dtype, count),
        v(dtype, count),
        grad(dtype, count),
        out(count * size_of(dtype)),
        dq(count * size_of(dtype)),
        dk(count * size_of(dtype)),
        dv(count * size_of(dtype)),
        lse(tokens * 4),
        tables(tokens, head_dim / 4) {
    params.dtype = dtype;
    params.interleaved = params.has_rotary = true;
    params.batch = params.heads = params.key_heads = 1;
    params.queries = params.keys = tokens;
    params.head_dim = params.value_dim = head_dim;
    params.pairs = head_dim / 4;
    params.q = contiguous(q, 1, tokens, head_dim);
    params.k = contiguous(k, 1, tokens, head_dim);
    params.v = contiguous(v, 1, tokens, head_dim);
    params.out = contiguous(out, 1, tokens, head_dim);
    params.lse = lse.data();
    params.table_q = params.table_k = tables.table();
    params.scale = 1.0 / std::sqrt(static_cast<double>(head_dim));
    backward.forward = params;
    backward.grad_out = contiguous(grad, 1, tokens, head_dim);
    backward.dq = contiguous(dq, 1, tokens, head_dim);
    backward.dk = contiguous(dk, 1, tokens, head_dim);
    backward.dv = contiguous(dv, 1, tokens, head_dim);
  }

  int64_t count;
  Values q, k, v, grad;
  Buffer out, dq, dk, dv, lse;
  Tables tables;
  AttentionParams params{};
  AttentionBackwardParams backward{};
};

void attention(benchmark::State& state, Isa isa, DType dtype, bool backward) {
  const int64_t tokens = state.range(0), head_dim = state.range(1);
  const Attention a(dtype, tokens, head_dim);
  const double pairs = static_cast<double>(tokens) * static_cast<double>(tokens);
  const double products = backward ? 5.0 : 2.0;
  const double bytes = (backward ? 8.0 : 4.0) * static_cast<double>(a.count * size_of(dtype));
  if (!cpu::select_isa(isa.name)) {
    state.SkipWithError("this machine does not have it");
    return;
  }
  const cpu::KernelTable& table = cpu::kernels();
  const Buffer space(table.attention_workspace(a.params, 1));
  const Buffer backward_space(table.attention_backward_workspace(a.backward, 1));
  table.attention_forward(a.params, kOneThread, space.data());
  measure(state, isa.name, isa.peak, products * 2.0 * pairs * static_cast<double>(head_dim), bytes,
          [&](const cpu::KernelTable& kernels) {
            if (backward) {
              kernels.attention_backward(a.backward, kOneThread, backward_space.data());
            } else {
              kernels.attention_forward(a.params, kOneThread, space.data());
            }
          });
}

void pool(benchmark::State& state, Isa isa, DType dtype, bool backward) {
  const int64_t tokens = state.range(0), channels = 512, heads = 8, queries = state.range(1);
  const int64_t count = tokens * channels, rows = heads * queries * channels;
  const Values x(dtype, count), query(dtype, rows, 1.0 / std::sqrt(512.0)), grad(dtype, rows);
  const Buffer pooled(rows * size_of(dtype)), lse(heads * queries * 4);
  const Buffer dx(count * size_of(dtype)), dquery(rows * size_of(dtype));
  PoolBackwardParams params{};
  PoolParams& forward = params.forward;
  forward.dtype = dtype;
  forward.batch = forward.query_batch = 1;
  forward.tokens = tokens;
  forward.channels = channels;
  forward.heads = heads;
  forward.queries = queries;
  forward.x = {x.data(), count, channels, 1};
  forward.query = contiguous(query, heads, queries, channels);
  forward.pooled = pooled.data();
  forward.lse = lse.data();
  forward.scale = 1.0;
  params.grad = contiguous(grad, heads, queries, channels);
  params.dx = {dx.data(), count, channels, 1};
  params.dquery = dquery.data();
  if (!cpu::select_isa(isa.name)) {
    state.SkipWithError("this machine does not have it");
    return;
  }
  const cpu::KernelTable& table = cpu::kernels();
  const Buffer space(table.pool_workspace(forward, 1));
  const Buffer backward_space(table.pool_backward_workspace(params, 1));
  table.pool_forward(forward, kOneThread, space.data());
  const double products = static_cast<double>(count) * static_cast<double>(heads * queries);
  const auto bytes = static_cast<double>(count * size_of(dtype));
  measure(state, isa.name, isa.peak, (backward ? 10.0 : 4.0) * products,
          (backward ? 2.0 : 1.0) * bytes, [&](const cpu::KernelTable& kernels) {
            if (backward) {
              kernels.pool_backward(params, kOneThread, backward_space.data());
            } else {
              kernels.pool_forward(forward, kOneThread, space.data());
            }
          });
}

// Multiply-add peak of the selected ISA on this thread: the best of a few runs.
double measure_peak() {
  using Clock = std::chrono::steady_clock;
  constexpr int kRuns = 20;
  constexpr int64_t kIterations = 1 << 17;
  double best = 0.0;
  for (int run = 0; run < kRuns; ++run) {
    const Clock::time_point start = Clock::now();
    const double flops = cpu::kernels().limits.fma_float32(kIterations);
    best = std::fmax(best, flops / std::chrono::duration<double>(Clock::now() - start).count());
  }
  return best;
}

void register_all(Isa isa) {
  for (const auto& [dtype, dtype_name] :
       {std::pair{DType::kFloat32, "float32"}, std::pair{DType::kBFloat16, "bfloat16"}}) {
    const auto name = [&, dtype_name = dtype_name](const char* what) {
      return std::string(isa.name) + "/" + what + "/" + dtype_name;
    };
    const DType type = dtype;
    benchmark::RegisterBenchmark(name("rope").c_str(),
                                 [=](benchmark::State& state) { rope(state, isa, type); })
        ->ArgName("N")
        ->Arg(1024);
    for (const bool backward : {false, true}) {
      benchmark::RegisterBenchmark(
          name(backward ? "attention_backward" : "attention_forward").c_str(),
          [=](benchmark::State& state) { attention(state, isa, type, backward); })
          ->ArgNames({"N", "D"})
          ->ArgsProduct({{197, 1024}, {64}})
          ->Args({1024, 32})
          ->Args({1024, 128});
      benchmark::RegisterBenchmark(
          name(backward ? "pool_backward" : "pool_forward").c_str(),
          [=](benchmark::State& state) { pool(state, isa, type, backward); })
          ->ArgNames({"N", "M"})
          ->ArgsProduct({{1024}, {1, 4, 16}});
    }
  }
}

}  // namespace

}  // namespace x_rope_cls::bench

int main(int argc, char** argv) {
  namespace cpu = x_rope_cls::cpu;
  for (const char* const* isa = cpu::built_isas(); *isa != nullptr; ++isa) {
    if (cpu::select_isa(*isa)) {
      x_rope_cls::bench::register_all({*isa, x_rope_cls::bench::measure_peak()});
    }
  }
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) {
    return 2;
  }
  benchmark::RunSpecifiedBenchmarks();
  benchmark::Shutdown();
  return 0;
}
