// Rotation of (batch, heads, tokens, head_dim) tensors: one read and one write of 16 bytes at a
// time. An instance a dtype and way to cut rows (rope_launch.h): in one for all ways, the slow ones
// would take the registers that hold the fast ones' loads.
#include <cstdint>

#include "launch.h"
#include "numeric.cuh"
#include "rope_launch.h"
#include "rotate.cuh"

namespace x_rope_cls::cuda {
namespace {

struct RopeCall {
  RopeParams p;
  RopeRow row;
  int32_t heads_per_thread;
  bool in_place;       // nothing is to be done for channels and tokens that are not rotated
  bool table_aligned;  // rows of the tables are dense and 16-byte aligned
  bool exchanged;      // angles are read by pairs of lanes, see load_angles
  uint32_t tiles, chunks, blocks;
};
struct RopeCalls {
  RopeCall call[2];
};

template <typename T>
__device__ __forceinline__ T* row_at(const Tensor4& t, int64_t b, int64_t h, int64_t n) {
  return static_cast<T*>(t.data) + b * t.stride_b + h * t.stride_h + n * t.stride_n;
}

template <typename T>
__device__ __forceinline__ Piece<T> read_piece(const T* from) {
  const uint4 bits = *reinterpret_cast<const uint4*>(from);
  Piece<T> piece;
  __builtin_memcpy(&piece, &bits, sizeof(piece));
  return piece;
}
template <typename T>
__device__ __forceinline__ void write_piece(T* to, const Piece<T>& piece) {
  uint4 bits;
  __builtin_memcpy(&bits, &piece, sizeof(piece));
  // The compiler would store a piece of an array of pieces element by element.
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)),
               "r"(bits.x), "r"(bits.y), "r"(bits.z), "r"(bits.w)
               : "memory");
}

// x cos + other sin, rounded in the same way for every way to cut rows.
__device__ __forceinline__ float turned(float x, float other, float cos, float sin) {
  return fmaf(x, cos, other * sin);
}
__device__ __forceinline__ double turned(double x, double other, double cos, double sin) {
  return fma(x, cos, other * sin);
}

template <int kBytes>
struct alignas(kBytes) Bytes {
  char values[kBytes];
};

// Angles first ... first + kCount - 1 of a row of a table.
//
// Eight float32 angles (2-byte elements in halves) are 32 bytes a thread: read in two instructions
// of 16 bytes, each would touch every sector and use half of it. So neighbouring lanes read 32
// adjacent bytes each time, first those of the even lane, then those of the odd one, and exchange.
template <int kCount, typename C>
__device__ __forceinline__ void load_angles(const C* row, int64_t stride, int32_t first,
                                            bool aligned, bool exchanged, C (&angles)[kCount]) {
  constexpr int kSize = kCount * static_cast<int>(sizeof(C));
  constexpr int kPart = kSize < 16 ? kSize : 16;
  constexpr int kHalf = kCount / 2;
  if (kSize == 32 && exchanged) {
    using Half = Bytes<16>;
    const bool odd = (threadIdx.x & 1) != 0;
    const Half* from = reinterpret_cast<const Half*>(row + first) + (odd ? -1 : 0);
    C part[2][kHalf > 0 ? kHalf : 1];
    *reinterpret_cast<Half*>(part[0]) = from[0];
    *reinterpret_cast<Half*>(part[1]) = from[2];
    const unsigned lane = (threadIdx.y * blockDim.x + threadIdx.x) % 32;
    const unsigned both = 3U << (lane & 30U);
#pragma unroll
    for (int i = 0; i < kHalf; ++i) {
      const C other = __shfl_xor_sync(both, odd ? part[0][i] : part[1][i], 1);
      angles[i] = odd ? other : part[0][i];
      angles[kHalf + i] = odd ? part[1][i] : other;
    }
  } else if (aligned) {
#pragma unroll
    for (int i = 0; i < kSize / kPart; ++i) {
      reinterpret_cast<Bytes<kPart>*>(angles)[i] =
          reinterpret_cast<const Bytes<kPart>*>(row + first)[i];
    }
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) angles[i] = row[(first + i) * stride];
  }
}

