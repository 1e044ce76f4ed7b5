// Rows of heads by the matrix that they meet (../rows.h): where they lie, and copies of them.
#pragma once

#include <cstdint>

#include "../rows.h"
#include "convert.h"
#include "quad_rows.h"
#include "vec.h"

namespace x_rope_cls::cpu::X_ROPE_CLS_ISA {
namespace {

// Rows of one group are numbered by batch, query and head, in this order.
static inline int64_t rows_of_group(const RowGroups& by) {
  return by.groups == 0 ? 0 : by.batch * by.queries * (by.heads / by.groups);
}
template <typename S>
X_ROPE_CLS_INLINE S* row_at(const HeadRows& rows, const RowGroups& by, int64_t group, int64_t r) {
  const int64_t together = by.heads / by.groups;
  const int64_t j = r % together;
  const int64_t token = r / together;
  const int64_t head = by.cyclic ? j * by.groups + group : group * together + j;
  return static_cast<S*>(rows.data) + token / by.queries * rows.stride_b +
         token % by.queries * rows.stride_n + head * rows.stride_h;
}

// Rows of a group that lie equally far apart: `count` of them, then as many again.
struct RowRun {
  int64_t count, stride;
};
static inline RowRun run_of(const HeadRows& rows, const RowGroups& by) {
  if (by.heads != by.groups) return {1, 0};
  if (by.queries == 1) return {by.batch, rows.stride_b};
  const bool all = by.batch == 1 || rows.stride_b == by.queries * rows.stride_n;
  return {all ? by.batch * by.queries : by.queries, rows.stride_n};
}

// The rows of a group, dense, converted to U and padded with zeros.
template <typename S, typename U>
void pack_group(const HeadRows& rows, const RowGroups& by, int64_t group, int64_t channels,
                int64_t width, U* to) {
  const int64_t count = rows_of_group(by);
  for (int64_t r = 0; r < count; ++r, to += width) {
    const S* from = row_at<const S>(rows, by, group, r);
    if constexpr (__is_same(S, U)) {
      __builtin_memcpy(to, from, static_cast<size_t>(channels) * sizeof(S));
    } else {
      load_row(from, 1, channels, to);
    }
    for (int64_t c = channels; c < width; ++c) to[c] = U{};
  }
}

// The same as quad_rows.h has them; `four`: room for as many rows, null if they can be read in
// place.
template <typename S, typename T>
void pack_quads(const HeadRows& rows, const RowGroups& by, int64_t group, int64_t channels,
                int64_t width, T* four, T* quads) {
  if constexpr (fills_quads<T>(kQuad)) {
    const int64_t count = rows_of_group(by);
    for (int64_t r = 0; r < count; r += kQuad, quads += quad_stride<T>(width)) {
      const T* from[kQuad];
      for (int64_t i = 0; i < kQuad; ++i) {
        const S* row = row_at<const S>(rows, by, group, r + i);
        if constexpr (__is_same(S, T)) {
          if (four == nullptr) {
            from[i] = row;
            continue;
          }
        }
        T* const to = four + i * width;
        load_row(row, 1, channels, to);
        for (int64_t c = channels; c < width; ++c) to[c] = T{0};
        from[i] = to;
      }
      rows_to_quad<T>(from, width, quads);
    }
  }
}

}  // namespace
}  // namespace x_rope_cls::cpu::X_ROPE_CLS_ISA
