// Tensor-core instructions: mma, wmma, ldmatrix, stmatrix, movmatrix.
#include <algorithm>

#include "access.h"

namespace cudasim {
namespace {

enum class El : uint8_t { F16, BF16, TF32, F64, S8, U8, F32, S32, E4M3, E5M2 };
El elOf(Ty t) {
  switch (t) {
    case Ty::f16: return El::F16; case Ty::bf16: return El::BF16; case Ty::tf32: return El::TF32; case Ty::f64: return El::F64;
    case Ty::s8: return El::S8; case Ty::u8: return El::U8; case Ty::f32: return El::F32; default: return El::S32;
  }
}
int elBits(El e) { return e == El::F16 || e == El::BF16 ? 16 : e == El::S8 || e == El::U8 || e == El::E4M3 || e == El::E5M2 ? 8 : e == El::F64 ? 64 : 32; }

inline float e4m3Value(uint32_t b) {
  const int e = int(b >> 3 & 15), m = int(b & 7);
  if ((b & 0x7f) == 0x7f) return NAN;
  const float v = e ? std::ldexp(float(8 + m), e - 10) : std::ldexp(float(m), -9);
  return b & 0x80 ? -v : v;
}
inline float tf32Value(uint32_t u) { return std::bit_cast<float>(u & ~0x1fffu); }      // low mantissa bits are ignored
inline float decode(El e, uint32_t reg, int sub) {
  switch (e) {
    case El::F16: return f16ToF32(uint16_t(reg >> (16 * sub)));
    case El::BF16: return bf16ToF32(uint16_t(reg >> (16 * sub)));
    case El::TF32: return tf32Value(reg);
    case El::S8: return float(int8_t(reg >> (8 * sub)));
    case El::U8: return float(uint8_t(reg >> (8 * sub)));
    case El::E4M3: return e4m3Value(reg >> (8 * sub) & 0xff);
    case El::E5M2: return f16ToF32(uint16_t((reg >> (8 * sub) & 0xff) << 8));
    default: return std::bit_cast<float>(reg);
  }
}

constexpr int kMaxM = 32, kMaxN = 32, kMaxK = 64;
struct alignas(64) Tile { float v[kMaxM][kMaxK]; };
struct alignas(64) TileB { float v[kMaxK][kMaxN]; };
struct alignas(64) TileC { float v[kMaxM][kMaxN]; };

// Sum of products as tensor cores form it: every addend aligned to the largest and truncated, result rounded to zero.
float truncatedSum(const float* a, const float* b, int bStride, int n, float c) {
  double p[33];
  int e, emax = -2000;
  bool special = false;
  for (int k = 0; k < n; ++k) { p[k] = double(a[k]) * double(b[size_t(k) * bStride]); special |= !std::isfinite(p[k]); }
  p[n] = c;
  special |= !std::isfinite(p[n]);
  if (special) { double s = 0; for (int k = 0; k <= n; ++k) s += p[k]; return float(s); }
  for (int k = 0; k <= n; ++k) if (p[k] != 0) { std::frexp(p[k], &e); emax = std::max(emax, e); }
  if (emax == -2000) return 0.f;
  int64_t sum = 0;
  for (int k = 0; k <= n; ++k) sum += int64_t(std::ldexp(p[k], 25 - emax));
  double r = std::ldexp(double(sum), emax - 25);
  float f = float(r);
  if (std::fabs(double(f)) > std::fabs(r)) f = std::nextafter(f, 0.f);
  return f;
}

template <int N> inline void multiplyFixed(const Tile& A, const TileB& B, TileC& C, int m, int k) {
  for (int i = 0; i < m; ++i) {
    float acc[N];
    for (int j = 0; j < N; ++j) acc[j] = C.v[i][j];
    for (int q = 0; q < k; ++q) {
      const float x = A.v[i][q];
      for (int j = 0; j < N; ++j) acc[j] = __builtin_fmaf(x, B.v[q][j], acc[j]);
    }
    for (int j = 0; j < N; ++j) C.v[i][j] = acc[j];
  }
}
void multiply(const Tile& A, const TileB& B, TileC& C, int m, int n, int k, El e) {
  if (options().strictMma) {
    int chunk = e == El::TF32 ? 4 : 8;
    for (int i = 0; i < m; ++i) for (int j = 0; j < n; ++j) for (int q = 0; q < k; q += chunk)
      C.v[i][j] = truncatedSum(&A.v[i][q], &B.v[q][j], kMaxN, std::min(chunk, k - q), C.v[i][j]);
    return;
  }
  if (n == 8) multiplyFixed<8>(A, B, C, m, k);
  else if (n == 16) multiplyFixed<16>(A, B, C, m, k);
  else multiplyFixed<32>(A, B, C, m, k);
}

// mma.sync.  Operand fragments: register r of A holds rows g + 8 (r & 1), columns t E + 4 E (r >> 1); register r of B
// rows t E + 4 E r of column g (g = lane / 4, t = lane % 4, E elements per register).
// ext: D regs, A regs, B regs, C regs.  arg: m | n<<8 | k<<16; elem: El of A; sub: El of B; nvec: accumulator El; imm: El of C
void hMma(Warp& w, const Instr& I, Mask) {
  const El ea = El(I.elem), eb = El(I.sub >> 1), ed = El(I.nvec), ec = El(I.imm);
  const int M = int(I.arg & 255), N = int(I.arg >> 8 & 255), K = int(I.arg >> 16);
  const uint32_t* x = w.prog->ext.data() + I.ext;
  const int E = 32 / elBits(ea);
  const int na = M / 8 * (K / (4 * E)), nb = K / (4 * E);
  const int nd = ed == El::F16 ? M / 8 : 2 * M / 8, nc = ec == El::F16 ? M / 8 : 2 * M / 8;
  const uint32_t *xd = x, *xa = xd + nd, *xb = xa + na, *xc = xb + nb;
  if (ea == El::S8 || ea == El::U8) {
    int32_t A[16][32], B[32][8];
    for (int r = 0; r < na; ++r) { const uint32_t* p = w.u32(xa[r]); for (int l = 0; l < 32; ++l) for (int e = 0; e < 4; ++e)
      A[l / 4 + 8 * (r & 1)][l % 4 * 4 + e + 16 * (r >> 1)] = ea == El::S8 ? int8_t(p[l] >> (8 * e)) : uint8_t(p[l] >> (8 * e)); }
    for (int r = 0; r < nb; ++r) { const uint32_t* p = w.u32(xb[r]); for (int l = 0; l < 32; ++l) for (int e = 0; e < 4; ++e)
      B[l % 4 * 4 + e + 16 * r][l / 4] = eb == El::S8 ? int8_t(p[l] >> (8 * e)) : uint8_t(p[l] >> (8 * e)); }
    uint32_t out[4][32];
    for (int r = 0; r < nd; ++r) { const uint32_t* c = w.u32(xc[r]); for (int l = 0; l < 32; ++l) {
      int row = l / 4 + 8 * (r >> 1), col = l % 4 * 2 + (r & 1);
      int64_t s = int32_t(c[l]);
      for (int k = 0; k < K; ++k) s += A[row][k] * B[k][col];
      if (I.target == 1) s = std::clamp<int64_t>(s, INT32_MIN, INT32_MAX);
      out[r][l] = uint32_t(s); } }
    for (int r = 0; r < nd; ++r) memcpy(w.u32(xd[r]), out[r], 128);
    return;
  }
  Tile A;
  TileB B;
  TileC C;
  for (int r = 0; r < na; ++r) {
    const uint32_t* p = w.u32(xa[r]);
    const int r8 = M == 16 ? 8 * (r & 1) : 0, c0 = 4 * E * (M == 16 ? r >> 1 : r);
    if (ea == El::F16) for (int l = 0; l < 32; ++l) { A.v[l / 4 + r8][l % 4 * 2 + c0] = f16ToF32(uint16_t(p[l])); A.v[l / 4 + r8][l % 4 * 2 + 1 + c0] = f16ToF32(uint16_t(p[l] >> 16)); }
    else if (ea == El::BF16) for (int l = 0; l < 32; ++l) { A.v[l / 4 + r8][l % 4 * 2 + c0] = bf16ToF32(uint16_t(p[l])); A.v[l / 4 + r8][l % 4 * 2 + 1 + c0] = bf16ToF32(uint16_t(p[l] >> 16)); }
    else for (int l = 0; l < 32; ++l) for (int e = 0; e < E; ++e) A.v[l / 4 + r8][l % 4 * E + e + c0] = decode(ea, p[l], e);
  }
  for (int r = 0; r < nb; ++r) {
    const uint32_t* p = w.u32(xb[r]);
    const int k0 = 4 * E * r;
    for (int l = 0; l < 32; ++l) for (int e = 0; e < E; ++e) B.v[l % 4 * E + e + k0][l / 4] = decode(eb, p[l], e);
  }
  if (ec == El::F16)
    for (int r = 0; r < nc; ++r) { const uint32_t* p = w.u32(xc[r]); for (int l = 0; l < 32; ++l) for (int e = 0; e < 2; ++e) C.v[l / 4 + 8 * r][l % 4 * 2 + e] = f16ToF32(uint16_t(p[l] >> (16 * e))); }
  else
    for (int r = 0; r < nc; ++r) { const uint32_t* p = w.u32(xc[r]); for (int l = 0; l < 32; ++l) C.v[l / 4 + 8 * (r >> 1)][l % 4 * 2 + (r & 1)] = std::bit_cast<float>(p[l]); }
  multiply(A, B, C, M, N, K, ea);
  if (ed == El::F16)
    for (int r = 0; r < nd; ++r) { uint32_t* p = w.u32(xd[r]); for (int l = 0; l < 32; ++l) p[l] = f32ToF16(C.v[l / 4 + 8 * r][l % 4 * 2]) | uint32_t(f32ToF16(C.v[l / 4 + 8 * r][l % 4 * 2 + 1])) << 16; }
  else
    for (int r = 0; r < nd; ++r) { uint32_t* p = w.u32(xd[r]); for (int l = 0; l < 32; ++l) p[l] = std::bit_cast<uint32_t>(C.v[l / 4 + 8 * (r >> 1)][l % 4 * 2 + (r & 1)]); }
}

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
// The same for m16n8k8 and m16n8k16 of halves with fp32 accumulators: in lane order, a register of A holds 8 rows of 8
// elements, one of B 8 columns of 8.
template <bool BF> inline __m256 row8(const uint32_t* p) {
  __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  if constexpr (BF) return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
  else return _mm256_cvtph_ps(h);
}
inline void transpose8(__m256* r) {
  __m256 a[8], b[8];
  for (int i = 0; i < 4; ++i) { a[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]); a[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]); }
  for (int i = 0; i < 2; ++i) {
    b[4 * i] = _mm256_shuffle_ps(a[4 * i], a[4 * i + 2], 0x44); b[4 * i + 1] = _mm256_shuffle_ps(a[4 * i], a[4 * i + 2], 0xee);
    b[4 * i + 2] = _mm256_shuffle_ps(a[4 * i + 1], a[4 * i + 3], 0x44); b[4 * i + 3] = _mm256_shuffle_ps(a[4 * i + 1], a[4 * i + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) { r[i] = _mm256_permute2f128_ps(b[i], b[i + 4], 0x20); r[i + 4] = _mm256_permute2f128_ps(b[i], b[i + 4], 0x31); }
}
template <bool BF> void hMmaHalf(Warp& w, const Instr& I, Mask m) {
  if (options().strictMma) return hMma(w, I, m);
  const int kr = int(I.arg >> 16) / 8;                 // registers of B, column blocks of A
  const uint32_t* x = w.prog->ext.data() + I.ext;
  const uint32_t *xd = x, *xa = x + 4, *xb = xa + 2 * kr, *xc = xb + kr;
  __m256 B[16];
  for (int r = 0; r < kr; ++r) {
    const uint32_t* p = w.u32(xb[r]);
    for (int i = 0; i < 8; ++i) B[8 * r + i] = row8<BF>(p + 4 * i);
    transpose8(B + 8 * r);
  }
  alignas(32) float A[16][16], out[4][32];
  for (int r = 0; r < 2 * kr; ++r) {
    const uint32_t* p = w.u32(xa[r]);
    for (int i = 0; i < 8; ++i) _mm256_store_ps(&A[i + 8 * (r & 1)][8 * (r >> 1)], row8<BF>(p + 4 * i));
  }
  const __m256i split = _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7);
  for (int h = 0; h < 2; ++h) {
    const float *c0 = reinterpret_cast<const float*>(w.u32(xc[2 * h])), *c1 = reinterpret_cast<const float*>(w.u32(xc[2 * h + 1]));
    __m256 acc[8];
    for (int i = 0; i < 8; ++i) {                      // row i: columns 0 2 4 6 in one register, 1 3 5 7 in the other
      __m128 e = _mm_loadu_ps(c0 + 4 * i), o = _mm_loadu_ps(c1 + 4 * i);
      acc[i] = _mm256_set_m128(_mm_unpackhi_ps(e, o), _mm_unpacklo_ps(e, o));
    }
    for (int k = 0; k < 8 * kr; ++k)
      for (int i = 0; i < 8; ++i) acc[i] = _mm256_fmadd_ps(_mm256_broadcast_ss(&A[i + 8 * h][k]), B[k], acc[i]);
    for (int i = 0; i < 8; ++i) {
      __m256 v = _mm256_permutevar8x32_ps(acc[i], split);
      _mm_store_ps(&out[2 * h][4 * i], _mm256_castps256_ps128(v));
      _mm_store_ps(&out[2 * h + 1][4 * i], _mm256_extractf128_ps(v, 1));
    }
  }
  for (int r = 0; r < 4; ++r) memcpy(w.u32(xd[r]), out[r], 128);
}
#endif

void hMmaF64(Warp& w, const Instr& I, Mask) {
  const int M = int(I.arg & 255), K = int(I.arg >> 16);
  const uint32_t* x = w.prog->ext.data() + I.ext;
  const int na = M / 8 * (K / 4), nb = K / 4, nd = 2 * M / 8;
  const uint32_t *xd = x, *xa = xd + nd, *xb = xa + na, *xc = xb + nb;
  double A[16][16], B[16][8];
  double out[4][32];
  for (int r = 0; r < na; ++r) { const double* p = reinterpret_cast<const double*>(w.u64(xa[r])); for (int l = 0; l < 32; ++l) A[l / 4 + (M == 16 ? 8 * (r & 1) : 0)][l % 4 + 4 * (M == 16 ? r >> 1 : r)] = p[l]; }
  for (int r = 0; r < nb; ++r) { const double* p = reinterpret_cast<const double*>(w.u64(xb[r])); for (int l = 0; l < 32; ++l) B[l % 4 + 4 * r][l / 4] = p[l]; }
  for (int r = 0; r < nd; ++r) {
    const double* c = reinterpret_cast<const double*>(w.u64(xc[r]));
    for (int l = 0; l < 32; ++l) {
      int row = l / 4 + 8 * (r >> 1), col = l % 4 * 2 + (r & 1);
      double s = c[l];
      for (int k = 0; k < K; ++k) s = __builtin_fma(A[row][k], B[k][col], s);
      out[r][l] = s;
    }
  }
  for (int r = 0; r < nd; ++r) memcpy(w.u64(xd[r]), out[r], 256);
}

// ---- ldmatrix and relatives --------------------------------------------------------------------

void matrixAddresses(Warp& w, const Instr& I, uint64_t* a) {
  addresses(w, I, I.op[0], I.sub & 2, a);
  if (I.sub & 8) for (int i = 0; i < 32; ++i) a[i] -= uint64_t(w.blk->shared);
  else for (int i = 0; i < 32; ++i) a[i] = uint32_t(a[i]);
}
void hLdmatrix(Warp& w, const Instr& I, Mask) {        // nvec matrices; arg 1: transposed
  alignas(64) uint64_t a[32];
  matrixAddresses(w, I, a);
  const int n = I.nvec;
  const Mask rows = n == 4 ? kFull : (1u << (8 * n)) - 1;
  const uint8_t* base = checkShared(w, I, rows, a, 16, 16, Acc::Read);
  const uint32_t* x = w.prog->ext.data() + I.ext;
  for (int q = 0; q < n; ++q) {
    uint16_t mat[8][8];
    for (int r = 0; r < 8; ++r) memcpy(mat[r], base + a[8 * q + r], 16);
    uint32_t* d = w.u32(x[q]);
    if (I.arg) for (int l = 0; l < 32; ++l) d[l] = mat[l % 4 * 2][l / 4] | uint32_t(mat[l % 4 * 2 + 1][l / 4]) << 16;
    else for (int l = 0; l < 32; ++l) d[l] = mat[l / 4][l % 4 * 2] | uint32_t(mat[l / 4][l % 4 * 2 + 1]) << 16;
  }
}
void hStmatrix(Warp& w, const Instr& I, Mask) {
  alignas(64) uint64_t a[32];
  matrixAddresses(w, I, a);
  const int n = I.nvec;
  const Mask rows = n == 4 ? kFull : (1u << (8 * n)) - 1;
  uint8_t* base = checkShared(w, I, rows, a, 16, 16, Acc::Write);
  const uint32_t* x = w.prog->ext.data() + I.ext;
  for (int q = 0; q < n; ++q) {
    uint16_t mat[8][8];
    const uint32_t* s = w.u32(x[q]);
    for (int l = 0; l < 32; ++l)
      for (int e = 0; e < 2; ++e) {
        uint16_t v = uint16_t(s[l] >> (16 * e));
        if (I.arg) mat[l % 4 * 2 + e][l / 4] = v; else mat[l / 4][l % 4 * 2 + e] = v;
      }
    for (int r = 0; r < 8; ++r) memcpy(base + a[8 * q + r], mat[r], 16);
  }
}
void hMovmatrix(Warp& w, const Instr& I, Mask) {
  uint16_t mat[8][8];
  const uint32_t* s = w.u32(I.op[1]);
  for (int l = 0; l < 32; ++l) { mat[l / 4][l % 4 * 2] = uint16_t(s[l]); mat[l / 4][l % 4 * 2 + 1] = uint16_t(s[l] >> 16); }
  uint32_t* d = w.u32(I.op[0]);
  for (int l = 0; l < 32; ++l) d[l] = mat[l % 4 * 2][l / 4] | uint32_t(mat[l % 4 * 2 + 1][l / 4]) << 16;
}

// ---- wmma --------------------------------------------------------------------------------------
// Fragment layout is unspecified by PTX; here element j of a lane is matrix element lane + 32 j in row-major order
// (repeating when the fragment has room for more than the matrix).

struct WFrag { int rows, cols; El el; int regs; };     // el: element type; regs: registers per lane
inline int perLane(const WFrag& f) { return f.rows * f.cols / 32; }

uint32_t packW(const WFrag& f) { return uint32_t(f.rows) | uint32_t(f.cols) << 8 | uint32_t(f.el) << 16 | uint32_t(f.regs) << 24; }
WFrag unpackW(uint32_t v) { return {int(v & 255), int(v >> 8 & 255), El(v >> 16 & 255), int(v >> 24)}; }

// ld/st: op[0] base, op[1] stride (elements) ; arg packW; nvec 1: column-major; ext registers
void hWmmaMem(Warp& w, const Instr& I, Mask m, bool load) {
  const WFrag f = unpackW(I.arg);
  const uint32_t eb = uint32_t(elBits(f.el)) / 8, E = eb >= 4 ? 1 : 4 / eb;
  const uint32_t* x = w.prog->ext.data() + I.ext;
  alignas(64) uint64_t base[32], a[32];
  addresses(w, I, I.op[0], I.sub & 2, base);
  const uint32_t* st = I.op[1] == kNone ? nullptr : w.u32(I.op[1]);
  const bool col = I.nvec & 1;
  const int n = perLane(f), slots = f.regs * int(E);
  const int cshift = __builtin_ctz(unsigned(f.cols));       // a power of two, as all dimensions
  for (int j = 0; j < (load ? slots : n); ++j) {
    const int first = 32 * (j % n);
    for (int l = 0; l < 32; ++l) {
      int row = (l + first) >> cshift, c = (l + first) & (f.cols - 1);
      uint32_t ld = st ? st[l] : uint32_t(col ? f.rows : f.cols);
      a[l] = base[l] + uint64_t(eb) * (col ? uint64_t(c) * ld + uint64_t(row) : uint64_t(row) * ld + uint64_t(c));
    }
    auto body = [&](Mask k, bool) {
      uint8_t* regs = eb == 8 ? reinterpret_cast<uint8_t*>(w.u64(x[j])) : reinterpret_cast<uint8_t*>(w.u32(x[uint32_t(j) / E])) + uint32_t(j) % E * eb;
      auto move = [&](auto unit) {
        const size_t step = sizeof unit == 8 ? 8 : 4;
        for (; k; k &= k - 1) {
          int l = __builtin_ctz(k);
          if (load) memcpy(regs + l * step, reinterpret_cast<void*>(a[l]), sizeof unit);
          else memcpy(reinterpret_cast<void*>(a[l]), regs + l * step, sizeof unit);
        }
      };
      if (eb == 8) move(uint64_t()); else if (eb == 4) move(uint32_t()); else if (eb == 2) move(uint16_t()); else move(uint8_t());
    };
    for (Mask rest = m; rest;) {
      Mask k = rest;
      Instr J = I;
      if (Space(I.space) == Space::generic) {
        Space sp = classify(w, I, k, a, eb);
        J.space = uint8_t(sp);
        if (sp == Space::shared) for (int l = 0; l < 32; ++l) a[l] -= uint64_t(w.blk->shared);
      }
      resolve(w, J, k, a, eb, eb, load ? Acc::Read : Acc::Write, body);
      rest &= ~k;
      if (rest) simFail(w, __builtin_ctz(rest), kErrIllegalAddress, "wmma matrix spans address spaces");
    }
  }
}
void hWmmaLd(Warp& w, const Instr& I, Mask m) { hWmmaMem(w, I, m, true); }
void hWmmaSt(Warp& w, const Instr& I, Mask m) { hWmmaMem(w, I, m, false); }

template <class T> void gather(Warp& w, const WFrag& f, const uint32_t* x, T* out, int stride) {
  const int eb = elBits(f.el) / 8, E = eb >= 4 ? 1 : 4 / eb, cshift = __builtin_ctz(unsigned(f.cols));
  for (int j = 0; j < perLane(f); ++j)
    for (int l = 0; l < 32; ++l) {
      int idx = l + 32 * j;
      T v;
      if (f.el == El::F64) v = T(std::bit_cast<double>(w.u64(x[j])[l]));
      else if (f.el == El::S32) v = T(int32_t(w.u32(x[j])[l]));
      else v = T(decode(f.el, w.u32(x[j / E])[l], j % E));
      out[(idx >> cshift) * stride + (idx & (f.cols - 1))] = v;
    }
}
// ext: D, A, B, C registers followed (not operands) by the four packed fragment descriptions
void hWmmaMma(Warp& w, const Instr& I, Mask) {
  const uint32_t* x = w.prog->ext.data() + I.ext;
  const uint32_t* desc = x + I.next;
  const WFrag fd = unpackW(desc[0]), fa = unpackW(desc[1]), fb = unpackW(desc[2]), fc = unpackW(desc[3]);
  const uint32_t *xd = x, *xa = xd + fd.regs, *xb = xa + fa.regs, *xc = xb + fb.regs;
  const int M = fd.rows, N = fd.cols, K = fa.cols;
  if (fd.el == El::F64 || fd.el == El::S32) {
    double A[32 * 16], B[16 * 32], C[32 * 32];
    gather(w, fa, xa, A, K); gather(w, fb, xb, B, N); gather(w, fc, xc, C, N);
    for (int i = 0; i < M; ++i) for (int j = 0; j < N; ++j) { double s = C[i * N + j]; for (int k = 0; k < K; ++k) s = __builtin_fma(A[i * K + k], B[k * N + j], s); C[i * N + j] = s; }
    for (int j = 0; j < perLane(fd); ++j) for (int l = 0; l < 32; ++l) {
      double v = C[l + 32 * j];
      if (fd.el == El::F64) w.u64(xd[j])[l] = std::bit_cast<uint64_t>(v); else w.u32(xd[j])[l] = uint32_t(int64_t(v));
    }
    return;
  }
  Tile A; TileB B; TileC C;
  gather(w, fa, xa, &A.v[0][0], kMaxK); gather(w, fb, xb, &B.v[0][0], kMaxN); gather(w, fc, xc, &C.v[0][0], kMaxN);
  multiply(A, B, C, M, N, K, fa.el);
  for (int j = 0; j < perLane(fd); ++j)
    for (int l = 0; l < 32; ++l) {
      int idx = l + 32 * j;
      float v = C.v[idx / N][idx % N];
      if (fd.el == El::F16) { uint32_t& r = w.u32(xd[j / 2])[l]; uint32_t sh = uint32_t(j % 2) * 16; r = (r & ~(0xffffu << sh)) | uint32_t(f32ToF16(v)) << sh; }
      else w.u32(xd[j])[l] = std::bit_cast<uint32_t>(v);
    }
}

bool shapeOf(const Lower& L, int& m, int& n, int& k) {
  for (auto& p : L.s->parts) if (p.size() > 3 && p[0] == 'm' && isdigit((unsigned char)p[1]) && sscanf(std::string(p).c_str(), "m%dn%dk%d", &m, &n, &k) == 3) return true;
  return false;
}
void vecOperands(Lower& L, const Operand& o, bool dst, bool wide, int want) {
  std::vector<Operand> one{o};
  const auto& v = o.kind == Operand::Vec ? o.elems : one;
  if (int(v.size()) != want) L.bad("fragment of " + std::to_string(v.size()) + " registers where " + std::to_string(want) + " are expected");
  Ty t = wide ? Ty::b64 : Ty::b32;
  for (auto& e : v) L.addExt(dst ? L.dst(e, t) : L.src(e, t));
}
}  // namespace

