// How tasks are shared: each is done once, by whom it belongs to or by who has done theirs.
#include <atomic>
#include <chrono>
#include <cstdio>
#include <thread>
#include <vector>

#include "kernels/cpu/tasks.h"

namespace {

using x_rope_cls::Parallel;
using x_rope_cls::cpu::generic::run_shares;

int failures = 0;

void expect(bool holds, const char* what, int64_t workers, int64_t tasks) {
  if (holds) return;
  std::printf("%s: %lld workers, %lld tasks\n", what, static_cast<long long>(workers),
              static_cast<long long>(tasks));
  ++failures;
}

using Body = void (*)(void* argument, int64_t worker);

void run_threads(void*, int64_t workers, Body body, void* argument) {
  std::vector<std::thread> threads;
  for (int64_t w = 1; w < workers; ++w) threads.emplace_back(body, argument, w);
  body(argument, 0);
  for (auto& thread : threads) thread.join();
}
void run_in_order(void*, int64_t workers, Body body, void* argument) {
  for (int64_t w = 0; w < workers; ++w) body(argument, w);
}

void check_once(decltype(Parallel::run) run, int64_t workers, int64_t tasks) {
  std::vector<std::atomic<int>> done(tasks);
  bool left = true;
  run_shares(Parallel{workers, run, nullptr}, workers, tasks,
             [&](int64_t task, int64_t next, int64_t) {
               ++done[task];
               if (run == run_in_order && next >= 0 && done[next] > 0) left = false;
             });
  bool once = true;
  for (const auto& times : done) once = once && times == 1;
  expect(once, "every task is done once", workers, tasks);
  expect(left, "the next task is one that is left", workers, tasks);
}

// Where all take the same time, worker w does the w-th of equal runs of neighbours, each announced.
void check_shares(int64_t workers, int64_t tasks) {
  std::vector<int64_t> owner(tasks, -1);
  std::atomic<int64_t> waiting{workers};
  std::atomic<bool> announced{true};
  std::vector<int64_t> next_of(workers, -2);
  run_shares(Parallel{workers, run_threads, nullptr}, workers, tasks,
             [&](int64_t task, int64_t next, int64_t worker) {
               const bool last = (task + 1) * workers % tasks == 0;
               if (last) {  // the end of a share: wait for the others, so that nobody helps out
                 --waiting;
                 while (waiting > 0) std::this_thread::yield();
               }
               if (next_of[worker] >= 0 && next_of[worker] != task) announced = false;
               next_of[worker] = next;
               owner[task] = worker;
             });
  bool own = true;
  for (int64_t t = 0; t < tasks; ++t) own = own && owner[t] == t * workers / tasks;
  expect(own, "workers do their shares", workers, tasks);
  expect(announced, "a worker is told its next task", workers, tasks);
}

// One worker is slow: the other takes most of its tasks.
void check_help() {
  constexpr int64_t kTasks = 100;
  std::atomic<int> slow{0};
  run_shares(Parallel{2, run_threads, nullptr}, 2, kTasks, [&](int64_t, int64_t, int64_t worker) {
    if (worker == 0) {
      ++slow;
      std::this_thread::sleep_for(std::chrono::milliseconds(20));
    } else {
      while (slow == 0) std::this_thread::yield();
    }
  });
  expect(slow < kTasks / 4, "a slow worker is helped", 2, kTasks);
}

}  // namespace

int main() {
  for (const int64_t workers : {1, 2, 3, 7, 64, 70}) {
    for (const int64_t tasks : {0, 1, 2, 5, 64, 65, 1000}) {
      check_once(run_threads, workers, tasks);
      check_once(run_in_order, workers, tasks);
    }
  }
  check_shares(2, 10);
  check_shares(4, 40);
  check_help();
  if (failures == 0) std::printf("tasks: all checks passed\n");
  return failures == 0 ? 0 : 1;
}
