// Pooling forward: one read of the token states.
//
// A task takes a part of one batch's tokens, block by block: scores of all rows by inner products,
// an online softmax, and the weighted sum of the same block while it is in the cache. Where a
// batch's tokens are cut into several parts, whoever finishes the last of them merges the sums, in
// order, so that results do not depend on the threads.
#include "isa.h"
#include "lane_rows.h"
#include "partial_sums.h"
#include "pooling_common.h"
#include "quad_rows.h"

namespace x_rope_cls::cpu::X_ROPE_CLS_ISA {
namespace {

// Of blocks where rows are lanes.
constexpr int64_t kLaneBlockBytes = 196608;
constexpr int64_t kLaneTokens = 96;

template <typename T>
struct PoolScratch {
  T* query;    // (rows, stride), or as lane_rows.h or quad_rows.h has it; times scale * log2(e)
  T* scores;   // (rows, columns) or (tokens, lanes)
  T* packed;   // (some rows, stride), on their way to either
  T* running;  // (3, lanes) there: maxima, sums and what outputs are rescaled by
  T* buffer;
  TokenMoments<T>* moments;
  DotScratch dots;
  PartialSums<T> sums;  // of all rows, or of one where parts are merged
  int64_t query_batch;  // whose rows are in `query`; -1: nobody's
  int64_t fetched;      // part whose first block has been asked for; -1: none
};

template <typename T>
struct PoolMemory {
  PoolPlan plan;
  PoolScratch<T>* scratch;
  PartialSums<T> parts;  // of all tasks, one after the other, where there are several parts a batch
  Counter* done;         // parts done, a batch
};

// Blocks are whole tiles of tokens then; longer ones, as each of them costs a pass over the sums.
template <typename T>
void choose_lanes(PoolPlan& plan) {
  constexpr int64_t kTile = VecTraits<T>::kTileRows;
  plan.lanes = round_up(plan.rows, kLanes<T>) + kLanes<T>;  // no power of two
  const int64_t fits = kLaneBlockBytes / (plan.width * static_cast<int64_t>(sizeof(T)));
  const int64_t most = min_of(kLaneTokens, round_up(plan.p->tokens, kTile));
  plan.block = max_of(kTile, min_of(fits, most) / kTile * kTile);
}

template <typename S>
PoolMemory<Compute<S>> take_pool_memory(const PoolParams& p, int64_t workers, Arena& arena) {
  using T = Compute<S>;
  PoolMemory<T> m{};
  m.plan = make_pool_plan<S>(p, workers, 2);
  if (!m.plan.dots && fills_lanes<T>(m.plan.rows)) choose_lanes<T>(m.plan);
  m.plan.quads = !m.plan.dots && m.plan.lanes == 0 && fills_quads<T>(m.plan.rows);
  const PoolPlan& plan = m.plan;
  take_kept(m.plan, arena);
  m.scratch = arena.take<PoolScratch<T>>(plan.workers);
  if (plan.chunks > 1) {
    m.parts = take_sums<T>(plan.tasks * plan.rows, plan.width, arena);
    m.done = arena.take<Counter>(p.batch);
  }
  for (int64_t i = 0; i < plan.workers; ++i) {
    PoolScratch<T> s{};
    if (plan.lanes > 0) {
      s.query = arena.take<T>(lane_rows_size<T>(plan.rows, plan.width));
      s.scores = arena.take<T>(plan.block * plan.lanes);
      s.packed = arena.take<T>(kLanes<T> * plan.stride);
      s.running = arena.take<T>(3 * plan.lanes);
    } else {
      s.query = arena.take<T>(plan.quads ? quad_rows_size<T>(plan.rows, plan.width)
                                         : plan.rows * plan.stride);
      s.packed = arena.take<T>(plan.quads ? kQuad * plan.stride : 0);
      s.scores = arena.take<T>(plan.rows * plan.columns);
    }
    s.buffer = needs_buffer(plan) && !plan.dots ? arena.take<T>(plan.block * plan.width) : nullptr;
    s.moments = arena.take<TokenMoments<T>>(plan.block);
    s.dots = take_dot_scratch(plan, plan.rows, arena);
    s.sums = take_sums<T>(plan.chunks > 1 ? 1 : plan.rows, plan.width, arena);
    s.query_batch = -1;
    s.fetched = -1;
    if (arena.base != nullptr) m.scratch[i] = s;
  }
  return m;
}

// Scores of one block become weights; padding columns get none.
template <typename T>
void soften_pool(const PoolPlan& plan, int64_t tokens, T* scores, const PartialSums<T>& sums) {
  const int64_t columns = round_up(tokens, kLanes<T>);
  for (int64_t r = 0; r < plan.rows; ++r) {
    T* row = scores + r * plan.columns;
    for (int64_t j = tokens; j < columns; ++j) row[j] = -kInfinity<T>;
    soften_row(row, columns, sums.maximum[r], sums.sum[r], sums.out + r * plan.width, plan.width);
  }
}

// Scores of one block become weights where rows are lanes.
template <typename T>
void soften_pool_lanes(const PoolPlan& plan, int64_t tokens, const PoolScratch<T>& s, T* out) {
  for (int64_t first = 0; first < plan.rows; first += kLanes<T>) {
    T* const maximum = s.running + first;
    T* const factors = maximum + 2 * plan.lanes;
    if (!soften_lanes(s.scores + first, plan.lanes, tokens, maximum, maximum + plan.lanes,
                      factors)) {
      continue;
    }
    const int64_t last = min_of<int64_t>(plan.rows - first, kLanes<T>);
    for (int64_t r = 0; r < last; ++r) {
      T* row = out + (first + r) * plan.width;
      for (int64_t c = 0; c < plan.width; ++c) row[c] *= factors[r];
    }
  }
}

// pool_range where rows are lanes.
template <typename S>
bool pool_range_lanes(const PoolPlan& plan, const TokenRange& range, const TokenRange& after,
                      const PoolScratch<Compute<S>>& s, const PartialSums<Compute<S>>& sums) {
  using T = Compute<S>;
  for (int64_t r = 0; r < plan.lanes; ++r) {
    s.running[r] = -kInfinity<T>;
    s.running[plan.lanes + r] = T{0};
  }
  int64_t ahead = 0;
  for (int64_t i = range.first; i < range.last; i += plan.block) {
    const int64_t count = min_of(plan.block, range.last - i);
    const auto x = read_block<S>(plan, range, i, count, s.buffer, s.moments);
    ahead = distance_to_next<S>(plan, range, i + count, after, x);
    lane_scores(s.query, plan.rows, x, plan.width, ahead, s.scores, plan.lanes);
    soften_pool_lanes(plan, count, s, sums.out);
    const auto sum = i == range.first ? lane_sums<T, false> : lane_sums<T, true>;
    sum(s.scores, plan.lanes, plan.rows, x, plan.width, sums.out, plan.width);
  }
  for (int64_t r = 0; r < plan.rows; ++r) {
    sums.maximum[r] = s.running[r];
    sums.sum[r] = s.running[plan.lanes + r];
  }
  return ahead != 0;
}

// Returns whether the first block of `after` has been fetched.
template <typename S>
bool pool_range(const PoolPlan& plan, const TokenRange& range, const TokenRange& after,
                PoolScratch<Compute<S>>& s, const PartialSums<Compute<S>>& sums) {
  using T = Compute<S>;
  const PoolParams& p = *plan.p;
  const int64_t wanted = p.query.stride_b == 0 ? 0 : range.b;
  if (s.query_batch != wanted) {
    if constexpr (kHasDots<S>) {
      if (plan.dots) copy_pool_rows<S>(plan, p.query, wanted, s.dots.rows);
    }
    const T factor = static_cast<T>(p.scale * kLog2E);
    if (plan.lanes > 0) {
      for (int64_t r = 0; r < plan.rows; r += kLanes<T>) {
        const int64_t count = min_of<int64_t>(plan.rows - r, kLanes<T>);
        pack_pool_rows<S>(plan, p.query, wanted, r, count, factor, s.packed);
        rows_to_lanes(s.packed, plan.stride, count, plan.width, r, s.query);
      }
    } else if (plan.quads) {
      for (int64_t r = 0; r < plan.rows; r += kQuad) {
        pack_pool_rows<S>(plan, p.query, wanted, r, kQuad, factor, s.packed);
        rows_to_quads(s.packed, plan.stride, kQuad, plan.width,
                      s.query + r / kQuad * quad_stride<T>(plan.width));
      }
    } else if (!plan.dots) {
      pack_pool_rows<S>(plan, p.query, wanted, 0, plan.rows, factor, s.query);
    }
    s.query_batch = wanted;
  }
  if (plan.lanes > 0 && range.first < range.last) {
    return pool_range_lanes<S>(plan, range, after, s, sums);
  }
  // The first block's sums need no zeros, but for those of bfloat16, which are only added to.
  if (plan.dots || range.first >= range.last) {
    clear_sums(sums, plan.rows, plan.width);
  } else {
    start_sums(sums, plan.rows);
  }
  int64_t ahead = 0;
  for (int64_t i = range.first; i < range.last; i += plan.block) {
    const int64_t count = min_of(plan.block, range.last - i);
    if constexpr (kHasDots<S>) {
      if (plan.dots) {
        const auto x = score_dots(plan, range, after, i, count, plan.rows, s.dots, s.scores);
        soften_pool(plan, count, s.scores, sums);
        ahead = distance_to_next<S>(plan, range, i + count, after, x);
        sum_dots(plan, x, s.scores, ahead, s.dots, sums.out);
        continue;
      }
    }
    const auto x = read_block<S>(plan, range, i, count, s.buffer, s.moments);
    ahead = distance_to_next<S>(plan, range, i + count, after, x);
    const int64_t next = sums_fetch_all(plan.rows) ? 0 : ahead;
    if (plan.quads) {
      const bool near = i == range.first && !range.fetched;
      quad_rows(s.query, plan.rows, x, plan.width, near, next, s.scores, plan.columns);
    } else {
      dot_rows(s.query, plan.stride, plan.rows, x, plan.width, next, s.scores, plan.columns);
    }
    soften_pool(plan, count, s.scores, sums);
    const auto sum = i == range.first ? sum_rows<T, false> : sum_rows<T, true>;
    sum(s.scores, plan.columns, plan.rows, x, plan.width, ahead, sums.out, plan.width, false);
  }
  return ahead != 0;
}

template <typename S>
X_ROPE_CLS_INLINE S* pooled_row(const PoolPlan& plan, int64_t b, int64_t r) {
  return static_cast<S*>(plan.p->pooled) + (b * plan.rows + r) * plan.p->channels;
}

// `out`: scratch of `width` channels, ordered on the way.
template <typename S>
void store_pool_row(const PoolPlan& plan, int64_t b, int64_t r, Compute<S>* out) {
  order_channels<S>(plan, out);
  store_row<S>(out, 1, plan.p->channels, pooled_row<S>(plan, b, r));
}

// Asks for `count` rows of so many channels.
template <typename T>
X_ROPE_CLS_INLINE void fetch_rows(const T* rows, int64_t stride, int64_t count, int64_t channels) {
  constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(T));
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t c = 0; c < channels; c += kLine) __builtin_prefetch(rows + i * stride + c, 0, 3);
  }
}

