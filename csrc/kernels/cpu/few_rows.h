// Products of a few rows with many token states that lie in memory as they are, a token a row of
// channels: nothing is transposed. Scores are inner products along the channels; weighted sums keep
// a panel of channels in registers and pass over the tokens.
#pragma once

#include <cstdint>
#include <type_traits>

#include "tile.h"
#include "vec.h"

namespace x_rope_cls::cpu::X_ROPE_CLS_ISA {
namespace {

// Registers that tiles may count on: sixteen, or the thirty-two of AVX-512.
constexpr bool kManyRegisters = X_ROPE_CLS_LANES == 16;

// Token states: element (n, c) at data[n * stride + c], channels padded to whole vectors.
template <typename T>
struct TokenBlock {
  const T* data;
  int64_t stride;
  int64_t tokens;
};

// -------------------------------------------------------------------------------------------------
// Inner products.

constexpr int64_t kDotTokens = 4;

template <int kLaneCount, int kPart>
struct FirstOfParts {
  static constexpr int at(int i) { return i * kPart % kLaneCount; }
};

// Parts of kPart lanes of a, then of b, added in pairs.
template <typename T, int kPart>
X_ROPE_CLS_INLINE Vec<T> add_pairs(Vec<T> a, Vec<T> b) {
  return shuffle<T, EvenParts<kPart>>(a, b) + shuffle<T, OddParts<kPart>>(a, b);
}
template <typename T, int kPart>
X_ROPE_CLS_INLINE Vec<T> sum_parts(Vec<T> v) {
  if constexpr (kPart > 1) {
    v += shuffle<T, SwapParts<kPart / 2>>(v, v);
    return sum_parts<T, kPart / 2>(v);
  }
  return v;
}

// to[j] = sum of the lanes of v[j].
template <typename T>
X_ROPE_CLS_INLINE void store_sums(const Vec<T> (&v)[kDotTokens], T* to) {
  constexpr int kL = kLanes<T>;
  const Vec<T> low = add_pairs<T, kL / 2>(v[0], v[1]);
  const Vec<T> high = add_pairs<T, kL / 2>(v[2], v[3]);
  if constexpr (kL == 2) {
    store<T>(to, low);
    store<T>(to + 2, high);
  } else {
    constexpr int kPart = kL / kDotTokens;
    const Vec<T> sums = sum_parts<T, kPart>(add_pairs<T, kPart>(low, high));
    const Vec<T> first = shuffle<T, FirstOfParts<kL, kPart>>(sums, sums);
    __builtin_memcpy(to, &first, kDotTokens * sizeof(T));
  }
}

// What is fetched while inner products of tokens are taken.
struct Fetch {
  int64_t near;  // distance to the same channels of the next tokens, into L1; 0: none
  int64_t far;   // to those of the next block, into L2; 0: none
};

// Which of the tokens to come are fetched: every other one where something else fetches the rest.
enum class Fetched { kNone, kHalf, kAll };
template <Fetched kFetched>
using FetchedConstant = std::integral_constant<Fetched, kFetched>;

template <typename T, int kRows, bool kNear, Fetched kFar>
static __attribute__((noinline)) void dot_tile(const T* a, int64_t a_stride, const T* x0,
                                               const T* x1, const T* x2, const T* x3,
                                               int64_t channels, Fetch fetch, T* out,
                                               int64_t out_stride) {
  Vec<T> acc[kRows][kDotTokens] = {};
  for (int64_t c = 0; c < channels; c += kLanes<T>) {
    Vec<T> left[kRows];
    X_ROPE_CLS_UNROLL
    for (int r = 0; r < kRows; ++r) left[r] = load<T>(a + r * a_stride + c);
    const T* const from[kDotTokens] = {x0, x1, x2, x3};
    X_ROPE_CLS_UNROLL
    for (int j = 0; j < kDotTokens; ++j) {
      const Vec<T> right = load<T>(from[j] + c);
      if constexpr (kNear) __builtin_prefetch(from[j] + fetch.near + c, 0, 3);
      if (kFar == Fetched::kAll || (kFar == Fetched::kHalf && j % 2 == 0)) {
        __builtin_prefetch(from[j] + fetch.far + c, 0, 2);
      }
      X_ROPE_CLS_UNROLL
      for (int r = 0; r < kRows; ++r) acc[r][j] += left[r] * right;
    }
  }
  X_ROPE_CLS_UNROLL
  for (int r = 0; r < kRows; ++r) store_sums<T>(acc[r], out + r * out_stride);
}

// Rows that the next tile takes of so many.
constexpr int64_t dot_rows_next(int64_t rows) {
  if (kManyRegisters) {
    if (rows >= 6 && rows != 7 && rows != 8) return 6;
    return rows >= 4 ? 4 : rows;
  }
  return rows >= 3 && rows != 4 ? 3 : min_of<int64_t>(rows, 2);
}

// The arguments of one tile of inner products.
template <typename S, typename T>
struct DotTile {
  const S* a;
  const S* x[kDotTokens];
  T* out;
  int64_t rows;
  Fetch fetch;
  bool all;  // fetch.far: of all tokens, not of every other one
};

// f(tile) for every tile of rows and kDotTokens tokens; behind the last token it is repeated. The
// first rows that meet tokens fetch those that follow, the second ones those of the next block, all
// of them or every other one.
template <typename S, typename T, typename F>
X_ROPE_CLS_INLINE void for_each_dot_tile(const S* a, int64_t a_stride, int64_t rows,
                                         const TokenBlock<S>& x, int64_t next, bool all, T* out,
                                         int64_t out_stride, F&& f) {
  constexpr int64_t kTogether = 16;  // rows that pass over the tokens while they are in L1
  for (int64_t start = 0; start < rows; start += kTogether) {
    const int64_t end = min_of(rows, start + kTogether);
    const int64_t second = start + dot_rows_next(end - start);
    for (int64_t n = 0; n < x.tokens; n += kDotTokens) {
      DotTile<S, T> tile{};
      for (int j = 0; j < kDotTokens; ++j) {
        tile.x[j] = x.data + min_of(n + j, x.tokens - 1) * x.stride;
      }
      for (int64_t r = start; r < end; r += tile.rows) {
        tile.a = a + r * a_stride;
        tile.out = out + r * out_stride + n;
        tile.rows = dot_rows_next(end - r);
        if (r == start && n + 2 * kDotTokens <= x.tokens) tile.fetch.near = kDotTokens * x.stride;
        if (start == 0 && r == (second < end ? second : start)) tile.fetch.far = next;
        tile.all = all;
        f(tile);
      }
    }
  }
}

// Calls f with the number of rows of a tile, and with what it fetches, as constants.
template <typename F>
X_ROPE_CLS_INLINE void with_dot_rows(int64_t rows, F&& f) {
  if constexpr (kManyRegisters) {
    if (rows == 6) return f(std::integral_constant<int, 6>{});
    if (rows == 4) return f(std::integral_constant<int, 4>{});
  }
  if (rows == 3) return f(std::integral_constant<int, 3>{});
  if (rows == 2) return f(std::integral_constant<int, 2>{});
  f(std::integral_constant<int, 1>{});
}
template <typename S, typename T, typename F>
X_ROPE_CLS_INLINE void with_dot_tile(const DotTile<S, T>& tile, F&& f) {
  const Fetch& fetch = tile.fetch;
  with_dot_rows(tile.rows, [&](auto count) {
    const auto with_far = [&](auto near) {
      if (fetch.far == 0) return f(count, near, FetchedConstant<Fetched::kNone>{});
      if (tile.all) return f(count, near, FetchedConstant<Fetched::kAll>{});
      f(count, near, FetchedConstant<Fetched::kHalf>{});
    };
    fetch.near != 0 ? with_far(std::true_type{}) : with_far(std::false_type{});
  });
}

// out[r * out_stride + n] = <a_r, x_n>, columns up to the next multiple of kDotTokens are written.
// channels: a multiple of the lanes. `next`: distance in elements to the tokens that will be read
// next, of which every other, or all, are fetched into the cache meanwhile; 0: none.
template <typename T>
void dot_rows(const T* a, int64_t a_stride, int64_t rows, const TokenBlock<T>& x, int64_t channels,
              int64_t next, T* out, int64_t out_stride, bool all = false) {
  for_each_dot_tile(a, a_stride, rows, x, next, all, out, out_stride, [&](const DotTile<T, T>& t) {
    with_dot_tile(t, [&](auto count, auto near, auto far) {
      dot_tile<T, decltype(count)::value, decltype(near)::value, decltype(far)::value>(
          t.a, a_stride, t.x[0], t.x[1], t.x[2], t.x[3], channels, t.fetch, t.out, out_stride);
    });
  });
}

// -------------------------------------------------------------------------------------------------
// Weighted sums.

// Weighted sums fetch the odd ones of the tokens to come where inner products have fetched the
// others, so that memory is kept busy all the time, or all of them.

// Whether sums of so many rows fetch all: inner products, which load more for each multiply-add,
// are faster alone then. Few rows would not cover it.
constexpr bool sums_fetch_all(int64_t rows) { return kManyRegisters && rows >= 6; }

// acc[r][v] = or += sum over n of w(r, n) x(n, v). Of tokens `ahead` elements further a line more
// is fetched than is read here.
template <typename T, int kRows, int kVectors, bool kAccumulate, Fetched kFetched>
static __attribute__((noinline)) void sum_tile(const T* w, int64_t w_stride, const T* x,
                                               int64_t x_stride, int64_t tokens, int64_t ahead,
                                               T* out, int64_t out_stride) {
  Vec<T> acc[kRows][kVectors];
  X_ROPE_CLS_UNROLL
  for (int r = 0; r < kRows; ++r) {
    X_ROPE_CLS_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      acc[r][v] = kAccumulate ? load<T>(out + r * out_stride + v * kLanes<T>) : Vec<T>{};
    }
  }
  auto rows = LeftRows<T, Left::kByRow, kRows>::make(w, w_stride);
  for (int64_t n = 0; n < tokens; ++n) {
    Vec<T> right[kVectors];
    X_ROPE_CLS_UNROLL
    for (int v = 0; v < kVectors; ++v) right[v] = load<T>(x + v * kLanes<T>);
    if (kFetched == Fetched::kAll || (kFetched == Fetched::kHalf && n % 2 != 0)) {
      constexpr int kLine = 64 / static_cast<int>(sizeof(T));
      X_ROPE_CLS_UNROLL
      for (int c = 0; c < kVectors * kLanes<T> + kLine; c += kLine) {
        __builtin_prefetch(x + ahead + c, 0, 2);
      }
    }
    X_ROPE_CLS_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const Vec<T> left = broadcast<T>(rows.at(r, 0));
      X_ROPE_CLS_UNROLL
      for (int v = 0; v < kVectors; ++v) acc[r][v] += left * right[v];
    }
    rows.advance(1);
    x += x_stride;
  }
  X_ROPE_CLS_UNROLL
  for (int r = 0; r < kRows; ++r) {
    X_ROPE_CLS_UNROLL
    for (int v = 0; v < kVectors; ++v) store<T>(out + r * out_stride + v * kLanes<T>, acc[r][v]);
  }
}

