// Inner products of rows in fours with many token states that lie in memory as they are: a vector
// holds a few channels of each of four rows and meets the same channels of a token, repeated four
// times. Against few_rows.h hardly any sum over lanes is left at the end, and one load serves four
// rows.
#pragma once

#include <cstdint>

#include "few_rows.h"
#include "vec.h"

namespace x_rope_cls::cpu::X_ROPE_CLS_ISA {
namespace {

constexpr int64_t kQuad = 4;
template <typename T>
constexpr int kQuadChannels = kLanes<T> / static_cast<int>(kQuad);  // of each row in a vector

// Whether rows come in fours, and vectors are long enough to hold several channels of them.
template <typename T>
constexpr bool fills_quads(int64_t rows) {
  return kQuadChannels<T> > 1 && rows % kQuad == 0;
}

// Four rows: channels [c, c + kQuadChannels) of row r at [c / kQuadChannels][r][..], and a cache
// line between them and the next four.
template <typename T>
constexpr int64_t quad_stride(int64_t width) {
  return kQuad * width + 64 / static_cast<int64_t>(sizeof(T));
}
template <typename T>
constexpr int64_t quad_rows_size(int64_t rows, int64_t width) {
  return fills_quads<T>(rows) ? rows / kQuad * quad_stride<T>(width) : 0;
}

// Two by two blocks of kSize lanes are transposed.
template <typename T, int kSize>
X_ROPE_CLS_INLINE void swap_blocks(Vec<T>& upper, Vec<T>& lower) {
  const Vec<T> first = shuffle<T, UpperBlocks<kLanes<T>, kSize>>(upper, lower);
  lower = shuffle<T, LowerBlocks<kLanes<T>, kSize>>(upper, lower);
  upper = first;
}

// Four rows of `width` channels, a multiple of the lanes.
template <typename T>
void rows_to_quad(const T* const (&rows)[kQuad], int64_t width, T* quad) {
  constexpr int kChannels = kQuadChannels<T>;
  for (int64_t c = 0; c < width; c += kLanes<T>, quad += kQuad * kLanes<T>) {
    Vec<T> v[kQuad];
    X_ROPE_CLS_UNROLL
    for (int r = 0; r < kQuad; ++r) v[r] = load<T>(rows[r] + c);
    swap_blocks<T, 2 * kChannels>(v[0], v[2]);
    swap_blocks<T, 2 * kChannels>(v[1], v[3]);
    swap_blocks<T, kChannels>(v[0], v[1]);
    swap_blocks<T, kChannels>(v[2], v[3]);
    X_ROPE_CLS_UNROLL
    for (int i = 0; i < kQuad; ++i) store<T>(quad + i * kLanes<T>, v[i]);
  }
}
// `count` rows, a multiple of four, `stride` apart.
template <typename T>
void rows_to_quads(const T* rows, int64_t stride, int64_t count, int64_t width, T* quads) {
  if constexpr (fills_quads<T>(kQuad)) {
    for (int64_t r = 0; r < count; r += kQuad, quads += quad_stride<T>(width)) {
      const T* const four = rows + r * stride;
      rows_to_quad<T>({four, four + stride, four + 2 * stride, four + 3 * stride}, width, quads);
    }
  }
}

// The channels at p for each of four rows.
template <typename T>
X_ROPE_CLS_INLINE Vec<T> load_repeated(const T* p) {
  constexpr int64_t kBytes = kQuadChannels<T> * static_cast<int64_t>(sizeof(T));
#ifdef __AVX512F__
  if constexpr (kBytes == 16) {
    const __m128i part = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return (Vec<T>)_mm512_maskz_broadcast_i32x4(0xffff, part);
  }
#elif defined(__AVX2__)
  if constexpr (kBytes == 8) {
    double part;
    __builtin_memcpy(&part, p, sizeof(part));
    return (Vec<T>)_mm256_set1_pd(part);
  }
#endif
  Vec<T> v;
  for (int r = 0; r < kQuad; ++r)
    __builtin_memcpy(reinterpret_cast<char*>(&v) + r * kBytes, p, kBytes);
  return v;
}

// Of every four lanes of a the two even (odd) ones, then those of b.
template <int kLaneCount, int kOdd>
struct EveryOther {
  static constexpr int at(int i) {
    const int lane = i / 4 * 4 + i % 2 * 2 + kOdd;
    return i % 4 < 2 ? lane : kLaneCount + lane;
  }
};
template <typename T, int kOdd>
X_ROPE_CLS_INLINE Vec<T> every_other(Vec<T> a, Vec<T> b) {
  return shuffle<T, EveryOther<kLanes<T>, kOdd>>(a, b);
}
template <typename T>
X_ROPE_CLS_INLINE Vec<T> add_neighbours(Vec<T> a, Vec<T> b) {
  return every_other<T, 0>(a, b) + every_other<T, 1>(a, b);
}

// to[r * stride + j] = sum of the channels of row r in v[j], for kCount <= 4 tokens.
template <typename T, int kCount>
X_ROPE_CLS_INLINE void store_quad(const Vec<T>* v, T* to, int64_t stride) {
  static_assert(kQuadChannels<T> == 2 || kQuadChannels<T> == 4);
  const auto token = [&](int j) { return v[min_of(j, kCount - 1)]; };
  const Vec<T> low = add_neighbours<T>(token(0), token(1));
  const Vec<T> high = kCount > 2 ? add_neighbours<T>(token(2), token(3)) : low;
  // Rows of the four lanes from 4 * i on: i, or i * 2 and i * 2 + 1.
  const auto put = [&](const Vec<T>& sums, int i, int64_t row) {
    __builtin_memcpy(to + row * stride, reinterpret_cast<const T*>(&sums) + 4 * i,
                     kCount * sizeof(T));
  };
  if constexpr (kQuadChannels<T> == 4) {
    const Vec<T> sums = add_neighbours<T>(low, high);
    X_ROPE_CLS_UNROLL
    for (int i = 0; i < 4; ++i) put(sums, i, i);
  } else {
    const Vec<T> even = every_other<T, 0>(low, high);
    const Vec<T> odd = every_other<T, 1>(low, high);
    X_ROPE_CLS_UNROLL
    for (int i = 0; i < 2; ++i) {
      put(even, i, 2 * i);
      put(odd, i, 2 * i + 1);
    }
  }
}

// Inner products of kQuads times four rows, `quads`, with kTokens tokens. As dot_tile.
template <typename T, int kQuads, int kTokens, bool kFetch>
static __attribute__((noinline)) void quad_tile(const T* quads, int64_t quads_stride, const T* x,
                                                int64_t x_stride, int64_t channels, Fetch fetch,
                                                T* out, int64_t out_stride) {
  constexpr int kLine = 64 / static_cast<int>(sizeof(T));
  Vec<T> acc[kQuads][kTokens] = {};
  for (int64_t c = 0; c < channels; c += kLanes<T>) {
    if (kFetch && c % kLine == 0) {
      X_ROPE_CLS_UNROLL
      for (int j = 0; j < kTokens; ++j) {
        __builtin_prefetch(x + j * x_stride + fetch.near + c, 0, 3);
        if (j % 2 == 0) __builtin_prefetch(x + j * x_stride + fetch.far + c, 0, 2);
      }
    }
    const auto add_products = [&](int i) __attribute__((always_inline)) {
      Vec<T> left[kQuads];
      X_ROPE_CLS_UNROLL
      for (int g = 0; g < kQuads; ++g) {
        left[g] = load<T>(quads + g * quads_stride + (c + i) * kQuad);
      }
      X_ROPE_CLS_UNROLL
      for (int j = 0; j < kTokens; ++j) {
        const Vec<T> right = load_repeated<T>(x + j * x_stride + c + i);
        X_ROPE_CLS_UNROLL
        for (int g = 0; g < kQuads; ++g) acc[g][j] += left[g] * right;
      }
    };
    if constexpr (kQuads > 2) {
      X_ROPE_CLS_UNROLL
      for (int i = 0; i < kLanes<T>; i += kQuadChannels<T>) add_products(i);
    } else {  // unrolled, GCC 12 keeps sums in memory where registers are few
      _Pragma("GCC unroll 1") for (int i = 0; i < kLanes<T>; i += kQuadChannels<T>) add_products(i);
    }
  }
  X_ROPE_CLS_UNROLL
  for (int g = 0; g < kQuads; ++g) {
    T* const to = out + g * kQuad * out_stride;
    constexpr int kWhole = kTokens / 4 * 4;
    X_ROPE_CLS_UNROLL
    for (int j = 0; j < kWhole; j += 4) store_quad<T, 4>(acc[g] + j, to + j, out_stride);
    if constexpr (kWhole < kTokens) {
      store_quad<T, kTokens - kWhole>(acc[g] + kWhole, to + kWhole, out_stride);
    }
  }
}

// Tokens of a tile of so many fours.
constexpr int quad_tokens(int quads) {
  if (kManyRegisters) return 8;
  return quads == 3 ? 4 : quads == 2 ? 6 : 8;
}

// Inner products of kQuads times four rows with tokens [first, last).
template <typename T, int kQuads>
void quad_pass(const T* quads, int64_t quads_stride, const TokenBlock<T>& x, int64_t first,
               int64_t last, int64_t channels, bool near, int64_t far, T* out, int64_t out_stride) {
  int64_t n = first;
  const auto run = [&](auto count) {
    constexpr int kTokens = decltype(count)::value;
    for (; n + kTokens <= last; n += kTokens) {
      if (kTokens == 6 && last - n == 8) break;  // 4 and 4 take less time than 6, 1 and 1
      const T* const from = x.data + n * x.stride;
      const bool more = near && n + int64_t{2} * kTokens <= x.tokens;
      const Fetch fetch{more ? kTokens * x.stride : 0, far};
      const auto tile = more || far != 0 ? quad_tile<T, kQuads, kTokens, true>
                                         : quad_tile<T, kQuads, kTokens, false>;
      tile(quads, quads_stride, from, x.stride, channels, fetch, out + n, out_stride);
    }
  };
  run(std::integral_constant<int, quad_tokens(kQuads)>{});
  if constexpr (quad_tokens(kQuads) > 4) run(std::integral_constant<int, 4>{});
  run(std::integral_constant<int, 1>{});
}

// As dot_rows, for rows as rows_to_quads lays them out. Columns behind the last token are left
// alone. near: whether tokens are not in the cache yet, and each tile fetches those of the next
// one; beside the loads of two fours there is no time for it otherwise.
template <typename T>
void quad_rows(const T* quads, int64_t rows, const TokenBlock<T>& x, int64_t channels, bool near,
               int64_t next, T* out, int64_t out_stride) {
  if constexpr (fills_quads<T>(kQuad)) {
    constexpr int64_t kTogether = 24;  // tokens that all rows meet while they are near
    const int64_t stride = quad_stride<T>(channels);
    const int64_t all = rows / kQuad;
    for (int64_t n = 0; n < x.tokens; n += kTogether) {
      const int64_t last = min_of(x.tokens, n + kTogether);
      int64_t take = 0;
      int64_t passes = 0;
      for (int64_t i = 0; i < all; i += take) {
        const int64_t left = all - i;
        take = left >= 3 && left != 4 ? 3 : min_of<int64_t>(left, 2);
        // The first rows that meet tokens fetch those that follow, the second ones the next
        // block's.
        const int64_t far = take == all || passes == 1 ? next : 0;
        ++passes;
        const auto pass = take == 3   ? quad_pass<T, 3>
                          : take == 2 ? quad_pass<T, 2>
                                      : quad_pass<T, 1>;
        pass(quads + i * stride, stride, x, n, last, channels, (near || take != 2) && i == 0, far,
             out + i * kQuad * out_stride, out_stride);
      }
    }
  }
}

}  // namespace
}  // namespace x_rope_cls::cpu::X_ROPE_CLS_ISA
