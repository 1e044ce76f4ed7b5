// Launches: blocks onto host threads, page faults, errors.
#include <immintrin.h>
#include <setjmp.h>
#include <signal.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <thread>

#include "machine.h"

namespace cudasim {

namespace {
constexpr uint64_t kWarpQuantum = 4096;        // warp instructions before the next warp of the block runs
constexpr uint64_t kBlockQuantum = 10'000'000; // before another block may run on the same host thread
constexpr uint64_t kCoopQuantum = 512;         // both of these in cooperative launches, whose blocks wait for one another

thread_local sigjmp_buf* tlJump = nullptr;
thread_local void* tlFaultAddr = nullptr;
struct sigaction gOldSegv, gOldBus;

void onFault(int sig, siginfo_t* si, void* ctx) {
  if (tlJump) { tlFaultAddr = si->si_addr; siglongjmp(*tlJump, 1); }
  struct sigaction& old = sig == SIGSEGV ? gOldSegv : gOldBus;
  if (old.sa_flags & SA_SIGINFO && old.sa_sigaction) { old.sa_sigaction(sig, si, ctx); return; }
  if (old.sa_handler && old.sa_handler != SIG_DFL && old.sa_handler != SIG_IGN) { old.sa_handler(sig); return; }
  signal(sig, SIG_DFL);
  raise(sig);
}

struct FaultGuard {
  FaultGuard() {
    struct sigaction sa{};
    sa.sa_sigaction = onFault;
    sa.sa_flags = SA_SIGINFO | SA_NODEFER;
    sigaction(SIGSEGV, &sa, &gOldSegv);
    sigaction(SIGBUS, &sa, &gOldBus);
  }
  ~FaultGuard() { sigaction(SIGSEGV, &gOldSegv, nullptr); sigaction(SIGBUS, &gOldBus, nullptr); }
};

struct LaunchErrors {
  std::mutex mu;
  int code = 0;
  std::string text;
};

void workerMain(Launch& l, Worker& wk, LaunchErrors& errs) {
  std::vector<std::unique_ptr<Block>> pool;
  std::deque<std::unique_ptr<Block>> parked;
  std::unique_ptr<Block> cur;
  unsigned csr = _mm_getcsr();
  _mm_setcsr(kCsrDefault);
  auto fail = [&](const SimError& e) {
    std::lock_guard lk(errs.mu);
    if (!errs.code) { errs.code = e.code; errs.text = e.text; }
    l.stop = true;
  };
  // Other blocks may have to run before this one can finish (grid-wide barriers, flags in global memory).
  const volatile size_t maxParked = l.cooperative ? size_t(l.nblocks) : 2048;
  volatile bool moreBlocks = true;
  sigjmp_buf jb;
  if (sigsetjmp(jb, 1) == 0) {
    tlJump = &jb;
    try {
      while (!l.stop.load(std::memory_order_relaxed)) {
        if (moreBlocks && parked.size() < maxParked) {
          uint64_t id = l.nextBlock.fetch_add(1);
          if (id >= l.nblocks) { moreBlocks = false; continue; }
          if (pool.empty()) cur = std::make_unique<Block>();
          else { cur = std::move(pool.back()); pool.pop_back(); }
          cur->start(l, wk, id);
        } else {
          if (parked.empty()) break;
          cur = std::move(parked.front());
          parked.pop_front();
        }
        RunStatus st = l.cooperative ? cur->run(1, kCoopQuantum) : cur->run(kBlockQuantum, kWarpQuantum);
        if (st == RunStatus::Done) pool.push_back(std::move(cur));
        else parked.push_back(std::move(cur));
      }
    } catch (SimError& e) {
      fail(e);
    } catch (std::exception& e) {
      fail(SimError{kErrLaunchFailure, std::string("internal error: ") + e.what() + "\n" + (wk.current ? describe(*wk.current, -1) : "")});
    }
  } else {
    char b[64];
    snprintf(b, sizeof b, "%p", tlFaultAddr);
    fail(SimError{kErrIllegalAddress, std::string("page fault at host address ") + b + "\n" + (wk.current ? describe(*wk.current, -1) : "")});
  }
  tlJump = nullptr;
  _mm_setcsr(csr);
}
}  // namespace

int runLaunch(Launch& l) {
  auto t0 = std::chrono::steady_clock::now();
  LaunchErrors errs;
  int n = int(std::min<uint64_t>(std::max(1, options().threads), l.nblocks));
  std::vector<Worker> workers(n);
  for (auto& w : workers) {
    w.launch = &l;
    w.ranges.resize(l.prog->code.size());
    if (l.stats) w.stats.resize(l.prog->code.size());
  }
  {
    FaultGuard guard;
    std::vector<std::thread> ts;
    for (int i = 1; i < n; ++i) ts.emplace_back([&, i] { workerMain(l, workers[i], errs); });
    workerMain(l, workers[0], errs);
    for (auto& t : ts) t.join();
  }
  if (l.stats) {
    l.pcStats.assign(l.prog->code.size(), {});
    for (auto& w : workers)
      for (size_t i = 0; i < w.stats.size(); ++i) l.pcStats[i] += w.stats[i];
    for (auto& s : l.pcStats) l.threadInstrs += s.lanes;
  }
  for (auto& w : workers) l.warpInstrs += w.warpInstrs;
  l.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - t0).count();
  if (errs.code) {
    std::lock_guard lk(gReportMutex);
    printReport(errs.text);
    if (options().abortOnError) abort();
  }
  return errs.code;
}

}  // namespace cudasim
