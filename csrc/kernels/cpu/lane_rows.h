// Products of rows that fill the lanes of vectors with many token states that lie in memory as they
// are: a lane is a row, a token's channels are broadcast. Against few_rows.h no sum over lanes is
// left at the end, and a softmax over the tokens needs none either.
#pragma once

#include <cstdint>

#include "few_rows.h"
#include "partial_sums.h"
#include "softmax.h"
#include "tile.h"
#include "vec.h"

namespace x_rope_cls::cpu::X_ROPE_CLS_ISA {
namespace {

// Rows in panels two vectors wide: channel c of row r at
// [r / kPanelRows][c][r % kPanelRows], padded with zeros.
template <typename T>
constexpr int64_t kPanelRows = 2 * kLanes<T>;

template <typename T>
constexpr int64_t lane_rows_size(int64_t rows, int64_t width) {
  return round_up(rows, kPanelRows<T>) * width;
}

// Whether so few lanes stay empty that this is faster. With few registers, one vector of rows
// leaves tiles too small.
template <typename T>
constexpr bool fills_lanes(int64_t rows) {
  return rows >= (kManyRegisters ? 1 : 2) * kLanes<T> &&
         round_up(rows, kLanes<T>) - rows <= rows / 8;
}

// `count` <= kLanes rows, `stride` apart, to the lanes of panels from row `first` on, a multiple of
// kLanes; the other lanes become 0.
template <typename T>
void rows_to_lanes(const T* rows, int64_t stride, int64_t count, int64_t width, int64_t first,
                   T* panels) {
  constexpr int kL = kLanes<T>;
  const int64_t lane = first % kPanelRows<T>;
  T* const to = panels + (first - lane) * width + lane;
  for (int64_t c = 0; c < width; c += kL) {
    Vec<T> block[kL] = {};
    for (int64_t r = 0; r < count; ++r) block[r] = load<T>(rows + r * stride + c);
    transpose<T>(block);
    for (int i = 0; i < kL; ++i) store<T>(to + (c + i) * kPanelRows<T>, block[i]);
  }
}

// Inner products of kRows tokens with the rows of kVectors lanes. Beside them the same channels of
// tokens `ahead` elements further are fetched.
template <typename T, int kRows, int kVectors, bool kAhead>
static __attribute__((noinline)) void lane_score_tile(const T* x, int64_t x_stride, const T* panel,
                                                      int64_t channels, int64_t ahead, T* out,
                                                      int64_t out_stride) {
  constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(T));
  Vec<T> acc[kRows][kVectors] = {};
  for (int64_t c = 0; c < channels; c += kLanes<T>) {
    if (kAhead && c % kLine == 0) {
      X_ROPE_CLS_UNROLL
      for (int r = 0; r < kRows; ++r) __builtin_prefetch(x + r * x_stride + c + ahead, 0, 2);
    }
    multiply_tile<T, Left::kByRow, kRows, kVectors>(acc, x + c, x_stride, panel + c * kPanelRows<T>,
                                                    kPanelRows<T>, kLanes<T>);
  }
  X_ROPE_CLS_UNROLL
  for (int r = 0; r < kRows; ++r) {
    X_ROPE_CLS_UNROLL
    for (int v = 0; v < kVectors; ++v) store<T>(out + r * out_stride + v * kLanes<T>, acc[r][v]);
  }
}

template <typename T, int kVectors, bool kAhead>
void lane_score_panel(const TokenBlock<T>& x, const T* panel, int64_t channels, int64_t ahead,
                      T* out, int64_t out_stride) {
  constexpr int kMany = VecTraits<T>::kTileRows;
  int64_t n = 0;
  const auto run = [&](auto count) {
    constexpr int kRows = decltype(count)::value;
    for (; n + kRows <= x.tokens; n += kRows) {
      lane_score_tile<T, kRows, kVectors, kAhead>(x.data + n * x.stride, x.stride, panel, channels,
                                                  ahead, out + n * out_stride, out_stride);
    }
  };
  // Tokens whole pages apart meet in one set of L1, which does not hold lines of so many.
  const bool crowded = x.stride * static_cast<int64_t>(sizeof(T)) % 4096 == 0;
  if (!crowded || kMany <= 6) run(std::integral_constant<int, kMany>{});
  run(std::integral_constant<int, 6>{});
  run(std::integral_constant<int, 4>{});
  run(std::integral_constant<int, 1>{});
}

// out[n * out_stride + r] = <row r, x_n>, for rows up to a whole number of vectors. `ahead`: as
// `next` of dot_rows. Every token there is fetched; those that follow at once, a tile before their
// turn.
template <typename T>
void lane_scores(const T* panels, int64_t rows, const TokenBlock<T>& x, int64_t channels,
                 int64_t ahead, T* out, int64_t out_stride) {
  if (ahead == x.tokens * x.stride) ahead = VecTraits<T>::kTileRows * x.stride;
  for (int64_t r = 0; r < rows; r += kPanelRows<T>) {
    const T* panel = panels + r * channels;
    const bool one = rows - r <= kLanes<T>;
    if (r == 0 && ahead != 0) {
      one ? lane_score_panel<T, 1, true>(x, panel, channels, ahead, out, out_stride)
          : lane_score_panel<T, 2, true>(x, panel, channels, ahead, out, out_stride);
    } else {
      one ? lane_score_panel<T, 1, false>(x, panel, channels, 0, out + r, out_stride)
          : lane_score_panel<T, 2, false>(x, panel, channels, 0, out + r, out_stride);
    }
  }
}

// soften_row (softmax.h) for kLanes rows at once, scores (tokens, stride). `maximum` and `sum`: of
// each lane; `factors`: what the lanes' outputs must be multiplied with. Returns whether one of
// these is not 1.
template <typename T>
bool soften_lanes(T* scores, int64_t stride, int64_t tokens, T* maximum, T* sum, T* factors) {
  constexpr int kChains = 4;
  Vec<T> best[kChains];
  for (auto& v : best) v = broadcast<T>(-kInfinity<T>);
  int64_t n = 0;
  for (; n + kChains <= tokens; n += kChains) {
    X_ROPE_CLS_UNROLL
    for (int i = 0; i < kChains; ++i) {
      best[i] = max_or_second<T>(best[i], load<T>(scores + (n + i) * stride));
    }
  }
  for (; n < tokens; ++n) best[0] = max_or_second<T>(best[0], load<T>(scores + n * stride));
  const Vec<T> largest =
      max_or_second<T>(max_or_second<T>(best[0], best[1]), max_or_second<T>(best[2], best[3]));
  const Vec<T> before = load<T>(maximum);
  const Vec<T> so_far = load<T>(sum);
  const auto grown = largest > before + T{kRescaleAbove};
  const Vec<T> reference = grown ? largest : before;
  const auto rescaled = grown & (so_far != Vec<T>{});
  const Vec<T> factor = rescaled ? exp2<T>(before - reference) : broadcast<T>(T{1});
  bool any = false;
  for (int i = 0; i < kLanes<T>; ++i) any |= rescaled[i] != 0;
  store<T>(maximum, reference);
  store<T>(factors, factor);

  const Vec<T> by = reference == -kInfinity<T> ? Vec<T>{} : reference;
  Vec<T> sums[kChains] = {so_far * factor};
  for (n = 0; n + kChains <= tokens; n += kChains) {
    X_ROPE_CLS_UNROLL
    for (int i = 0; i < kChains; ++i) {
      const Vec<T> e = exp2<T>(load<T>(scores + (n + i) * stride) - by);
      store<T>(scores + (n + i) * stride, e);
      sums[i] += e;
    }
  }
  for (; n < tokens; ++n) {
    const Vec<T> e = exp2<T>(load<T>(scores + n * stride) - by);
    store<T>(scores + n * stride, e);
    sums[0] += e;
  }
  store<T>(sum, (sums[0] + sums[1]) + (sums[2] + sums[3]));
  return any;
}

// acc[r][v] = or += sum over n of w(n, r) x(n, v).
template <typename T, bool kAccumulate, int kRows, int kVectors>
static __attribute__((noinline)) void lane_sum_tile(const T* w, int64_t w_stride, const T* x,
                                                    int64_t x_stride, int64_t tokens, T* out,
                                                    int64_t out_stride) {
  Vec<T> acc[kRows][kVectors];
  X_ROPE_CLS_UNROLL
  for (int r = 0; r < kRows; ++r) {
    X_ROPE_CLS_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      T* const to = out + r * out_stride + v * kLanes<T>;
      acc[r][v] = kAccumulate ? load<T>(to) : Vec<T>{};
      if (!kAccumulate) __builtin_prefetch(to, 1, 3);
    }
  }
  multiply_tile<T, Left::kByColumn, kRows, kVectors>(acc, w, w_stride, x, x_stride, tokens);
  X_ROPE_CLS_UNROLL
  for (int r = 0; r < kRows; ++r) {
    X_ROPE_CLS_UNROLL
    for (int v = 0; v < kVectors; ++v) store<T>(out + r * out_stride + v * kLanes<T>, acc[r][v]);
  }
}

