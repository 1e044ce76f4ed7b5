// What both attention passes share: which tokens have a position, how keys line up in columns,
// how rows are packed, and what is added to scores.
#pragma once

#include <cstdint>

#include "../attention.h"
#include "arena.h"
#include "convert.h"
#include "few_rows.h"
#include "philox.h"
#include "rotate.h"
#include "softmax.h"
#include "tile.h"
#include "vec.h"

namespace x_rope_cls::cpu::X_ROPE_CLS_ISA {
namespace {

// So many heads for each worker and more are handed out whole: one worker does all that belongs to
// a head, and finds in its caches what it has packed. Fewer are cut, so that all workers have work.
constexpr int64_t kHeadsPerWorker = 8;

// -------------------------------------------------------------------------------------------------
// Partition. A softmax does not care about the order of its keys, so those with a position
// ("ordinary") and those without ("special") are sorted apart; no tile is mixed.

// Indices of the kept tokens, ascending: `ordinary` of them first, then `special`.
struct Split {
  const int32_t* index;
  int64_t ordinary;
  int64_t special;
};

// One split for every batch, or one for all batches (stride 0).
struct Splits {
  int32_t* index;
  int64_t* counts;  // ordinary, special
  int64_t stride;   // in batches: 0 or 1
  int64_t tokens;

  Split of(int64_t b) const {
    const int64_t i = b * stride;
    return {index + i * tokens, counts[2 * i], counts[2 * i + 1]};
  }
};

// rotate: null unless tokens without a position are to be set apart. keep: null, all are kept.
struct SplitSource {
  const uint8_t* rotate;
  int64_t rotate_stride_b, rotate_stride_n;
  const uint8_t* keep;
  int64_t keep_stride_b, keep_stride_n;
  int64_t batch, tokens;