bool lowerMma(Lower& L) {
  const std::string_view op = L.s->op();
  const auto& parts = L.s->parts;
  Instr& I = L.I;
  if (op == "mma") {
    int m = 0, n = 0, k = 0;
    if (!shapeOf(L, m, n, k)) L.bad("form of mma");
    std::vector<El> fp8;                               // no operand types elsewhere, so not in L.types
    for (auto& p : parts) if (p == "e4m3" || p == "e5m2") fp8.push_back(p == "e4m3" ? El::E4M3 : El::E5M2);
    if (L.types.size() + fp8.size() != 4 || (!fp8.empty() && fp8.size() != 2)) L.bad("form of mma");
    if (L.has("sp") || L.has("sp::ordered_metadata")) L.bad("sparse mma");
    Ty td = L.types[0], ta = fp8.empty() ? L.types[1] : Ty::none, tb = fp8.empty() ? L.types[2] : Ty::none, tc = L.types.back();
    const El ea = fp8.empty() ? elOf(ta) : fp8[0], eb = fp8.empty() ? elOf(tb) : fp8[1];
    I.kind = Kind::WarpOp;
    I.cls = Cls::Mma;
    I.arg = uint32_t(m) | uint32_t(n) << 8 | uint32_t(k) << 16;
    if (n != 8 || !L.has("row") || !L.has("col")) L.bad("mma shape or layout");
    if (ta == Ty::f64) {
      if ((m != 8 || k != 4) && m != 16) L.bad("mma shape");
      vecOperands(L, L.arg(0), true, true, 2 * m / 8);
      vecOperands(L, L.arg(1), false, true, m / 8 * (k / 4));
      vecOperands(L, L.arg(2), false, true, k / 4);
      vecOperands(L, L.arg(3), false, true, 2 * m / 8);
      I.fn = hMmaF64;
      return true;
    }
    const bool int8 = (ta == Ty::s8 || ta == Ty::u8) && (tb == Ty::s8 || tb == Ty::u8);
    bool ok = !fp8.empty() || int8 || (ta == Ty::f16 && tb == ta) || (ta == Ty::bf16 && tb == ta) || (ta == Ty::tf32 && tb == ta);
    const int E = 32 / elBits(ea);
    if (!ok || !(m == 16 || (int8 && m == 8 && k == 16)) || (k != 4 * E && k != 8 * E)) L.bad("mma shape or types");
    if (L.has("satfinite")) { if (!int8) L.bad("mma with .satfinite"); I.target = 1; }
    auto accRegs = [&](Ty t) { return t == Ty::f16 ? m / 8 : 2 * m / 8; };
    I.elem = uint8_t(ea);
    I.sub = uint8_t(uint8_t(eb) << 1);
    I.nvec = uint8_t(elOf(td));
    I.imm = int64_t(elOf(tc));
    vecOperands(L, L.arg(0), true, false, accRegs(td));
    vecOperands(L, L.arg(1), false, false, m / 8 * (k / (4 * E)));
    vecOperands(L, L.arg(2), false, false, k / (4 * E));
    vecOperands(L, L.arg(3), false, false, accRegs(tc));
    I.fn = hMma;
#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
    if (td == Ty::f32 && tc == Ty::f32 && E == 2) I.fn = ta == Ty::bf16 ? hMmaHalf<true> : hMmaHalf<false>;
#endif
    return true;
  }
  if (op == "ldmatrix" || op == "stmatrix") {
    const bool load = op == "ldmatrix";
    if (L.type() != Ty::b16 || !L.has("m8n8")) L.bad("matrix shape");
    I.kind = Kind::WarpOp;
    I.cls = load ? Cls::LdMatrix : Cls::StShared;
    I.nvec = L.has("x4") ? 4 : L.has("x2") ? 2 : 1;
    I.arg = L.has("trans");
    auto ad = L.address(L.arg(load ? 1 : 0), Space::shared);
    I.op[0] = ad.base;
    I.imm = ad.offset;
    bool shared = L.has("shared") || L.has("shared::cta");
    I.sub = uint8_t(ad.wide << 1) | (shared ? 0 : 8);
    vecOperands(L, L.arg(load ? 0 : 1), load, false, I.nvec);
    I.fn = load ? hLdmatrix : hStmatrix;
    return true;
  }
  if (op == "movmatrix") { I.kind = Kind::WarpOp; I.cls = Cls::Shfl; I.op[0] = L.dst(0, Ty::b32); I.op[1] = L.src(1, Ty::b32); I.fn = hMovmatrix; return true; }
  if (op == "wmma") {
    int m = 0, n = 0, k = 0;
    if (!shapeOf(L, m, n, k)) L.bad("form of wmma");
    I.kind = Kind::WarpOp;
    auto frag = [&](char which, Ty t) {
      WFrag f;
      f.rows = which == 'b' ? k : m;
      f.cols = which == 'a' ? k : n;
      f.el = elOf(t);
      if (t == Ty::s32) f.el = El::S32;
      int bits = elBits(f.el), E = bits >= 32 ? 1 : 32 / bits;
      f.regs = std::max(1, f.rows * f.cols / 32 / E);
      if ((which == 'a' || which == 'b') && t == Ty::f16) f.regs = 8;     // the f16 fragments hold every element twice
      return f;
    };
    if (parts[1] == "load" || parts[1] == "store") {
      const bool load = parts[1] == "load";
      const char which = parts[2][0];
      Ty t = L.type();
      I.cls = load ? Cls::LdGlobal : Cls::StGlobal;
      for (auto& p : parts) if (p.starts_with("shared")) { I.space = uint8_t(Space::shared); I.cls = load ? Cls::LdShared : Cls::StShared; } else if (p == "global") I.space = uint8_t(Space::global);
      WFrag f = frag(which, t);
      I.arg = packW(f);
      I.nvec = L.has("col");
      auto ad = L.address(L.arg(load ? 1 : 0), Space(I.space));
      I.op[0] = ad.base;
      I.imm = ad.offset;
      I.sub = uint8_t(ad.wide << 1);
      if (L.s->ops.size() > 2) I.op[1] = L.src(2, Ty::u32);
      vecOperands(L, L.arg(load ? 0 : 1), load, f.el == El::F64, f.regs);
      I.fn = load ? hWmmaLd : hWmmaSt;
      return true;
    }
    if (parts[1] == "mma") {
      I.cls = Cls::Mma;
      Ty td, ta, tb, tc;
      if (L.types.size() == 2) { td = L.types[0]; ta = tb = Ty::f16; tc = L.types[1]; }
      else if (L.types.size() == 4) { td = L.types[0]; ta = L.types[1]; tb = L.types[2]; tc = L.types[3]; }
      else L.bad("wmma types");
      if (L.has("satfinite")) L.bad("wmma with .satfinite");
      WFrag fd = frag('d', td), fa = frag('a', ta), fb = frag('b', tb), fc = frag('c', tc);
      vecOperands(L, L.arg(0), true, fd.el == El::F64, fd.regs);
      vecOperands(L, L.arg(1), false, fa.el == El::F64, fa.regs);
      vecOperands(L, L.arg(2), false, fb.el == El::F64, fb.regs);
      vecOperands(L, L.arg(3), false, fc.el == El::F64, fc.regs);
      for (auto& f : {fd, fa, fb, fc}) L.P.ext.push_back(packW(f));
      I.fn = hWmmaMma;
      return true;
    }
  }
  return false;
}

}  // namespace cudasim
