// What include/cudasim.h declares: registered host ranges, options that change between launches, reports, statistics.
#include <dlfcn.h>

#include <string>

#include "../include/cudasim.h"
#include "check.h"
using tst::check;

template <class F> F* find(const char* name) {
  F* f = reinterpret_cast<F*>(dlsym(RTLD_DEFAULT, name));
  if (!f) { printf("FAIL %s is not there\n", name); exit(1); }
  return f;
}

__global__ void fill(float* p, int n) { if (int(threadIdx.x) < n) p[threadIdx.x] = 1; }
__global__ void racy(float* p) {
  __shared__ float s[64];
  s[threadIdx.x] = 0;
  s[63 - threadIdx.x] = 1;                       // without a barrier
  __syncthreads();
  p[threadIdx.x] = s[threadIdx.x];
}
static cudaError_t after() {
  cudaError_t e = cudaGetLastError(), s = cudaDeviceSynchronize();
  return e ? e : s;
}

int main() {
  auto* setOption = find<decltype(cudasim_set_option)>("cudasim_set_option");
  auto* takeReport = find<decltype(cudasim_take_report)>("cudasim_take_report");
  auto* addHost = find<decltype(cudasim_register_host)>("cudasim_register_host");
  auto* removeHost = find<decltype(cudasim_unregister_host)>("cudasim_unregister_host");
  char text[1000];

  check(setOption("NO_SUCH", "1") != 0 && setOption("ARCH", "90") != 0 && setOption(nullptr, "1") != 0, "what cannot be set is refused");
  check(takeReport(text, sizeof text) == 0, "no report at the start");

  float* d;
  CK(cudaMalloc(&d, 64 * sizeof(float)));
  racy<<<1, 64>>>(d);
  check(after() == cudaSuccess, "the race is not looked for");
  check(setOption("RACECHECK", "1") == 0, "race detector on");
  racy<<<1, 64>>>(d);
  check(after() == cudaErrorLaunchFailure, "the race is found");
  const size_t n = takeReport(nullptr, 0);
  check(takeReport(text, 20) == n && strlen(text) == 19 && std::string(text).starts_with("shared-memory race"), "report, cut: %s", text);
  check(takeReport(text, sizeof text) == 0, "a report is taken once");
  setOption("RACECHECK", "");
  racy<<<1, 64>>>(d);
  check(after() == cudaSuccess, "race detector off again");

  std::vector<float> h(64);
  setOption("HOST_POINTERS", "1");
  fill<<<1, 64>>>(h.data(), 64);
  check(after() == cudaSuccess && h[63] == 1, "host memory is open");
  CK(cudaError_t(addHost(h.data(), 63 * sizeof(float))));
  fill<<<1, 64>>>(h.data(), 64);
  check(after() == cudaErrorIllegalAddress, "one beyond the registered range");
  takeReport(text, sizeof text);
  check(std::string(text).find("registered host range") != std::string::npos && std::string(text).find("thread (63,0,0)") != std::string::npos, "report: %s", text);
  CK(cudaError_t(removeHost(h.data())));
  setOption("HOST_POINTERS", "0");
  fill<<<1, 64>>>(h.data(), 64);
  check(after() == cudaErrorIllegalAddress, "host memory is closed again");
  return tst::finish();
}
