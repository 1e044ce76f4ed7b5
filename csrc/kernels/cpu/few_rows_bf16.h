// The products of few_rows.h on bfloat16 token states as they are, by dot products of pairs into
// float32: twice the rate of float32, and nothing is converted.
#pragma once

#include "convert.h"
#include "few_rows.h"

namespace x_rope_cls::cpu::X_ROPE_CLS_ISA {
namespace {

// Channels that the kernels below take at a time.
constexpr int64_t kDotChannels = 32;
constexpr int64_t kHalf = kDotChannels / 2;  // of a vector of float32

#ifdef __AVX512BF16__
template <typename S>
constexpr bool kHasDots = __is_same(S, BFloat16);

X_ROPE_CLS_INLINE __m512i load_bits(const BFloat16* p) { return _mm512_loadu_si512(p); }
X_ROPE_CLS_INLINE __m512 add_dots(__m512 sum, __m512i a, __m512i b) {
  return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
}

template <int kRows, bool kNear, Fetched kFar>
static __attribute__((noinline)) void dot_tile_bf16(const BFloat16* a, int64_t a_stride,
                                                    const BFloat16* x0, const BFloat16* x1,
                                                    const BFloat16* x2, const BFloat16* x3,
                                                    int64_t channels, Fetch fetch, float* out,
                                                    int64_t out_stride) {
  __m512 acc[kRows][kDotTokens];
  X_ROPE_CLS_UNROLL
  for (int r = 0; r < kRows; ++r) {
    X_ROPE_CLS_UNROLL
    for (int j = 0; j < kDotTokens; ++j) acc[r][j] = _mm512_setzero_ps();
  }
  for (int64_t c = 0; c < channels; c += kDotChannels) {
    __m512i left[kRows];
    X_ROPE_CLS_UNROLL
    for (int r = 0; r < kRows; ++r) left[r] = load_bits(a + r * a_stride + c);
    const BFloat16* const from[kDotTokens] = {x0, x1, x2, x3};
    X_ROPE_CLS_UNROLL
    for (int j = 0; j < kDotTokens; ++j) {
      const __m512i right = load_bits(from[j] + c);
      if constexpr (kNear) __builtin_prefetch(from[j] + fetch.near + c, 0, 3);
      if (kFar == Fetched::kAll || (kFar == Fetched::kHalf && j % 2 == 0)) {
        __builtin_prefetch(from[j] + fetch.far + c, 0, 2);
      }
      X_ROPE_CLS_UNROLL
      for (int r = 0; r < kRows; ++r) acc[r][j] = add_dots(acc[r][j], left[r], right);
    }
  }
  X_ROPE_CLS_UNROLL
  for (int r = 0; r < kRows; ++r) {
    FloatVec sums[kDotTokens];
    X_ROPE_CLS_UNROLL
    for (int j = 0; j < kDotTokens; ++j) sums[j] = reinterpret_cast<FloatVec>(acc[r][j]);
    store_sums<float>(sums, out + r * out_stride);
  }
}

// As dot_rows. channels: a multiple of kDotChannels.
static inline void dot_rows(const BFloat16* a, int64_t a_stride, int64_t rows,
                            const TokenBlock<BFloat16>& x, int64_t channels, int64_t next,
                            float* out, int64_t out_stride, bool all = false) {
  for_each_dot_tile(
      a, a_stride, rows, x, next, all, out, out_stride, [&](const DotTile<BFloat16, float>& t) {
        with_dot_tile(t, [&](auto count, auto near, auto far) {
          dot_tile_bf16<decltype(count)::value, decltype(near)::value, decltype(far)::value>(
              t.a, a_stride, t.x[0], t.x[1], t.x[2], t.x[3], channels, t.fetch, t.out, out_stride);
        });
      });
}

// acc[r][2 i], acc[r][2 i + 1] += channels 32 i ... of w(r, n) x_n + w(r, n + 1) x_(n + 1), for all
// pairs of tokens. Interleaving two tokens leaves channels in another order, see natural_order.
template <int kRows, int kPieces, Fetched kFetched>
static __attribute__((noinline)) void sum_tile_bf16(const BFloat16* w, int64_t w_stride,
                                                    const TokenBlock<BFloat16>& x, int64_t ahead,
                                                    float* out, int64_t out_stride) {
  __m512 acc[kRows][2 * kPieces];
  X_ROPE_CLS_UNROLL
  for (int r = 0; r < kRows; ++r) {
    X_ROPE_CLS_UNROLL
    for (int v = 0; v < 2 * kPieces; ++v)
      acc[r][v] = _mm512_loadu_ps(out + r * out_stride + kHalf * v);
  }
  for (int64_t n = 0; n < x.tokens; n += 2) {
    const BFloat16* const even = x.data + n * x.stride;
    const BFloat16* const odd = n + 1 < x.tokens ? even + x.stride : even;  // weight 0 if not there
    __m512i right[2 * kPieces];
    X_ROPE_CLS_UNROLL
    for (int i = 0; i < kPieces; ++i) {
      const __m512i a = load_bits(even + kDotChannels * i);
      const __m512i b = load_bits(odd + kDotChannels * i);
      right[2 * i] = _mm512_unpacklo_epi16(a, b);
      right[2 * i + 1] = _mm512_unpackhi_epi16(a, b);
      if (kFetched == Fetched::kAll) __builtin_prefetch(even + ahead + kDotChannels * i, 0, 2);
      if (kFetched != Fetched::kNone) __builtin_prefetch(odd + ahead + kDotChannels * i, 0, 2);
    }
    X_ROPE_CLS_UNROLL
    for (int r = 0; r < kRows; ++r) {
      int32_t pair;
      __builtin_memcpy(&pair, w + r * w_stride + n, sizeof(pair));
      const __m512i left = _mm512_set1_epi32(pair);
      X_ROPE_CLS_UNROLL
      for (int v = 0; v < 2 * kPieces; ++v) acc[r][v] = add_dots(acc[r][v], left, right[v]);
    }
  }
  X_ROPE_CLS_UNROLL
  for (int r = 0; r < kRows; ++r) {
    X_ROPE_CLS_UNROLL
    for (int v = 0; v < 2 * kPieces; ++v)
      _mm512_storeu_ps(out + r * out_stride + kHalf * v, acc[r][v]);
  }
}

template <int kRows, int kPieces>
X_ROPE_CLS_INLINE void sum_row_tile_bf16(const BFloat16* w, int64_t w_stride,
                                         TokenBlock<BFloat16> x, int64_t channels, Fetched fetched,
                                         int64_t ahead, float* out, int64_t out_stride) {
  const auto tile = fetched == Fetched::kAll    ? sum_tile_bf16<kRows, kPieces, Fetched::kAll>
                    : fetched == Fetched::kHalf ? sum_tile_bf16<kRows, kPieces, Fetched::kHalf>
                                                : sum_tile_bf16<kRows, kPieces, Fetched::kNone>;
  int64_t c = 0;
  for (; c + kDotChannels * kPieces <= channels; c += kDotChannels * kPieces) {
    tile(w, w_stride, x, ahead, out + c, out_stride);
    x.data += kDotChannels * kPieces;
  }
  for (; c < channels; c += kDotChannels) {
    sum_tile_bf16<kRows, 1, Fetched::kNone>(w, w_stride, x, 0, out + c, out_stride);
    x.data += kDotChannels;
  }
}

// As sum_rows, but channels of `out` are in the order of natural_order. The columns of w go on to
// an even number, with zeros.
static inline void sum_rows(const BFloat16* w, int64_t w_stride, int64_t rows,
                            const TokenBlock<BFloat16>& x, int64_t channels, int64_t ahead,
                            float* out, int64_t out_stride, bool all = false) {
  Fetched fetched = ahead == 0 ? Fetched::kNone : all ? Fetched::kAll : Fetched::kHalf;
  for (int64_t r = 0; r < rows;) {
    const int64_t left = rows - r;
    const BFloat16* const from = w + r * w_stride;
    float* const to = out + r * out_stride;
    int64_t take = 1;
    if (left >= 8 && left != 9 && left != 10 && left != 12) {
      sum_row_tile_bf16<8, 1>(from, w_stride, x, channels, fetched, ahead, to, out_stride);
      take = 8;
    } else if (left >= 6) {
      sum_row_tile_bf16<6, 2>(from, w_stride, x, channels, fetched, ahead, to, out_stride);
      take = 6;
    } else if (left >= 4) {
      sum_row_tile_bf16<4, 2>(from, w_stride, x, channels, fetched, ahead, to, out_stride);
      take = 4;
    } else if (left >= 2) {
      sum_row_tile_bf16<2, 4>(from, w_stride, x, channels, fetched, ahead, to, out_stride);
      take = 2;
    } else {
      sum_row_tile_bf16<1, 4>(from, w_stride, x, channels, fetched, ahead, to, out_stride);
    }
    fetched = Fetched::kNone;  // once is enough
    r += take;
  }
}

// Channels of a row as sum_rows leaves them, put in order.
static inline void natural_order(float* row, int64_t channels) {
  // Within 32 channels: 0-3, 8-11, 16-19, 24-27, then the other fours.
  const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
  for (int64_t c = 0; c < channels; c += kDotChannels) {
    const __m512 low = _mm512_loadu_ps(row + c);
    const __m512 high = _mm512_loadu_ps(row + c + 16);
    _mm512_storeu_ps(row + c, _mm512_permutex2var_ps(low, first, high));
    _mm512_storeu_ps(row + c + 16, _mm512_permutex2var_ps(low, second, high));
  }
}

// The way back.
static inline void dot_order(float* row, int64_t channels) {
  const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27);
  const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(4));
  for (int64_t c = 0; c < channels; c += kDotChannels) {
    const __m512 low = _mm512_loadu_ps(row + c);
    const __m512 high = _mm512_loadu_ps(row + c + kHalf);
    _mm512_storeu_ps(row + c, _mm512_permutex2var_ps(low, first, high));
    _mm512_storeu_ps(row + c + kHalf, _mm512_permutex2var_ps(low, second, high));
  }
}

// Dense rows of weights in bfloat16, `count` of them and a zero if that is odd.
static inline void round_weights(const float* from, int64_t count, BFloat16* to) {
  for (int64_t j = 0; j < count; ++j) to[j] = from_compute<BFloat16>(from[j]);
  if (count % 2 != 0) to[count] = BFloat16{0};
}
#else
template <typename S>
constexpr bool kHasDots = false;
#endif

}  // namespace
}  // namespace x_rope_cls::cpu::X_ROPE_CLS_ISA
