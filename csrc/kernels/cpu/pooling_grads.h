// Gradients of token states: the product of stacked weights, by column, with stacked rows, a few
// tokens at a time. Where nothing else is done to them they go from registers to memory.
#pragma once

#include "convert_vec.h"
#include "operands.h"
#include "pooling_common.h"
#include "stores.h"
#include "tile.h"

namespace x_rope_cls::cpu::X_ROPE_CLS_ISA {
namespace {

// What the product sums over: pairs of rows in bfloat16, or rows.
template <typename U>
struct GradFactors {
  const U* weights;  // (depth, columns)
  int64_t columns;
  const U* stack;  // (depth, width)
  int64_t stride;
  int64_t width;
  int64_t depth;
};

// Two vectors of the compute type, neighbours, to storage.
template <bool kStream, typename S, typename V>
X_ROPE_CLS_INLINE void put_pair(S* to, V first, V second) {
#ifdef __AVX512BF16__
  if constexpr (__is_same(S, BFloat16)) {
    return put<kStream>(to, (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first));
  }
#endif
  put<kStream>(to, vector_from_compute(first, S{}));
  put<kStream>(to + kLanes<Compute<S>>, vector_from_compute(second, S{}));
}

// Gradients of kRows tokens whose weights start at column `token`, all channels; `to` is dense.
template <typename S, typename U, int kRows, bool kStream>
static __attribute__((noinline)) void grad_tokens(const GradFactors<U>& f, int64_t token, S* to,
                                                  int64_t stride) {
  constexpr int64_t kL = kLanes<Sum<U>>;
  int64_t c = 0;
  for (; c + 2 * kL <= f.width; c += 2 * kL) {
    Vec<Sum<U>> acc[kRows][2] = {};
    multiply_tile<U, Left::kByColumn, kRows, 2>(acc, f.weights + token, f.columns, f.stack + c,
                                                f.stride, f.depth);
    X_ROPE_CLS_UNROLL
    for (int r = 0; r < kRows; ++r) put_pair<kStream>(to + r * stride + c, acc[r][0], acc[r][1]);
  }
  if (c == f.width) return;
  Vec<Sum<U>> acc[kRows][1] = {};
  multiply_tile<U, Left::kByColumn, kRows, 1>(acc, f.weights + token, f.columns, f.stack + c,
                                              f.stride, f.depth);
  X_ROPE_CLS_UNROLL
  for (int r = 0; r < kRows; ++r) {
    put<kStream>(to + r * stride + c, vector_from_compute(acc[r][0], S{}));
  }
}

// Those of `count` tokens from column `token` on, `stride` apart.
template <typename S, typename U, bool kStream>
void grads_of_tokens(const GradFactors<U>& f, int64_t token, int64_t count, S* to, int64_t stride) {
  constexpr int kMany = VecTraits<Sum<U>>::kTileRows;
  constexpr int kSome = kMany / 3;
  int64_t i = 0;
  for (; i + kMany <= count; i += kMany) {
    grad_tokens<S, U, kMany, kStream>(f, token + i, to + i * stride, stride);
  }
  for (; i + kSome <= count; i += kSome) {
    grad_tokens<S, U, kSome, kStream>(f, token + i, to + i * stride, stride);
  }
  for (; i < count; ++i) grad_tokens<S, U, 1, kStream>(f, token + i, to + i * stride, stride);
}

// Scores of `count` tokens in pairs of rows, those of the queries times `factor`.
template <typename U>
void pair_weights(const PoolPlan& plan, int64_t count, Sum<U> factor, const Sum<U>* scores, U* to) {
  using T = Sum<U>;
  const Vec<T> by = broadcast<T>(factor);
  for (int64_t r = 0; r < 2 * plan.rows; r += 2) {
    const T* row = scores + r * plan.columns;
    for (int64_t j = 0; j < count; j += kLanes<T>) {
      Vec<T> even = load<T>(row + j);
      Vec<T> odd = load<T>(row + plan.columns + j);
      if (r < plan.rows) even *= by;
      if (r + 1 < plan.rows) odd *= by;
      OperandTraits<U>::store_vector(to + j, OperandTraits<U>::paired(even, odd));
    }
    to += plan.columns;
  }
}

}  // namespace
}  // namespace x_rope_cls::cpu::X_ROPE_CLS_ISA
