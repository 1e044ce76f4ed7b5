// A shared counter that hands out tasks in increasing order, and waiting for earlier tasks.
#pragma once

#include <sched.h>

#include <cstdint>

#include "../parallel.h"
#include "vec.h"

namespace x_rope_cls::cpu::X_ROPE_CLS_ISA {
namespace {

// One counter a cache line, so that threads do not disturb each other.
struct alignas(64) Counter {
  int64_t value;
};

X_ROPE_CLS_INLINE int64_t add(Counter& c, int64_t by) {
  return __atomic_fetch_add(&c.value, by, __ATOMIC_ACQ_REL);
}

// Returns once the counter has reached `target`. Tasks are handed out in increasing order, so
// whoever a task may wait for has been taken by somebody who is running.
X_ROPE_CLS_INLINE void wait_until(const Counter& c, int64_t target) {
  for (int64_t spins = 0; __atomic_load_n(&c.value, __ATOMIC_ACQUIRE) < target; ++spins) {
    if (spins > 256) {
      sched_yield();
    } else {
#if defined(__x86_64__)
      __builtin_ia32_pause();
#endif
    }
  }
}

template <typename F>
struct TaskLoop {
  const F* body;
  Counter next;
  int64_t tasks;
  static void run(void* self, int64_t worker) {
    auto& loop = *static_cast<TaskLoop*>(self);
    for (int64_t t = add(loop.next, 1); t < loop.tasks; t = add(loop.next, 1)) {
      (*loop.body)(t, worker);
    }
  }
};

// body(task, worker) for every task, each by whoever is free, started in increasing order.
template <typename F>
X_ROPE_CLS_INLINE void run_tasks(const Parallel& parallel, int64_t workers, int64_t tasks,
                                 const F& body) {
  if (workers <= 1 || tasks <= 1) {
    for (int64_t t = 0; t < tasks; ++t) body(t, 0);
    return;
  }
  TaskLoop<F> loop{&body, {0}, tasks};
  parallel.run(parallel.context, min_of(workers, tasks), &TaskLoop<F>::run, &loop);
}

template <typename F>
struct RunLoop {
  const F* body;
  Counter next;
  int64_t tasks, workers;
  int64_t share;  // of a worker before it takes what comes
  static void run(void* self, int64_t worker) {
    auto& loop = *static_cast<RunLoop*>(self);
    const int64_t own = worker * loop.share;
    if (loop.share > 0) (*loop.body)(own, own + loop.share, worker);
    int64_t first = __atomic_load_n(&loop.next.value, __ATOMIC_ACQUIRE);
    while (first < loop.tasks) {
      const int64_t last = first + ceil_div(loop.tasks - first, 2 * loop.workers);
      if (__atomic_compare_exchange_n(&loop.next.value, &first, last, /*weak=*/false,
                                      __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE)) {
        (*loop.body)(first, last, worker);
        first = __atomic_load_n(&loop.next.value, __ATOMIC_ACQUIRE);
      }
    }
  }
};

// body(first, last, worker) for runs of tasks that one worker does one after the other: long ones
// while there is much left, single ones at the end. If all tasks take about the same time, most of
// them are one run a worker, since what a run starts with is not in the caches.
template <typename F>
X_ROPE_CLS_INLINE void run_in_runs(const Parallel& parallel, int64_t workers, int64_t tasks,
                                   bool equal, const F& body) {
  if (tasks <= 0) return;
  if (workers <= 1 || tasks == 1) return body(0, tasks, 0);
  const int64_t used = min_of(workers, tasks);
  const int64_t share = equal ? tasks * 7 / 8 / used : 0;
  RunLoop<F> loop{&body, {share * used}, tasks, used, share};
  parallel.run(parallel.context, used, &RunLoop<F>::run, &loop);
}

// Tasks of one worker. It takes them in order; others take from it once they have done theirs.
struct alignas(64) Share {
  int64_t next, last;
};
constexpr int64_t kMostShares = 64;

template <typename F>
struct ShareLoop {
  const F* body;
  int64_t workers;
  Share shares[kMostShares];
  static void run(void* self, int64_t worker) {
    auto& loop = *static_cast<ShareLoop*>(self);
    for (int64_t i = 0; i < loop.workers; ++i) {
      Share& share = loop.shares[(worker + i) % loop.workers];
      for (int64_t t = __atomic_fetch_add(&share.next, 1, __ATOMIC_ACQ_REL); t < share.last;
           t = __atomic_fetch_add(&share.next, 1, __ATOMIC_ACQ_REL)) {
        (*loop.body)(t);
      }
    }
  }
};

// body(task) for every task. Worker w does the w-th of equal shares, as others divide work on the
// same tensors: what it reads may be in its caches, and what it writes may be read from there.
template <typename F>
X_ROPE_CLS_INLINE void run_shares(const Parallel& parallel, int64_t workers, int64_t tasks,
                                  const F& body) {
  const int64_t used = min_of(min_of(workers, tasks), kMostShares);
  if (used <= 1) {
    for (int64_t t = 0; t < tasks; ++t) body(t);
    return;
  }
  ShareLoop<F> loop;
  loop.body = &body;
  loop.workers = used;
  for (int64_t w = 0; w < used; ++w) loop.shares[w] = {w * tasks / used, (w + 1) * tasks / used};
  parallel.run(parallel.context, used, &ShareLoop<F>::run, &loop);
}

// Workers worth waking for so much work: a thread costs about as much as `least` units of it.
X_ROPE_CLS_INLINE int64_t useful_workers(int64_t workers, double work, double least) {
  const double useful = work / least;
  return useful >= static_cast<double>(workers) ? workers
                                                : max_of<int64_t>(1, static_cast<int64_t>(useful));
}

}  // namespace
}  // namespace x_rope_cls::cpu::X_ROPE_CLS_ISA