  bool per_batch() const {
    return batch > 1 &&
           ((rotate != nullptr && rotate_stride_b != 0) || (keep != nullptr && keep_stride_b != 0));
  }
  bool special(int64_t b, int64_t n) const {
    return rotate != nullptr && rotate[b * rotate_stride_b + n * rotate_stride_n] == 0;
  }
  bool kept(int64_t b, int64_t n) const {
    return keep == nullptr || keep[b * keep_stride_b + n * keep_stride_n] != 0;
  }
};

static inline Splits take_splits(Arena& arena, const SplitSource& s) {
  const int64_t lists = s.per_batch() ? s.batch : 1;
  Splits splits{};
  splits.index = arena.take<int32_t>(lists * s.tokens);
  splits.counts = arena.take<int64_t>(lists * 2);
  splits.stride = s.per_batch() ? 1 : 0;
  splits.tokens = s.tokens;
  return splits;
}

static inline void fill_splits(const Splits& splits, const SplitSource& s) {
  const int64_t lists = splits.stride == 0 ? min_of<int64_t>(s.batch, 1) : s.batch;
  for (int64_t b = 0; b < lists; ++b) {
    int32_t* index = splits.index + b * s.tokens;
    int64_t ordinary = 0;
    for (int64_t n = 0; n < s.tokens; ++n) {
      if (s.kept(b, n) && !s.special(b, n)) index[ordinary++] = static_cast<int32_t>(n);
    }
    int64_t total = ordinary;
    for (int64_t n = 0; n < s.tokens && s.rotate != nullptr; ++n) {
      if (s.kept(b, n) && s.special(b, n)) index[total++] = static_cast<int32_t>(n);
    }
    splits.counts[2 * b] = ordinary;
    splits.counts[2 * b + 1] = total - ordinary;
  }
}

X_ROPE_CLS_INLINE bool sets_apart(const AttentionParams& p) {
  return p.has_rotary && p.cls_rope == ClsRope::kMask;
}

static inline SplitSource query_source(const AttentionParams& p) {
  const RotaryTable& t = p.table_q;
  return {sets_apart(p) ? t.rotate : nullptr,
          t.rotate_stride_b,
          t.rotate_stride_n,
          nullptr,
          0,
          0,
          p.batch,
          p.queries};
}
static inline SplitSource key_source(const AttentionParams& p) {
  const RotaryTable& t = p.table_k;
  return {sets_apart(p) ? t.rotate : nullptr,
          t.rotate_stride_b,
          t.rotate_stride_n,
          p.key_mask,
          p.key_mask_stride_b,
          p.key_mask_stride_n,
          p.batch,
          p.keys};
}

// -------------------------------------------------------------------------------------------------
// Columns of scores: keys with a position, then those without. Keys are packed in panels two
// vectors wide, the last of a class may be one; columns behind the last key are padding.

struct Columns {
  int64_t ordinary, special;  // keys
  int64_t special_start;      // column of the first special key
  int64_t total;              // whole vectors
};

// Each class starts at a whole vector.
template <typename T>
X_ROPE_CLS_INLINE Columns columns_of(const Split& s) {
  const int64_t start = round_up(s.ordinary, kLanes<T>);
  return {s.ordinary, s.special, start, start + round_up(s.special, kLanes<T>)};
}
// Special keys that fit into one vector start right behind the others, so that a few of them need
// no columns, or hardly any, beyond those of the keys.
template <typename T>
X_ROPE_CLS_INLINE Columns close_columns_of(const Split& s) {
  if (s.special == 0 || s.special > kLanes<T>) return columns_of<T>(s);
  return {s.ordinary, s.special, s.ordinary, round_up(s.ordinary + s.special, kLanes<T>)};
}
// Columns that no split of so many keys exceeds.
template <typename T>
X_ROPE_CLS_INLINE int64_t most_columns(int64_t keys) {
  return round_up(keys, kLanes<T>) + kLanes<T>;
}

// The panel of keys whose scores start at a column. It is as wide as its packed keys, which may be
// more than the columns to the next one: that one's scores are written later.
struct Panel {
  int64_t columns;  // to the next panel
  int64_t width;    // one or two vectors
  int64_t packed;   // where it starts among the packed keys
};
template <typename T>
X_ROPE_CLS_INLINE Panel panel_at(const Columns& c, int64_t column) {
  constexpr int64_t kL = kLanes<T>;
  const bool ordinary = column < c.special_start;
  if (!ordinary && c.special_start % kL != 0) {  // the only one
    return {c.total - column, kL, round_up(c.special_start, kL)};
  }
  const int64_t width = min_of(2 * kL, (ordinary ? c.special_start : c.total) - column);
  return {width, round_up(width, kL), column};
}

// End of the block of whole panels that starts at `column`, a whole number of vectors. A short
// rest is taken along; it may exceed `most` by kBlockExcess vectors.
constexpr int64_t kBlockExcess = 3;
template <typename T>
X_ROPE_CLS_INLINE int64_t block_end(const Columns& c, int64_t column, int64_t most) {
  constexpr int64_t kL = kLanes<T>;
  int64_t end = column;
  while (end < c.total && (end - column < most || end % kL != 0))
    end += panel_at<T>(c, end).columns;
  return c.total - end <= 2 * kL && end - column <= most + kL ? c.total : end;
}

// The key in a column, or -1 in padding.
X_ROPE_CLS_INLINE int64_t token_at(const Columns& c, const Split& s, int64_t column) {
  if (column < c.ordinary) return s.index[column];
  const int64_t i = column - c.special_start;
  return i >= 0 && i < c.special ? s.index[c.ordinary + i] : -1;
}

// The keys of one class in columns [first, last): f(offset of the column from `first`, indices,
// count).
template <typename F>
X_ROPE_CLS_INLINE void for_each_run(const Columns& c, const Split& s, int64_t first, int64_t last,
                                    F&& f) {
  const int64_t ordinary_end = min_of(last, c.ordinary);
  if (first < ordinary_end) f(int64_t{0}, s.index + first, ordinary_end - first);
  const int64_t start = max_of(first, c.special_start);
  const int64_t special_end = min_of(last, c.special_start + c.special);
  if (start < special_end) {
    f(start - first, s.index + c.ordinary + (start - c.special_start), special_end - start);
  }
}

// Scores of padding columns in [first, last) become -infinity.
template <typename T>
X_ROPE_CLS_INLINE void hide_padding(const Columns& c, int64_t first, int64_t last, T* row) {
  for (int64_t j = max_of(first, c.ordinary); j < min_of(last, c.special_start); ++j) {
    row[j - first] = -kInfinity<T>;
  }
  for (int64_t j = max_of(first, c.special_start + c.special); j < min_of(last, c.total); ++j) {
    row[j - first] = -kInfinity<T>;
  }
}
X_ROPE_CLS_INLINE bool has_padding(const Columns& c, int64_t first, int64_t last) {
  return (first < c.special_start && last > c.ordinary && c.ordinary < c.special_start) ||
         last > c.special_start + c.special;
}

// -------------------------------------------------------------------------------------------------
// Packing.

template <typename S>
X_ROPE_CLS_INLINE S* row_at(const Tensor4& t, int64_t b, int64_t h, int64_t n) {
  return static_cast<S*>(t.data) + b * t.stride_b + h * t.stride_h + n * t.stride_n;
}

// Whether the token is rotated where it stands among the ordinary ones.
X_ROPE_CLS_INLINE bool turns(const AttentionParams& p, const RotaryTable& t, int64_t b, int64_t n) {
  return p.has_rotary && (p.cls_rope != ClsRope::kSkip || has_position(t, b, n));
}

// A dense row of the compute type, `padded` long: loaded, rotated if wanted, scaled, zero behind.
// table_buffer: room for 2 * pairs.
template <typename S>
X_ROPE_CLS_INLINE void pack_row(const AttentionParams& p, const Tensor4& x, const RotaryTable& t,
                                int64_t b, int64_t h, int64_t n, int64_t channels, int64_t padded,
                                bool rotated, Compute<S> scale, Compute<S>* to,
                                Compute<S>* table_buffer) {
  using T = Compute<S>;
  const S* const row = row_at<const S>(x, b, h, n);
  const T* from = to;
  int64_t turned = rotated ? 2 * p.pairs : 0;  // channels that rotation writes
  if constexpr (__is_same(S, T)) {
    if (x.stride_d == 1) from = row;
  }
  if (from == to) turned = 0;
  load_row(row + turned * x.stride_d, x.stride_d, channels - turned, to + turned);
  if (rotated) {
    rotate_row(from, to, table_row<T>(t, b, h, n, p.pairs, table_buffer), p.pairs, p.interleaved,
               false, scale);
  }
  if (scale != T{1}) {
    for (int64_t i = rotated ? 2 * p.pairs : 0; i < channels; ++i) to[i] *= scale;
  }
  for (int64_t i = channels; i < padded; ++i) to[i] = T{0};
}

// Indices in a run ascend, so its keys are neighbours where the ends are `count` apart.
X_ROPE_CLS_INLINE bool neighbours(const int32_t* index, int64_t count) {
  return index[count - 1] - index[0] == count - 1;
}

// Dense rows of x (k or v) of the tokens in `index`, their channels padded to `width`: where they
// lie (in_place: they could be used so), or packed in `buffer`.
template <typename S>
TokenBlock<Compute<S>> read_rows(const AttentionParams& p, const Tensor4& x, int64_t b, int64_t h,
                                 const int32_t* index, int64_t count, int64_t channels,
                                 int64_t width, bool in_place, bool rotated, Compute<S>* buffer,
                                 Compute<S>* table) {
  using T = Compute<S>;
  if constexpr (__is_same(S, T)) {
    if (in_place && !rotated && neighbours(index, count)) {
      return {row_at<const T>(x, b, h, index[0]), x.stride_n, count};
    }
  }
  for (int64_t i = 0; i < count; ++i) {
    const bool turned = rotated && turns(p, p.table_k, b, index[i]);
    pack_row<S>(p, x, p.table_k, b, h, index[i], channels, width, turned, T{1}, buffer + i * width,
                table);
  }
  return {buffer, width, count};
}
// Whether rows of x may be used where they lie.
template <typename S>
X_ROPE_CLS_INLINE bool in_place(const Tensor4& x, int64_t channels) {
  return __is_same(S, Compute<S>) && x.stride_d == 1 && channels % kLanes<Compute<S>> == 0;
}

// rows[i][d], i < width, row stride `padded` (a multiple of the lanes), becomes to[d][i].
template <typename T>
X_ROPE_CLS_INLINE void transpose_panel(const T* rows, int64_t padded, int64_t width,
                                       int64_t channels, T* to) {
  constexpr int kL = kLanes<T>;
  for (int64_t part = 0; part < width; part += kL) {
    for (int64_t d = 0; d < channels; d += kL) {
      Vec<T> block[kL];
      X_ROPE_CLS_UNROLL
      for (int i = 0; i < kL; ++i) block[i] = load<T>(rows + (part + i) * padded + d);
      transpose<T>(block);
      if (d + kL <= channels) {
        X_ROPE_CLS_UNROLL
        for (int i = 0; i < kL; ++i) store<T>(to + (d + i) * width + part, block[i]);
      } else {
        for (int i = 0; d + i < channels; ++i) store<T>(to + (d + i) * width + part, block[i]);
      }
    }
  }
}

// -------------------------------------------------------------------------------------------------
// Masks and biases.

struct ScoreBias {
  const void* data;  // at the (batch, head, query); null: none
  DType dtype;
  int64_t stride;  // from key to key
};

X_ROPE_CLS_INLINE int64_t size_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return 4;
    case DType::kFloat64:
      return 8;
    case DType::kBFloat16:
    case DType::kFloat16:
      return 2;
    case DType::kBool:
      return 1;
  }
  return 0;
}

