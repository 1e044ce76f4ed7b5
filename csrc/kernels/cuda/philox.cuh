// Attention dropout: the numbers of csrc/kernels/cpu/philox.h (Philox4x32 with 7 rounds), so that
// the same seed drops the same pairs on every device, forward and backward.
#pragma once

#include <cstdint>

namespace x_rope_cls::cuda {

constexpr int kPhiloxRounds = 7;

// Key m has counter (m / 128) * 32 + m % 32 and word (m / 32) % 4 of it: keys m, m + 32, m + 64 and
// m + 96 of the same 128 share a counter.
__device__ __forceinline__ uint32_t dropout_counter(int32_t key) {
  return (static_cast<uint32_t>(key) / 128) * 32 + static_cast<uint32_t>(key) % 32;
}
__device__ __forceinline__ int dropout_word(int32_t key) { return (key / 32) % 4; }

// The four words of a counter for query `query` of head `head` (batch * heads + head).
__device__ __forceinline__ uint4 dropout_words(uint64_t seed, uint32_t counter, int32_t query,
                                               int64_t head) {
  uint32_t c0 = counter;
  uint32_t c1 = static_cast<uint32_t>(query);
  uint32_t c2 = static_cast<uint32_t>(head);
  uint32_t c3 = static_cast<uint32_t>(static_cast<uint64_t>(head) >> 32);
  uint32_t k0 = static_cast<uint32_t>(seed);
  uint32_t k1 = static_cast<uint32_t>(seed >> 32);
#pragma unroll
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint32_t high0 = __umulhi(0xD2511F53U, c0);
    const uint32_t low0 = 0xD2511F53U * c0;
    const uint32_t high1 = __umulhi(0xCD9E8D57U, c2);
    const uint32_t low1 = 0xCD9E8D57U * c2;
    c0 = high1 ^ c1 ^ k0;
    c1 = low1;
    c2 = high0 ^ c3 ^ k1;
    c3 = low0;
    k0 += 0x9E3779B9U;
    k1 += 0xBB67AE85U;
  }
  return make_uint4(c0, c1, c2, c3);
}

// Words below this are dropped. 64 bits: p = 1 drops every word.
struct Dropout {
  uint64_t seed;
  uint64_t threshold;
  float kept;  // 1 / (1 - p), or 0 where p is 1
};

__device__ __forceinline__ bool dropout_keeps(const Dropout& d, uint32_t word) {
  return word >= d.threshold;
}

// One pair's factor; where neighbouring keys are at hand, dropout_words serves four of them.
__device__ __forceinline__ float dropout_factor(const Dropout& d, int64_t head, int32_t query,
                                                int32_t key) {
  const uint4 words = dropout_words(d.seed, dropout_counter(key), query, head);
  const int word = dropout_word(key);
  const uint32_t value = word == 0 ? words.x : word == 1 ? words.y : word == 2 ? words.z : words.w;
  return dropout_keeps(d, value) ? d.kept : 0.0f;
}

// p and seed as a launch takes them; the seed is read on the device.
inline uint64_t dropout_threshold(double p) { return static_cast<uint64_t>(p * 4294967296.0); }
inline double dropout_kept(double p) { return p < 1.0 ? 1.0 / (1.0 - p) : 0.0; }

}  // namespace x_rope_cls::cuda
