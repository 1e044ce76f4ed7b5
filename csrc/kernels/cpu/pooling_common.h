// What both pooling passes share: how the work is cut, which tokens count, and how blocks of token
// states are read.
#pragma once

#include <cstdint>

#include "../pooling.h"
#include "arena.h"
#include "convert.h"
#include "few_rows.h"
#include "few_rows_bf16.h"
#include "quad_rows.h"
#include "softmax.h"
#include "tasks.h"
#include "vec.h"

namespace x_rope_cls::cpu::X_ROPE_CLS_ISA {
namespace {

// Of token states between the two products: in L2, and the same of those that are fetched
// meanwhile.
constexpr int64_t kPoolBlockBytes = kManyRegisters ? 262144 : 131072;
constexpr int64_t kPoolMostTokens = 128;     // of a block
constexpr int64_t kPoolTasks = 16;           // that a call is cut into where it is large enough
constexpr int64_t kPoolManyTasks = 32;       // where parts stay long
constexpr int64_t kPoolChunk = 256;          // tokens; fewer are not worth a sum of their own
constexpr int64_t kPoolLongChunk = 512;      // of which that sum takes next to nothing
constexpr double kPoolFlopsPerWorker = 2e5;  // less work is not worth another thread

// Sizes and choices of one call. They depend on the shapes alone, so that results do not depend on
// the number of threads.
struct PoolPlan {
  const PoolParams* p;
  int64_t rows;     // heads * queries
  int64_t width;    // channels padded to whole vectors
  int64_t stride;   // between rows of queries, in elements: a cache line more
  int64_t block;    // tokens of a block, a multiple of kDotTokens
  int64_t columns;  // row stride of scores
  int64_t lanes;    // of a token's scores, where rows are lanes (lane_rows.h); else 0
  bool quads;       // inner products take rows in fours (quad_rows.h)
  int64_t chunks;   // parts of a batch's tokens, summed apart
  int64_t group;    // batches of a task, where chunks is 1
  int64_t tasks;    // ceil(batch / group) * chunks
  int64_t workers;
  bool in_place;        // tokens can be read where they are
  bool dots;            // and in bfloat16, multiplied without conversion
  bool direct_grads;    // gradients of tokens are stored from registers
  bool stream_grads;    // and past the caches
  int32_t* kept;        // (batch, tokens): tokens that are not masked, ascending; null: all count
  int64_t* kept_count;  // (batch)
};

template <typename S>
PoolPlan make_pool_plan(const PoolParams& p, int64_t most_workers, int64_t products) {
  using T = Compute<S>;
  PoolPlan plan{};
  plan.p = &p;
  plan.rows = p.heads * p.queries;
  plan.width = round_up(p.channels, kLanes<T>);
  plan.stride = plan.width + 64 / static_cast<int64_t>(sizeof(S));
  const bool dense = p.x.stride_c == 1 && p.norm == PoolNorm::kNone;
  plan.in_place = __is_same(S, T) && dense && plan.width == p.channels;
  plan.dots = kHasDots<S> && dense && p.channels % kDotChannels == 0;
  const size_t size = plan.dots ? sizeof(S) : sizeof(T);
  const int64_t fits = kPoolBlockBytes / (plan.width * static_cast<int64_t>(size));
  const int64_t block = max_of<int64_t>(16, min_of(kPoolMostTokens, fits)) / 16 * 16;
  plan.block = max_of<int64_t>(kDotTokens, min_of(block, round_up(p.tokens, kDotTokens)));
  plan.columns = round_up(plan.block, kLanes<T>) + kLanes<T>;
  const int64_t batch = max_of<int64_t>(1, p.batch);
  const auto parts = [&](int64_t tasks, int64_t least) {
    return min_of(ceil_div(tasks, batch), p.tokens / max_of(least, 4 * plan.rows));
  };
  plan.chunks = max_of<int64_t>(
      1, max_of(parts(kPoolTasks, kPoolChunk), parts(kPoolManyTasks, kPoolLongChunk)));
  plan.group = plan.chunks > 1 ? 1 : ceil_div(batch, 2 * kPoolManyTasks);
  plan.tasks = ceil_div(p.batch, plan.group) * plan.chunks;
  const double flops = 2.0 * static_cast<double>(products) *
                       static_cast<double>(p.batch * p.tokens) *
                       static_cast<double>(p.channels * plan.rows);
  plan.workers = useful_workers(most_workers, flops, kPoolFlopsPerWorker);
  return plan;
}

static inline void take_kept(PoolPlan& plan, Arena& arena) {
  if (plan.p->key_mask == nullptr) return;
  plan.kept = arena.take<int32_t>(plan.p->batch * plan.p->tokens);
  plan.kept_count = arena.take<int64_t>(plan.p->batch);
}
static inline void fill_kept(const PoolPlan& plan) {
  const PoolParams& p = *plan.p;
  for (int64_t b = 0; plan.kept != nullptr && b < p.batch; ++b) {
    const uint8_t* mask = p.key_mask + b * p.key_mask_stride_b;
    int32_t* kept = plan.kept + b * p.tokens;
    int64_t count = 0;
    for (int64_t n = 0; n < p.tokens; ++n) {
      kept[count] = static_cast<int32_t>(n);
      count += mask[n * p.key_mask_stride_n] != 0 ? 1 : 0;
    }
    plan.kept_count[b] = count;
  }
}

// Part `chunk` of the tokens of batch b that count: the first..last of them.
struct TokenRange {
  int64_t b;
  const int32_t* kept;  // null: token i is token i
  int64_t count;        // tokens of the batch that count
  int64_t first, last;
  bool fetched;  // the first block has been asked for already

