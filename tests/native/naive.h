// What the kernels must compute, in float64 loops over plain arrays.
#pragma once

#include <cstdint>
#include <vector>

namespace naive {

// A contiguous (batch, heads, tokens, channels) array.
struct Array {
  int64_t b = 0, h = 0, n = 0, d = 0;
  std::vector<double> values;

  Array() = default;
  Array(int64_t b, int64_t h, int64_t n, int64_t d, double fill = 0.0)
      : b(b), h(h), n(n), d(d), values(b * h * n * d, fill) {}
  // Indices along axes of size 1 are broadcast.
  double& at(int64_t ib, int64_t ih, int64_t in, int64_t id) {
    return values[index(ib, ih, in, id)];
  }
  double at(int64_t ib, int64_t ih, int64_t in, int64_t id) const {
    return values[index(ib, ih, in, id)];
  }

 private:
  int64_t index(int64_t ib, int64_t ih, int64_t in, int64_t id) const {
    const auto along = [](int64_t i, int64_t size) { return size == 1 ? 0 : i; };
    return ((along(ib, b) * h + along(ih, h)) * n + along(in, n)) * d + along(id, d);
  }
};

// Rotation tables (1 or batch, 1 or heads, tokens, pairs); rotate (1 or batch, 1, tokens, 1),
// empty: every token has a position.
struct Rotary {
  Array cos, sin, rotate;

  bool has_position(int64_t b, int64_t n) const {
    return rotate.values.empty() || rotate.at(b, 0, n, 0) != 0.0;
  }
};

// x rotated, whatever `rotate` says; or only where it says so.
Array rotate_all(const Array& x, const Rotary& rotary, bool interleaved, bool inverse);
Array rope(const Array& x, const Rotary& rotary, bool interleaved, bool inverse);

// Gradients to the tables of sum(grad * rope(x)), in their shapes.
struct TableGrads {
  Array cos, sin;
};
TableGrads rope_table_grad(const Array& grad, const Array& x, const Rotary& rotary,
                           bool interleaved, bool inverse);

enum class Mode { kRotate, kSkip, kMask };

struct Attention {
  Mode mode;
  bool has_rotary, interleaved;
  double scale, dropout_p;
  uint64_t seed;
  Array q, k, v;  // (b, heads, n, d), (b, key_heads, m, d), (b, key_heads, m, e)
  Rotary rotary_q, rotary_k;
  Array key_mask;  // (b, 1, m, 1); empty: none
  Array bias;      // broadcasts to (b, heads, n, m), -inf for not to attend; empty: none
};

struct AttentionResult {
  Array out, lse;  // lse: (b, heads, n, 1)
};
AttentionResult attention(const Attention& a);

struct AttentionGrads {
  Array dq, dk, dv, dq_rotated, dk_rotated, dbias;
};
// grad_lse: (b, heads, n, 1); empty: none.
AttentionGrads attention_backward(const Attention& a, const Array& grad_out, const Array& grad_lse);

enum class Norm { kNone, kLayer, kRms };

struct Pool {
  Norm norm;
  double scale, eps;
  Array x;             // (b, 1, n, c); tokens that are masked may hold anything
  Array query;         // (1 or b, heads, m, c)
  Array key_mask;      // (b, 1, n, 1); empty: none
  Array weight, bias;  // (1, 1, 1, c); empty: 1 and 0

  bool counts(int64_t ib, int64_t in) const {
    return key_mask.values.empty() || key_mask.at(ib, 0, in, 0) != 0.0;
  }
};

struct PoolResult {
  Array pooled, lse;  // lse: (b, heads, m, 1)
};
PoolResult pool(const Pool& p);

struct PoolGrads {
  Array dx, dquery, dweight, dbias;  // the last two always (1, 1, 1, c)
};
// grad_lse: (b, heads, m, 1); empty: none.
PoolGrads pool_backward(const Pool& p, const Array& grad, const Array& grad_lse);

}  // namespace naive
