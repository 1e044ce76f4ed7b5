// The loops that measure what the machine can do, at one ISA.
#include "isa.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace x_rope_cls::cpu::X_ROPE_CLS_ISA {

namespace {

constexpr int kLanes = X_ROPE_CLS_LANES;

typedef float VectorF __attribute__((vector_size(kLanes * sizeof(float))));
typedef uint64_t VectorU __attribute__((vector_size(kLanes * sizeof(float))));

// Two FMA units of latency 4 or 5 need 10 in flight; a file of 16 registers holds 12 beside the
// operands.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kChains = 24;
#else
constexpr int kChains = 12;
#endif

// Keeps the compiler from knowing the value.
template <typename Vector>
__attribute__((always_inline)) inline void hide(Vector& value) {
#if defined(__x86_64__) && (defined(__AVX512F__) || X_ROPE_CLS_LANES <= 8)
  asm volatile("" : "+v"(value));
#elif defined(__aarch64__)
  asm volatile("" : "+w"(value));
#else
  asm volatile("" : "+m"(value));
#endif
}

// One vector to memory, past the caches where there is an instruction for it.
__attribute__((always_inline)) inline void stream_store(VectorF* to, VectorF value) {
#if defined(__AVX512F__)
  _mm512_stream_ps(reinterpret_cast<float*>(to), value);
#elif defined(__AVX2__) && X_ROPE_CLS_LANES == 8
  _mm256_stream_ps(reinterpret_cast<float*>(to), value);
#elif defined(__SSE2__) && X_ROPE_CLS_LANES == 4
  _mm_stream_ps(reinterpret_cast<float*>(to), value);
#else
  *to = value;
#endif
}

#ifdef X_ROPE_CLS_HAVE_INT16
typedef int32_t VectorI __attribute__((vector_size(kLanes * sizeof(float))));

// add(sum, left, right) adds products of pairs, one in a lane, to as many sums. one: a pair of 1.
template <typename Sums, typename F>
__attribute__((always_inline)) inline double dot_pairs(int64_t iterations, int32_t one,
                                                       const F& add) {
  Sums sums[kChains];
  VectorI left = VectorI{} + one;
  VectorI right = left;
  hide(left);
  hide(right);
#pragma GCC unroll 32
  for (int i = 0; i < kChains; ++i) {
    sums[i] = Sums{};
    hide(sums[i]);
  }
  for (int64_t iteration = 0; iteration < iterations; ++iteration) {
#pragma GCC unroll 32
    for (int i = 0; i < kChains; ++i) {
      hide(left);  // or all products would be one
      add(sums[i], left, right);
    }
  }
#pragma GCC unroll 32
  for (int i = 0; i < kChains; ++i) {
    hide(sums[i]);
  }
  return 4.0 * kLanes * kChains * static_cast<double>(iterations);
}
#endif

}  // namespace

double fma_float32(int64_t iterations) {
  VectorF sums[kChains];
  VectorF factor = VectorF{} + 0.5f;
  VectorF term = VectorF{} + 1.0f;
  hide(factor);
  hide(term);
#pragma GCC unroll 32
  for (int i = 0; i < kChains; ++i) {
    sums[i] = factor;
    hide(sums[i]);
  }
  for (int64_t iteration = 0; iteration < iterations; ++iteration) {
#pragma GCC unroll 32
    for (int i = 0; i < kChains; ++i) {
      sums[i] = sums[i] * factor + term;
    }
  }
#pragma GCC unroll 32
  for (int i = 0; i < kChains; ++i) {
    hide(sums[i]);
  }
  return 2.0 * kLanes * kChains * static_cast<double>(iterations);
}

#ifdef __AVX512BF16__
double dot_bfloat16(int64_t iterations) {
  return dot_pairs<__m512>(iterations, 0x3f803f80, [](__m512& sum, VectorI left, VectorI right) {
    sum = _mm512_dpbf16_ps(sum, (__m512bh)left, (__m512bh)right);
  });
}
#endif

#ifdef X_ROPE_CLS_HAVE_INT16
double dot_int16(int64_t iterations) {
  return dot_pairs<VectorI>(iterations, 0x00010001, [](VectorI& sum, VectorI left, VectorI right) {
#ifdef __AVX512VNNI__
    sum = (VectorI)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)left, (__m512i)right);
#else
    sum += (VectorI)_mm256_madd_epi16((__m256i)left, (__m256i)right);
#endif
  });
}
#endif

void stream_copy(void* to, const void* from, int64_t bytes) {
  auto* target = static_cast<VectorF*>(to);
  const auto* source = static_cast<const VectorF*>(from);
  const int64_t vectors = bytes / static_cast<int64_t>(sizeof(VectorF));
  for (int64_t i = 0; i < vectors; i += 8) {
    VectorF values[8];
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) {
      values[j] = source[i + j];
    }
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) {
      stream_store(target + i + j, values[j]);
    }
  }
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

uint64_t stream_read(const void* from, int64_t bytes) {
  const auto* source = static_cast<const VectorU*>(from);
  const int64_t vectors = bytes / static_cast<int64_t>(sizeof(VectorU));
  VectorU sums[8] = {};
  for (int64_t i = 0; i < vectors; i += 8) {
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) {
      sums[j] |= source[i + j];
    }
  }
  uint64_t result = 0;
#pragma GCC unroll 8
  for (int j = 0; j < 8; ++j) {
    for (int lane = 0; lane < kLanes / 2; ++lane) {
      result |= sums[j][lane];
    }
  }
  return result;
}

}  // namespace x_rope_cls::cpu::X_ROPE_CLS_ISA
