// Rotation of a (batch, heads, tokens, head_dim) tensor, and its gradient with respect to the
// tables.
#include "../rope.h"

#include <type_traits>

#include "cache.h"
#include "convert.h"
#include "isa.h"
#include "rope_rows.h"
#include "rope_vectors.h"
#include "rotate.h"
#include "tasks.h"
#include "vec.h"

namespace x_rope_cls::cpu::X_ROPE_CLS_ISA {
namespace {

constexpr int64_t kBlock = 64;                // tokens a task
constexpr double kElementsPerWorker = 32768;  // fewer are not worth another thread
constexpr int64_t kMostPairs = 256;           // that are rotated together; longer rows go in parts
constexpr double kHeld = 0.75;                // of the cache, by what is read and written
constexpr int64_t kTableRoom = 4 * kMostPairs + int64_t{4} * kLanes<float>;

template <typename S>
X_ROPE_CLS_INLINE S* row_of(const Tensor4& t, int64_t b, int64_t h, int64_t n) {
  return static_cast<S*>(t.data) + b * t.stride_b + h * t.stride_h + n * t.stride_n;
}

template <typename S>
X_ROPE_CLS_INLINE void copy_channels(const S* from, int64_t from_stride, S* to, int64_t to_stride,
                                     int64_t n) {
  if (from == to) return;
  for (int64_t i = 0; i < n; ++i) to[i * to_stride] = from[i * from_stride];
}

// Pairs [first, first + count) of one row, by way of a dense buffer; any strides.
template <typename S, PairLayout kLayout>
X_ROPE_CLS_INLINE void turn_strided(const RopeParams& p, const S* x, S* y, const Compute<S>* table,
                                    int64_t first, int64_t count) {
  using T = Compute<S>;
  T buffer[2 * kMostPairs];
  const int64_t sx = p.x.stride_d;
  const int64_t sy = p.y.stride_d;
  if constexpr (kLayout == PairLayout::kHalves) {
    const int64_t second = p.pairs + first;
    load_row(x + first * sx, sx, count, buffer);
    load_row(x + second * sx, sx, count, buffer + count);
    turn_row<T, kLayout, false>(buffer, buffer, table, count, count, 2 * count);
    store_row<S>(buffer, sy, count, y + first * sy);
    store_row<S>(buffer + count, sy, count, y + second * sy);
  } else {
    load_row(x + 2 * first * sx, sx, 2 * count, buffer);
    turn_row<T, kLayout, false>(buffer, buffer, table, count, count, 2 * count);
    store_row<S>(buffer, sy, 2 * count, y + 2 * first * sy);
  }
}

// Pairs [first, first + count) of one row, and with the last of them the channels that stay.
template <typename S, PairLayout kLayout, bool kDense, bool kStream>
X_ROPE_CLS_INLINE void turn_part(const RopeParams& p, const S* x, S* y, const Compute<S>* table,
                                 int64_t first, int64_t count) {
  const int64_t rest = 2 * p.pairs;
  const bool last = first + count == p.pairs;
  if constexpr (kDense) {
    const int64_t at = kLayout == PairLayout::kHalves ? first : 2 * first;
    turn_row<S, kLayout, kStream>(x + at, y + at, table, count, p.pairs, 2 * count);
    if (last) copy_row<S, kStream>(x + rest, y + rest, p.head_dim - rest);
  } else {
    turn_strided<S, kLayout>(p, x, y, table, first, count);
    if (last) {
      copy_channels(x + rest * p.x.stride_d, p.x.stride_d, y + rest * p.y.stride_d, p.y.stride_d,
                    p.head_dim - rest);
    }
  }
}

// Rows that are not rotated, one of every head.
template <typename S, bool kStream>
__attribute__((noinline)) void copy_heads(const S* x, int64_t x_step, S* y, int64_t y_step,
                                          int64_t heads, int64_t channels) {
  for (int64_t h = 0; h < heads; ++h) {
    copy_row<S, kStream>(x + h * x_step, y + h * y_step, channels);
  }
}

// Rows of dense channels of all heads of tokens [first, last) of batch b. table_of(n): what turns
// the rows of token n. There is little to do a row: nothing but vectors and steps from head to
// head.
template <typename S, bool kStream, bool kRest, typename F>
X_ROPE_CLS_INLINE void turn_tokens(const RopeParams& p, int64_t b, int64_t first, int64_t last,
                                   const F& table_of) {
  // Read once: for all that the compiler knows, rows are stored over p.
  const int64_t heads = p.heads;
  const int64_t turned = 2 * p.pairs;
  const int64_t channels = p.head_dim;
  const int64_t x_step = p.x.stride_h;
  const int64_t y_step = p.y.stride_h;
  for (int64_t n = first; n < last; ++n) {
    const S* x = row_of<const S>(p.x, b, 0, n);
    S* y = row_of<S>(p.y, b, 0, n);
    if (!has_position(p.table, b, n)) {
      copy_heads<S, kStream>(x, x_step, y, y_step, heads, channels);
      continue;
    }
    const auto table = table_of(n);
    for (int64_t h = 0; h < heads; ++h, x += x_step, y += y_step) {
      table.template turn<kStream>(x, y);
      if constexpr (kRest) copy_row<S, kStream>(x + turned, y + turned, channels - turned);
    }
  }
}
// Tables that fill kVectors vectors.
template <typename S, PairLayout kLayout, bool kStream, int kVectors>
void turn_vectors(const RopeParams& p, int64_t b, int64_t first, int64_t last) {
  using T = Compute<S>;
  const int64_t half = p.pairs;
  const T sign = p.inverse ? T{-1} : T{1};
  const auto table_of = [&](int64_t n) __attribute__((always_inline)) {
    return token_table<S, kLayout, kVectors>(table_row_start<T>(p.table, b, 0, n), sign, half);
  };
  if (2 * half == p.head_dim)
    turn_tokens<S, kStream, false>(p, b, first, last, table_of);
  else
    turn_tokens<S, kStream, true>(p, b, first, last, table_of);
}
// Tables of any number of pairs up to kMostPairs, any strides.
template <typename S, PairLayout kLayout, bool kStream>
void turn_pairs(const RopeParams& p, int64_t b, int64_t first, int64_t last) {
  using T = Compute<S>;
  alignas(64) T buffer[kTableRoom];
  const int64_t pairs = p.pairs;
  const int64_t channels = p.head_dim;
  const T sign = p.inverse ? T{-1} : T{1};
  turn_tokens<S, kStream, true>(p, b, first, last, [&](int64_t n) __attribute__((always_inline)) {
    lay_out_table<T, kLayout>(table_row_start<T>(p.table, b, 0, n), p.table.cos_stride_i,
                              p.table.sin_stride_i, pairs, sign, buffer);
    return LaidTable<S, kLayout>{buffer, pairs, channels};
  });
}

// Rows of any kind, in parts where they are long. Heads are inside, so that a table row is laid out
// once for all that share it.
template <typename S, PairLayout kLayout, bool kDense, bool kStream>
void turn_parts(const RopeParams& p, int64_t b, int64_t first, int64_t last) {
  using T = Compute<S>;
  alignas(64) T table[kTableRoom];
  const RotaryTable& t = p.table;
  const bool by_head = t.cos_stride_h != 0 || t.sin_stride_h != 0;
  const T sign = p.inverse ? T{-1} : T{1};
  for (int64_t n = first; n < last; ++n) {
    if (!has_position(t, b, n)) {
      for (int64_t h = 0; h < p.heads; ++h) {
        const S* x = row_of<const S>(p.x, b, h, n);
        S* y = row_of<S>(p.y, b, h, n);
        if constexpr (kDense) {
          copy_row<S, kStream>(x, y, p.head_dim);
        } else {
          copy_channels(x, p.x.stride_d, y, p.y.stride_d, p.head_dim);
        }
      }
      continue;
    }
    for (int64_t pair = 0; pair < p.pairs; pair += kMostPairs) {
      const int64_t count = min_of(kMostPairs, p.pairs - pair);
      for (int64_t h = 0; h < p.heads; ++h) {
        if (h == 0 || by_head) {
          TableRow<T> row = table_row_start<T>(t, b, h, n);
          row.cos += pair * t.cos_stride_i;
          row.sin += pair * t.sin_stride_i;
          lay_out_table<T, kLayout>(row, t.cos_stride_i, t.sin_stride_i, count, sign, table);
        }
        turn_part<S, kLayout, kDense, kStream>(p, row_of<const S>(p.x, b, h, n),
                                               row_of<S>(p.y, b, h, n), table, pair, count);
      }
    }
  }
}

// Whether every vector of a row of y is stored at a multiple of its size.
template <typename S>
X_ROPE_CLS_INLINE bool is_aligned(const RopeParams& p) {
  const auto size = static_cast<int64_t>(sizeof(S));
  const int64_t part = kLanes<Compute<S>> * size;  // of the compute type in storage
  const int64_t offsets = p.y.stride_b | p.y.stride_h | p.y.stride_n | p.head_dim | (2 * p.pairs);
  return reinterpret_cast<uintptr_t>(p.y.data) % kVectorBytes == 0 &&
         offsets * size % kVectorBytes == 0 && (p.interleaved || p.pairs * size % part == 0);
}

// How many whole vectors the table of a token is; 0 where it is none.
template <typename T, PairLayout kLayout>
X_ROPE_CLS_INLINE int64_t whole_vectors(const RopeParams& p) {
  if (p.table.cos_stride_i != 1 || p.table.sin_stride_i != 1) return 0;
  const int64_t elements = table_elements(kLayout, p.pairs);
  return elements % kLanes<T> == 0 ? elements / kLanes<T> : 0;
}

template <typename S, PairLayout kLayout>
void rope_block(const RopeParams& p, int64_t b, int64_t first, int64_t last, bool stream) {
  if constexpr (kLayout != PairLayout::kWords) {
    if (p.x.stride_d != 1 || p.y.stride_d != 1) {
      return turn_parts<S, kLayout, false, false>(p, b, first, last);
    }
  }
  const auto with_stores = [&](auto streams) __attribute__((always_inline)) {
    constexpr bool kStream = decltype(streams)::value;
    if (p.pairs > kMostPairs || p.table.cos_stride_h != 0 || p.table.sin_stride_h != 0) {
      return turn_parts<S, kLayout, true, kStream>(p, b, first, last);
    }
    const int64_t vectors = whole_vectors<Compute<S>, kLayout>(p);
    if constexpr (kLayout != PairLayout::kTwice) {  // whose vectors come in twos
      if (vectors == 1) return turn_vectors<S, kLayout, kStream, 1>(p, b, first, last);
      if (vectors == 3) return turn_vectors<S, kLayout, kStream, 3>(p, b, first, last);
      if (vectors == 5) return turn_vectors<S, kLayout, kStream, 5>(p, b, first, last);
    }
    const auto turn = vectors == 2   ? turn_vectors<S, kLayout, kStream, 2>
                      : vectors == 4 ? turn_vectors<S, kLayout, kStream, 4>
                      : vectors == 6 ? turn_vectors<S, kLayout, kStream, 6>
                      : vectors == 8 ? turn_vectors<S, kLayout, kStream, 8>
                                     : turn_pairs<S, kLayout, kStream>;
    turn(p, b, first, last);
  };
  stream ? with_stores(std::true_type{}) : with_stores(std::false_type{});
}

X_ROPE_CLS_INLINE int64_t tasks_of(const RopeParams& p) {
  return p.batch * ceil_div(p.tokens, kBlock);
}

// Block `task` of the tokens of all batches.
template <typename S>
void rope_task(const RopeParams& p, int64_t task, bool stream) {
  const int64_t blocks = ceil_div(p.tokens, kBlock);
  const int64_t b = task / blocks;
  const int64_t first = task % blocks * kBlock;
  const int64_t last = min_of(first + kBlock, p.tokens);
  if (!p.interleaved) {
    rope_block<S, PairLayout::kHalves>(p, b, first, last, stream);
    return;
  }
  if constexpr (__is_same(S, BFloat16)) {
    if (p.x.stride_d == 1 && p.y.stride_d == 1) {
      rope_block<S, PairLayout::kWords>(p, b, first, last, stream);
      return;
    }
  }
  rope_block<S, PairLayout::kTwice>(p, b, first, last, stream);
}

X_ROPE_CLS_INLINE double elements_of(const RopeParams& p) {
  return static_cast<double>(p.batch * p.heads) * static_cast<double>(p.tokens) *
         static_cast<double>(p.head_dim);
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

void rope(const RopeParams* calls, int64_t count, const Parallel& parallel) {
  int64_t tasks = 0;
  double elements = 0;
  double bytes = 0;
  for (int64_t i = 0; i < count; ++i) {
    tasks = max_of(tasks, tasks_of(calls[i]));
    elements += elements_of(calls[i]);
    with_storage_type(calls[i].dtype, [&](auto type) {
      bytes += elements_of(calls[i]) * static_cast<double>(sizeof(type));
    });
  }
  const int64_t workers = useful_workers(parallel.workers, elements, kElementsPerWorker);
  // Where the cache holds inputs and outputs with room to spare, plain stores keep them there.
  const bool stream = 2 * bytes > kHeld * static_cast<double>(cache_bytes());
  // A step is the same part of all tensors.
  run_shares(parallel, workers, tasks, [&](int64_t step, int64_t, int64_t) {
    for (int64_t i = 0; i < count; ++i) {
      const RopeParams& p = calls[i];
      const int64_t own = tasks_of(p);
      with_storage_type(p.dtype, [&](auto type) {
        using S = decltype(type);
        const bool streams = stream && is_aligned<S>(p);
        for (int64_t task = step * own / tasks; task < (step + 1) * own / tasks; ++task) {
          rope_task<S>(p, task, streams);
        }
        if (streams) finish_streams();
      });
    }
  });
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