// All channels of one tile of rows: panels of kVectors, then of two and of one.
template <typename T, bool kAccumulate, int kRows, int kVectors>
void lane_sum_rows(const T* w, int64_t w_stride, const TokenBlock<T>& x, int64_t channels, T* out,
                   int64_t out_stride) {
  int64_t c = 0;
  const auto run = [&](auto count) {
    constexpr int kWide = decltype(count)::value;
    for (; c + kWide * kLanes<T> <= channels; c += kWide * kLanes<T>) {
      lane_sum_tile<T, kAccumulate, kRows, kWide>(w, w_stride, x.data + c, x.stride, x.tokens,
                                                  out + c, out_stride);
    }
  };
  run(std::integral_constant<int, kVectors>{});
  if constexpr (kVectors > 2) run(std::integral_constant<int, 2>{});
  run(std::integral_constant<int, 1>{});
}

// out[r * out_stride + c] = or += sum over n of w[n * w_stride + r] x_n[c]. channels: a multiple of
// the lanes.
template <typename T, bool kAccumulate>
void lane_sums(const T* w, int64_t w_stride, int64_t rows, const TokenBlock<T>& x, int64_t channels,
               T* out, int64_t out_stride) {
  int64_t r = 0;
  const auto run = [&](auto count, auto vectors) {
    constexpr int kRows = decltype(count)::value;
    for (; r + kRows <= rows; r += kRows) {
      lane_sum_rows<T, kAccumulate, kRows, decltype(vectors)::value>(
          w + r, w_stride, x, channels, out + r * out_stride, out_stride);
    }
  };
  using std::integral_constant;
  if constexpr (kManyRegisters) {
    run(integral_constant<int, 8>{}, integral_constant<int, 3>{});
    run(integral_constant<int, 6>{}, integral_constant<int, 4>{});
    run(integral_constant<int, 4>{}, integral_constant<int, 6>{});
    run(integral_constant<int, 2>{}, integral_constant<int, 8>{});
    run(integral_constant<int, 1>{}, integral_constant<int, 8>{});
  } else {
    run(integral_constant<int, 4>{}, integral_constant<int, 3>{});
    run(integral_constant<int, 2>{}, integral_constant<int, 4>{});
    run(integral_constant<int, 1>{}, integral_constant<int, 6>{});
  }
}

}  // namespace
}  // namespace x_rope_cls::cpu::X_ROPE_CLS_ISA
