// Python module _C: what was built, which ISA is in use, what the machine can do. Knows no torch.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>
#include <utility>

#include "../kernels/cpu/cache.h"
#include "../kernels/cpu/dispatch.h"
#include "build_config.h"
#include "measure.h"

namespace py = pybind11;
namespace config = x_rope_cls::build_config;
namespace cpu = x_rope_cls::cpu;

namespace {

py::list built_isas() {
  py::list names;
  for (const char* const* name = cpu::built_isas(); *name != nullptr; ++name) {
    names.append(*name);
  }
  return names;
}

py::list cpu_isas() {
  py::list names;
  for (const char* const* name = cpu::built_isas(); *name != nullptr; ++name) {
    if (cpu::isa_supported(*name)) {
      names.append(*name);
    }
  }
  return names;
}

void set_cpu_isa(const std::string& name) {
  if (!cpu::select_isa(name.c_str())) {
    throw py::value_error("set_cpu_isa: name must be one of " +
                          py::str(cpu_isas()).cast<std::string>() + ", got '" + name + "'");
  }
}

// None: no CUDA kernels.
py::object cuda_architectures() {
  py::list names;
  for (const char* const* name = config::kCudaArchitectures; **name != '\0'; ++name) {
    names.append(*name);
  }
  if (names.empty()) return py::none();
  return std::move(names);
}

py::dict build_info() {
  py::dict flags;
  flags["all"] = config::kFlags;
  for (const config::IsaFlags& isa : config::kIsaFlags) {
    flags[isa.name] = isa.flags;
  }
  py::dict info;
  info["version"] = config::kVersion;
  info["compiler"] = config::kCompiler;
  info["build_type"] = config::kBuildType;
  info["flags"] = flags;
  info["torch"] = config::kTorchVersion;
  info["cpu_isas_built"] = built_isas();
  info["cpu_isas_supported"] = cpu_isas();
  info["cpu_isa"] = cpu::kernels().name;
  info["cpu_isa_warning"] = cpu::isa_warning();
  info["cuda_architectures"] = cuda_architectures();
  info["cuda_reason"] = config::kCudaReason;
  return info;
}

py::dict limits_dict(int64_t threads, double seconds) {
  x_rope_cls::Limits limits;
  {
    py::gil_scoped_release release;
    limits = x_rope_cls::measure_limits(threads, seconds);
  }
  constexpr double kGiga = 1e9;
  py::dict result;
  result["threads"] = threads;
  result["fma_float32_gflops"] = limits.fma_float32 / kGiga;
  const auto rate_or_none = [](double rate) -> py::object {
    if (rate > 0.0) return py::float_(rate / kGiga);
    return py::none();
  };
  result["dot_bfloat16_gflops"] = rate_or_none(limits.dot_bfloat16);
  result["dot_int16_gflops"] = rate_or_none(limits.dot_int16);
  result["copy_gbs"] = limits.copy / kGiga;
  result["read_gbs"] = limits.read / kGiga;
  return result;
}

py::dict measure_limits(double seconds, int64_t threads) {
  if (!(seconds > 0.0)) {
    throw py::value_error("measure_limits: seconds must be positive, got " +
                          std::to_string(seconds));
  }
  if (threads < 0) {
    throw py::value_error("measure_limits: threads must be at least 0, got " +
                          std::to_string(threads));
  }
  const int64_t all = threads > 0 ? threads : x_rope_cls::usable_processors();
  py::dict result;
  result["cpu_isa"] = cpu::kernels().name;
  result["one_thread"] = limits_dict(1, seconds);
  result["all_threads"] = limits_dict(all, seconds);
  return result;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "Build information, the CPU instruction set in use, and measured machine limits.";
  module.def(
      "build_info", &build_info,
      "What this library was built from and for, as a dict: version, compiler, build_type, flags\n"
      "(of all variants and of each), torch (version built against), cpu_isas_built,\n"
      "cpu_isas_supported (those this machine runs), cpu_isa (in use), cpu_isa_warning,\n"
      "cuda_architectures (sm_*: machine code, compute_*: PTX; None: no CUDA kernels) and\n"
      "cuda_reason (why there are none, or '').");
  module.def("cache_bytes", &cpu::cache_bytes,
             "Bytes of the largest cache, as the system says, 32 MB where it does not, at most 64\n"
             "MB. Rotations that read and write more than 3/4 of it store past the caches.");
  module.def(
      "cpu_isa", [] { return cpu::kernels().name; },
      "Name of the instruction set whose kernels are in use.");
  module.def(
      "cpu_isas", &cpu_isas,
      "Names of the instruction sets that were built and that this machine runs, slowest first.");
  module.def(
      "set_cpu_isa", &set_cpu_isa, py::arg("name"),
      "Uses the named instruction set from now on. Not to be called while an operator runs.\n\n"
      "Raises:\n    ValueError: the name is unknown, or this machine cannot run it.");
  module.def("measure_limits", &measure_limits, py::arg("seconds") = 0.2, py::arg("threads") = 0,
             "Measures what this machine can do at most, with the instruction set in use.\n\n"
             "Args:\n"
             "    seconds: time for each of about ten figures.\n"
             "    threads: of the second measurement; 0: all processors of this process.\n\n"
             "Returns:\n"
             "    {'cpu_isa', 'one_thread': limits, 'all_threads': limits}, each limits a dict of "
             "threads,\n"
             "    fma_float32_gflops, dot_bfloat16_gflops and dot_int16_gflops (a multiply-add "
             "counts two;\n"
             "    None: no such instruction), copy_gbs (bytes read plus written) and read_gbs, in "
             "1e9 a second.");
}