// All channels of one tile of rows: panels of kVectors, then of two and of one. The first panels
// fetch all that there is of the tokens to come, so that it is there when it is wanted.
template <typename T, int kRows, int kVectors, bool kAccumulate>
X_ROPE_CLS_INLINE void sum_row_tile(const T* w, int64_t w_stride, const TokenBlock<T>& x,
                                    int64_t channels, Fetched fetched, int64_t ahead, T* out,
                                    int64_t out_stride) {
  constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(T));
  int64_t c = 0;
  int64_t more = 0;  // a line for each panel so far
  const auto panels_of = [&](auto vectors) {
    constexpr int kWide = decltype(vectors)::value;
    constexpr auto kNone = sum_tile<T, kRows, kWide, kAccumulate, Fetched::kNone>;
    const auto fetch =
        fetched == Fetched::kAll    ? sum_tile<T, kRows, kWide, kAccumulate, Fetched::kAll>
        : fetched == Fetched::kHalf ? sum_tile<T, kRows, kWide, kAccumulate, Fetched::kHalf>
                                    : kNone;
    for (; c + kWide * kLanes<T> <= channels; c += kWide * kLanes<T>, more += kLine) {
      const auto tile = c + more < channels ? fetch : kNone;
      tile(w, w_stride, x.data + c, x.stride, x.tokens, ahead + more, out + c, out_stride);
    }
  };
  panels_of(std::integral_constant<int, kVectors>{});
  if constexpr (kVectors > 2) panels_of(std::integral_constant<int, 2>{});
  panels_of(std::integral_constant<int, 1>{});
}

