# The variants of the CPU kernels on this architecture:
#   x_rope_cls_isas              their names, slowest first
#   x_rope_cls_flags_<name>      compiler flags
#   x_rope_cls_lanes_<name>      float32 lanes of a vector

macro(add_isa name lanes)
  if(X_ROPE_CLS_ISAS STREQUAL "" OR "${name}" IN_LIST X_ROPE_CLS_ISAS)
    list(APPEND x_rope_cls_isas ${name})
    set(x_rope_cls_lanes_${name} ${lanes})
    set(x_rope_cls_flags_${name} ${ARGN})
  endif()
endmacro()

set(avx2_flags -mavx2 -mfma -mf16c)
set(avx512_flags -mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c)

set(x_rope_cls_isas)
add_isa(generic 4)
if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$" AND CMAKE_SIZEOF_VOID_P EQUAL 8)
  if(X_ROPE_CLS_TEST_ISA)
    add_isa(avx2x16 16 ${avx2_flags})
  endif()
  add_isa(avx2 8 ${avx2_flags})
  add_isa(avx512 16 ${avx512_flags})
  add_isa(avx512_bf16 16 ${avx512_flags} -mavx512bf16 -mavx512vnni)
endif()
if(NOT "generic" IN_LIST x_rope_cls_isas)
  message(FATAL_ERROR "X_ROPE_CLS_ISAS must contain generic, got ${X_ROPE_CLS_ISAS}")
endif()
