// What each ISA variant defines. The sources that include this header are compiled once per ISA,
// with X_ROPE_CLS_ISA (the namespace) and X_ROPE_CLS_LANES (float32 lanes of a vector) from the
// build.
//
// Everything in such a source lives in this namespace or in an anonymous one inside it, and no
// inline function or template of std:: may be emitted from it: such a symbol is weak, the linker
// keeps one copy of it for the whole library, and that copy may hold instructions the processor
// does not have.
#pragma once

#include "dispatch.h"

#if !defined(X_ROPE_CLS_ISA) || !defined(X_ROPE_CLS_LANES)
#error "X_ROPE_CLS_ISA and X_ROPE_CLS_LANES must be defined by the build"
#endif

// Whether there are products of pairs of 16-bit integers, more of them a cycle than of floats.
#if defined(__AVX512VNNI__) || (X_ROPE_CLS_LANES == 8 && defined(__AVX2__))
#define X_ROPE_CLS_HAVE_INT16
#endif

namespace x_rope_cls::cpu::X_ROPE_CLS_ISA {

// rope.cpp
void rope(const RopeParams* calls, int64_t count, const Parallel& parallel);
void rope_table_grad(const RopeTableGradParams& params, const Parallel& parallel);

// attention_forward.cpp
int64_t attention_workspace(const AttentionParams& params, int64_t workers);
void attention_forward(const AttentionParams& params, const Parallel& parallel, void* workspace);

// attention_few.cpp: what attention_forward does where there are few queries.
bool attention_is_few(const AttentionParams& params);
int64_t attention_few_workspace(const AttentionParams& params, int64_t workers);
void attention_few(const AttentionParams& params, const Parallel& parallel, void* workspace);

// attention_backward.cpp
int64_t attention_backward_workspace(const AttentionBackwardParams& params, int64_t workers);
void attention_backward(const AttentionBackwardParams& params, const Parallel& parallel,
                        void* workspace);

// pooling_forward.cpp
int64_t pool_workspace(const PoolParams& params, int64_t workers);
void pool_forward(const PoolParams& params, const Parallel& parallel, void* workspace);

// pooling_backward.cpp
int64_t pool_backward_workspace(const PoolBackwardParams& params, int64_t workers);
void pool_backward(const PoolBackwardParams& params, const Parallel& parallel, void* workspace);

// rows.cpp
int64_t rows_product_workspace(const RowsProductParams& params, int64_t workers);
void rows_product(const RowsProductParams& params, const Parallel& parallel, void* workspace);
int64_t rows_outer_workspace(const RowsOuterParams& params, int64_t workers);
void rows_outer(const RowsOuterParams& params, const Parallel& parallel, void* workspace);

// limits.cpp
double fma_float32(int64_t iterations);
#ifdef __AVX512BF16__
double dot_bfloat16(int64_t iterations);
#endif
#ifdef X_ROPE_CLS_HAVE_INT16
double dot_int16(int64_t iterations);
#endif
void stream_copy(void* to, const void* from, int64_t bytes);
uint64_t stream_read(const void* from, int64_t bytes);

// table.cpp
extern const KernelTable kTable;

}  // namespace x_rope_cls::cpu::X_ROPE_CLS_ISA