// out[r * out_stride + c] = or += sum over n of w[r * w_stride + n] x_n[c]. channels: a multiple of
// the lanes. `ahead`: as `next` of dot_rows, which has been told the same unless `all` or
// sums_fetch_all.
template <typename T, bool kAccumulate = true>
void sum_rows(const T* w, int64_t w_stride, int64_t rows, const TokenBlock<T>& x, int64_t channels,
              int64_t ahead, T* out, int64_t out_stride, bool all = false) {
  Fetched fetched = ahead == 0                    ? Fetched::kNone
                    : all || sums_fetch_all(rows) ? Fetched::kAll
                                                  : Fetched::kHalf;
  int64_t r = 0;
  const auto tile = [&](auto count, auto vectors) {
    constexpr int kRows = decltype(count)::value;
    sum_row_tile<T, kRows, decltype(vectors)::value, kAccumulate>(
        w + r * w_stride, w_stride, x, channels, fetched, ahead, out + r * out_stride, out_stride);
    fetched = Fetched::kNone;  // once is enough
    return kRows;
  };
  using std::integral_constant;
  while (r < rows) {
    const int64_t left = rows - r;
    if constexpr (kManyRegisters) {
      if (left >= 8 && left != 9 && left != 10 && left != 12) {
        r += tile(integral_constant<int, 8>{}, integral_constant<int, 3>{});
      } else if (left >= 6) {
        r += tile(integral_constant<int, 6>{}, integral_constant<int, 4>{});
      } else if (left >= 4) {
        r += tile(integral_constant<int, 4>{}, integral_constant<int, 6>{});
      } else if (left >= 2) {
        r += tile(integral_constant<int, 2>{}, integral_constant<int, 8>{});
      } else {
        r += tile(integral_constant<int, 1>{}, integral_constant<int, 8>{});
      }
    } else {
      if (left >= 6 && left != 8) {
        r += tile(integral_constant<int, 6>{}, integral_constant<int, 2>{});
      } else if (left >= 4) {
        r += tile(integral_constant<int, 4>{}, integral_constant<int, 3>{});
      } else if (left >= 2) {
        r += tile(integral_constant<int, 2>{}, integral_constant<int, 4>{});
      } else {
        r += tile(integral_constant<int, 1>{}, integral_constant<int, 6>{});
      }
    }
  }
}

}  // namespace
}  // namespace x_rope_cls::cpu::X_ROPE_CLS_ISA
