// Launch choices of the CUDA kernels: what holds for all shapes, on every device that they are for.
#include <cstdio>
#include <cstdlib>

#include "kernels/cuda/attention_choices.h"
#include "kernels/cuda/pooling_plan.h"
#include "kernels/cuda/rope_launch.h"

namespace {

using namespace x_rope_cls;
using namespace x_rope_cls::cuda;

void expect(bool holds, const char* what, int64_t a = 0, int64_t b = 0, int64_t c = 0) {
  if (holds) return;
  std::printf("failed: %s (%lld, %lld, %lld)\n", what, static_cast<long long>(a),
              static_cast<long long>(b), static_cast<long long>(c));
  std::exit(1);
}

// A100, A10 (sm_86, the least shared memory), H100.
const Device kDevices[] = {{108, 166912, 167936}, {72, 101376, 102400}, {132, 232448, 233472}};

void check_rope() {
  for (const int32_t piece : {2, 4, 8}) {
    for (int64_t head_dim = 1; head_dim <= 300; ++head_dim) {
      for (int64_t pairs = 1; 2 * pairs <= head_dim; ++pairs) {
        for (const bool interleaved : {false, true}) {
          for (const bool whole : {false, head_dim % piece == 0}) {
            const RopeRow row = rope_row(head_dim, pairs, interleaved, whole, piece);
            const bool scalar = row.units == RopeUnits::kScalar;
            const int64_t width = scalar || row.units == RopeUnits::kHalves ? 2 : 1;
            const int64_t channels =
                (width * row.rotated + row.copied) * (scalar ? 1 : static_cast<int64_t>(piece));
            expect(channels == head_dim, "units of a row are its channels", head_dim, pairs, piece);
            expect(whole || scalar, "pieces need whole rows", head_dim, pairs, piece);
          }
        }
      }
    }
  }
  const RopeRow row = rope_row(64, 32, false, true, 8);
  expect(row.units == RopeUnits::kHalves && row.rotated == 4 && row.copied == 0, "64 channels");
  for (int32_t units = 0; units <= 600; ++units) {
    for (const bool even : {false, true}) {
      const int32_t threads = rope_row_threads(units, even);
      expect(threads >= 1 && threads <= kRopeThreads, "threads of a row", units);
      expect(!even || units == 0 || threads % 2 == 0, "pairs of lanes", units);
    }
    for (const int64_t summed : {0, 1, 3, 8, 100, 100000}) {
      const TableGradBlock block = table_grad_block(units, summed);
      expect(block.units * block.splits * block.rows <= kRopeThreads, "block", units, summed);
      expect(block.units > 0 && block.splits > 0 && block.rows > 0, "block", units, summed);
      expect(block.rows <= 64, "CUDA has at most 64 threads along z", units, summed);
    }
  }
}

void check_attention() {
  for (const Device& device : kDevices) {
    for (int64_t dim = 1; dim <= 300; ++dim) {
      const int32_t native = native_dim(dim, 1);
      expect(native == 0 ? dim > 256 : native >= dim, "padded channels", dim);
      expect(native == native_dim(1, dim), "head_dim and value_dim alike", dim);
      if (native == 0) continue;
      for (const bool wide : {false, true}) {
        for (const bool general : {false, true}) {
          const ForwardShape s = forward_shape(native, wide, general);
          const int64_t bytes = forward_shared_bytes(native, wide, general);
          expect(bytes <= device.shared_per_block, "a block fits", native, bytes);
          expect(!wide || s.warps * s.row_tiles * 16 == s.rows, "rows of the warps", native);
          expect(s.keys % 16 == 0 && s.special_keys <= s.keys, "keys of a tile", native);
          expect(key_pieces(1024, s, native) == (wide && native == 256 ? 32 : 16),
                 "pieces of the keys", native);
        }
      }
    }
    for (const int64_t blocks : {0, 1, 5, 64, 107, 1000}) {
      for (const int64_t tiles : {0, 1, 2, 3, 16, 1000}) {
        const int32_t parts = key_parts(blocks, tiles, device.multiprocessors);
        expect(parts >= 1 && parts <= kMostParts, "parts of the keys", blocks, tiles);
        expect(parts == 1 || int64_t{parts} * kLeastPartTiles <= tiles, "parts with keys", blocks,
               tiles);
        expect(parts == 1 || blocks < device.multiprocessors, "a full device is not cut", blocks);
      }
    }
  }
}

// Which kernels take a call. What fits in shared memory and registers is read once.
void check_pool_kernels(const PoolParams& p, const Device& device, const PoolPlan& plan,
                        bool backward) {
  const bool half = p.dtype == DType::kBFloat16;
  const int64_t size = p.dtype == DType::kFloat64 ? 8 : 4;
  // Bytes of a token that all devices have room for, and that none has.
  const int64_t some = backward ? 2048 : 4096, none = 6144;
  if (p.heads == 0 || p.tokens == 0) {
    expect(plan.kernels == PoolKernels::kSimple, "nothing to do", p.heads, p.tokens);
  } else if (half) {
    expect(plan.kernels != PoolKernels::kFma, "tensor cores for 16 bits", p.channels);
  } else {
    expect(plan.kernels != PoolKernels::kTensorCores, "tensor cores are for 16 bits");
    const bool fma = plan.kernels == PoolKernels::kFma;
    expect(fma || p.channels * size > some, "tokens read once", p.channels, size);
    expect(!fma || p.channels * size <= none, "no more channels than fit", p.channels, size);
    const bool large = device.shared_per_block > 200000;
    expect(fma || !large || p.channels * size > none, "as many channels as fit", p.channels, size);
  }
}

void check_pooling() {
  for (const Device& device : kDevices) {
    for (const DType dtype : {DType::kFloat32, DType::kFloat64, DType::kBFloat16}) {
      for (const int64_t tokens : {0, 1, 15, 16, 17, 100, 1024, 100000}) {
        for (const int64_t channels : {1, 33, 128, 512, 768, 1024, 2000, 5000}) {
          for (const int64_t heads : {0, 1, 8, 16, 17}) {
            PoolParams p{};
            p.dtype = dtype;
            p.batch = 2;
            p.query_batch = 1;
            p.tokens = tokens;
            p.channels = channels;
            p.heads = heads;
            p.queries = 1;
            for (const bool backward : {false, true}) {
              const PoolPlan plan = make_pool_plan(p, device, backward, backward);
              expect(plan.bytes >= 0 && plan.splits >= 1, "plan", tokens, channels, heads);
              check_pool_kernels(p, device, plan, backward);
              if (plan.kernels == PoolKernels::kSimple) continue;
              expect(plan.shared_bytes <= device.shared_per_block, "a block fits", channels);
              expect(plan.padded >= channels && plan.warps <= 16, "channels of the warps",
                     channels);
              const bool fma = plan.kernels == PoolKernels::kFma;
              const int64_t tile = fma ? kFmaTokens : kPoolTokens;
              expect(plan.split_tokens % tile == 0, "whole tiles", tokens);
              expect(plan.splits * plan.split_tokens >= tokens, "all tokens", tokens);
              expect((plan.splits - 1) * plan.split_tokens < tokens, "no empty split", tokens);
              expect(plan.groups * plan.group_rows >= plan.rows, "all rows", heads);
              expect(plan.group_rows == (fma ? kFmaRows : kPoolRows), "rows of a group", heads);
            }
          }
        }
      }
    }
  }
}

}  // namespace

int main() {
  check_rope();
  check_attention();
  check_pooling();
  std::puts("launch choices hold");
  return 0;
}