X_ROPE_CLS_INLINE ScoreBias bias_of(const AttentionParams& p, int64_t b, int64_t h, int64_t n) {
  if (p.bias == nullptr) return {nullptr, p.bias_dtype, 0};
  const int64_t offset = b * p.bias_stride_b + h * p.bias_stride_h + n * p.bias_stride_n;
  return {static_cast<const char*>(p.bias) + offset * size_of(p.bias_dtype), p.bias_dtype,
          p.bias_stride_m};
}

// The bias in units of log2, finite where it was: the most negative floats, often used as a mask,
// must not become -infinity, or a row of nothing else would lose its uniform distribution.
template <typename T, typename S>
X_ROPE_CLS_INLINE T bias_log2(S value) {
  constexpr T kLargest = sizeof(T) == 8 ? static_cast<T>(__DBL_MAX__) : static_cast<T>(__FLT_MAX__);
  const T v = static_cast<T>(to_compute(value));
  const T scaled = v * static_cast<T>(kLog2E);
  const T low = (scaled < -kLargest && v >= -kLargest) ? -kLargest : scaled;
  return (scaled > kLargest && v <= kLargest) ? kLargest : low;
}

template <typename T, typename S>
X_ROPE_CLS_INLINE void add_bias_typed(const S* bias, int64_t stride, const int32_t* index,
                                      int64_t count, T* scores) {
  if (stride == 1 && neighbours(index, count)) {
    const S* from = bias + index[0];
    for (int64_t j = 0; j < count; ++j) scores[j] += bias_log2<T>(from[j]);
  } else {
    for (int64_t j = 0; j < count; ++j) scores[j] += bias_log2<T>(bias[index[j] * stride]);
  }
}

// Adds the bias to scores (in units of log2) of the keys in `index`, or hides those masked out.
template <typename T>
static void add_bias(const ScoreBias& bias, const int32_t* index, int64_t count, T* scores) {
  if (bias.dtype == DType::kBool) {
    const auto* keep = static_cast<const uint8_t*>(bias.data);
    for (int64_t j = 0; j < count; ++j) {
      if (keep[index[j] * bias.stride] == 0) scores[j] = -kInfinity<T>;
    }
    return;
  }
  with_storage_type(bias.dtype, [&](auto type) {
    using S = decltype(type);
    add_bias_typed<T>(static_cast<const S*>(bias.data), bias.stride, index, count, scores);
  });
}

}  // namespace
}  // namespace x_rope_cls::cpu::X_ROPE_CLS_ISA
