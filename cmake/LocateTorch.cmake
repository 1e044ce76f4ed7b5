# Finds torch without importing it, and without its own CMake package (which stops where torch is a
# CUDA build and the machine has no CUDA toolkit):
#   x_rope_cls_torch_include     include folder
#   x_rope_cls_torch_library     the library with the symbols of the stable ABI
#   x_rope_cls_torch_version     of the torch that is built against

set(torch_dir "${X_ROPE_CLS_TORCH_DIR}")
if(NOT torch_dir)
  execute_process(
    COMMAND "${Python_EXECUTABLE}" -c
      "import importlib.util as u, os; s = u.find_spec('torch'); print(os.path.dirname(s.origin) if s else '')"
    OUTPUT_VARIABLE torch_dir OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
endif()
if(NOT torch_dir OR NOT EXISTS "${torch_dir}/include")
  message(FATAL_ERROR
    "x_rope_cls needs torch 2.13 or newer to build, got none for ${Python_EXECUTABLE}. "
    "Install torch there, or set X_ROPE_CLS_TORCH_DIR to a LibTorch folder.")
endif()

set(x_rope_cls_torch_include "${torch_dir}/include")
set(x_rope_cls_torch_version "")
foreach(header torch/headeronly/version.h torch/csrc/api/include/torch/version.h) # now; before 2.10
  if(NOT x_rope_cls_torch_version AND EXISTS "${x_rope_cls_torch_include}/${header}")
    foreach(part MAJOR MINOR PATCH)
      file(STRINGS "${x_rope_cls_torch_include}/${header}" line REGEX "#define TORCH_VERSION_${part} ")
      string(REGEX REPLACE ".*TORCH_VERSION_${part} +([0-9]+).*" "\\1" torch_${part} "${line}")
    endforeach()
    set(x_rope_cls_torch_version "${torch_MAJOR}.${torch_MINOR}.${torch_PATCH}")
  endif()
endforeach()
if(x_rope_cls_torch_version VERSION_LESS 2.13)
  message(FATAL_ERROR
    "x_rope_cls needs torch 2.13 or newer to build, got ${x_rope_cls_torch_version} in ${torch_dir}")
endif()
find_library(x_rope_cls_torch_library torch_cpu
  PATHS "${torch_dir}/lib" NO_DEFAULT_PATH NO_CACHE REQUIRED)
message(STATUS "Found torch ${x_rope_cls_torch_version}: ${torch_dir}")
