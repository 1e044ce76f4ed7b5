// Contract of the products of a few rows with a matrix, by head: projections of queries and of what
// they pooled, and their gradients.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "parallel.h"

namespace x_rope_cls {

// Rows (batch, queries, heads, channels) by strides in elements, unit stride in channels.
struct HeadRows {
  void* data;
  int64_t stride_b, stride_n, stride_h;
};

// Which rows meet which of the `groups` matrices: head h is of group h / (heads / groups), or,
// where `cyclic`, of h % groups.
struct RowGroups {
  DType dtype;  // of everything
  int64_t batch, queries, heads;
  int64_t groups;  // a divisor of heads, or both are 0
  bool cyclic;
};

// out = row times the matrix of its group, (inner, columns), or times the transpose of (columns,
// inner).
struct RowsProductParams {
  RowGroups by;
  int64_t inner, columns;
  bool transposed;
  HeadRows rows;       // `inner` channels
  const void* matrix;  // those of all groups one below the other, rows `matrix_stride` apart
  int64_t matrix_stride;
  HeadRows out;  // `columns` channels
};

// out = sum over the rows of a group of a b^T, (a_columns, b_columns), one group below the other.
struct RowsOuterParams {
  RowGroups by;
  int64_t a_columns, b_columns;
  HeadRows a, b;
  void* out;        // (groups * a_columns, b_columns), contiguous
  int64_t written;  // bytes of all that the pass writes which this is a part of
};

// Bytes of scratch memory, see attention.h.
using RowsProductWorkspace = int64_t (*)(const RowsProductParams&, int64_t workers);
using RowsProduct = void (*)(const RowsProductParams&, const Parallel&, void* workspace);
using RowsOuterWorkspace = int64_t (*)(const RowsOuterParams&, int64_t workers);
using RowsOuter = void (*)(const RowsOuterParams&, const Parallel&, void* workspace);

}  // namespace x_rope_cls
