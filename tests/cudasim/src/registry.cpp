#include "registry.h"

#include <algorithm>
#include <cstdio>
#include <cstring>

namespace cudasim {

enum { kErrNoKernelImage = 209, kErrInvalidPtx = 218, kErrInvalidDeviceFunction = 98, kErrInvalidSymbol = 13, kErrSymbolNotFound = 500 };

void printError(const std::string& text) {
  std::lock_guard lk(gReportMutex);
  printReport(text);
}

Registry& Registry::get() {
  static Registry* r = new Registry;         // never destroyed: used by atexit handlers
  return *r;
}

uint64_t FatModule::addressOf(const std::string& name) const {
  auto it = vars.find(name);
  return it == vars.end() ? 0 : it->second.address;
}

int FatModule::load() {
  if (loaded) return error;
  loaded = true;
  PtxImage* best = nullptr;
  for (auto& im : image.ptx) if (im.arch <= options().arch && (!best || im.arch > best->arch)) best = &im;
  if (!best) {
    std::string t = "no PTX to simulate for compute_" + std::to_string(options().arch) + " in this program";
    if (!image.ptx.empty()) {
      t += ": it has PTX for";
      for (auto& im : image.ptx) t += " compute_" + std::to_string(im.arch);
      t += "; choose one of these with CUDASIM_ARCH or compile with -gencode arch=compute_80,code=compute_80";
    } else if (!image.problem.empty()) t += ": " + image.problem;
    else t += ": it has machine code only; compile with -gencode arch=compute_80,code=compute_80";
    printError(t);
    return error = kErrNoKernelImage;
  }
  try {
    ast = parseModule(std::move(best->text));
  } catch (PtxError& e) {
    printError(std::string("cannot read the PTX of this program\n    ") + e.what());
    return error = kErrInvalidPtx;
  }
  // variables: storage first, then contents, which may hold addresses of other variables
  for (auto& v : ast->vars) {
    if (v.space != Space::global && v.space != Space::constant) continue;
    if (v.isExtern && v.init.empty() && v.count == 0) continue;
    Var s;
    s.bytes = std::max<uint64_t>(v.bytes(), v.init.size());
    s.constant = v.space == Space::constant;
    void* p = MemoryMap::get().allocate(s.bytes, s.constant ? RangeKind::Constant : RangeKind::Variable, v.name);
    if (!p) return error = 2;
    memset(p, 0, s.bytes);
    if (!v.init.empty()) memcpy(p, v.init.data(), v.init.size());
    s.address = uint64_t(p);
    MemoryMap::get().markInitialised(s.address, s.bytes);
    vars[v.name] = s;
  }
  for (auto& v : ast->vars) {
    auto it = vars.find(v.name);
    if (it == vars.end()) continue;
    for (auto& r : v.relocs) {
      uint64_t a = addressOf(r.symbol);
      if (!a)
        for (size_t i = 0; i < ast->functions.size(); ++i) if (ast->functions[i]->name == r.symbol) a = kFuncBase + i * 16;
      if (!a) { printError("variable " + v.name + " refers to the unknown symbol " + r.symbol); return error = kErrInvalidPtx; }
      a += uint64_t(r.addend);
      uint8_t* at = reinterpret_cast<uint8_t*>(it->second.address + r.offset);
      if (r.bytes > 0) memcpy(at, &a, size_t(r.bytes));
      else *at = uint8_t(a >> (8 * (-r.bytes - 1)));
    }
  }
  for (auto& m : managed)
    if (uint64_t a = addressOf(m.name)) *m.host = reinterpret_cast<void*>(a);
  return 0;
}

Kernel* Registry::kernel(const void* func) {
  auto it = byHost.find(func);
  return it == byHost.end() ? nullptr : it->second;
}

int Registry::prepare(Kernel& k) {
  if (k.prog || k.error) return k.error;
  if (int e = k.mod->load()) return k.error = e;
  auto it = k.mod->ast->funcIndex.find(k.name);
  if (it == k.mod->ast->funcIndex.end() || !it->second->hasBody) {
    printError("kernel " + demangle(k.name) + " is not in the program's PTX");
    return k.error = kErrInvalidDeviceFunction;
  }
  try {
    k.prog = lowerKernel(*k.mod->ast, *it->second, *k.mod);
  } catch (PtxError& e) {
    printError(e.what());
    return k.error = kErrNotSupported;
  }
  return 0;
}

int Registry::variable(const void* symbol, FatModule::Var& out, std::string* name) {
  auto it = vars.find(symbol);
  if (it == vars.end()) return kErrInvalidSymbol;
  if (int e = it->second.mod->load()) return e;
  auto v = it->second.mod->vars.find(it->second.name);
  if (v == it->second.mod->vars.end()) return kErrSymbolNotFound;
  out = v->second;
  if (name) *name = it->second.name;
  return 0;
}

}  // namespace cudasim