// Part i of all tokens. Returns what pool_range does.
template <typename S>
bool pool_part(const PoolMemory<Compute<S>>& m, int64_t i, const TokenRange& range,
               const TokenRange& after, PoolScratch<Compute<S>>& s) {
  using T = Compute<S>;
  const PoolPlan& plan = m.plan;
  const int64_t b = range.b;
  T* const lse = static_cast<T*>(plan.p->lse) + b * plan.rows;
  if (plan.chunks == 1) {
    const bool fetched = pool_range<S>(plan, range, after, s, s.sums);
    for (int64_t r = 0; r < plan.rows; ++r) {
      const auto sums = sums_from(s.sums, r, plan.width);
      lse[r] = finish_sums(sums, plan.width);
      store_pool_row<S>(plan, b, r, sums.out);
    }
    return fetched;
  }
  const auto sums = sums_from(m.parts, i * plan.rows, plan.width);
  const bool fetched = pool_range<S>(plan, range, after, s, sums);
  if (add(m.done[b], 1) + 1 < plan.chunks) return fetched;
  for (int64_t r = 0; r < plan.rows; ++r) {  // the last part is done
    if (r + 1 < plan.rows) {
      fetch_rows(sums_from(m.parts, b * plan.chunks * plan.rows + r + 1, plan.width).out,
                 plan.rows * plan.width, plan.chunks, plan.width);
    }
    T* out = s.sums.out;
    if constexpr (__is_same(S, T)) {  // where the result belongs
      if (plan.width == plan.p->channels) out = pooled_row<S>(plan, b, r);
    }
    lse[r] = merge_sums(sums_from(m.parts, b * plan.chunks * plan.rows + r, plan.width), plan.rows,
                        plan.chunks, plan.width, out);
    if (out == s.sums.out) store_pool_row<S>(plan, b, r, out);
  }
  return fetched;
}

