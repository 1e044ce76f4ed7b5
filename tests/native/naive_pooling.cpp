#include <cmath>
#include <limits>

#include "naive.h"

namespace naive {

namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// One token and what its normalisation did to it.
struct Token {
  std::vector<double> unit;   // (x - mean) / spread
  std::vector<double> state;  // unit * weight + bias: key and value
  double spread = 1.0;
};

double weight_of(const Pool& p, int64_t c) {
  return p.weight.values.empty() ? 1.0 : p.weight.at(0, 0, 0, c);
}

Token read_token(const Pool& p, int64_t b, int64_t n) {
  const int64_t channels = p.x.d;
  Token token;
  double mean = 0.0, squares = 0.0;
  for (int64_t c = 0; c < channels && p.norm == Norm::kLayer; ++c) {
    mean += p.x.at(b, 0, n, c) / static_cast<double>(channels);
  }
  for (int64_t c = 0; c < channels; ++c) {
    token.unit.push_back(p.x.at(b, 0, n, c) - mean);
    squares += token.unit[c] * token.unit[c];
  }
  if (p.norm == Norm::kNone) {
    token.state = token.unit;
    return token;
  }
  token.spread = std::sqrt(squares / static_cast<double>(channels) + p.eps);
  for (int64_t c = 0; c < channels; ++c) {
    token.unit[c] /= token.spread;
    const double bias = p.bias.values.empty() ? 0.0 : p.bias.at(0, 0, 0, c);
    token.state.push_back(token.unit[c] * weight_of(p, c) + bias);
  }
  return token;
}

// The tokens of one batch; those that are masked are left empty.
std::vector<Token> read_tokens(const Pool& p, int64_t b) {
  std::vector<Token> tokens(p.x.n);
  for (int64_t n = 0; n < p.x.n; ++n) {
    if (p.counts(b, n)) {
      tokens[n] = read_token(p, b, n);
    }
  }
  return tokens;
}

// Softmax of one row's scores, 0 where there is nothing to attend to, and their logsumexp.
std::vector<double> weights_of(const Pool& p, const std::vector<Token>& tokens, int64_t b,
                               int64_t h, int64_t m, double* lse) {
  std::vector<double> weights(tokens.size(), 0.0);
  double largest = -kInfinity, sum = 0.0;
  for (size_t n = 0; n < tokens.size(); ++n) {
    for (size_t c = 0; c < tokens[n].state.size(); ++c) {
      weights[n] += p.scale * p.query.at(b, h, m, static_cast<int64_t>(c)) * tokens[n].state[c];
    }
    largest = tokens[n].state.empty() ? largest : std::fmax(largest, weights[n]);
  }
  for (size_t n = 0; n < tokens.size(); ++n) {
    weights[n] = tokens[n].state.empty() ? 0.0 : std::exp(weights[n] - largest);
    sum += weights[n];
  }
  for (double& weight : weights) {
    weight /= sum > 0.0 ? sum : 1.0;
  }
  *lse = sum > 0.0 ? largest + std::log(sum) : -kInfinity;
  return weights;
}

// Gradient of one token's state to that of the token itself, and to weight and bias.
void norm_backward(const Pool& p, const Token& token, std::vector<double> grad, int64_t b,
                   int64_t n, PoolGrads* g) {
  const auto channels = static_cast<int64_t>(grad.size());
  double mean = 0.0, along = 0.0;
  for (int64_t c = 0; c < channels && p.norm != Norm::kNone; ++c) {
    g->dbias.at(0, 0, 0, c) += grad[c];
    g->dweight.at(0, 0, 0, c) += grad[c] * token.unit[c];
    grad[c] *= weight_of(p, c);
    mean += p.norm == Norm::kLayer ? grad[c] / static_cast<double>(channels) : 0.0;
    along += grad[c] * token.unit[c] / static_cast<double>(channels);
  }
  for (int64_t c = 0; c < channels; ++c) {
    g->dx.at(b, 0, n, c) = (grad[c] - mean - token.unit[c] * along) / token.spread;
  }
}

}  // namespace

PoolResult pool(const Pool& p) {
  PoolResult result{Array(p.x.b, p.query.h, p.query.n, p.x.d),
                    Array(p.x.b, p.query.h, p.query.n, 1)};
  for (int64_t b = 0; b < p.x.b; ++b) {
    const std::vector<Token> tokens = read_tokens(p, b);
    for (int64_t h = 0; h < p.query.h; ++h) {
      for (int64_t m = 0; m < p.query.n; ++m) {
        const auto weights = weights_of(p, tokens, b, h, m, &result.lse.at(b, h, m, 0));
        for (size_t n = 0; n < tokens.size(); ++n) {
          for (size_t c = 0; c < tokens[n].state.size(); ++c) {
            result.pooled.at(b, h, m, static_cast<int64_t>(c)) += weights[n] * tokens[n].state[c];
          }
        }
      }
    }
  }
  return result;
}

PoolGrads pool_backward(const Pool& p, const Array& grad, const Array& grad_lse) {
  const int64_t channels = p.x.d;
  const PoolResult forward = pool(p);
  PoolGrads g{Array(p.x.b, 1, p.x.n, channels), Array(p.query.b, p.query.h, p.query.n, channels),
              Array(1, 1, 1, channels), Array(1, 1, 1, channels)};
  for (int64_t b = 0; b < p.x.b; ++b) {
    const std::vector<Token> tokens = read_tokens(p, b);
    std::vector<std::vector<double>> states(tokens.size(), std::vector<double>(channels));
    for (int64_t h = 0; h < p.query.h; ++h) {
      for (int64_t m = 0; m < p.query.n; ++m) {
        double lse, delta = grad_lse.values.empty() ? 0.0 : -grad_lse.at(b, h, m, 0);
        const auto weights = weights_of(p, tokens, b, h, m, &lse);
        for (int64_t c = 0; c < channels; ++c) {
          delta += grad.at(b, h, m, c) * forward.pooled.at(b, h, m, c);
        }
        for (size_t n = 0; n < tokens.size(); ++n) {
          if (tokens[n].state.empty()) {
            continue;
          }
          double ds = -delta;
          for (int64_t c = 0; c < channels; ++c) {
            ds += grad.at(b, h, m, c) * tokens[n].state[c];
          }
          ds *= weights[n] * p.scale;
          for (int64_t c = 0; c < channels; ++c) {
            states[n][c] += weights[n] * grad.at(b, h, m, c) + ds * p.query.at(b, h, m, c);
            g.dquery.at(b, h, m, c) += ds * tokens[n].state[c];
          }
        }
      }
    }
    for (size_t n = 0; n < tokens.size(); ++n) {
      if (!tokens[n].state.empty()) {
        norm_backward(p, tokens[n], states[n], b, static_cast<int64_t>(n), &g);
      }
    }
  }
  return g;
}

}  // namespace naive