// A unit of `count` rows that share their angles, head after head: all are read before the first is
// written.
template <typename T, bool kInterleaved>
__device__ __forceinline__ void rotate_pieces(const RopeCall& c, const Compute<T>* cos,
                                              const Compute<T>* sin, const T* x, T* y, int count,
                                              int32_t unit) {
  using C = Compute<T>;
  constexpr int kPieces = kInterleaved ? 1 : 2;
  constexpr int kPairs = kInterleaved ? kPiece<T> / 2 : kPiece<T>;
  const int64_t second = kInterleaved ? 0 : c.p.pairs;
  x += unit * kPiece<T>;
  y += unit * kPiece<T>;
  constexpr int kHeads = kRopePieces / kPieces;
  Piece<T> pieces[kHeads][kPieces];
#pragma unroll
  for (int h = 0; h < kHeads; ++h) {
    if (h >= count) continue;
    pieces[h][0] = read_piece(x + h * c.p.x.stride_h);
    if (!kInterleaved) pieces[h][kPieces - 1] = read_piece(x + h * c.p.x.stride_h + second);
  }
  C cosine[kPairs];
  C sine[kPairs];
  load_angles(cos, c.p.table.cos_stride_i, unit * kPairs, c.table_aligned, c.exchanged, cosine);
  load_angles(sin, c.p.table.sin_stride_i, unit * kPairs, c.table_aligned, c.exchanged, sine);
#pragma unroll
  for (int h = 0; h < kHeads; ++h) {
    if (h >= count) continue;
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      T& first_value = pieces[h][0].values[kInterleaved ? 2 * i : i];
      T& second_value = pieces[h][kPieces - 1].values[kInterleaved ? 2 * i + 1 : i];
      const C x0 = to_compute(first_value);
      const C x1 = to_compute(second_value);
      const C s = c.p.inverse ? -sine[i] : sine[i];
      first_value = from_compute<T>(turned(x0, -x1, cosine[i], s));
      second_value = from_compute<T>(turned(x1, x0, cosine[i], s));
    }
    T* to = y + h * c.p.y.stride_h;
    write_piece(to, pieces[h][0]);
    if (!kInterleaved) write_piece(to + second, pieces[h][kPieces - 1]);
  }
}

// One pair of `count` rows, any strides.
template <typename T>
__device__ __forceinline__ void rotate_pairs(const RopeCall& c, const Compute<T>* cos,
                                             const Compute<T>* sin, const T* x, T* y, int count,
                                             int32_t pair) {
  using C = Compute<T>;
  const int64_t first = c.p.interleaved ? 2 * pair : pair;
  const int64_t second = c.p.interleaved ? first + 1 : first + c.p.pairs;
  const C cosine = cos[pair * c.p.table.cos_stride_i];
  const C sine = sin[pair * c.p.table.sin_stride_i];
  const C s = c.p.inverse ? -sine : sine;
#pragma unroll 1
  for (int h = 0; h < count; ++h, x += c.p.x.stride_h, y += c.p.y.stride_h) {
    const C x0 = to_compute(x[first * c.p.x.stride_d]);
    const C x1 = to_compute(x[second * c.p.x.stride_d]);
    y[first * c.p.y.stride_d] = from_compute<T>(turned(x0, -x1, cosine, s));
    y[second * c.p.y.stride_d] = from_compute<T>(turned(x1, x0, cosine, s));
  }
}

// Channels of `count` rows as they are: a piece, or one channel of any strides.
template <typename T, RopeUnits kUnits>
__device__ __forceinline__ void copy_unit(const RopeCall& c, const T* x, T* y, int count,
                                          int64_t channel) {
#pragma unroll 1
  for (int h = 0; h < count; ++h, x += c.p.x.stride_h, y += c.p.y.stride_h) {
    if (kUnits == RopeUnits::kScalar) {
      y[channel * c.p.y.stride_d] = x[channel * c.p.x.stride_d];
    } else {
      write_piece(y + channel, read_piece(x + channel));
    }
  }
}

