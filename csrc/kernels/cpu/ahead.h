// Rows of channels that will be read or written soon, asked for beside products that keep the
// arithmetic busy: a few at a time, because memory takes only so many requests at once.
#pragma once

#include <cstdint>

#include "../attention.h"
#include "vec.h"

namespace x_rope_cls::cpu::X_ROPE_CLS_ISA {
namespace {

constexpr int64_t kAheadBytes = 1 << 19;  // more would not stay in L2 until it is wanted

template <typename S>
class Ahead {
 public:
  // The tokens in `index`, of which so many are wanted, of one head; in the order of the calls.
  void add(const Tensor4& t, int64_t b, int64_t h, const int32_t* index, int64_t count,
           int64_t channels) {
    if (t.data == nullptr || t.stride_d != 1 || count <= 0) return;
    const S* head = static_cast<const S*>(t.data) + b * t.stride_b + h * t.stride_h;
    spans_[used_++] = {head, t.stride_n, index, count, channels};
    rows_ += count;
    bytes_ += count * channels * static_cast<int64_t>(sizeof(S));
  }
  // Everything will have been asked for after so many calls of ().
  void spread(int64_t calls) {
    step_ = bytes_ > kAheadBytes ? 0 : ceil_div(rows_, max_of<int64_t>(calls, 1));
  }
  void operator()() {
    for (int64_t left = step_; left > 0 && span_ < used_; --left) {
      const Span& s = spans_[span_];
      constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(S));
      const S* const row = s.head + s.index[at_] * s.stride;
      for (int64_t c = 0; c < s.channels; c += kLine) __builtin_prefetch(row + c, 0, 2);
      if (++at_ == s.count) {
        at_ = 0;
        ++span_;
      }
    }
  }

 private:
  struct Span {
    const S* head;
    int64_t stride;
    const int32_t* index;
    int64_t count, channels;
  };
  Span spans_[8] = {};
  int64_t used_ = 0, rows_ = 0, bytes_ = 0, step_ = 0;
  int64_t span_ = 0, at_ = 0;  // the next row
};

}  // namespace
}  // namespace x_rope_cls::cpu::X_ROPE_CLS_ISA
