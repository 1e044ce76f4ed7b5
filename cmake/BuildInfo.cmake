# Writes generated/build_config.h: what `_C.build_info()` tells about this build.

string(TOUPPER "${CMAKE_BUILD_TYPE}" build_type)
string(JOIN " " x_rope_cls_common_flags
  ${CMAKE_CXX_FLAGS} ${CMAKE_CXX_FLAGS_${build_type}} ${isa_common_flags})
set(x_rope_cls_isa_flags "")
foreach(isa IN LISTS x_rope_cls_isas)
  string(JOIN " " flags ${x_rope_cls_flags_${isa}})
  string(APPEND x_rope_cls_isa_flags "    {\"${isa}\", \"${flags}\"},\n")
endforeach()
set(x_rope_cls_cuda_names "")
foreach(architecture IN LISTS x_rope_cls_cuda_architectures)
  string(APPEND x_rope_cls_cuda_names "\"${architecture}\", ")
endforeach()
configure_file(cmake/build_config.h.in generated/build_config.h @ONLY)
