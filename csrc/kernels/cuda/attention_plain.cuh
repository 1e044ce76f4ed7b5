// Attention forward for everything that has no kernel of its own (float64, more than 256 channels):
// one query a block, scores of 128 keys at a time, any strides. Simple and right, not fast.
#pragma once

#include <cstdint>

#include "attention_common.cuh"

namespace x_rope_cls::cuda {

constexpr int kPlainThreads = 128;
constexpr int kPlainChannels = 4;  // of the values, a thread; blocks of one query share the rest

struct PlainArgs {
  AttentionParams p;
  TokenOrder keys;
  Tensor4 q_turned, k_turned;  // rotated: by query; by place of the keys
  int32_t value_blocks;
  double kept;  // factor of the weights that dropout keeps
};

template <typename C>
__device__ __forceinline__ C plain_exp(C x) {
  if constexpr (sizeof(C) == 8) {
    return exp(x);
  } else {
    return expf(x);
  }
}

// Maximum (or sum) of the block; all threads call it. `places`: one a warp.
template <typename C, bool kMaximum>
__device__ __forceinline__ C reduce_block(C x, C* places) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
    const C other = __shfl_xor_sync(0xffffffffU, x, step);
    x = kMaximum ? (other > x ? other : x) : x + other;
  }
  __syncthreads();
  if (threadIdx.x % kWarpSize == 0) places[threadIdx.x / kWarpSize] = x;
  __syncthreads();
  C all = places[0];
#pragma unroll
  for (int w = 1; w < kPlainThreads / kWarpSize; ++w) {
    all = kMaximum ? (places[w] > all ? places[w] : all) : all + places[w];
  }
  return all;
}

// A row of a block of the plain kernel.
template <typename T>
struct PlainRow {
  using C = Compute<T>;
  const PlainArgs& args;
  int64_t b, h, n, key_head;
  bool special;

  // The score of the key at a place, with its bias; natural units.
  __device__ __forceinline__ C score(int32_t place, int32_t with, int32_t token) const {
    const AttentionParams& p = args.p;
    const bool turned = p.has_rotary && !special && place < with;
    const Tensor4& qs = turned ? args.q_turned : p.q;
    const Tensor4& ks = turned ? args.k_turned : p.k;
    const T* const q =
        static_cast<const T*>(qs.data) + b * qs.stride_b + h * qs.stride_h + n * qs.stride_n;
    const T* const k = static_cast<const T*>(ks.data) + b * ks.stride_b + key_head * ks.stride_h +
                       (turned ? place : token) * ks.stride_n;
    C sum = 0;
    for (int64_t d = 0; d < p.head_dim; ++d) {
      sum += to_compute(q[d * qs.stride_d]) * to_compute(k[d * ks.stride_d]);
    }
    sum *= static_cast<C>(p.scale);
    if (p.bias == nullptr) return sum;
    const double bias = load_any(
        p.bias, p.bias_dtype,
        b * p.bias_stride_b + h * p.bias_stride_h + n * p.bias_stride_n + token * p.bias_stride_m);
    if (p.bias_dtype != DType::kBool) return sum + static_cast<C>(bias);
    return bias != 0 ? sum : static_cast<C>(negative_infinity());
  }
};

template <typename T>
__global__ void __launch_bounds__(kPlainThreads)
    attention_plain_kernel(const __grid_constant__ PlainArgs args) {
  using C = Compute<T>;
  const AttentionParams& p = args.p;
  __shared__ C weights[kPlainThreads];
  __shared__ C places[kPlainThreads / kWarpSize];
  const C kNothing = static_cast<C>(negative_infinity());
  const int thread = static_cast<int>(threadIdx.x);
  const int32_t value_block = static_cast<int32_t>(blockIdx.x % args.value_blocks);
  int64_t index = blockIdx.x / args.value_blocks;
  const int64_t n = index % p.queries;
  index /= p.queries;
  const int64_t h = index % p.heads;
  const int64_t b = index / p.heads;
  const int64_t key_head = h / (p.heads / p.key_heads);
  const bool special = p.cls_rope == ClsRope::kMask && !has_position(p.table_q, b, n);
  const PlainRow<T> row{args, b, h, n, key_head, p.has_rotary && special};
  const bool drops = p.dropout_p > 0;
  const Dropout dropout{drops ? static_cast<uint64_t>(*p.seed_data) : 0,
                        static_cast<uint64_t>(p.dropout_p * 4294967296.0), 1.0f};

  const int32_t with = args.keys.with_position(b);
  const int32_t keys = with + args.keys.without_position(b);
  C maximum = kNothing;
  C sum = 0;
  C out[kPlainChannels] = {};
  for (int32_t first = 0; first < keys; first += kPlainThreads) {
    const int32_t place = first + thread;
    const int32_t token = place < keys ? args.keys.token(b, place) : 0;
    const C score = place < keys ? row.score(place, with, token) : kNothing;
    const C largest = reduce_block<C, true>(score, places);
    const C before = maximum;
    maximum = largest > maximum ? largest : maximum;
    const C shift = maximum == kNothing ? C{0} : maximum;
    const C factor = plain_exp(before - shift);
    const C weight = plain_exp(score - shift);
    sum = sum * factor + reduce_block<C, false>(weight, places);
    const bool kept =
        !drops || place >= keys ||
        dropout_factor(dropout, b * p.heads + h, static_cast<int32_t>(n), token) != 0.0f;
    weights[thread] = kept ? weight : C{0};
    __syncthreads();
    const int32_t count = min(kPlainThreads, keys - first);
#pragma unroll
    for (int i = 0; i < kPlainChannels; ++i) {
      const int64_t c =
          (static_cast<int64_t>(value_block) * kPlainChannels + i) * kPlainThreads + thread;
      if (c >= p.value_dim) break;
      const T* const v = static_cast<const T*>(p.v.data) + b * p.v.stride_b +
                         key_head * p.v.stride_h + c * p.v.stride_d;
      out[i] *= factor;
      for (int32_t j = 0; j < count; ++j) {
        const int32_t at = args.keys.token(b, first + j);
        out[i] += weights[j] * to_compute(v[at * p.v.stride_n]);
      }
    }
    __syncthreads();
  }

  const C inverse = sum == C{0} ? C{0} : static_cast<C>(args.kept) / sum;
#pragma unroll
  for (int i = 0; i < kPlainChannels; ++i) {
    const int64_t c =
        (static_cast<int64_t>(value_block) * kPlainChannels + i) * kPlainThreads + thread;
    if (c >= p.value_dim) break;
    static_cast<T*>(p.out.data)[b * p.out.stride_b + h * p.out.stride_h + n * p.out.stride_n +
                                c * p.out.stride_d] = from_compute<T>(out[i] * inverse);
  }
  if (thread == 0 && value_block == 0) {
    static_cast<C*>(p.lse)[(b * p.heads + h) * p.queries + n] =
        sum == C{0} ? kNothing : maximum + log(sum);
  }
}

}  // namespace x_rope_cls::cuda
