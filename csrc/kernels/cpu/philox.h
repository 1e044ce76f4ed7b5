// Attention dropout: counter-based random numbers, so that backward recomputes what forward drew
// and every device draws the same. Philox4x32 with 7 rounds (Salmon et al., SC'11).
#pragma once

#include <cstdint>

#include "vec.h"

namespace x_rope_cls::cpu::X_ROPE_CLS_ISA {
namespace {

constexpr int kPhiloxRounds = 7;
// Keys that share 32 counters: key m uses counter (m / 128) * 32 + m % 32 and word (m / 32) % 4, so
// that one run over 32 neighbouring counters fills 128 neighbouring keys.
constexpr int64_t kDropoutChunk = 128;
constexpr int kDropoutCounters = 32;

// words[i] for the keys chunk * 128 + i of query n of head bh.
static inline void dropout_words(uint64_t seed, int64_t chunk, int64_t n, int64_t bh,
                                 uint32_t (&words)[kDropoutChunk]) {
  for (int lane = 0; lane < kDropoutCounters; ++lane) {
    auto c0 = static_cast<uint32_t>(chunk * kDropoutCounters + lane);
    auto c1 = static_cast<uint32_t>(n);
    auto c2 = static_cast<uint32_t>(bh);
    auto c3 = static_cast<uint32_t>(static_cast<uint64_t>(bh) >> 32);
    auto k0 = static_cast<uint32_t>(seed);
    auto k1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < kPhiloxRounds; ++round) {
      const uint64_t p0 = uint64_t{0xD2511F53U} * c0;
      const uint64_t p1 = uint64_t{0xCD9E8D57U} * c2;
      c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
      c1 = static_cast<uint32_t>(p1);
      c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
      c3 = static_cast<uint32_t>(p0);
      k0 += 0x9E3779B9U;
      k1 += 0xBB67AE85U;
    }
    words[lane] = c0;
    words[lane + kDropoutCounters] = c1;
    words[lane + 2 * kDropoutCounters] = c2;
    words[lane + 3 * kDropoutCounters] = c3;
  }
}

struct Dropout {
  double p;
  uint64_t seed;
  uint64_t threshold;  // words below it are dropped
};

X_ROPE_CLS_INLINE Dropout make_dropout(double p, uint64_t seed) {
  return {p, seed, static_cast<uint64_t>(p * 4294967296.0)};
}

// factors[j] = 1 / (1 - p) where key index[j] is kept, else 0.
template <typename T>
static inline void dropout_factors(const Dropout& d, int64_t bh, int64_t n, const int32_t* index,
                                   int64_t count, T* factors) {
  const T kept = d.p < 1.0 ? static_cast<T>(1.0 / (1.0 - d.p)) : T{0};
  uint32_t words[kDropoutChunk];
  int64_t current = -1;
  for (int64_t j = 0; j < count; ++j) {
    const int64_t chunk = index[j] / kDropoutChunk;
    if (chunk != current) {
      dropout_words(d.seed, chunk, n, bh, words);
      current = chunk;
    }
    factors[j] = words[index[j] % kDropoutChunk] >= d.threshold ? kept : T{0};
  }
}

}  // namespace
}  // namespace x_rope_cls::cpu::X_ROPE_CLS_ISA
