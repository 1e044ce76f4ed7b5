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

// Tasks of one worker, [next, last): `next` is in the lower half of the word, `last` in the upper.
// The worker takes them from the front, others, once they have done theirs, from the back.
struct alignas(64) Share {
  uint64_t range;
};
// A task that has been taken, and the one that the same worker takes next unless somebody else is
// faster; -1: none.
struct Taken {
  int64_t task, next;
};
constexpr int kShareBits = 32;
constexpr int64_t kMostShares = 64;

constexpr uint64_t share_of(int64_t next, int64_t last) {
  return static_cast<uint64_t>(next) | static_cast<uint64_t>(last) << kShareBits;
}
// task -1: none is left.
X_ROPE_CLS_INLINE Taken take(Share& share, bool front) {
  uint64_t range = __atomic_load_n(&share.range, __ATOMIC_RELAXED);
  while (true) {
    const auto next = static_cast<int64_t>(range & 0xffffffffU);
    const auto last = static_cast<int64_t>(range >> kShareBits);
    if (next >= last) return {-1, -1};
    const uint64_t rest = front ? share_of(next + 1, last) : share_of(next, last - 1);
    if (__atomic_compare_exchange_n(&share.range, &range, rest, /*weak=*/true, __ATOMIC_RELAXED,
                                    __ATOMIC_RELAXED)) {
      const int64_t step = front ? 1 : -1;
      const int64_t task = front ? next : last - 1;
      return {task, last - next > 1 ? task + step : -1};
    }
  }
}

template <typename F>
struct ShareLoop {
  const F* body;
  int64_t workers;
  Share shares[kMostShares];
  static void run(void* self, int64_t worker) {
    auto& loop = *static_cast<ShareLoop*>(self);
    for (int64_t i = 0; i < loop.workers; ++i) {
      Share& share = loop.shares[(worker + i) % loop.workers];
      for (Taken t = take(share, i == 0); t.task >= 0; t = take(share, i == 0)) {
        (*loop.body)(t.task, t.next, worker);
      }
    }
  }
};

// body(task, next, worker) for every task; next: see Taken. Worker w does the w-th of equal shares,
// as others divide work on the same tensors: what it reads may be in its caches, and what it writes
// may be read from there. What a worker starts with is not, so it goes on with what lies next.
template <typename F>
X_ROPE_CLS_INLINE void run_shares(const Parallel& parallel, int64_t workers, int64_t tasks,
                                  const F& body) {
  const int64_t used = min_of(min_of(workers, tasks), kMostShares);
  // More tasks than a share can count are of tensors without elements.
  if (used <= 1 || tasks >> (kShareBits - 1) != 0) {
    for (int64_t t = 0; t < tasks; ++t) body(t, t + 1 < tasks ? t + 1 : -1, 0);
    return;
  }
  ShareLoop<F> loop;
  loop.body = &body;
  loop.workers = used;
  for (int64_t w = 0; w < used; ++w) {
    loop.shares[w].range = share_of(w * tasks / used, (w + 1) * tasks / used);
  }
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