  int64_t token(int64_t i) const { return kept == nullptr ? i : kept[i]; }
};
static inline TokenRange range_of(const PoolPlan& plan, int64_t b, int64_t chunk) {
  TokenRange range{};
  range.b = b;
  range.kept = plan.kept == nullptr ? nullptr : plan.kept + b * plan.p->tokens;
  range.count = plan.kept == nullptr ? plan.p->tokens : plan.kept_count[b];
  const int64_t part = round_up(ceil_div(range.count, plan.chunks), kDotTokens);
  range.first = min_of(range.count, chunk * part);
  range.last = chunk + 1 == plan.chunks ? range.count : min_of(range.count, range.first + part);
  return range;
}

// -------------------------------------------------------------------------------------------------
// Rows of queries.

template <typename S>
X_ROPE_CLS_INLINE const S* row4(const Tensor4& t, int64_t b, int64_t row, int64_t queries) {
  return static_cast<const S*>(t.data) + b * t.stride_b + row / queries * t.stride_h +
         row % queries * t.stride_n;
}

// The rows as they are, one after the other.
template <typename S>
void copy_pool_rows(const PoolPlan& plan, const Tensor4& t, int64_t b, S* to) {
  for (int64_t r = 0; r < plan.rows; ++r, to += plan.stride) {
    const S* from = row4<S>(t, b, r, plan.p->queries);
    for (int64_t c = 0; c < plan.p->channels; ++c) to[c] = from[c * t.stride_d];
  }
}

// Rows [first, first + count), dense, of the compute type, times `factor`, padded with zeros.
template <typename S>
void pack_pool_rows(const PoolPlan& plan, const Tensor4& t, int64_t b, int64_t first, int64_t count,
                    Compute<S> factor, Compute<S>* to) {
  using T = Compute<S>;
  const PoolParams& p = *plan.p;
  for (int64_t r = first; r < first + count; ++r, to += plan.stride) {
    load_row(row4<S>(t, b, r, p.queries), t.stride_d, p.channels, to);
    for (int64_t c = 0; c < p.channels; ++c) to[c] *= factor;
    for (int64_t c = p.channels; c < plan.width; ++c) to[c] = T{0};
  }
}

// -------------------------------------------------------------------------------------------------
// Blocks of tokens.

// What normalising one token needs: (x - mean) * inverse is the normalised state.
template <typename T>
struct TokenMoments {
  T mean;
  T inverse;
};

// Sum of n elements, four chains of vectors wide.
template <typename T, typename F>
X_ROPE_CLS_INLINE T sum_of(int64_t n, F&& term) {
  constexpr int64_t kL = kLanes<T>;
  Vec<T> sum[4] = {};
  int64_t c = 0;
  for (; c + 4 * kL <= n; c += 4 * kL) {
    X_ROPE_CLS_UNROLL
    for (int i = 0; i < 4; ++i) sum[i] += term(c + i * kL);
  }
  for (; c + kL <= n; c += kL) sum[0] += term(c);
  return sum_lanes<T>((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

// row: `channels` values; what lies between them and `width` is not looked at.
template <typename T>
X_ROPE_CLS_INLINE TokenMoments<T> moments_of(const PoolParams& p, const T* row) {
  const int64_t n = p.channels;
  const int64_t whole = n / kLanes<T> * kLanes<T>;
  TokenMoments<T> m{T{0}, T{0}};
  if (p.norm == PoolNorm::kLayer) {
    T sum = sum_of<T>(whole, [&](int64_t c) { return load<T>(row + c); });
    for (int64_t c = whole; c < n; ++c) sum += row[c];
    m.mean = sum / static_cast<T>(n);
  }
  const Vec<T> mean = broadcast<T>(m.mean);
  T squares = sum_of<T>(whole, [&](int64_t c) {
    const Vec<T> d = load<T>(row + c) - mean;
    return d * d;
  });
  for (int64_t c = whole; c < n; ++c) squares += (row[c] - m.mean) * (row[c] - m.mean);
  m.inverse = T{1} / static_cast<T>(__builtin_sqrt(static_cast<double>(
                         squares / static_cast<T>(n) + static_cast<T>(p.norm_eps))));
  return m;
}

// to = (from - mean) * inverse * weight + bias; in place is fine.
template <typename T, bool kWeight, bool kBias>
X_ROPE_CLS_INLINE void normalise_row(const PoolParams& p, TokenMoments<T> m, const T* from, T* to) {
  const T* weight = static_cast<const T*>(p.norm_weight);
  const T* bias = static_cast<const T*>(p.norm_bias);
  const auto normal = [&](auto x, auto w, auto b) {
    const auto y = (x - m.mean) * m.inverse;
    return kWeight ? (kBias ? y * w + b : y * w) : (kBias ? y + b : y);
  };
  int64_t c = 0;
  for (; c + kLanes<T> <= p.channels; c += kLanes<T>) {
    const Vec<T> w = kWeight ? load<T>(weight + c) : Vec<T>{};
    const Vec<T> b = kBias ? load<T>(bias + c) : Vec<T>{};
    store<T>(to + c, normal(load<T>(from + c), w, b));
  }
  for (; c < p.channels; ++c) {
    to[c] = normal(from[c], kWeight ? weight[c] : T{0}, kBias ? bias[c] : T{0});
  }
}
template <typename T>
X_ROPE_CLS_INLINE void normalise_row(const PoolParams& p, TokenMoments<T> m, const T* from, T* to) {
  if (p.norm_weight != nullptr && p.norm_bias != nullptr) {
    normalise_row<T, true, true>(p, m, from, to);
  } else if (p.norm_weight != nullptr) {
    normalise_row<T, true, false>(p, m, from, to);
  } else if (p.norm_bias != nullptr) {
    normalise_row<T, false, true>(p, m, from, to);
  } else {
    normalise_row<T, false, false>(p, m, from, to);
  }
}

template <typename S>
X_ROPE_CLS_INLINE S* token_at(const Tensor3& t, int64_t b, int64_t n) {
  return static_cast<S*>(t.data) + b * t.stride_b + n * t.stride_n;
}

// Blocks are fetched while their predecessors are summed up. Of one without, all is asked for at
// once, or, by quad_rows, as it goes.
template <typename S>
X_ROPE_CLS_INLINE TokenBlock<S> block_in_place(const PoolPlan& plan, const TokenRange& range,
                                               int64_t first, int64_t count) {
  constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(S));
  const PoolParams& p = *plan.p;
  const S* from = token_at<const S>(p.x, range.b, range.token(first));
  const int64_t asked = plan.quads ? min_of<int64_t>(count, quad_tokens(1)) : count;
  for (int64_t i = 0; first == range.first && !range.fetched && i < asked; ++i) {
    const S* row = from + i * p.x.stride_n;
    for (int64_t c = 0; c < p.channels; c += kLine) __builtin_prefetch(row + c, 0, 2);
  }
  return {from, p.x.stride_n, count};
}

// Tokens [first, first + count) of the range, where they are or as dense rows in `buffer`
// (block * width), normalised if wanted; `moments` (block) is filled then.
template <typename S>
TokenBlock<Compute<S>> read_block(const PoolPlan& plan, const TokenRange& range, int64_t first,
                                  int64_t count, Compute<S>* buffer,
                                  TokenMoments<Compute<S>>* moments) {
  using T = Compute<S>;
  const PoolParams& p = *plan.p;
  const int64_t start = range.token(first);
  const bool together = range.token(first + count - 1) - start == count - 1;
  if constexpr (__is_same(S, T)) {
    if (plan.in_place && together) {
      return block_in_place<T>(plan, range, first, count);
    }
  }
  for (int64_t i = 0; i < count; ++i) {
    T* row = buffer + i * plan.width;
    const S* token = token_at<const S>(p.x, range.b, range.token(first + i));
    const T* from = row;
    if constexpr (__is_same(S, T)) {
      if (p.x.stride_c == 1 && p.norm != PoolNorm::kNone) from = token;
    }
    if (from == row) load_row(token, p.x.stride_c, p.channels, row);
    if (p.norm != PoolNorm::kNone) {
      moments[i] = moments_of(p, from);
      normalise_row(p, moments[i], from, row);
    }
    for (int64_t c = p.channels; c < plan.width; ++c) row[c] = T{0};
  }
  return {buffer, plan.width, count};
}

// The same without conversion: dense channels, where they are or one after the other in `buffer`.
template <typename S>
TokenBlock<S> read_block_raw(const PoolPlan& plan, const TokenRange& range, int64_t first,
                             int64_t count, S* buffer) {
  const PoolParams& p = *plan.p;
  const int64_t start = range.token(first);
  if (range.token(first + count - 1) - start == count - 1) {
    return block_in_place<S>(plan, range, first, count);
  }
  for (int64_t i = 0; i < count; ++i) {
    const S* from = token_at<const S>(p.x, range.b, range.token(first + i));
    __builtin_memcpy(buffer + i * plan.width, from, static_cast<size_t>(p.channels) * sizeof(S));
  }
  return {buffer, plan.width, count};
}

// Distance from a block to where its successor lies, for fetching that ahead; 0 where there is none
// or rows are not equally far apart. `next`: the block's end in the range; `after`: the range that
// the same worker reads next, perhaps an empty one.
template <typename S, typename B>
X_ROPE_CLS_INLINE int64_t distance_to_next(const PoolPlan& plan, const TokenRange& range,
                                           int64_t next, const TokenRange& after,
                                           const TokenBlock<B>& x) {
  const PoolParams& p = *plan.p;
  if constexpr (__is_same(S, B)) {
    const bool ends = next >= range.last;
    const TokenRange& of = ends ? after : range;
    const int64_t first = ends ? after.first : next;
    if (first + x.tokens > of.last || p.x.stride_n != x.stride || p.x.stride_c != 1) return 0;
    const auto to = reinterpret_cast<intptr_t>(token_at<const S>(p.x, of.b, of.token(first)));
    return (to - reinterpret_cast<intptr_t>(x.data)) / static_cast<intptr_t>(sizeof(S));
  }
  return 0;
}

// f(part, range, after) for every part of a task, in order, with its tokens and those of the part
// that the same worker does next. f returns whether it has fetched the first block of that. next:
// the task that the worker does next; -1: none that is known. fetched: the part whose first block
// has been fetched; -1: none.
template <typename F>
X_ROPE_CLS_INLINE void for_each_range(const PoolPlan& plan, int64_t task, int64_t next,
                                      int64_t& fetched, F&& f) {
  const int64_t size = plan.chunks > 1 ? 1 : plan.group;
  const int64_t end = min_of((task + 1) * size, plan.p->batch * plan.chunks);
  const auto part = [&](int64_t i) {
    return i >= 0 ? range_of(plan, i / plan.chunks, i % plan.chunks) : TokenRange{};
  };
  for (int64_t i = task * size; i < end; ++i) {
    const int64_t after = i + 1 < end ? i + 1 : next >= 0 ? next * size : -1;
    TokenRange range = part(i);
    range.fetched = i == fetched;
    fetched = f(i, range, part(after)) ? after : -1;
  }
}

// Whether tokens may have to be copied.
static inline bool needs_buffer(const PoolPlan& plan) {
  return !(plan.in_place || plan.dots) || plan.p->key_mask != nullptr;
}

// What products in bfloat16 dot products need beside the rest.
struct DotScratch {
  BFloat16* rows;     // (rows or twice as many, stride): queries, and gradients of pooled
  BFloat16* weights;  // (rows, columns)
  BFloat16* buffer;   // (block, width)
};
static inline DotScratch take_dot_scratch(const PoolPlan& plan, int64_t rows, Arena& arena) {
  if (!plan.dots) return {};
  return {arena.take<BFloat16>(rows * plan.stride), arena.take<BFloat16>(plan.rows * plan.columns),
          needs_buffer(plan) ? arena.take<BFloat16>(plan.block * plan.width) : nullptr};
}

#ifdef __AVX512BF16__
// Scores of `rows` stacked rows with one block, those of queries times scale * log2(e).
static inline TokenBlock<BFloat16> score_dots(const PoolPlan& plan, const TokenRange& range,
                                              const TokenRange& after, int64_t first, int64_t count,
                                              int64_t rows, const DotScratch& s, float* scores) {
  const auto x = read_block_raw<BFloat16>(plan, range, first, count, s.buffer);
  const int64_t ahead = distance_to_next<BFloat16>(plan, range, first + count, after, x);
  dot_rows(s.rows, plan.stride, rows, x, plan.width, ahead, scores, plan.columns);
  const float factor = static_cast<float>(plan.p->scale * kLog2E);
  for (int64_t i = 0; i < plan.rows * plan.columns; ++i) scores[i] *= factor;
  return x;
}

// out += weights of the queries' rows times the block, in the order of natural_order.
static inline void sum_dots(const PoolPlan& plan, const TokenBlock<BFloat16>& x,
                            const float* weights, int64_t ahead, const DotScratch& s, float* out) {
  for (int64_t r = 0; r < plan.rows; ++r) {
    round_weights(weights + r * plan.columns, x.tokens, s.weights + r * plan.columns);
  }
  sum_rows(s.weights, plan.columns, plan.rows, x, plan.width, ahead, out, plan.width);
}
#endif

// Puts a finished row of sums in order.
template <typename S>
X_ROPE_CLS_INLINE void order_channels([[maybe_unused]] const PoolPlan& plan,
                                      [[maybe_unused]] Compute<S>* row) {
  if constexpr (kHasDots<S>) {
    if (plan.dots) natural_order(row, plan.width);
  }
}

}  // namespace
}  // namespace x_rope_cls::cpu::X_ROPE_CLS_ISA
