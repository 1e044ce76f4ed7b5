#include "naive.h"

#include <cmath>
#include <limits>

namespace naive {

namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

struct Pair {
  int64_t first, second;
};

Pair channels_of(int64_t i, int64_t pairs, bool interleaved) {
  return interleaved ? Pair{2 * i, 2 * i + 1} : Pair{i, i + pairs};
}

// Philox4x32 with 7 rounds; the word that decides about key m of query n.
uint32_t random_word(uint64_t seed, uint64_t bh, uint64_t n, uint64_t m) {
  uint32_t c[4] = {static_cast<uint32_t>((m >> 7) * 32 + (m & 31)), static_cast<uint32_t>(n),
                   static_cast<uint32_t>(bh), static_cast<uint32_t>(bh >> 32)};
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 7; ++round) {
    const uint64_t p0 = uint64_t{0xD2511F53} * c[0], p1 = uint64_t{0xCD9E8D57} * c[2];
    const uint32_t next[4] = {
        static_cast<uint32_t>(p1 >> 32) ^ c[1] ^ k0, static_cast<uint32_t>(p1),
        static_cast<uint32_t>(p0 >> 32) ^ c[3] ^ k1, static_cast<uint32_t>(p0)};
    for (int i = 0; i < 4; ++i) {
      c[i] = next[i];
    }
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return c[(m >> 5) & 3];
}

// The factor dropout puts on a probability: 0, or what makes up for those dropped.
double dropout_factor(const Attention& a, int64_t b, int64_t h, int64_t n, int64_t m) {
  if (a.dropout_p <= 0.0) {
    return 1.0;
  }
  const uint64_t threshold = static_cast<uint64_t>(a.dropout_p * 4294967296.0);
  const bool kept = random_word(a.seed, b * a.q.h + h, n, m) >= threshold;
  return kept ? 1.0 / (1.0 - a.dropout_p) : 0.0;
}

// Scores and softmax of one query row, and how each pair is rotated.
class Row {
 public:
  Row(const Attention& a, const Array& rotated_q, const Array& rotated_k, int64_t b, int64_t h,
      int64_t n)
      : keys_(a.k.n),
        probabilities(a.k.n),
        rotate_query(a.k.n),
        rotate_key(a.k.n),
        lse(-kInfinity) {
    const int64_t key_head = h / (a.q.h / a.k.h);
    std::vector<double> scores(keys_);
    double largest = -kInfinity;
    for (int64_t m = 0; m < keys_; ++m) {
      choose(a, b, n, m);
      scores[m] = -kInfinity;
      if (a.key_mask.values.empty() || a.key_mask.at(b, 0, m, 0) != 0.0) {
        const Array& q = rotate_query[m] ? rotated_q : a.q;
        const Array& k = rotate_key[m] ? rotated_k : a.k;
        double dot = 0.0;
        for (int64_t d = 0; d < a.q.d; ++d) {
          dot += q.at(b, h, n, d) * k.at(b, key_head, m, d);
        }
        scores[m] = dot * a.scale + (a.bias.values.empty() ? 0.0 : a.bias.at(b, h, n, m));
      }
      largest = std::fmax(largest, scores[m]);
    }
    if (largest == -kInfinity) {
      return;
    }
    double sum = 0.0;
    for (int64_t m = 0; m < keys_; ++m) {
      sum += std::exp(scores[m] - largest);
    }
    lse = largest + std::log(sum);
    for (int64_t m = 0; m < keys_; ++m) {
      probabilities[m] = std::exp(scores[m] - lse);
    }
  }

 private:
  void choose(const Attention& a, int64_t b, int64_t n, int64_t m) {
    if (!a.has_rotary) {
      return;
    }
    const bool query = a.rotary_q.has_position(b, n), key = a.rotary_k.has_position(b, m);
    rotate_query[m] = a.mode == Mode::kRotate || (a.mode == Mode::kSkip ? query : query && key);
    rotate_key[m] = a.mode == Mode::kRotate || (a.mode == Mode::kSkip ? key : query && key);
  }

  int64_t keys_;

 public:
  std::vector<double> probabilities;  // all 0 where there is no key to attend to
  std::vector<char> rotate_query, rotate_key;
  double lse;
};

void add_to(Array& sum, const Array& part) {
  for (size_t i = 0; i < sum.values.size(); ++i) {
    sum.values[i] += part.values[i];
  }
}

Array rotate_if_any(const Array& x, const Rotary& rotary, const Attention& a, bool inverse) {
  return a.has_rotary ? rotate_all(x, rotary, a.interleaved, inverse) : x;
}

}  // namespace

Array rotate_all(const Array& x, const Rotary& rotary, bool interleaved, bool inverse) {
  Array y = x;
  const int64_t pairs = rotary.cos.d;
  for (int64_t b = 0; b < x.b; ++b) {
    for (int64_t h = 0; h < x.h; ++h) {
      for (int64_t n = 0; n < x.n; ++n) {
        for (int64_t i = 0; i < pairs; ++i) {
          const auto [first, second] = channels_of(i, pairs, interleaved);
          const double c = rotary.cos.at(b, h, n, i);
          const double s = inverse ? -rotary.sin.at(b, h, n, i) : rotary.sin.at(b, h, n, i);
          y.at(b, h, n, first) = c * x.at(b, h, n, first) - s * x.at(b, h, n, second);
          y.at(b, h, n, second) = s * x.at(b, h, n, first) + c * x.at(b, h, n, second);
        }
      }
    }
  }
  return y;
}