template <typename S>
void pool_forward_typed(const PoolParams& p, const Parallel& parallel, void* workspace) {
  Arena arena{static_cast<char*>(workspace), 0};
  const auto m = take_pool_memory<S>(p, parallel.workers, arena);
  fill_kept(m.plan);
  for (int64_t b = 0; m.plan.chunks > 1 && b < p.batch; ++b) m.done[b].value = 0;
  run_shares(
      parallel, m.plan.workers, m.plan.tasks, [&](int64_t task, int64_t next, int64_t worker) {
        auto& scratch = m.scratch[worker];
        for_each_range(m.plan, task, next, scratch.fetched, [&](int64_t i, const auto&... ranges) {
          return pool_part<S>(m, i, ranges..., scratch);
        });
      });
}

}  // namespace

int64_t pool_workspace(const PoolParams& params, int64_t workers) {
  int64_t bytes = 0;
  with_storage_type(params.dtype, [&](auto type) {
    Arena arena{nullptr, 0};
    take_pool_memory<decltype(type)>(params, workers, arena);
    bytes = arena.used;
  });
  return bytes;
}

void pool_forward(const PoolParams& params, const Parallel& parallel, void* workspace) {
  with_storage_type(params.dtype, [&](auto type) {
    pool_forward_typed<decltype(type)>(params, parallel, workspace);
  });
}

}  // namespace x_rope_cls::cpu::X_ROPE_CLS_ISA
