// Attention forward on the FMA units, for everything that has no tensor core kernel: float32,
// float64, more than 256 channels. Any strides: tiles are read element by element. Queries and keys
// pass through shared memory a few channels at a time, so that any head_dim fits; a block has 128
// channels of the values, and blocks beside it, which compute the same scores, have the others.
#pragma once

#include <cstdint>

#include "attention_common.cuh"
#include "attention_rows.cuh"

namespace x_rope_cls::cuda {

constexpr int kTiledThreads = 128;
constexpr int kTiledRows = 32;
constexpr int kTiledKeys = 64;
constexpr int kTiledStep = 32;       // channels of queries and keys at a time
constexpr int kTiledValueKeys = 16;  // keys of values at a time
constexpr int kTiledChannels = 128;  // of the values, a block

struct TiledArgs {
  AttentionParams p;
  RowSet rows;
  TokenOrder keys;
  Tensor4 q_turned, k_turned;  // rotated: by query; by place of the keys
  uint64_t dropout_threshold;
  double kept;  // factor of the weights that dropout keeps
  int32_t value_blocks;
};

__device__ __forceinline__ float exponential(float x) { return expf(x); }
__device__ __forceinline__ double exponential(double x) { return exp(x); }
__device__ __forceinline__ float logarithm(float x) { return logf(x); }
__device__ __forceinline__ double logarithm(double x) { return log(x); }

// Threads are 8 x 16: thread (y, x) has rows y + 8 i and keys, or channels of the values, x + 16 j.
template <typename T>
struct TiledKernel {
  using C = Compute<T>;
  static constexpr int kMine = 4;      // rows, and keys, of a thread
  static constexpr int kChannels = 8;  // of the values, of a thread
  static constexpr int kPitch = kTiledStep + 1;
  static constexpr int kKeyPitch = kTiledKeys + 1;

  struct Shared {
    union {
      struct {
        C q[kTiledRows * kPitch];
        C k[kTiledKeys * kPitch];
      } factors;
      C v[kTiledValueKeys * kTiledChannels];
    };
    C weights[kTiledRows * kKeyPitch];
  };
  struct State {
    C out[kMine][kChannels];
    C maximum[kMine], sum[kMine];
  };

  const TiledArgs& args;
  const RowTile tile;
  Shared& shared;
  int32_t first_channel;  // of the values
  int y, x;

  __device__ __forceinline__ int64_t key_head() const {
    return tile.unit_head / (args.p.heads / args.p.key_heads);
  }

  // Scores of the block's rows with keys at places first ... first + count - 1.
  __device__ __forceinline__ void score(int32_t first, int32_t count, bool turned,
                                        C (&s)[kMine][kMine]) const {
    const Tensor4& qs = turned ? args.q_turned : args.p.q;
    const Tensor4& ks = turned ? args.k_turned : args.p.k;
    const int lane = static_cast<int>(threadIdx.x) % kTiledStep;
    const int start = static_cast<int>(threadIdx.x) / kTiledStep;
    constexpr int kPass = kTiledThreads / kTiledStep;
    const int32_t channels = static_cast<int32_t>(args.p.head_dim);
#pragma unroll 1
    for (int32_t step = 0; step < channels; step += kTiledStep) {
      const bool inside = step + lane < channels;
      __syncthreads();  // what was there has been used
#pragma unroll 4
      for (int row = start; row < kTiledRows; row += kPass) {
        C value = 0;
        if (inside && row < tile.rows) {
          const RowPlace at = place_of(args.rows, tile, row);
          value = to_compute(
              static_cast<const T*>(qs.data)[tile.b * qs.stride_b + at.h * qs.stride_h +
                                             at.n * qs.stride_n + (step + lane) * qs.stride_d]);
        }
        shared.factors.q[row * kPitch + lane] = value;
      }
#pragma unroll 4
      for (int key = start; key < kTiledKeys; key += kPass) {
        C value = 0;
        if (inside && key < count) {
          const int32_t at = turned ? first + key : args.keys.token(tile.b, first + key);
          value = to_compute(
              static_cast<const T*>(ks.data)[tile.b * ks.stride_b + key_head() * ks.stride_h +
                                             at * ks.stride_n + (step + lane) * ks.stride_d]);
        }
        shared.factors.k[key * kPitch + lane] = value;
      }
      __syncthreads();
#pragma unroll 8
      for (int c = 0; c < kTiledStep; ++c) {
        C q[kMine];
        C k[kMine];
#pragma unroll
        for (int i = 0; i < kMine; ++i) {
          q[i] = shared.factors.q[(y + 8 * i) * kPitch + c];
          k[i] = shared.factors.k[(x + 16 * i) * kPitch + c];
        }
#pragma unroll
        for (int i = 0; i < kMine; ++i) {
#pragma unroll
          for (int j = 0; j < kMine; ++j) s[i][j] += q[i] * k[j];
        }
      }
    }
  }

