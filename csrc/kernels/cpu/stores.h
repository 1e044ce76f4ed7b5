// Stores of whole vectors, past the caches where that pays.
#pragma once

#include <cstdint>

#include "vec.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace x_rope_cls::cpu::X_ROPE_CLS_ISA {
namespace {

// Whether vectors of so many bytes can be stored past the caches.
constexpr bool can_stream([[maybe_unused]] int bytes) {
#if defined(__AVX512F__)
  return bytes == 64 || bytes == 32 || bytes == 16;
#elif defined(__AVX2__)
  return bytes == 32 || bytes == 16;
#elif defined(__SSE2__)
  return bytes == 16;
#else
  return false;
#endif
}

// Whether a pass that writes so many bytes, and reads as many and more, stores rows of whole
// vectors past the caches: a line need not be read before it is written, and takes no room from
// what is read. strides: of the rows, in bytes, one or several joined by |.
static inline bool rows_stream(double bytes, const void* data, int64_t strides) {
  constexpr double kStreamBytes = 8 << 20;
  return bytes >= kStreamBytes && reinterpret_cast<uintptr_t>(data) % kVectorBytes == 0 &&
         strides % kVectorBytes == 0;
}

// kStream: past the caches; `to` is then aligned to the vector.
template <bool kStream, typename V>
X_ROPE_CLS_INLINE void put([[maybe_unused]] void* to, V v) {
  if constexpr (kStream && can_stream(sizeof(V))) {
#if defined(__AVX512F__)
    if constexpr (sizeof(V) == 64) {
      _mm512_stream_si512(static_cast<__m512i*>(to), reinterpret_cast<__m512i>(v));
    }
#endif
#if defined(__AVX2__)
    if constexpr (sizeof(V) == 32) {
      _mm256_stream_si256(static_cast<__m256i*>(to), reinterpret_cast<__m256i>(v));
    }
#endif
#if defined(__SSE2__)
    if constexpr (sizeof(V) == 16) {
      _mm_stream_si128(static_cast<__m128i*>(to), reinterpret_cast<__m128i>(v));
    }
#endif
  } else {
    __builtin_memcpy(to, &v, sizeof(v));
  }
}

// Others see what went past the caches from here on.
X_ROPE_CLS_INLINE void finish_streams() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

}  // namespace
}  // namespace x_rope_cls::cpu::X_ROPE_CLS_ISA