// A row that is not rotated; its channels lie in two units where pieces go in pairs.
template <typename T, RopeUnits kUnits>
__device__ __forceinline__ void copy_rows(const RopeCall& c, const T* x, T* y, int count) {
  constexpr int32_t step = kUnits == RopeUnits::kScalar ? 1 : kPiece<T>;
#pragma unroll 1
  for (int64_t channel = threadIdx.x * step; channel < c.p.head_dim; channel += blockDim.x * step) {
    copy_unit<T, kUnits>(c, x, y, count, channel);
  }
}

// Blocks: those of the first call, then those of the second; in each batch by batch, chunks of
// heads, tiles of tokens. Threads: units of a row, tokens of the tile.
template <typename T, RopeUnits kUnits>
__global__ void __launch_bounds__(kRopeThreads, 3)
    rope_kernel(const __grid_constant__ RopeCalls calls) {
  using C = Compute<T>;
  const bool is_second = blockIdx.x >= calls.call[0].blocks;
  const RopeCall& c = calls.call[is_second ? 1 : 0];
  const uint32_t block = blockIdx.x - (is_second ? calls.call[0].blocks : 0);
  const int64_t n = static_cast<int64_t>(block % c.tiles) * blockDim.y + threadIdx.y;
  if (n >= c.p.tokens) return;
  const int64_t h = static_cast<int64_t>(block / c.tiles % c.chunks) * c.heads_per_thread;
  const int64_t b = block / c.tiles / c.chunks;
  const int64_t left = c.p.heads - h;
  const int count = left < c.heads_per_thread ? static_cast<int>(left) : c.heads_per_thread;
  const T* const x = row_at<const T>(c.p.x, b, h, n);
  T* const y = row_at<T>(c.p.y, b, h, n);
  if (!has_position(c.p.table, b, n)) {
    if (!c.in_place) copy_rows<T, kUnits>(c, x, y, count);
    return;
  }
  const RotaryTable& t = c.p.table;
  const C* const cos =
      static_cast<const C*>(t.cos) + b * t.cos_stride_b + h * t.cos_stride_h + n * t.cos_stride_n;
  const C* const sin =
      static_cast<const C*>(t.sin) + b * t.sin_stride_b + h * t.sin_stride_h + n * t.sin_stride_n;
#pragma unroll 1
  for (int32_t unit = static_cast<int32_t>(threadIdx.x); unit < c.row.rotated;
       unit += static_cast<int32_t>(blockDim.x)) {
    if constexpr (kUnits == RopeUnits::kInterleaved) {
      rotate_pieces<T, true>(c, cos, sin, x, y, count, unit);
    } else if constexpr (kUnits == RopeUnits::kHalves) {
      rotate_pieces<T, false>(c, cos, sin, x, y, count, unit);
    } else {
      rotate_pairs<T>(c, cos, sin, x, y, count, unit);
    }
  }
  if (c.in_place) return;
  // Behind the rotated channels; threads that had no rotated unit come first.
  const int32_t idle = c.row.rotated % static_cast<int32_t>(blockDim.x);
  constexpr int32_t step = kUnits == RopeUnits::kScalar ? 1 : kPiece<T>;
  int32_t place = static_cast<int32_t>(threadIdx.x) - idle;
  if (place < 0) place += static_cast<int32_t>(blockDim.x);
#pragma unroll 1
  for (; place < c.row.copied; place += static_cast<int32_t>(blockDim.x)) {
    copy_unit<T, kUnits>(c, x, y, count, 2 * c.p.pairs + static_cast<int64_t>(place) * step);
  }
}

bool same_place(const Tensor4& x, const Tensor4& y) {
  return x.data == y.data && x.stride_b == y.stride_b && x.stride_h == y.stride_h &&
         x.stride_n == y.stride_n && x.stride_d == y.stride_d;
}

template <typename C>
bool table_is_aligned(const RotaryTable& t) {
  const auto aligned = [](int64_t stride) {
    return stride * static_cast<int64_t>(sizeof(C)) % 16 == 0;
  };
  return t.cos_stride_i == 1 && t.sin_stride_i == 1 && aligned(t.cos_stride_n) &&
         aligned(t.cos_stride_h) && aligned(t.cos_stride_b) && aligned(t.sin_stride_n) &&
         aligned(t.sin_stride_h) && aligned(t.sin_stride_b) &&
         reinterpret_cast<uintptr_t>(t.cos) % 16 == 0 &&
         reinterpret_cast<uintptr_t>(t.sin) % 16 == 0;
}

