#include "measure.h"

#if defined(__linux__)
#include <sched.h>
#include <sys/mman.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <barrier>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

#include "../kernels/cpu/dispatch.h"

namespace x_rope_cls {

namespace {

using Clock = std::chrono::steady_clock;

// Work done by one call on one thread, in whatever unit is counted.
using Loop = std::function<double(int64_t thread)>;

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

// Keeps the calling thread on a processor of its own while it exists, where there are enough of
// them: two threads that the system has started on one would find half of what the machine can do.
class OwnProcessor {
 public:
  OwnProcessor([[maybe_unused]] int64_t thread, [[maybe_unused]] int64_t threads) {
#if defined(__linux__)
    if (sched_getaffinity(0, sizeof(before_), &before_) != 0 || CPU_COUNT(&before_) < threads) {
      return;
    }
    cpu_set_t own;
    CPU_ZERO(&own);
    for (int processor = 0; processor < CPU_SETSIZE; ++processor) {
      if (CPU_ISSET(processor, &before_) && thread-- == 0) {
        CPU_SET(processor, &own);
      }
    }
    pinned_ = sched_setaffinity(0, sizeof(own), &own) == 0;
#endif
  }
  OwnProcessor(const OwnProcessor&) = delete;
  OwnProcessor& operator=(const OwnProcessor&) = delete;
  ~OwnProcessor() {
#if defined(__linux__)
    if (pinned_) {
      sched_setaffinity(0, sizeof(before_), &before_);
    }
#endif
  }

#if defined(__linux__)
 private:
  cpu_set_t before_{};
  bool pinned_ = false;
#endif
};

// Best rate over repeats of all threads doing `loop` at the same time, from the first start to the
// last end.
double best_rate(int64_t threads, double seconds, const Loop& loop) {
  constexpr int kMinRepeats = 3;
  std::vector<double> work(threads);
  Clock::time_point round_start;
  double best = 0.0;
  bool done = false;
  int repeats = 0;
  const Clock::time_point first_start = Clock::now();
  auto at_end = [&]() noexcept {
    const double elapsed = seconds_since(round_start);
    double total = 0.0;
    for (const double part : work) {
      total += part;
    }
    best = std::max(best, total / elapsed);
    done = ++repeats >= kMinRepeats && seconds_since(first_start) >= seconds;
  };
  auto at_start = [&]() noexcept { round_start = Clock::now(); };
  std::barrier start_line(threads, at_start);
  std::barrier end_line(threads, at_end);
  auto run = [&](int64_t thread) {
    const OwnProcessor own(thread, threads);
    loop(thread);  // warms up: pages, clocks, caches
    while (!done) {
      start_line.arrive_and_wait();
      work[thread] = loop(thread);
      end_line.arrive_and_wait();
    }
  };
  std::vector<std::jthread> others;
  for (int64_t thread = 1; thread < threads; ++thread) {
    others.emplace_back(run, thread);
  }
  run(0);
  return best;
}

// Iterations that keep one thread of this machine busy for about 10 ms.
int64_t calibrate(double (*loop)(int64_t)) {
  constexpr double kEnough = 0.01;
  int64_t iterations = 1024;
  while (true) {
    const Clock::time_point start = Clock::now();
    loop(iterations);
    const double elapsed = seconds_since(start);
    if (elapsed >= kEnough / 4) {
      return std::max<int64_t>(1, static_cast<int64_t>(iterations * (kEnough / elapsed)));
    }
    iterations *= 4;
  }
}

double arithmetic_rate(double (*loop)(int64_t), int64_t threads, double seconds) {
  if (loop == nullptr) {
    return 0.0;
  }
  const int64_t iterations = calibrate(loop);
  return best_rate(threads, seconds, [=](int64_t) { return loop(iterations); });
}

constexpr int64_t kHugePage = int64_t{2} << 20;

// Bytes of one buffer of a thread: all threads' buffers together are far larger than any cache.
int64_t buffer_bytes(int64_t threads) {
  constexpr int64_t kSmallest = int64_t{256} << 20;
  constexpr int64_t kLargest = int64_t{1} << 30;
  int64_t cache = 0;
#if defined(_SC_LEVEL3_CACHE_SIZE)
  cache = std::max<int64_t>(0, sysconf(_SC_LEVEL3_CACHE_SIZE));
#endif
  const int64_t total = std::clamp(4 * cache, kSmallest, kLargest);
  return std::max(2 * kHugePage, total / threads) / kHugePage * kHugePage;
}

struct Free {
  void operator()(void* data) const { std::free(data); }
};
using Buffer = std::unique_ptr<void, Free>;

// Two buffers for each thread, written to by it first so that their pages are near it.
struct Buffers {
  Buffers(int64_t threads, int64_t bytes) : from(threads), to(threads) {
    std::vector<std::jthread> workers;
    for (int64_t thread = 0; thread < threads; ++thread) {
      from[thread] = allocate(bytes);
      to[thread] = allocate(bytes);
      workers.emplace_back([this, thread, bytes] {
        std::memset(from[thread].get(), 1, bytes);
        std::memset(to[thread].get(), 2, bytes);
      });
    }
  }

  static Buffer allocate(int64_t bytes) {
    Buffer buffer(std::aligned_alloc(kHugePage, bytes));
    if (!buffer) {
      throw std::bad_alloc();
    }
#if defined(__linux__)
    madvise(buffer.get(), bytes, MADV_HUGEPAGE);
#endif
    return buffer;
  }

  std::vector<Buffer> from, to;
};

void measure_memory(const LimitKernels& loops, int64_t threads, double seconds, Limits& limits) {
  const int64_t bytes = buffer_bytes(threads);
  const Buffers buffers(threads, bytes);
  const std::vector<Buffer>&from = buffers.from, &to = buffers.to;
  const double streaming = best_rate(threads, seconds / 2, [&](int64_t thread) {
    loops.copy(to[thread].get(), from[thread].get(), bytes);
    return 2.0 * bytes;
  });
  const double library = best_rate(threads, seconds / 2, [&](int64_t thread) {
    std::memcpy(to[thread].get(), from[thread].get(), bytes);
    return 2.0 * bytes;
  });
  limits.copy = std::max(streaming, library);
  std::vector<uint64_t> results(threads);
  limits.read = best_rate(threads, seconds, [&](int64_t thread) {
    results[thread] = loops.read(from[thread].get(), bytes);
    return static_cast<double>(bytes);
  });
}

}  // namespace

int64_t usable_processors() {
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof(set), &set) == 0) {
    return CPU_COUNT(&set);
  }
#endif
  return std::max(1u, std::thread::hardware_concurrency());
}

Limits measure_limits(int64_t threads, double seconds) {
  const LimitKernels loops = cpu::kernels().limits;
  Limits limits{};
  limits.fma_float32 = arithmetic_rate(loops.fma_float32, threads, seconds);
  limits.dot_bfloat16 = arithmetic_rate(loops.dot_bfloat16, threads, seconds);
  limits.dot_int16 = arithmetic_rate(loops.dot_int16, threads, seconds);
  measure_memory(loops, threads, seconds, limits);
  return limits;
}

}  // namespace x_rope_cls
