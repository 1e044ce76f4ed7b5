// How a kernel asks for threads. Kernels own no thread pool: whoever calls them passes one in.
#pragma once

#include <cstdint>

namespace x_rope_cls {

// body(argument, worker) is called once for every worker in [0, workers), possibly at the same time
// and possibly one after the other by one thread. A body must therefore never wait for a worker
// that has not started; waiting for work that was taken from a shared counter earlier is fine,
// because whoever took it is running. `run` returns after the last body has.
struct Parallel {
  int64_t workers;
  void (*run)(void* context, int64_t workers, void (*body)(void* argument, int64_t worker),
              void* argument);
  void* context;
};

}  // namespace x_rope_cls
