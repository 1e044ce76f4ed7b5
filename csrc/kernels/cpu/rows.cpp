// Products of a few rows with a matrix, by head. The matrix is read once; it and the rows of a head
// are read where they lie if their elements can be used as they are, and else packed.
#include "../rows.h"

#include "arena.h"
#include "convert.h"
#include "few_rows.h"
#include "few_rows_bf16.h"
#include "isa.h"
#include "lane_rows.h"
#include "pooling_grads.h"
#include "quad_rows.h"
#include "row_groups.h"
#include "tasks.h"

namespace x_rope_cls::cpu::X_ROPE_CLS_ISA {
namespace {

constexpr int64_t kMatrixRows = 32;          // of a transposed matrix, a task
constexpr int64_t kMatrixColumns = 128;      // of one that is not, a task
constexpr int64_t kOuterRows = 24;           // of a sum of outer products, a task
constexpr int64_t kLaneRows = 64;            // for fewer, turning the matrix does not pay
constexpr int64_t kQuadRows = 12;            // for fewer, or with many registers, fours do not pay
constexpr int64_t kShortestRun = 4;          // of rows that are read where they are
constexpr double kRowsFlopsPerWorker = 2e5;  // less work is not worth another thread

// What products are made of: the storage type where there are dot products of it.
template <typename S>
struct RowsScratch {
  using T = Compute<S>;
  char* rows;       // of a group, packed, as T or as S
  T* four;          // rows on their way to quads; null where they are read in place
  char* matrix;     // a part of the matrix, as T
  T* panels;        // and turned, as those of lane_rows.h
  T* sums;          // (rows of a group, columns of a task padded)
  int64_t group;    // whose rows are in `rows`; -1: nobody's
  int64_t fetched;  // task whose part of the matrix has been asked for; -1: none
};
struct RowsPlan {
  int64_t rows;    // of a group
  int64_t inner;   // padded
  int64_t part;    // columns of a task
  int64_t parts;   // of a group
  int64_t stride;  // of sums
  bool dots;       // products of bfloat16 as it is
  bool in_place;   // the matrix needs no conversion
  bool lanes;      // columns of a transposed matrix are lanes
  bool quads;      // rows are packed in fours
  RowRun run;      // rows that need none are read where they are; count 0: they are packed
  int64_t workers;
};

template <typename S>
RowsPlan make_rows_plan(const RowsProductParams& p, int64_t most_workers) {
  using T = Compute<S>;
  RowsPlan plan{};
  plan.rows = rows_of_group(p.by);
  // Vectors of the matrix lie along its rows.
  const int64_t along = p.transposed ? p.inner : p.columns;
  plan.dots = kHasDots<S> && along % kDotChannels == 0;
  plan.in_place = plan.dots || (__is_same(S, T) && along % kLanes<T> == 0);
  plan.inner = round_up(p.inner, plan.dots ? kDotChannels : int64_t{kLanes<T>});
  if (p.inner == plan.inner && (plan.dots || __is_same(S, T))) {
    plan.run = run_of(p.rows, p.by);
    // Shorter runs would leave the tiles of the products small.
    if (plan.run.count < min_of(plan.rows, kShortestRun)) plan.run.count = 0;
  }
  plan.lanes = p.transposed && !plan.dots && plan.rows >= kLaneRows;
  plan.quads = p.transposed && !plan.dots && !plan.lanes && !kManyRegisters &&
               fills_quads<T>(plan.rows) && plan.rows >= kQuadRows;
  plan.part = p.transposed ? kMatrixRows : kMatrixColumns;
  plan.parts = ceil_div(p.columns, plan.part);
  plan.stride = plan.part + kLanes<T>;
  const double flops =
      2.0 * static_cast<double>(plan.rows * p.by.groups) * static_cast<double>(p.inner * p.columns);
  plan.workers = useful_workers(most_workers, flops, kRowsFlopsPerWorker);
  return plan;
}

template <typename S>
RowsScratch<S>* take_rows_scratch(const RowsPlan& plan, int64_t inner, Arena& arena) {
  using T = Compute<S>;
  auto* scratch = arena.take<RowsScratch<S>>(plan.workers);
  const int64_t size = plan.dots ? sizeof(S) : sizeof(T);
  const int64_t block = plan.in_place ? 0 : plan.part * plan.inner;
  const bool in_place = __is_same(S, T) && inner == plan.inner;  // rows
  for (int64_t i = 0; i < plan.workers; ++i) {
    RowsScratch<S> s{};
    if (plan.quads) {
      s.rows = arena.take<char>(quad_rows_size<T>(plan.rows, plan.inner) * size);
      if (!in_place) s.four = arena.take<T>(kQuad * plan.inner);
    } else {
      s.rows = arena.take<char>(plan.run.count > 0 ? 0 : plan.rows * plan.inner * size);
    }
    s.matrix = arena.take<char>(block * static_cast<int64_t>(sizeof(T)));
    s.panels = arena.take<T>(plan.lanes ? lane_rows_size<T>(plan.part, plan.inner) : 0);
    s.sums = arena.take<T>(plan.rows * plan.stride);
    s.group = s.fetched = -1;
    if (arena.base != nullptr) scratch[i] = s;
  }
  return scratch;
}

// `count` rows of `channels` elements of the matrix, as U: where they are, or padded in `buffer`.
// They were last read one call ago: unless they have been fetched beside the products of the part
// before, they are asked for at once.
template <typename S, typename U>
TokenBlock<U> read_matrix(const S* from, int64_t stride, int64_t count, int64_t channels,
                          int64_t width, bool in_place, bool fetched, U* buffer) {
  if constexpr (__is_same(S, U)) {
    if (in_place) {
      constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(S));
      for (int64_t i = 0; !fetched && i < count; ++i) {
        for (int64_t c = 0; c < channels; c += kLine)
          __builtin_prefetch(from + i * stride + c, 0, 2);
      }
      return {from, stride, count};
    }
  }
  for (int64_t i = 0; i < count; ++i) {
    U* row = buffer + i * width;
    if constexpr (!__is_same(S, U) || __is_same(U, Compute<S>)) {
      load_row(from + i * stride, 1, channels, row);
    }
    for (int64_t c = channels; c < width; ++c) row[c] = U{};
  }
  return {buffer, width, count};
}

// Products of rows with those of a matrix, turned into lanes.
template <typename T, typename F>
void multiply_lanes(const RowsPlan& plan, const TokenBlock<T>& matrix, T* panels,
                    const F& for_each_run) {
  for (int64_t c = 0; c < matrix.tokens; c += kLanes<T>) {
    rows_to_lanes(matrix.data + c * matrix.stride, matrix.stride,
                  min_of<int64_t>(kLanes<T>, matrix.tokens - c), plan.inner, c, panels);
  }
  for_each_run([&](const T* rows, int64_t stride, int64_t count, int64_t ahead, T* sums) {
    const TokenBlock<T> x{rows, stride, count};
    lane_scores(panels, matrix.tokens, x, plan.inner, ahead, sums, plan.stride);
  });
}

// `count` columns of the products of one group, U being S or the compute type. `from`: their part
// of the matrix, perhaps fetched; `next`: distance to that which the same worker reads next, which
// is fetched meanwhile; 0: none.
template <typename S, typename U>
void rows_product_part(const RowsProductParams& p, const RowsPlan& plan, int64_t group,
                       const S* from, int64_t count, bool fetched, int64_t next,
                       const RowsScratch<S>& s) {
  using T = Compute<S>;
  // f(rows, stride, count, distance to the next ones, their sums) for all rows.
  const auto for_each_run = [&](const auto& f) {
    if (plan.run.count == 0) {
      return f(reinterpret_cast<const U*>(s.rows), plan.inner, plan.rows, plan.rows * plan.inner,
               s.sums);
    }
    if constexpr (__is_same(S, U)) {
      for (int64_t r = 0; r < plan.rows; r += plan.run.count) {
        const S* rows = row_at<const S>(p.rows, p.by, group, r);
        const int64_t next = r + plan.run.count;
        const int64_t ahead = next < plan.rows ? row_at<const S>(p.rows, p.by, group, next) - rows
                                               : plan.run.count * plan.run.stride;
        f(rows, plan.run.stride, plan.run.count, ahead, s.sums + r * plan.stride);
      }
    }
  };
  U* buffer = reinterpret_cast<U*>(s.matrix);
  if (p.transposed) {
    const auto x = read_matrix<S, U>(from, p.matrix_stride, count, p.inner, plan.inner,
                                     plan.in_place, fetched, buffer);
    if constexpr (__is_same(U, T)) {
      if (plan.lanes) return multiply_lanes(plan, x, s.panels, for_each_run);
      if (plan.quads) {
        const T* const quads = reinterpret_cast<const T*>(s.rows);
        return quad_rows(quads, plan.rows, x, plan.inner, true, next, s.sums, plan.stride);
      }
    }
    for_each_run([&](const U* rows, int64_t stride, int64_t count_of_rows, int64_t, T* sums) {
      dot_rows(rows, stride, count_of_rows, x, plan.inner, next, sums, plan.stride, true);
      next = 0;
    });
    return;
  }
  const int64_t width = round_up(count, plan.dots ? kDotChannels : int64_t{kLanes<T>});
  const auto x = read_matrix<S, U>(from, p.matrix_stride, p.inner, count, width, plan.in_place,
                                   fetched, buffer);
  for (int64_t r = 0; r < plan.rows; ++r) {
    for (int64_t c = 0; c < width; ++c) s.sums[r * plan.stride + c] = T{0};
  }
  for_each_run([&](const U* rows, int64_t stride, int64_t count_of_rows, int64_t, T* sums) {
    sum_rows(rows, stride, count_of_rows, x, width, next, sums, plan.stride, true);
    next = 0;
  });
  if constexpr (kHasDots<U>) {
    for (int64_t r = 0; r < plan.rows; ++r) natural_order(s.sums + r * plan.stride, width);
  }
}

// Where the matrix of a task starts, in elements.
static inline int64_t matrix_start(const RowsProductParams& p, const RowsPlan& plan, int64_t task) {
  const int64_t group = task / plan.parts;
  const int64_t first = task % plan.parts * plan.part;
  return p.transposed ? (group * p.columns + first) * p.matrix_stride
                      : group * p.inner * p.matrix_stride + first;
}

// after: the task that the same worker does next; -1: none that is known.
template <typename S>
void rows_product_task(const RowsProductParams& p, const RowsPlan& plan, int64_t task,
                       int64_t after, RowsScratch<S>& s) {
  using T = Compute<S>;
  const int64_t group = task / plan.parts;
  const int64_t column = task % plan.parts * plan.part;
  const int64_t start = matrix_start(p, plan, task);
  // Lanes and quads do not fetch all of it.
  const bool fetched = s.fetched == task && !plan.lanes && !plan.quads;
  const int64_t next = after < 0 || !plan.in_place ? 0 : matrix_start(p, plan, after) - start;
  s.fetched = after;
  const int64_t count = min_of(plan.part, p.columns - column);
  const auto run = [&](auto type) {
    using U = decltype(type);
    if ((plan.quads || plan.run.count == 0) && s.group != group) {
      U* const rows = reinterpret_cast<U*>(s.rows);
      if constexpr (__is_same(U, T)) {
        if (plan.quads) pack_quads<S>(p.rows, p.by, group, p.inner, plan.inner, s.four, rows);
      }
      if (!plan.quads) pack_group<S, U>(p.rows, p.by, group, p.inner, plan.inner, rows);
      s.group = group;
    }
    rows_product_part<S, U>(p, plan, group, static_cast<const S*>(p.matrix) + start, count, fetched,
                            next, s);
  };
  if constexpr (kHasDots<S>) {
    plan.dots ? run(S{}) : run(T{});
  } else {
    run(T{});
  }
  for (int64_t r = 0; r < plan.rows; ++r) {
    store_row<S>(s.sums + r * plan.stride, 1, count, row_at<S>(p.out, p.by, group, r) + column);
  }
}

template <typename S>
void rows_product_typed(const RowsProductParams& p, const Parallel& parallel, void* workspace) {
  const RowsPlan plan = make_rows_plan<S>(p, parallel.workers);
  Arena arena{static_cast<char*>(workspace), 0};
  RowsScratch<S>* scratch = take_rows_scratch<S>(plan, p.inner, arena);
  if (plan.rows == 0) return;
  run_shares(parallel, plan.workers, p.by.groups * plan.parts,
             [&](int64_t task, int64_t after, int64_t worker) {
               rows_product_task<S>(p, plan, task, after, scratch[worker]);
             });
}

// -------------------------------------------------------------------------------------------------
// Sums of outer products.

template <typename T>
struct OuterScratch {
  T* a;           // (rows of a group, kOuterRows)
  T* b;           // (rows of a group, width)
  T* grads;       // (kOuterRows, width), where the sums do not go to memory at once
  int64_t group;  // whose rows are in `b`; -1: nobody's
};

struct OuterPlan {
  int64_t rows;   // of a group
  int64_t width;  // of b, padded
  int64_t parts;  // of a group
  bool stream;    // the sums are stored past the caches
  int64_t workers;
};

template <typename S>
OuterPlan make_outer_plan(const RowsOuterParams& p, int64_t most_workers) {
  OuterPlan plan{};
  plan.rows = rows_of_group(p.by);
  plan.width = round_up(p.b_columns, kLanes<Compute<S>>);
  plan.parts = ceil_div(p.a_columns, kOuterRows);
  plan.stream =
      plan.width == p.b_columns && rows_stream(static_cast<double>(p.written), p.out,
                                               p.b_columns * static_cast<int64_t>(sizeof(S)));
  const double flops = 2.0 * static_cast<double>(plan.rows * p.by.groups) *
                       static_cast<double>(p.a_columns * p.b_columns);
  plan.workers = useful_workers(most_workers, flops, kRowsFlopsPerWorker);
  return plan;
}

template <typename S>
OuterScratch<Compute<S>>* take_outer_scratch(const OuterPlan& plan, Arena& arena) {
  using T = Compute<S>;
  auto* scratch = arena.take<OuterScratch<T>>(plan.workers);
  for (int64_t i = 0; i < plan.workers; ++i) {
    OuterScratch<T> s{};
    s.a = arena.take<T>(plan.rows * kOuterRows);
    s.b = arena.take<T>(plan.rows * plan.width);
    s.grads = arena.take<T>(kOuterRows * plan.width);
    s.group = -1;
    if (arena.base != nullptr) scratch[i] = s;
  }
  return scratch;
}

template <typename S>
void rows_outer_task(const RowsOuterParams& p, const OuterPlan& plan, int64_t task,
                     OuterScratch<Compute<S>>& s) {
  using T = Compute<S>;
  const int64_t group = task / plan.parts;
  const int64_t first = task % plan.parts * kOuterRows;
  const int64_t count = min_of(kOuterRows, p.a_columns - first);
  if (s.group != group) {
    pack_group<S, T>(p.b, p.by, group, p.b_columns, plan.width, s.b);
    s.group = group;
  }
  HeadRows part = p.a;
  part.data = static_cast<S*>(p.a.data) + first;
  pack_group<S, T>(part, p.by, group, count, kOuterRows, s.a);
  const GradFactors<T> f{s.a, kOuterRows, s.b, plan.width, plan.width, plan.rows};
  S* out = static_cast<S*>(p.out) + (group * p.a_columns + first) * p.b_columns;
  if (plan.width == p.b_columns) {
    const auto sums = plan.stream ? grads_of_tokens<S, T, true> : grads_of_tokens<S, T, false>;
    sums(f, 0, count, out, p.b_columns);
    if (plan.stream) finish_streams();
    return;
  }
  grads_of_tokens<T, T, false>(f, 0, count, s.grads, plan.width);
  for (int64_t i = 0; i < count; ++i) {
    store_row<S>(s.grads + i * plan.width, 1, p.b_columns, out + i * p.b_columns);
  }
}

template <typename S>
void rows_outer_typed(const RowsOuterParams& p, const Parallel& parallel, void* workspace) {
  const OuterPlan plan = make_outer_plan<S>(p, parallel.workers);
  Arena arena{static_cast<char*>(workspace), 0};
  OuterScratch<Compute<S>>* scratch = take_outer_scratch<S>(plan, arena);
  run_tasks(parallel, plan.workers, p.by.groups * plan.parts, [&](int64_t task, int64_t worker) {
    rows_outer_task<S>(p, plan, task, scratch[worker]);
  });
}

}  // namespace