template <typename T>
RopeCall make_call(const RopeParams& p) {
  RopeCall c{};
  c.p = p;
  const bool whole = rows_are_whole<T>(p.x, p.head_dim) && rows_are_whole<T>(p.y, p.head_dim);
  c.row = rope_row(p.head_dim, p.pairs, p.interleaved, whole, kPiece<T>);
  c.in_place = same_place(p.x, p.y);
  c.table_aligned = table_is_aligned<Compute<T>>(p.table);
  c.exchanged = c.table_aligned && sizeof(T) == 2 && c.row.units == RopeUnits::kHalves &&
                c.row.rotated % 2 == 0;
  const bool by_head = p.table.cos_stride_h != 0 || p.table.sin_stride_h != 0;
  c.heads_per_thread = by_head ? 1 : rope_heads(c.row.units);
  return c;
}

// Calls whose rows are cut in the same way.
template <typename T, RopeUnits kUnits>
cudaError_t launch_rope(RopeCalls calls, int count, cudaStream_t stream) {
  int32_t units = 0;
  bool exchanged = false;
  for (int i = 0; i < count; ++i) {
    const RopeCall& c = calls.call[i];
    units = std::max(units, c.row.rotated + (c.in_place ? 0 : c.row.copied));
    exchanged = exchanged || c.exchanged;
  }
  const int32_t threads = rope_row_threads(units, exchanged);
  const int32_t tokens = kRopeThreads / threads;
  int64_t grid = 0;
  for (int i = 0; i < count; ++i) {
    RopeCall& c = calls.call[i];
    const int64_t tiles = (c.p.tokens + tokens - 1) / tokens;
    const int64_t chunks = (c.p.heads + c.heads_per_thread - 1) / c.heads_per_thread;
    const int64_t blocks = tiles * chunks * c.p.batch;
    grid += blocks;
    if (grid > INT32_MAX) return cudaErrorInvalidConfiguration;
    c.tiles = static_cast<uint32_t>(tiles);
    c.chunks = static_cast<uint32_t>(chunks);
    c.blocks = static_cast<uint32_t>(blocks);
  }
  if (grid == 0) return cudaSuccess;
  const dim3 block(static_cast<unsigned>(threads), static_cast<unsigned>(tokens));
  rope_kernel<T, kUnits><<<static_cast<unsigned>(grid), block, 0, stream>>>(calls);
  return cudaGetLastError();
}

template <typename T>
cudaError_t rope_typed(const RopeParams* params, int count, cudaStream_t stream) {
  RopeCalls calls{};
  for (int i = 0; i < count; ++i) calls.call[i] = make_call<T>(params[i]);
  const RopeUnits units = calls.call[0].row.units;
  if (count == 2 && calls.call[1].row.units != units) {
    const cudaError_t error = rope_typed<T>(params, 1, stream);
    return error != cudaSuccess ? error : rope_typed<T>(params + 1, 1, stream);
  }
  switch (units) {
    case RopeUnits::kInterleaved:
      return launch_rope<T, RopeUnits::kInterleaved>(calls, count, stream);
    case RopeUnits::kHalves:
      return launch_rope<T, RopeUnits::kHalves>(calls, count, stream);
    default:
      return launch_rope<T, RopeUnits::kScalar>(calls, count, stream);
  }
}

}  // namespace

cudaError_t rope(const RopeParams* calls, int count, cudaStream_t stream) {
  if (count == 2 && calls[0].dtype != calls[1].dtype) {
    const cudaError_t error = rope(calls, 1, stream);
    return error != cudaSuccess ? error : rope(calls + 1, 1, stream);
  }
  if (count == 0) return cudaSuccess;
  return with_dtype(calls[0].dtype, [&](auto element) {
    return rope_typed<decltype(element)>(calls, count, stream);
  });
}

}  // namespace x_rope_cls::cuda
