// Pieces of a call's scratch memory.
#pragma once

#include <cstdint>

#include "vec.h"

namespace x_rope_cls::cpu::X_ROPE_CLS_ISA {
namespace {

// Hands out 64-byte aligned pieces of a workspace; with a null base it only counts.
struct Arena {
  static constexpr int64_t kPage = 4096;

  char* base;
  int64_t used;

  template <typename T>
  T* take(int64_t count) {
    T* piece = base == nullptr ? nullptr : reinterpret_cast<T*>(base + used);
    used = round_up(used + count * static_cast<int64_t>(sizeof(T)), 64);
    return piece;
  }

  // What one worker writes ends here, and another's begins. `stride`: bytes between the rows that
  // stores of the first go to one after the other. The processor asks for lines many such strides
  // ahead of them; were these another worker's, it would have to fetch them back every time (up to
  // a third of the time of queries times keys was lost so).
  void separate(int64_t stride) {
    constexpr int64_t kStridesAhead = 24;  // 12 were too few, 22 enough (Zen 4)
    used = round_up(used + kStridesAhead * stride, kPage);
  }
};

}  // namespace
}  // namespace x_rope_cls::cpu::X_ROPE_CLS_ISA