int64_t rows_product_workspace(const RowsProductParams& params, int64_t workers) {
  int64_t bytes = 0;
  with_storage_type(params.by.dtype, [&](auto type) {
    using S = decltype(type);
    Arena arena{nullptr, 0};
    take_rows_scratch<S>(make_rows_plan<S>(params, workers), params.inner, arena);
    bytes = arena.used;
  });
  return bytes;
}

void rows_product(const RowsProductParams& params, const Parallel& parallel, void* workspace) {
  with_storage_type(params.by.dtype, [&](auto type) {
    rows_product_typed<decltype(type)>(params, parallel, workspace);
  });
}

int64_t rows_outer_workspace(const RowsOuterParams& params, int64_t workers) {
  int64_t bytes = 0;
  with_storage_type(params.by.dtype, [&](auto type) {
    using S = decltype(type);
    Arena arena{nullptr, 0};
    take_outer_scratch<S>(make_outer_plan<S>(params, workers), arena);
    bytes = arena.used;
  });
  return bytes;
}

void rows_outer(const RowsOuterParams& params, const Parallel& parallel, void* workspace) {
  with_storage_type(params.by.dtype, [&](auto type) {
    rows_outer_typed<decltype(type)>(params, parallel, workspace);
  });
}

}  // namespace x_rope_cls::cpu::X_ROPE_CLS_ISA