  // The score of one pair with its scale and bias, natural units.
  __device__ __forceinline__ C biased(C score, const RowPlace& at, int32_t token) const {
    const AttentionParams& p = args.p;
    score *= static_cast<C>(p.scale);
    if (p.bias == nullptr) return score;
    const double bias = load_any(p.bias, p.bias_dtype,
                                 tile.b * p.bias_stride_b + at.h * p.bias_stride_h +
                                     at.n * p.bias_stride_n + token * p.bias_stride_m);
    if (p.bias_dtype != DType::kBool) return score + static_cast<C>(bias);
    return bias != 0 ? score : static_cast<C>(negative_infinity());
  }

  // Scores become weights in shared memory; earlier sums are rescaled.
  __device__ __forceinline__ void soften(int32_t first, int32_t count, C (&s)[kMine][kMine],
                                         State& state) const {
    const C kNothing = static_cast<C>(negative_infinity());
    const bool drops = args.p.dropout_p > 0;
    const Dropout dropout{drops ? static_cast<uint64_t>(*args.p.seed_data) : 0,
                          args.dropout_threshold, 1.0f};
#pragma unroll
    for (int i = 0; i < kMine; ++i) {
      // Kept through the main loop, the places of the rows cost a spill on sm_100.
      const int row = afresh(y) + 8 * i;
      const bool there = row < tile.rows;
      const RowPlace at = place_of(args.rows, tile, there ? row : 0);
      C largest = state.maximum[i];
#pragma unroll
      for (int j = 0; j < kMine; ++j) {
        const int key = x + 16 * j;
        const bool pair = there && key < count;
        s[i][j] = pair ? biased(s[i][j], at, args.keys.token(tile.b, first + key)) : kNothing;
        largest = s[i][j] > largest ? s[i][j] : largest;
      }
#pragma unroll
      for (int step = 8; step > 0; step /= 2) {
        const C other = __shfl_xor_sync(0xffffffffU, largest, step);
        largest = other > largest ? other : largest;
      }
      const C shift = largest == kNothing ? C{0} : largest;
      const C factor = exponential(state.maximum[i] - shift);
      state.maximum[i] = largest;
      state.sum[i] *= factor;
#pragma unroll
      for (int c = 0; c < kChannels; ++c) state.out[i][c] *= factor;
#pragma unroll
      for (int j = 0; j < kMine; ++j) {
        const int key = x + 16 * j;
        C weight = exponential(s[i][j] - shift);
        state.sum[i] += weight;
        if (drops && there && key < count) {
          const int32_t token = args.keys.token(tile.b, first + key);
          const int64_t head = static_cast<int64_t>(tile.b) * args.rows.heads + at.h;
          weight *= static_cast<C>(dropout_factor(dropout, head, at.n, token));
        }
        shared.weights[row * kKeyPitch + key] = weight;
      }
    }
  }

