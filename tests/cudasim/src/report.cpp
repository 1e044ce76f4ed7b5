// Options from the environment, and what messages say about where a kernel is.
#include <cxxabi.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <thread>

#include "registry.h"

namespace cudasim {

std::mutex gReportMutex;

const char* const kClsNames[] = {
  "int", "fp32", "fp64", "half", "sfu", "cvt", "mov", "pred", "branch", "ld_global", "st_global", "ld_shared", "st_shared",
  "ld_st_local", "ld_const", "atomic", "cp_async", "ldmatrix", "mma", "shfl", "barrier", "other"};
static_assert(std::size(kClsNames) == size_t(Cls::Count));

namespace {
const char* const kOptionNames[] = {"THREADS", "HOST_POINTERS", "ABORT", "STICKY", "RACECHECK", "INITCHECK", "POISON", "MMA", "ARCH",
                                    "MAX_INSTRUCTIONS", "STATS", "VERBOSE"};

// `name` without CUDASIM_; an empty value means the default.  False where there is no such option.
bool assign(Options& o, const std::string& name, std::string v) {
  const Options d;
  auto num = [&](uint64_t dflt) -> uint64_t { return v.empty() ? dflt : strtoull(v.c_str(), nullptr, 0); };
  if (name == "THREADS") o.threads = int(num(std::max(1u, std::thread::hardware_concurrency())));
  else if (name == "HOST_POINTERS") o.hostPointers = int(num(0));
  else if (name == "ABORT") o.abortOnError = num(0);
  else if (name == "STICKY") o.sticky = num(0);
  else if (name == "RACECHECK") o.race = num(0);
  else if (name == "INITCHECK") {
    o.initShared = v == "0" || v == "off" ? 0 : v == "warn" ? 1 : d.initShared;
    o.initGlobal = v == "global";
  } else if (name == "POISON") o.poison = num(1);
  else if (name == "MMA") o.strictMma = v == "truncate";
  else if (name == "ARCH") {
    v.erase(std::remove(v.begin(), v.end(), '.'), v.end());
    if (v.starts_with("sm_")) v = v.substr(3);
    o.arch = v.empty() ? d.arch : atoi(v.c_str());
  } else if (name == "MAX_INSTRUCTIONS") o.maxInstr = num(0);
  else if (name == "STATS") o.statsPath = v;
  else if (name == "VERBOSE") o.verbose = num(0);
  else return false;
  return true;
}
std::string gReport;             // guarded by gReportMutex
}  // namespace

Options& options() {
  static Options o = [] {
    Options o;
    for (const char* name : kOptionNames) {
      const char* s = getenv(("CUDASIM_" + std::string(name)).c_str());
      assign(o, name, s ? s : "");
    }
    return o;
  }();
  return o;
}

void printReport(const std::string& text) {
  fflush(stdout);
  fprintf(stderr, "cudasim: error: %s%s", text.c_str(), text.ends_with('\n') ? "" : "\n");
  fflush(stderr);
  gReport = text;
}

std::string demangle(const std::string& s) {
  int st = 0;
  char* d = abi::__cxa_demangle(s.c_str(), nullptr, nullptr, &st);
  std::string r = d ? d : s;
  free(d);
  return r;
}

std::string oneLine(std::string_view t) {
  std::string r;
  for (char c : t) {
    bool space = isspace((unsigned char)c);
    if (!space) r += c; else if (!r.empty() && r.back() != ' ') r += ' ';
  }
  return r;
}
static std::string where(const Warp& w, uint32_t pc) {
  const SrcInfo& s = w.prog->src[w.prog->code[pc].stmt];
  std::string t;
  if (s.loc.line) {
    auto it = w.prog->mod->files.find(s.loc.file);
    t += "    source: " + (it == w.prog->mod->files.end() ? "?" : it->second) + ":" + std::to_string(s.loc.line) + "\n";
  }
  t += "    PTX line " + std::to_string(s.line) + ": " + oneLine(s.text) + "\n";
  if (s.fn && s.fn != w.prog->kernel) t += "    in device function " + demangle(s.fn->name) + "\n";
  return t;
}
static std::string threadName(const Warp& w, int lane) {
  uint32_t t = uint32_t(w.index) * 32 + lane;
  const Launch& l = *w.blk->launch;
  char b[64];
  snprintf(b, sizeof b, "(%u,%u,%u)", t % l.block[0], t / l.block[0] % l.block[1], t / (l.block[0] * l.block[1]));
  return b;
}
std::string describe(const Warp& w, int lane) {
  char b[200];
  const Block& k = *w.blk;
  int n = snprintf(b, sizeof b, "    block (%u,%u,%u), ", k.ctaid[0], k.ctaid[1], k.ctaid[2]);
  if (lane >= 0) snprintf(b + n, sizeof b - size_t(n), "thread %s, warp %d lane %d\n", threadName(w, lane).c_str(), w.index, lane);
  else snprintf(b + n, sizeof b - size_t(n), "warp %d\n", w.index);
  return "    kernel: " + w.prog->pretty + "\n" + b + where(w, w.pc);
}
void simFail(const Warp& w, int lane, int code, const std::string& what) {
  throw SimError{code, what + "\n" + describe(w, lane)};
}
void simWarn(const Warp& w, int lane, const std::string& what) {
  static std::map<std::pair<std::string, uint32_t>, int> seen;   // once per instruction
  std::lock_guard lk(gReportMutex);
  if (seen[{w.prog->name, w.pc}]++) return;
  fprintf(stderr, "cudasim: warning: %s\n%s", what.c_str(), describe(w, lane).c_str());
}

}  // namespace cudasim

#pragma GCC visibility push(default)
extern "C" {
int cudasim_set_option(const char* name, const char* value) {
  using namespace cudasim;
  if (!name || std::string(name) == "ARCH") return kErrInvalidValue;
  std::lock_guard lk(Registry::get().mu);        // between launches
  return assign(options(), name, value ? value : "") ? 0 : int(kErrInvalidValue);
}
size_t cudasim_take_report(char* text, size_t bytes) {
  using namespace cudasim;
  std::lock_guard lk(gReportMutex);
  const size_t n = gReport.size();
  if (text && bytes) {
    const size_t most = std::min(n, bytes - 1);
    memcpy(text, gReport.data(), most);
    text[most] = 0;
    gReport.clear();
  }
  return n;
}
}
