// How the rotation kernels are launched, as plain functions of the shapes.
#pragma once

#include <algorithm>
#include <cstdint>

namespace x_rope_cls::cuda {

constexpr int kRopeThreads = 256;  // of a block
constexpr int kRopePieces = 4;     // of 16 bytes that a thread reads before it writes

// How a row is cut into units, each for one thread: `rotated` units, then `copied` ones.
//   kInterleaved: a piece of 16 bytes, which holds both channels of its pairs
//   kHalves: two pieces of 16 bytes, one of the first channels of pairs and one of the second ones
//   kScalar: one pair or, of the channels behind the rotated ones, one channel
enum class RopeUnits : int32_t { kScalar = 0, kInterleaved = 1, kHalves = 2 };
struct RopeRow {
  RopeUnits units;
  int32_t rotated, copied;
};

// Heads that a thread takes, where they share a table.
constexpr int rope_heads(RopeUnits units) {
  return units == RopeUnits::kHalves ? kRopePieces / 2 : kRopePieces;
}

// `piece`: channels in 16 bytes. `whole`: every row is dense, 16-byte aligned and a multiple of 16
// bytes long, of the input and of the output.
inline RopeRow rope_row(int64_t head_dim, int64_t pairs, bool interleaved, bool whole,
                        int32_t piece) {
  const auto count = [](int64_t channels) { return static_cast<int32_t>(channels); };
  const int64_t rest = head_dim - 2 * pairs;
  if (whole && rest % piece == 0) {
    if (interleaved && 2 * pairs % piece == 0) {
      return {RopeUnits::kInterleaved, count(2 * pairs / piece), count(rest / piece)};
    }
    if (!interleaved && pairs % piece == 0) {
      return {RopeUnits::kHalves, count(pairs / piece), count(rest / piece)};
    }
  }
  return {RopeUnits::kScalar, count(pairs), count(rest)};
}

// Threads along the units of a row; the others of the block take further tokens.
inline int32_t rope_row_threads(int32_t units, bool even) {
  const int32_t threads = even ? units + units % 2 : units;
  return std::clamp(threads, 1, kRopeThreads);
}

// Gradients of the tables: threads along the units of a row, along the rows that are summed, and
// along the rows of the table.
struct TableGradBlock {
  int32_t units, splits, rows;
};
inline TableGradBlock table_grad_block(int32_t units, int64_t summed) {
  const int32_t x = std::clamp(units, 1, kRopeThreads);
  const int32_t y =
      static_cast<int32_t>(std::clamp<int64_t>(summed, 1, static_cast<int64_t>(kRopeThreads / x)));
  return {x, y, std::clamp(kRopeThreads / (x * y), 1, 64)};  // 64: the most along z
}

}  // namespace x_rope_cls::cuda