  __device__ __forceinline__ void sum_values(int32_t first, int32_t count, State& state) const {
    const Tensor4& vs = args.p.v;
    const int32_t channel = first_channel + static_cast<int32_t>(threadIdx.x);
    const bool inside = channel < args.p.value_dim;
    const T* const v = static_cast<const T*>(vs.data) + tile.b * vs.stride_b +
                       key_head() * vs.stride_h + channel * vs.stride_d;
#pragma unroll 1
    for (int32_t part = 0; part < count; part += kTiledValueKeys) {
      __syncthreads();  // what was there has been used; the weights are there
#pragma unroll 4
      for (int key = 0; key < kTiledValueKeys; ++key) {
        C value = 0;
        if (inside && part + key < count) {
          value = to_compute(v[args.keys.token(tile.b, first + part + key) * vs.stride_n]);
        }
        shared.v[key * kTiledChannels + static_cast<int>(threadIdx.x)] = value;
      }
      __syncthreads();
#pragma unroll 4
      for (int key = 0; key < kTiledValueKeys; ++key) {
        C weight[kMine];
#pragma unroll
        for (int i = 0; i < kMine; ++i) {
          weight[i] = shared.weights[(y + 8 * i) * kKeyPitch + part + key];
        }
#pragma unroll
        for (int c = 0; c < kChannels; ++c) {
          const C value = shared.v[key * kTiledChannels + x + 16 * c];
#pragma unroll
          for (int i = 0; i < kMine; ++i) state.out[i][c] += weight[i] * value;
        }
      }
    }
  }

  __device__ __forceinline__ void run(State& state) const {
    const auto [with, without] = args.keys.counts_of(tile.b);
    const int32_t all = with + without;
    // Tiles end where the keys with a position do.
#pragma unroll 1
    for (int32_t first = 0; first < all;) {
      const int32_t count = min(kTiledKeys, (first < with ? with : all) - first);
      C s[kMine][kMine] = {};
      score(first, count, args.p.has_rotary && !tile.special && first < with, s);
      soften(first, count, s, state);
      sum_values(first, count, state);
      first += count;
    }
  }

  __device__ __forceinline__ void store(State& state) const {
    const AttentionParams& p = args.p;
#pragma unroll
    for (int i = 0; i < kMine; ++i) {
#pragma unroll
      for (int step = 8; step > 0; step /= 2) {
        state.sum[i] += __shfl_xor_sync(0xffffffffU, state.sum[i], step);
      }
      const C sum = state.sum[i];
      const int row = y + 8 * i;
      if (row >= tile.rows) continue;
      const RowPlace at = place_of(args.rows, tile, row);
      const C factor = sum == C{0} ? C{0} : static_cast<C>(args.kept) / sum;
      T* const out = static_cast<T*>(p.out.data) + tile.b * p.out.stride_b + at.h * p.out.stride_h +
                     at.n * p.out.stride_n;
#pragma unroll
      for (int c = 0; c < kChannels; ++c) {
        const int32_t channel = first_channel + x + 16 * c;
        if (channel < p.value_dim) {
          out[channel * p.out.stride_d] = from_compute<T>(state.out[i][c] * factor);
        }
      }
      if (x == 0 && first_channel == 0) {
        static_cast<C*>(p.lse)[(static_cast<int64_t>(tile.b) * p.heads + at.h) * p.queries + at.n] =
            sum == C{0} ? static_cast<C>(negative_infinity()) : state.maximum[i] + logarithm(sum);
      }
    }
  }
};

template <typename T>
__global__ void __launch_bounds__(kTiledThreads)
    attention_tiled_kernel(const __grid_constant__ TiledArgs args) {
  using Kernel = TiledKernel<T>;
  using C = typename Kernel::C;
  __shared__ typename Kernel::Shared shared;
  const int32_t value_block = static_cast<int32_t>(blockIdx.x) % args.value_blocks;
  const int32_t index = static_cast<int32_t>(blockIdx.x) / args.value_blocks;
  const RowTile tile = find_tile(args.rows, index / args.rows.tiles, index % args.rows.tiles);
  if (tile.rows == 0) return;
  const int thread = static_cast<int>(threadIdx.x);
  const Kernel kernel{args, tile, shared, value_block * kTiledChannels, thread / 16, thread % 16};
  typename Kernel::State state;
#pragma unroll
  for (int i = 0; i < Kernel::kMine; ++i) {
    state.maximum[i] = static_cast<C>(negative_infinity());
    state.sum[i] = 0;
#pragma unroll
    for (int c = 0; c < Kernel::kChannels; ++c) state.out[i][c] = 0;
  }
  kernel.run(state);
  kernel.store(state);
}

}  // namespace x_rope_cls::cuda
