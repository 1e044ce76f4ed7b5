// Rotation of a (batch, heads, tokens, head_dim) tensor, and its gradient with respect to the
// tables.
#include "../rope.h"

#include "convert.h"
#include "isa.h"
#include "rotate.h"
#include "tasks.h"
#include "vec.h"

namespace x_rope_cls::cpu::X_ROPE_CLS_ISA {
namespace {

constexpr int64_t kBlock = 64;                // tokens a task
constexpr double kElementsPerWorker = 32768;  // fewer are not worth another thread
constexpr int64_t kChannels = 512;            // of a row in the buffers on the stack

template <typename S>
X_ROPE_CLS_INLINE S* row_of(const Tensor4& t, int64_t b, int64_t h, int64_t n) {
  return static_cast<S*>(t.data) + b * t.stride_b + h * t.stride_h + n * t.stride_n;
}

template <typename S>
X_ROPE_CLS_INLINE void copy_channels(const S* from, int64_t from_stride, S* to, int64_t to_stride,
                                     int64_t n) {
  if (from == to) return;
  if (from_stride == 1 && to_stride == 1) {
    __builtin_memcpy(to, from, static_cast<size_t>(n) * sizeof(S));
  } else {
    for (int64_t i = 0; i < n; ++i) to[i * to_stride] = from[i * from_stride];
  }
}

// Pairs [first, first + count) of one row, by way of a dense buffer; any strides. `part` starts at
// the first of them.
template <typename S>
X_ROPE_CLS_INLINE void rotate_chunk(const RopeParams& p, const S* x, S* y,
                                    TableRow<Compute<S>> part, int64_t first, int64_t count) {
  using T = Compute<S>;
  T buffer[kChannels];
  const int64_t sx = p.x.stride_d;
  const int64_t sy = p.y.stride_d;
  if (p.interleaved) {
    load_row(x + 2 * first * sx, sx, 2 * count, buffer);
    rotate_row(buffer, buffer, part, count, true, p.inverse);
    store_row<S>(buffer, sy, 2 * count, y + 2 * first * sy);
  } else {
    load_row(x + first * sx, sx, count, buffer);
    load_row(x + (p.pairs + first) * sx, sx, count, buffer + count);
    rotate_row(buffer, buffer, part, count, false, p.inverse);
    store_row<S>(buffer, sy, count, y + first * sy);
    store_row<S>(buffer + count, sy, count, y + (p.pairs + first) * sy);
  }
}

template <typename S>
X_ROPE_CLS_INLINE void rotate_one(const RopeParams& p, int64_t b, int64_t h, int64_t n,
                                  bool rotated, TableRow<Compute<S>> t) {
  const S* x = row_of<const S>(p.x, b, h, n);
  S* y = row_of<S>(p.y, b, h, n);
  const int64_t sx = p.x.stride_d;
  const int64_t sy = p.y.stride_d;
  if (!rotated) {
    copy_channels(x, sx, y, sy, p.head_dim);
    return;
  }
  if constexpr (__is_same(S, Compute<S>)) {
    if (sx == 1 && sy == 1) {
      rotate_row(x, y, t, p.pairs, p.interleaved, p.inverse);
      copy_channels(x + 2 * p.pairs, 1, y + 2 * p.pairs, 1, p.head_dim - 2 * p.pairs);
      return;
    }
  }
  for (int64_t first = 0; first < p.pairs; first += kChannels / 2) {
    rotate_chunk<S>(p, x, y, {t.cos + first, t.sin + first}, first,
                    min_of(kChannels / 2, p.pairs - first));
  }
  copy_channels(x + 2 * p.pairs * sx, sx, y + 2 * p.pairs * sy, sy, p.head_dim - 2 * p.pairs);
}

// One token of one head; table rows whose pairs are not adjacent are gathered piece by piece.
template <typename S>
X_ROPE_CLS_INLINE void rotate_token(const RopeParams& p, int64_t b, int64_t h, int64_t n) {
  using T = Compute<S>;
  const bool rotated = has_position(p.table, b, n);
  if (!rotated || (p.table.cos_stride_i == 1 && p.table.sin_stride_i == 1)) {
    rotate_one<S>(p, b, h, n, rotated, table_row_start<T>(p.table, b, h, n));
    return;
  }
  const S* x = row_of<const S>(p.x, b, h, n);
  S* y = row_of<S>(p.y, b, h, n);
  T buffer[kChannels];
  for (int64_t first = 0; first < p.pairs; first += kChannels / 2) {
    const int64_t count = min_of(kChannels / 2, p.pairs - first);
    RotaryTable part = p.table;
    part.cos = static_cast<const T*>(part.cos) + first * part.cos_stride_i;
    part.sin = static_cast<const T*>(part.sin) + first * part.sin_stride_i;
    rotate_chunk<S>(p, x, y, table_row<T>(part, b, h, n, count, buffer), first, count);
  }
  copy_channels(x + 2 * p.pairs * p.x.stride_d, p.x.stride_d, y + 2 * p.pairs * p.y.stride_d,
                p.y.stride_d, p.head_dim - 2 * p.pairs);
}

template <typename S>
void rope_typed(const RopeParams& p, const Parallel& parallel) {
  const int64_t blocks = ceil_div(p.tokens, kBlock);
  const double elements = static_cast<double>(p.batch * p.heads) * static_cast<double>(p.tokens) *
                          static_cast<double>(p.head_dim);
  const int64_t workers = useful_workers(parallel.workers, elements, kElementsPerWorker);
  const bool heads_inside = p.x.stride_h < p.x.stride_n;  // (batch, tokens, heads, channels) memory
  run_tasks(parallel, workers, p.batch * blocks, [&](int64_t task, int64_t) {
    const int64_t b = task / blocks;
    const int64_t first = task % blocks * kBlock;
    const int64_t last = min_of(first + kBlock, p.tokens);
    if (heads_inside) {
      for (int64_t n = first; n < last; ++n) {
        for (int64_t h = 0; h < p.heads; ++h) rotate_token<S>(p, b, h, n);
      }
    } else {
      for (int64_t h = 0; h < p.heads; ++h) {
        for (int64_t n = first; n < last; ++n) rotate_token<S>(p, b, h, n);
      }
    }
  });
}

// dcos_i += g0 x0 + g1 x1 and dsin_i += g1 x0 - g0 x1, with the sign of the direction on dsin.
template <typename S, typename G>
void add_table_grad(const RopeTableGradParams& p, const G* g, const S* x, Compute<S>* dcos,
                    Compute<S>* dsin) {
  using T = Compute<S>;
  const T sign = p.inverse ? T{-1} : T{1};
  for (int64_t i = 0; i < p.pairs; ++i) {
    const int64_t even = p.interleaved ? 2 * i : i;
    const int64_t odd = p.interleaved ? 2 * i + 1 : i + p.pairs;
    const T g0 = to_compute(g[even * p.grad.stride_d]);
    const T g1 = to_compute(g[odd * p.grad.stride_d]);
    const T x0 = to_compute(x[even * p.x.stride_d]);
    const T x1 = to_compute(x[odd * p.x.stride_d]);
    dcos[i] += g0 * x0 + g1 * x1;
    dsin[i] += sign * (g1 * x0 - g0 * x1);
  }
}

// One row of the tables' gradients: the sum over the batches and heads that shared the row.
template <typename S, typename G>
void table_grad_row(const RopeTableGradParams& p, int64_t tb, int64_t th, int64_t n) {
  using T = Compute<S>;
  const int64_t row = ((tb * p.table_heads + th) * p.tokens + n) * p.pairs;
  T* dcos = static_cast<T*>(p.dcos) + row;
  T* dsin = static_cast<T*>(p.dsin) + row;
  for (int64_t i = 0; i < p.pairs; ++i) dcos[i] = dsin[i] = T{0};
  const int64_t b_first = p.table_batch == 1 ? 0 : tb;
  const int64_t b_last = p.table_batch == 1 ? p.batch : tb + 1;
  const int64_t h_first = p.table_heads == 1 ? 0 : th;
  const int64_t h_last = p.table_heads == 1 ? p.heads : th + 1;
  for (int64_t b = b_first; b < b_last; ++b) {
    if (p.rotate != nullptr && p.rotate[b * p.rotate_stride_b + n * p.rotate_stride_n] == 0)
      continue;
    if (p.keep != nullptr && p.keep[b * p.keep_stride_b + n * p.keep_stride_n] == 0) continue;
    for (int64_t h = h_first; h < h_last; ++h) {
      add_table_grad<S, G>(p, row_of<const G>(p.grad, b, h, n), row_of<const S>(p.x, b, h, n), dcos,
                           dsin);
    }
  }
}

template <typename S, typename G>
void table_grad_typed(const RopeTableGradParams& p, const Parallel& parallel) {
  const double elements = static_cast<double>(p.batch * p.heads) * static_cast<double>(p.tokens) *
                          static_cast<double>(p.pairs);
  const int64_t workers = useful_workers(parallel.workers, elements, kElementsPerWorker);
  const int64_t rows = p.table_batch * p.table_heads * p.tokens;
  constexpr int64_t kRows = 8;
  run_tasks(parallel, workers, ceil_div(rows, kRows), [&](int64_t task, int64_t) {
    for (int64_t r = task * kRows; r < min_of((task + 1) * kRows, rows); ++r) {
      const int64_t n = r % p.tokens;
      const int64_t th = r / p.tokens % p.table_heads;
      table_grad_row<S, G>(p, r / p.tokens / p.table_heads, th, n);
    }
  });
}

}  // namespace

void rope(const RopeParams& params, const Parallel& parallel) {
  with_storage_type(params.dtype, [&](auto type) { rope_typed<decltype(type)>(params, parallel); });
}

void rope_table_grad(const RopeTableGradParams& params, const Parallel& parallel) {
  with_storage_type(params.dtype, [&](auto type) {
    using S = decltype(type);
    if (params.grad_dtype == params.dtype) {
      table_grad_typed<S, S>(params, parallel);
    } else {
      table_grad_typed<S, Compute<S>>(params, parallel);
    }
  });
}

}  // namespace x_rope_cls::cpu::X_ROPE_CLS_ISA
