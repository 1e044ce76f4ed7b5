// Pieces of a call's scratch memory.
#pragma once

#include <cstdint>

#include "vec.h"

namespace x_rope_cls::cpu::X_ROPE_CLS_ISA {
namespace {

// Hands out 64-byte aligned pieces of a workspace; with a null base it only counts.
struct Arena {
  char* base;
  int64_t used;

  template <typename T>
  T* take(int64_t count) {
    T* piece = base == nullptr ? nullptr : reinterpret_cast<T*>(base + used);
    used = round_up(used + count * static_cast<int64_t>(sizeof(T)), 64);
    return piece;
  }
};

}  // namespace
}  // namespace x_rope_cls::cpu::X_ROPE_CLS_ISA
