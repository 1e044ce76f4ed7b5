// Which CPU variant of the kernels runs. One table of function pointers per instruction set; the
// best one that the processor and the operating system support is chosen when the library is
// loaded.
#pragma once

#include <cstdint>

#include "../attention.h"
#include "../limits.h"
#include "../pooling.h"
#include "../rope.h"
#include "../rows.h"

namespace x_rope_cls::cpu {

struct KernelTable {
  const char* name;  // "generic", "avx2", "avx512", "avx512_bf16"
  int32_t lanes;     // float32 lanes of a vector
  void (*rope)(const RopeParams* calls, int64_t count, const Parallel&);  // in one parallel region
  void (*rope_table_grad)(const RopeTableGradParams&, const Parallel&);
  AttentionWorkspace attention_workspace;
  AttentionForward attention_forward;
  AttentionBackwardWorkspace attention_backward_workspace;
  AttentionBackward attention_backward;
  PoolWorkspace pool_workspace;
  PoolForward pool_forward;
  PoolBackwardWorkspace pool_backward_workspace;
  PoolBackward pool_backward;
  RowsProductWorkspace rows_product_workspace;
  RowsProduct rows_product;
  RowsOuterWorkspace rows_outer_workspace;
  RowsOuter rows_outer;
  LimitKernels limits;
};

// Exported from the kernels' library, which is built with hidden visibility.
#pragma GCC visibility push(default)

// The table in use.
const KernelTable& kernels();

// Variants compiled into this library, slowest first, null-terminated, and whether this machine
// runs one.
const char* const* built_isas();
bool isa_supported(const char* name);

// Uses the named variant from now on. False, and nothing changes, where it is unknown or
// unsupported.
bool select_isa(const char* name);

// Why the choice at load time was what it was: "" or a complaint about X_ROPE_CLS_CPU_ISA.
const char* isa_warning();

#pragma GCC visibility pop

}  // namespace x_rope_cls::cpu