Array rope(const Array& x, const Rotary& rotary, bool interleaved, bool inverse) {
  Array y = rotate_all(x, rotary, interleaved, inverse);
  for (int64_t b = 0; b < x.b; ++b) {
    for (int64_t h = 0; h < x.h; ++h) {
      for (int64_t n = 0; n < x.n; ++n) {
        for (int64_t d = 0; d < x.d && !rotary.has_position(b, n); ++d) {
          y.at(b, h, n, d) = x.at(b, h, n, d);
        }
      }
    }
  }
  return y;
}

TableGrads rope_table_grad(const Array& grad, const Array& x, const Rotary& rotary,
                           bool interleaved, bool inverse) {
  const Array& t = rotary.cos;
  TableGrads result{Array(t.b, t.h, t.n, t.d), Array(t.b, t.h, t.n, t.d)};
  for (int64_t b = 0; b < x.b; ++b) {
    for (int64_t h = 0; h < x.h; ++h) {
      for (int64_t n = 0; n < x.n; ++n) {
        for (int64_t i = 0; i < t.d && rotary.has_position(b, n); ++i) {
          const auto [first, second] = channels_of(i, t.d, interleaved);
          const double g0 = grad.at(b, h, n, first), g1 = grad.at(b, h, n, second);
          const double x0 = x.at(b, h, n, first), x1 = x.at(b, h, n, second);
          result.cos.at(b, h, n, i) += g0 * x0 + g1 * x1;
          result.sin.at(b, h, n, i) += (inverse ? -1.0 : 1.0) * (g1 * x0 - g0 * x1);
        }
      }
    }
  }
  return result;
}

AttentionResult attention(const Attention& a) {
  const Array rotated_q = rotate_if_any(a.q, a.rotary_q, a, false);
  const Array rotated_k = rotate_if_any(a.k, a.rotary_k, a, false);
  AttentionResult result{Array(a.q.b, a.q.h, a.q.n, a.v.d), Array(a.q.b, a.q.h, a.q.n, 1)};
  for (int64_t b = 0; b < a.q.b; ++b) {
    for (int64_t h = 0; h < a.q.h; ++h) {
      for (int64_t n = 0; n < a.q.n; ++n) {
        const Row row(a, rotated_q, rotated_k, b, h, n);
        result.lse.at(b, h, n, 0) = row.lse;
        for (int64_t m = 0; m < a.k.n; ++m) {
          const double p = row.probabilities[m] * dropout_factor(a, b, h, n, m);
          for (int64_t e = 0; e < a.v.d && p != 0.0; ++e) {
            result.out.at(b, h, n, e) += p * a.v.at(b, h / (a.q.h / a.k.h), m, e);
          }
        }
      }
    }
  }
  return result;
}

AttentionGrads attention_backward(const Attention& a, const Array& grad_out,
                                  const Array& grad_lse) {
  const Array rotated_q = rotate_if_any(a.q, a.rotary_q, a, false);
  const Array rotated_k = rotate_if_any(a.k, a.rotary_k, a, false);
  const AttentionResult forward = attention(a);
  AttentionGrads g;
  g.dq = g.dq_rotated = Array(a.q.b, a.q.h, a.q.n, a.q.d);
  g.dk = g.dk_rotated = Array(a.k.b, a.k.h, a.k.n, a.k.d);
  g.dv = Array(a.v.b, a.v.h, a.v.n, a.v.d);
  g.dbias = Array(a.bias.b, a.bias.h, a.bias.n, a.bias.d);
  for (int64_t b = 0; b < a.q.b; ++b) {
    for (int64_t h = 0; h < a.q.h; ++h) {
      const int64_t kv = h / (a.q.h / a.k.h);
      for (int64_t n = 0; n < a.q.n; ++n) {
        const Row row(a, rotated_q, rotated_k, b, h, n);
        double delta = grad_lse.values.empty() ? 0.0 : -grad_lse.at(b, h, n, 0);
        for (int64_t e = 0; e < a.v.d; ++e) {
          delta += grad_out.at(b, h, n, e) * forward.out.at(b, h, n, e);
        }
        for (int64_t m = 0; m < a.k.n; ++m) {
          const double p = row.probabilities[m], factor = dropout_factor(a, b, h, n, m);
          if (p == 0.0) {
            continue;
          }
          double dp = 0.0;
          for (int64_t e = 0; e < a.v.d; ++e) {
            dp += factor * grad_out.at(b, h, n, e) * a.v.at(b, kv, m, e);
            g.dv.at(b, kv, m, e) += p * factor * grad_out.at(b, h, n, e);
          }
          const double ds = p * (dp - delta);
          if (!g.dbias.values.empty()) {
            g.dbias.at(b, h, n, m) += ds;
          }
          Array& dq = row.rotate_query[m] ? g.dq_rotated : g.dq;
          Array& dk = row.rotate_key[m] ? g.dk_rotated : g.dk;
          for (int64_t d = 0; d < a.q.d; ++d) {
            dq.at(b, h, n, d) +=
                a.scale * ds * (row.rotate_key[m] ? rotated_k : a.k).at(b, kv, m, d);
            dk.at(b, kv, m, d) +=
                a.scale * ds * (row.rotate_query[m] ? rotated_q : a.q).at(b, h, n, d);
          }
        }
      }
    }
  }
  add_to(g.dq, rotate_if_any(g.dq_rotated, a.rotary_q, a, true));
  add_to(g.dk, rotate_if_any(g.dk_rotated, a.rotary_k, a, true));
  return g;
}

}  // namespace naive
