// The table of function pointers of one ISA variant.
#include "isa.h"

#define X_ROPE_CLS_STRING(text) X_ROPE_CLS_STRING_OF(text)
#define X_ROPE_CLS_STRING_OF(text) #text

namespace x_rope_cls::cpu::X_ROPE_CLS_ISA {

const KernelTable kTable = {
    .name = X_ROPE_CLS_STRING(X_ROPE_CLS_ISA),
    .lanes = X_ROPE_CLS_LANES,
    .rope = rope,
    .rope_table_grad = rope_table_grad,
    .attention_workspace = attention_workspace,
    .attention_forward = attention_forward,
    .attention_backward_workspace = attention_backward_workspace,
    .attention_backward = attention_backward,
    .pool_workspace = pool_workspace,
    .pool_forward = pool_forward,
    .pool_backward_workspace = pool_backward_workspace,
    .pool_backward = pool_backward,
    .rows_product_workspace = rows_product_workspace,
    .rows_product = rows_product,
    .rows_outer_workspace = rows_outer_workspace,
    .rows_outer = rows_outer,
    .limits =
        {
            .fma_float32 = fma_float32,
#ifdef __AVX512BF16__
            .dot_bfloat16 = dot_bfloat16,
#else
            .dot_bfloat16 = nullptr,
#endif
#ifdef X_ROPE_CLS_HAVE_INT16
            .dot_int16 = dot_int16,
#else
            .dot_int16 = nullptr,
#endif
            .copy = stream_copy,
            .read = stream_read,
        },
};

}  // namespace x_rope_cls::cpu::X_ROPE_CLS_ISA
