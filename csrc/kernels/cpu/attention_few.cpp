// Attention forward for a few queries over many keys: CLS rows, late CLS, pooling.
//
// Packing keys into panels would cost more than the few rows that pass over them. Here keys and
// values are used as they lie in memory wherever they can be (rotated, converted or gathered a
// block at a time where not), and the keys are cut into parts, so that a single long sequence keeps
// all threads busy. Whoever finishes the last part of a key head merges them, in order.
#include "attention_common.h"
#include "few_rows.h"
#include "isa.h"
#include "partial_sums.h"
#include "tasks.h"

namespace x_rope_cls::cpu::X_ROPE_CLS_ISA {
namespace {

constexpr int64_t kMostFewQueries = 16;
constexpr int64_t kMostFewRows = 64;  // queries * query heads of a key head
constexpr int64_t kFewBlock = 128;    // keys between the two products
constexpr int64_t kFewChunk = 256;    // keys; fewer are not worth a sum of their own
constexpr int64_t kFewTasks = 32;     // that a call is cut into where it is large enough
constexpr double kFewFlopsPerWorker = 2e5;

// Choices depend on the shapes alone, so that results do not depend on the number of threads.
struct FewPlan {
  const AttentionParams* p;
  int64_t workers;
  int64_t group;  // query heads a key head
  int64_t rows;   // group * queries; row i * group + g is query i of the split, head g of the group
  int64_t key_width, value_width;
  int64_t columns;  // row stride of scores
  int64_t units;    // batch * key heads
  int64_t chunks;   // parts of the keys
  bool keys_in_place, values_in_place;
  Splits queries, keys;
};

template <typename T>
struct FewScratch {
  T* query;      // (rows, key_width), scaled by scale * log2(e), rotated where rows have a position
  T* query_raw;  // the same, unrotated
  T* scores;
  T* keys;      // (block, key_width)
  T* keys_raw;  // the same, unrotated
  T* values;    // (block, value_width)
  T* table;     // (2 * pairs)
  T* factors;   // (block), dropout
  PartialSums<T> sums;
};

template <typename T>
struct FewMemory {
  FewPlan plan;
  FewScratch<T>* scratch;
  PartialSums<T> parts;
  Counter* done;  // parts done, a key head
};

template <typename S>
FewPlan make_few_plan(const AttentionParams& p, int64_t most_workers) {
  using T = Compute<S>;
  FewPlan plan{};
  plan.p = &p;
  plan.group = p.key_heads == 0 ? 1 : p.heads / p.key_heads;
  plan.rows = plan.group * p.queries;
  plan.key_width = round_up(p.head_dim, kLanes<T>);
  plan.value_width = round_up(p.value_dim, kLanes<T>);
  plan.columns = kFewBlock + kLanes<T>;
  plan.units = p.batch * p.key_heads;
  const int64_t least = max_of(kFewChunk, 4 * plan.rows);
  plan.chunks = max_of<int64_t>(
      1, min_of(ceil_div(kFewTasks, max_of<int64_t>(1, plan.units)), p.keys / least));
  const double flops = 2.0 * static_cast<double>(plan.units * plan.rows) *
                       static_cast<double>(p.keys) * static_cast<double>(p.head_dim + p.value_dim);
  plan.workers = useful_workers(most_workers, flops, kFewFlopsPerWorker);
  plan.keys_in_place = in_place<S>(p.k, p.head_dim);
  plan.values_in_place = in_place<S>(p.v, p.value_dim);
  return plan;
}

template <typename S>
FewMemory<Compute<S>> take_few_memory(const AttentionParams& p, int64_t workers, Arena& arena) {
  using T = Compute<S>;
  FewMemory<T> m{};
  m.plan = make_few_plan<S>(p, workers);
  FewPlan& plan = m.plan;
  plan.queries = take_splits(arena, query_source(p));
  plan.keys = take_splits(arena, key_source(p));
  m.scratch = arena.take<FewScratch<T>>(plan.workers);
  if (plan.chunks > 1) {
    m.parts = take_sums<T>(plan.units * plan.chunks * plan.rows, plan.value_width, arena);
    m.done = arena.take<Counter>(plan.units);
  }
  for (int64_t i = 0; i < plan.workers; ++i) {
    FewScratch<T> s{};
    s.query = arena.take<T>(plan.rows * plan.key_width);
    s.query_raw = sets_apart(p) ? arena.take<T>(plan.rows * plan.key_width) : nullptr;
    s.scores = arena.take<T>(plan.rows * plan.columns);
    s.keys = arena.take<T>(kFewBlock * plan.key_width);
    s.keys_raw = sets_apart(p) ? arena.take<T>(kFewBlock * plan.key_width) : nullptr;
    s.values = arena.take<T>(kFewBlock * plan.value_width);
    s.table = arena.take<T>(2 * p.pairs);
    s.factors = p.dropout_p > 0 ? arena.take<T>(kFewBlock) : nullptr;
    s.sums = take_sums<T>(plan.chunks > 1 ? 1 : plan.rows, plan.value_width, arena);
    if (arena.base != nullptr) m.scratch[i] = s;
  }
  return m;
}

// A key head of a batch.
struct FewUnit {
  int64_t b, key_head, index;
  Split queries, keys;
  int64_t ordinary_rows;
};
static inline FewUnit unit_of(const FewPlan& plan, int64_t index) {
  FewUnit u{};
  u.index = index;
  u.b = index / plan.p->key_heads;
  u.key_head = index % plan.p->key_heads;
  u.queries = plan.queries.of(u.b);
  u.keys = plan.keys.of(u.b);
  u.ordinary_rows = u.queries.ordinary * plan.group;
  return u;
}

// Query index and head of a row.
X_ROPE_CLS_INLINE int64_t query_of(const FewPlan& plan, const FewUnit& u, int64_t row) {
  return u.queries.index[row / plan.group];
}
X_ROPE_CLS_INLINE int64_t head_of(const FewPlan& plan, const FewUnit& u, int64_t row) {
  return u.key_head * plan.group + row % plan.group;
}

template <typename S>
void pack_few_queries(const FewPlan& plan, const FewUnit& u, const FewScratch<Compute<S>>& s) {
  using T = Compute<S>;
  const AttentionParams& p = *plan.p;
  const T scale = static_cast<T>(p.scale * kLog2E);
  for (int64_t r = 0; r < plan.rows; ++r) {
    const int64_t n = query_of(plan, u, r);
    const int64_t h = head_of(plan, u, r);
    const bool turned = r < u.ordinary_rows && turns(p, p.table_q, u.b, n);
    pack_row<S>(p, p.q, p.table_q, u.b, h, n, p.head_dim, plan.key_width, turned, scale,
                s.query + r * plan.key_width, s.table);
    if (s.query_raw != nullptr && u.keys.special > 0) {
      pack_row<S>(p, p.q, p.table_q, u.b, h, n, p.head_dim, plan.key_width, false, scale,
                  s.query_raw + r * plan.key_width, s.table);
    }
  }
}

// Scores of all rows with keys of one class.
template <typename S>
void score_few(const FewPlan& plan, const FewUnit& u, const int32_t* index, int64_t count,
               bool ordinary, const FewScratch<Compute<S>>& s) {
  using T = Compute<S>;
  const AttentionParams& p = *plan.p;
  const auto read = [&](bool rotated, T* buffer) {
    return read_rows<S>(p, p.k, u.b, u.key_head, index, count, p.head_dim, plan.key_width,
                        plan.keys_in_place, rotated, buffer, s.table);
  };
  const auto score = [&](const T* query, int64_t first, int64_t last, const TokenBlock<T>& keys) {
    dot_rows(query + first * plan.key_width, plan.key_width, last - first, keys, plan.key_width, 0,
             s.scores + first * plan.columns, plan.columns);
  };
  const int64_t apart = sets_apart(p) ? u.ordinary_rows : plan.rows;
  if (!ordinary) {  // raw keys for everybody; special rows are packed raw already
    const auto keys = read(false, s.keys);
    score(s.query_raw, 0, apart, keys);
    score(s.query, apart, plan.rows, keys);
    return;
  }
  if (apart > 0) score(s.query, 0, apart, read(p.has_rotary, s.keys));
  if (apart < plan.rows) score(s.query, apart, plan.rows, read(false, s.keys_raw));
}

// Biases, softmax and dropout of one block.
template <typename T>
void soften_few(const FewPlan& plan, const FewUnit& u, const int32_t* index, int64_t count,
                const FewScratch<T>& s, const PartialSums<T>& sums) {
  const AttentionParams& p = *plan.p;
  const int64_t columns = round_up(count, kLanes<T>);
  for (int64_t r = 0; r < plan.rows; ++r) {
    T* row = s.scores + r * plan.columns;
    const int64_t n = query_of(plan, u, r);
    const int64_t h = head_of(plan, u, r);
    if (p.bias != nullptr) add_bias(bias_of(p, u.b, h, n), index, count, row);
    for (int64_t j = count; j < columns; ++j) row[j] = -kInfinity<T>;
    soften_row(row, columns, sums.maximum[r], sums.sum[r], sums.out + r * plan.value_width,
               plan.value_width);
    if (p.dropout_p > 0) {
      dropout_factors(make_dropout(p.dropout_p, p.seed), u.b * p.heads + h, n, index, count,
                      s.factors);
      for (int64_t j = 0; j < count; ++j) row[j] *= s.factors[j];
    }
  }
}

// Keys [first, last) of the split.
template <typename S>
void attend_few(const FewPlan& plan, const FewUnit& u, int64_t first, int64_t last,
                const FewScratch<Compute<S>>& s, const PartialSums<Compute<S>>& sums) {
  using T = Compute<S>;
  const AttentionParams& p = *plan.p;
  pack_few_queries<S>(plan, u, s);
  clear_sums(sums, plan.rows, plan.value_width);
  for (int64_t i = first; i < last;) {
    const bool ordinary = i < u.keys.ordinary;
    const int64_t end = ordinary ? min_of(last, u.keys.ordinary) : last;
    const int64_t count = min_of(kFewBlock, end - i);
    const int32_t* index = u.keys.index + i;
    score_few<S>(plan, u, index, count, ordinary, s);
    soften_few<T>(plan, u, index, count, s, sums);
    const auto values =
        read_rows<S>(p, p.v, u.b, u.key_head, index, count, p.value_dim, plan.value_width,
                     plan.values_in_place, false, s.values, s.table);
    sum_rows(s.scores, plan.columns, plan.rows, values, plan.value_width, 0, sums.out,
             plan.value_width);
    i += count;
  }
}

template <typename S>
void store_few_row(const FewPlan& plan, const FewUnit& u, int64_t r, const Compute<S>* out,
                   Compute<S> lse) {
  const AttentionParams& p = *plan.p;
  const int64_t n = query_of(plan, u, r);
  const int64_t h = head_of(plan, u, r);
  static_cast<Compute<S>*>(p.lse)[(u.b * p.heads + h) * p.queries + n] = lse;
  store_row<S>(out, p.out.stride_d, p.value_dim, row_at<S>(p.out, u.b, h, n));
}

template <typename S>
void few_task(const FewMemory<Compute<S>>& m, int64_t task, int64_t worker) {
  using T = Compute<S>;
  const FewPlan& plan = m.plan;
  const FewScratch<Compute<S>>& s = m.scratch[worker];
  const FewUnit u = unit_of(plan, task / plan.chunks);
  const int64_t keys = u.keys.ordinary + u.keys.special;
  if (plan.chunks == 1) {
    attend_few<S>(plan, u, 0, keys, s, s.sums);
    for (int64_t r = 0; r < plan.rows; ++r) {
      const auto sums = sums_from(s.sums, r, plan.value_width);
      const T lse = finish_sums(sums, plan.value_width);
      store_few_row<S>(plan, u, r, sums.out, lse);
    }
    return;
  }
  const int64_t part = ceil_div(keys, plan.chunks);
  const int64_t first = min_of(keys, task % plan.chunks * part);
  attend_few<S>(plan, u, first, min_of(keys, first + part), s,
                sums_from(m.parts, task * plan.rows, plan.value_width));
  if (add(m.done[u.index], 1) + 1 < plan.chunks) return;
  for (int64_t r = 0; r < plan.rows; ++r) {  // the last part is done
    const T lse =
        merge_sums(sums_from(m.parts, u.index * plan.chunks * plan.rows + r, plan.value_width),
                   plan.rows, plan.chunks, plan.value_width, s.sums.out);
    store_few_row<S>(plan, u, r, s.sums.out, lse);
  }
}

template <typename S>
void few_typed(const AttentionParams& p, const Parallel& parallel, void* workspace) {
  Arena arena{static_cast<char*>(workspace), 0};
  const auto m = take_few_memory<S>(p, parallel.workers, arena);
  fill_splits(m.plan.queries, query_source(p));
  fill_splits(m.plan.keys, key_source(p));
  for (int64_t i = 0; m.plan.chunks > 1 && i < m.plan.units; ++i) m.done[i].value = 0;
  run_tasks(parallel, m.plan.workers, m.plan.units * m.plan.chunks,
            [&](int64_t task, int64_t worker) { few_task<S>(m, task, worker); });
}

}  // namespace

bool attention_is_few(const AttentionParams& params) {
  const int64_t group = params.key_heads == 0 ? 1 : params.heads / params.key_heads;
  return params.queries <= kMostFewQueries && params.queries * group <= kMostFewRows;
}

int64_t attention_few_workspace(const AttentionParams& params, int64_t workers) {
  int64_t bytes = 0;
  with_storage_type(params.dtype, [&](auto type) {
    Arena arena{nullptr, 0};
    take_few_memory<decltype(type)>(params, workers, arena);
    bytes = arena.used;
  });
  return bytes;
}

void attention_few(const AttentionParams& params, const Parallel& parallel, void* workspace) {
  with_storage_type(params.dtype,
                    [&](auto type) { few_typed<decltype(type)>(params, parallel, workspace); });
}

}  // namespace x_rope_cls::cpu::X_ROPE_CLS_ISA
