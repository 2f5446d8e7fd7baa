// AdamW, Adam, SGD and Lion over split pairs, and sums of gradients, at the speed of the host's memory.
//
// A split pair is the float32 master w kept as `hi`, the bfloat16 weight that computes, and `lo`, a signed 16-bit
// remainder: hi = (bits(w) + 0x8000) >> 16 and lo = bits(w) - (hi << 16), so that (hi << 16) + lo is w again. Where
// there is no `lo` the master is rounded to `hi` by chance, see rounding.py.
//
// The arithmetic is that of torch.optim's single-tensor code on CPUs with fused multiply-add, operation by operation:
// where torch fuses (lerp, addcmul, add with alpha) there is a fused multiply-add here, everywhere else each operation
// rounds once. Built with -ffp-contract=off, every variant therefore gives the same bits, whatever the number of
// threads, and reference_updates.py gives them too. NaN weights are written as 0x7fc00000: the carry of the split
// would turn some NaNs into a finite `hi`.
//
// The file includes itself once per instruction set: first the lanes of that set, then the algorithms over them.
#ifndef ALGORITHMS
#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define FORCED inline __attribute__((always_inline))
#define INLINE static FORCED

namespace {

constexpr int64_t kBlock = 32;        // elements per turn of a loop: one cache line of 16-bit values
constexpr int64_t kShared = 256;      // elements of a stored moment that share a scale
constexpr int64_t kAhead = 2048;      // bytes that prefetches run ahead of each stream
constexpr int64_t kFewest = 1 << 14;  // elements below which another thread costs more than it gives
constexpr int32_t kNan = 0x7fc00000;  // the only NaN that is written into a pair
enum Variant { kPlain, kAvx2, kAvx512 };
enum Rule { kAdam, kSgd, kLion };
enum Kind { kBfloat16, kFloat16, kFloat32 };
enum Stored { kExact, kHalf, kCodes };  // moments: float32, bfloat16, or 8-bit codes, see kernels/moments.py

// One update of n elements. Scalars are what torch.optim computes in double, rounded to float32.
struct Update {
  int64_t n;
  uint16_t* hi;
  int16_t* lo;
  const void* gradient;
  void* first;   // Adam, Lion: running mean; SGD: momentum buffer, or null
  void* second;  // Adam: running mean of squares
  uint16_t* new_hi;  // where each is written: the same places, or others apart from all that is read
  int16_t* new_lo;
  void* new_first;
  void* new_second;
  int32_t rule;
  int32_t kind;  // of the gradient
  int32_t stored;  // how moments are
  int32_t threads;
  float scale;  // multiplies the gradient
  float l2;     // this times the weight is added to the gradient
  float decay;  // multiplies the weight
  float step;   // SGD, Lion: -lr; Adam: -lr / (1 - beta1^t)
  float lerp;   // Adam: 1 - beta1
  float keep;   // Adam, Lion: beta2; SGD: momentum
  float add;    // Adam, Lion: 1 - beta2; SGD: 1 - dampening
  float root;   // Adam: sqrt(1 - beta2^t)
  float eps;
  float mix_keep;  // Lion: steps by the sign of this times the mean
  float mix_add;   // and this times the gradient
  int32_t fresh;     // SGD: the buffer holds nothing yet
  int32_t nesterov;  // SGD
  uint32_t low, high, element;  // without `lo`: what is drawn with, and the number of the first element there
};

struct Draws {
  uint32_t low, high, element;
};
constexpr uint32_t kFactor = 0x7feb352d, kNextFactor = 0x846ca68b;

// total += scale * gradient, of n elements; the first of several overwrites what is there.
struct Sum {
  int64_t n;
  float* total;
  const void* gradient;
  int32_t kind;  // of the gradient
  int32_t threads;
  float scale;
  int32_t fresh;  // the total holds nothing yet
};

template <class Job>
using Range = void (*)(const Job&, int64_t, int64_t);  // elements from the second on, up to the third

INLINE float from_bits(uint32_t bits) { float x; std::memcpy(&x, &bits, 4); return x; }
INLINE uint32_t to_bits(float x) { uint32_t bits; std::memcpy(&bits, &x, 4); return bits; }
INLINE float* floats(void* p) { return static_cast<float*>(p); }
INLINE void ahead(const void* p, int64_t line) {
  __builtin_prefetch(static_cast<const char*>(p) + kAhead + 64 * line);
}

// ---- plain: any CPU --------------------------------------------------------------------------------------------
namespace plain {
#define TARGET
constexpr int64_t kLanes = 1;
using F = float;
struct Quotient { F d; };

INLINE F splat(float x) { return x; }
INLINE F load(const float* p) { return *p; }
INLINE void store(float* p, F x) { *p = x; }
INLINE void stream(float* p, F x) { *p = x; }
INLINE void streamed() {}
INLINE F root(F a) { return std::sqrt(a); }
INLINE F sign(F a) { return a > 0.0f ? 1.0f : a < 0.0f ? -1.0f : a != a ? a : 0.0f; }
INLINE Quotient quotient(float d) { return {d}; }
INLINE F over(F x, const Quotient& q) { return x / q.d; }

INLINE F fma(F a, F b, F c) {
#if defined(__FP_FAST_FMAF)
  return __builtin_fmaf(a, b, c);
#else
  // The product is exact in double; the sum is rounded to odd there, which the second rounding cannot spoil
  // (Boldo and Melquiond, "Emulation of FMA and correctly rounded sums", 2008).
  const double p = static_cast<double>(a) * b, z = c, s = p + z, t = s - p;
  const double error = (p - (s - t)) + (z - t);
  int64_t bits;
  std::memcpy(&bits, &s, 8);
  if ((error < 0 || error > 0) && !(bits & 1)) bits += ((error > 0) == (s > 0)) ? 1 : -1;
  double odd;
  std::memcpy(&odd, &bits, 8);
  return static_cast<float>(odd);
#endif
}

INLINE F half(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16, rest = h & 0x7fff;
  if (rest >= 0x7c00) return from_bits(sign | 0x7f800000 | (rest & 0x3ff) << 13);
  if (rest >= 0x0400) return from_bits(sign | ((rest << 13) + (112u << 23)));
  return from_bits(sign | to_bits(static_cast<float>(rest) * 0x1p-24f));
}

template <int kKind>
INLINE F load_gradient(const void* p, int64_t i) {
  if (kKind == kFloat32) return static_cast<const float*>(p)[i];
  const uint16_t g = static_cast<const uint16_t*>(p)[i];
  return kKind == kFloat16 ? half(g) : from_bits(static_cast<uint32_t>(g) << 16);
}

INLINE F load_pair(const uint16_t* hi, const int16_t* lo) {
  return from_bits((static_cast<uint32_t>(*hi) << 16) + static_cast<uint32_t>(static_cast<int32_t>(*lo)));
}

template <bool kApart>
INLINE void store_pair(uint16_t* hi, int16_t* lo, F w) {
  const uint32_t bits = w != w ? static_cast<uint32_t>(kNan) : to_bits(w);
  *hi = static_cast<uint16_t>((bits + 0x8000u) >> 16);
  *lo = static_cast<int16_t>(bits);  // `hi << 16` only takes upper bits away
}

template <bool kApart>
INLINE void store_rounded(uint16_t* p, F w, const Draws& draws, int64_t i) {
  uint32_t x = draws.element + static_cast<uint32_t>(i) + draws.low;
  x = ((x ^ x >> 16) * kFactor) ^ draws.high;
  x = (x ^ x >> 15) * kNextFactor;
  *p = static_cast<uint16_t>((w != w ? static_cast<uint32_t>(kNan) : to_bits(w) + ((x ^ x >> 16) >> 16)) >> 16);
}

INLINE void store_half(uint16_t* p, F x) {  // to nearest, ties to even
  const uint32_t bits = to_bits(x);
  *p = static_cast<uint16_t>((x != x ? static_cast<uint32_t>(kNan) : bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}

// Magnitudes are in the order of their bits, and what is not finite is above the rest.
INLINE F larger(F most, F x) {
  const uint32_t a = to_bits(most), b = to_bits(x) & 0x7fffffffu;
  return from_bits(a > b ? a : b);
}
INLINE uint32_t largest(F most) { return to_bits(most); }

template <bool kUnsigned>
INLINE F load_codes(const uint8_t* p) {
  return kUnsigned ? static_cast<F>(*p) : static_cast<F>(static_cast<int8_t>(*p));
}

// The integers nearest to x, ties to even; unsigned ones are at least 1 where `x` is above 0.
template <bool kUnsigned>
INLINE void store_codes(uint8_t* p, F x) {
  // What is added leaves no bits for a fraction, and the integer in the lowest.
  const int32_t code = static_cast<int32_t>(to_bits(x + 0x1.8p23f) - 0x4b400000u);
  *p = static_cast<uint8_t>(kUnsigned && x > 0.0f && code < 1 ? 1 : code);
}
#define ALGORITHMS
#include "host_updates.cpp"
#undef ALGORITHMS
#undef TARGET
}  // namespace plain

#if defined(__x86_64__)
// ---- AVX2 ------------------------------------------------------------------------------------------------------
namespace avx2 {
#define TARGET __attribute__((target("avx2,fma,f16c")))
constexpr int64_t kLanes = 8;
using F = __m256;
struct Quotient { F d, r, inf; };

TARGET INLINE F splat(float x) { return _mm256_set1_ps(x); }
TARGET INLINE F load(const float* p) { return _mm256_loadu_ps(p); }
TARGET INLINE void store(float* p, F x) { _mm256_storeu_ps(p, x); }
TARGET INLINE void stream(float* p, F x) { _mm256_stream_ps(p, x); }
TARGET INLINE void streamed() { _mm_sfence(); }
TARGET INLINE F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
TARGET INLINE F root(F a) { return _mm256_sqrt_ps(a); }
TARGET INLINE F sign(F a) {
  const F zero = splat(0.0f), unordered = _mm256_and_ps(_mm256_cmp_ps(a, a, _CMP_UNORD_Q), a);
  const F up = _mm256_and_ps(_mm256_cmp_ps(a, zero, _CMP_GT_OQ), splat(1.0f));
  return _mm256_or_ps(_mm256_or_ps(up, unordered), _mm256_and_ps(_mm256_cmp_ps(a, zero, _CMP_LT_OQ), splat(-1.0f)));
}
TARGET INLINE Quotient quotient(float d) { return {splat(d), splat(1.0f / d), splat(INFINITY)}; }

// x / d correctly rounded without the divider, which the square root and the other divisions keep busy: the estimate
// is corrected by its exact remainder (Markstein, "Computation of elementary functions on the IBM RISC System/6000
// processor", 1990). Infinity has no remainder and stays.
TARGET INLINE F over(F x, const Quotient& q) {
  const F y = x * q.r, better = fma(_mm256_fnmadd_ps(y, q.d, x), q.r, y);
  return _mm256_blendv_ps(y, better, _mm256_cmp_ps(x, q.inf, _CMP_LT_OQ));
}

TARGET INLINE __m256i words(const void* p) {
  return _mm256_cvtepu16_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p)));
}

template <int kKind>
TARGET INLINE F load_gradient(const void* p, int64_t i) {
  if (kKind == kFloat32) return load(static_cast<const float*>(p) + i);
  const void* at = static_cast<const uint16_t*>(p) + i;
  if (kKind == kFloat16) return _mm256_cvtph_ps(_mm_loadu_si128(static_cast<const __m128i*>(at)));
  return _mm256_castsi256_ps(_mm256_slli_epi32(words(at), 16));
}

TARGET INLINE F load_pair(const uint16_t* hi, const int16_t* lo) {
  const __m256i l = _mm256_cvtepi16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(lo)));
  return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_slli_epi32(words(hi), 16), l));
}

template <bool kApart>
TARGET INLINE void store_pair(uint16_t* hi, int16_t* lo, F w) {
  const F nan = _mm256_castsi256_ps(_mm256_set1_epi32(kNan));
  const __m256i bits = _mm256_castps_si256(_mm256_blendv_ps(w, nan, _mm256_cmp_ps(w, w, _CMP_UNORD_Q)));
  const __m256i h = _mm256_srai_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x8000)), 16);
  const __m256i l = _mm256_sub_epi32(bits, _mm256_slli_epi32(h, 16));
  const __m256i both = _mm256_permute4x64_epi64(_mm256_packs_epi32(h, l), 0xd8);  // packing goes by 128-bit halves
  const __m128i halves[2] = {_mm256_castsi256_si128(both), _mm256_extracti128_si256(both, 1)};
  __m128i* places[2] = {reinterpret_cast<__m128i*>(hi), reinterpret_cast<__m128i*>(lo)};
  for (int k = 0; k < 2; k++) kApart ? _mm_stream_si128(places[k], halves[k]) : _mm_storeu_si128(places[k], halves[k]);
}

TARGET INLINE __m128i packed_words(__m256i x) {  // unsigned ones of 16 bits
  return _mm_packus_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
}

TARGET INLINE __m256i all(uint32_t x) { return _mm256_set1_epi32(static_cast<int32_t>(x)); }

template <bool kApart>
TARGET INLINE void store_rounded(uint16_t* p, F w, const Draws& draws, int64_t i) {
  const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  __m256i x = _mm256_add_epi32(all(draws.element + static_cast<uint32_t>(i) + draws.low), lanes);
  x = _mm256_mullo_epi32(_mm256_xor_si256(x, _mm256_srli_epi32(x, 16)), all(kFactor));
  x = _mm256_xor_si256(x, all(draws.high));
  x = _mm256_mullo_epi32(_mm256_xor_si256(x, _mm256_srli_epi32(x, 15)), all(kNextFactor));
  x = _mm256_srli_epi32(_mm256_xor_si256(x, _mm256_srli_epi32(x, 16)), 16);
  const F up = _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(w), x));
  const F rounded = _mm256_blendv_ps(up, _mm256_castsi256_ps(all(kNan)), _mm256_cmp_ps(w, w, _CMP_UNORD_Q));
  const __m128i halves = packed_words(_mm256_srli_epi32(_mm256_castps_si256(rounded), 16));
  __m128i* place = reinterpret_cast<__m128i*>(p);
  kApart ? _mm_stream_si128(place, halves) : _mm_storeu_si128(place, halves);
}

TARGET INLINE void store_half(uint16_t* p, F x) {
  const __m256i bits = _mm256_castps_si256(x), odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i up = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
  const F nan = _mm256_castsi256_ps(_mm256_set1_epi32(kNan));
  const F rounded = _mm256_blendv_ps(_mm256_castsi256_ps(up), nan, _mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  const __m256i halves = _mm256_srli_epi32(_mm256_castps_si256(rounded), 16);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), packed_words(halves));
}

TARGET INLINE F larger(F most, F x) {
  const __m256i size = _mm256_and_si256(_mm256_castps_si256(x), _mm256_set1_epi32(0x7fffffff));
  return _mm256_castsi256_ps(_mm256_max_epi32(_mm256_castps_si256(most), size));
}

TARGET INLINE uint32_t largest(F most) {
  alignas(32) uint32_t bits[8];
  _mm256_store_si256(reinterpret_cast<__m256i*>(bits), _mm256_castps_si256(most));
  uint32_t found = 0;
  for (uint32_t each : bits) found = each > found ? each : found;
  return found;
}

template <bool kUnsigned>
TARGET INLINE F load_codes(const uint8_t* p) {
  const __m128i codes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  return _mm256_cvtepi32_ps(kUnsigned ? _mm256_cvtepu8_epi32(codes) : _mm256_cvtepi8_epi32(codes));
}

template <bool kUnsigned>
TARGET INLINE void store_codes(uint8_t* p, F x) {
  __m256i codes = _mm256_cvtps_epi32(x);
  if (kUnsigned) {
    const __m256i above = _mm256_castps_si256(_mm256_cmp_ps(x, splat(0.0f), _CMP_GT_OQ));
    codes = _mm256_max_epi32(codes, _mm256_and_si256(above, _mm256_set1_epi32(1)));
  }
  const __m128i low = _mm256_castsi256_si128(codes), high = _mm256_extracti128_si256(codes, 1);
  const __m128i words = _mm_packs_epi32(low, high);
  const __m128i bytes = kUnsigned ? _mm_packus_epi16(words, words) : _mm_packs_epi16(words, words);
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), bytes);
}
#define ALGORITHMS
#include "host_updates.cpp"
#undef ALGORITHMS
#undef TARGET
}  // namespace avx2

// ---- AVX-512 ---------------------------------------------------------------------------------------------------
namespace avx512 {
#define TARGET __attribute__((target("avx512f")))
constexpr int64_t kLanes = 16;
using F = __m512;
struct Quotient { F d, r, inf; };

TARGET INLINE F splat(float x) { return _mm512_set1_ps(x); }
TARGET INLINE F load(const float* p) { return _mm512_loadu_ps(p); }
TARGET INLINE void store(float* p, F x) { _mm512_storeu_ps(p, x); }
TARGET INLINE void stream(float* p, F x) { _mm512_stream_ps(p, x); }
TARGET INLINE void streamed() { _mm_sfence(); }
TARGET INLINE F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
TARGET INLINE F root(F a) { return _mm512_sqrt_ps(a); }
TARGET INLINE F sign(F a) {
  const F zero = splat(0.0f), unordered = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q), a);
  const F up = _mm512_mask_mov_ps(unordered, _mm512_cmp_ps_mask(a, zero, _CMP_GT_OQ), splat(1.0f));
  return _mm512_mask_mov_ps(up, _mm512_cmp_ps_mask(a, zero, _CMP_LT_OQ), splat(-1.0f));
}
TARGET INLINE Quotient quotient(float d) { return {splat(d), splat(1.0f / d), splat(INFINITY)}; }

TARGET INLINE F over(F x, const Quotient& q) {
  const F y = x * q.r, rest = _mm512_fnmadd_ps(y, q.d, x);
  return _mm512_mask3_fmadd_ps(rest, q.r, y, _mm512_cmp_ps_mask(x, q.inf, _CMP_LT_OQ));
}

TARGET INLINE __m512i words(const void* p) {
  return _mm512_cvtepu16_epi32(_mm256_loadu_si256(static_cast<const __m256i*>(p)));
}

template <int kKind>
TARGET INLINE F load_gradient(const void* p, int64_t i) {
  if (kKind == kFloat32) return load(static_cast<const float*>(p) + i);
  const void* at = static_cast<const uint16_t*>(p) + i;
  if (kKind == kFloat16) return _mm512_cvtph_ps(_mm256_loadu_si256(static_cast<const __m256i*>(at)));
  return _mm512_castsi512_ps(_mm512_slli_epi32(words(at), 16));
}

TARGET INLINE F load_pair(const uint16_t* hi, const int16_t* lo) {
  const __m512i l = _mm512_cvtepi16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(lo)));
  return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_slli_epi32(words(hi), 16), l));
}

template <bool kApart>
TARGET INLINE void store_pair(uint16_t* hi, int16_t* lo, F w) {
  const __mmask16 nan = _mm512_cmp_ps_mask(w, w, _CMP_UNORD_Q);
  const __m512i bits = _mm512_mask_set1_epi32(_mm512_castps_si512(w), nan, kNan);
  const __m512i h = _mm512_srai_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x8000)), 16);
  const __m256i halves[2] = {_mm512_cvtepi32_epi16(h), _mm512_cvtepi32_epi16(bits)};
  __m256i* places[2] = {reinterpret_cast<__m256i*>(hi), reinterpret_cast<__m256i*>(lo)};
  for (int k = 0; k < 2; k++)
    kApart ? _mm256_stream_si256(places[k], halves[k]) : _mm256_storeu_si256(places[k], halves[k]);
}

TARGET INLINE __m512i all(uint32_t x) { return _mm512_set1_epi32(static_cast<int32_t>(x)); }

template <bool kApart>
TARGET INLINE void store_rounded(uint16_t* p, F w, const Draws& draws, int64_t i) {
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  __m512i x = _mm512_add_epi32(all(draws.element + static_cast<uint32_t>(i) + draws.low), lanes);
  x = _mm512_mullo_epi32(_mm512_xor_si512(x, _mm512_srli_epi32(x, 16)), all(kFactor));
  x = _mm512_xor_si512(x, all(draws.high));
  x = _mm512_mullo_epi32(_mm512_xor_si512(x, _mm512_srli_epi32(x, 15)), all(kNextFactor));
  x = _mm512_srli_epi32(_mm512_xor_si512(x, _mm512_srli_epi32(x, 16)), 16);
  const __m512i up = _mm512_add_epi32(_mm512_castps_si512(w), x);
  const __m512i rounded = _mm512_mask_set1_epi32(up, _mm512_cmp_ps_mask(w, w, _CMP_UNORD_Q), kNan);
  const __m256i halves = _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
  __m256i* place = reinterpret_cast<__m256i*>(p);
  kApart ? _mm256_stream_si256(place, halves) : _mm256_storeu_si256(place, halves);
}

TARGET INLINE void store_half(uint16_t* p, F x) {
  const __m512i bits = _mm512_castps_si512(x), odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i up = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
  const __m512i rounded = _mm512_mask_set1_epi32(up, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), kNan);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
}

TARGET INLINE F larger(F most, F x) {
  const __m512i size = _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(0x7fffffff));
  return _mm512_castsi512_ps(_mm512_max_epi32(_mm512_castps_si512(most), size));
}

TARGET INLINE uint32_t largest(F most) {
  return static_cast<uint32_t>(_mm512_reduce_max_epi32(_mm512_castps_si512(most)));
}

template <bool kUnsigned>
TARGET INLINE F load_codes(const uint8_t* p) {
  const __m128i codes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm512_cvtepi32_ps(kUnsigned ? _mm512_cvtepu8_epi32(codes) : _mm512_cvtepi8_epi32(codes));
}

template <bool kUnsigned>
TARGET INLINE void store_codes(uint8_t* p, F x) {
  __m512i codes = _mm512_cvtps_epi32(x);
  if (kUnsigned) {
    const __mmask16 above = _mm512_cmp_ps_mask(x, splat(0.0f), _CMP_GT_OQ);
    codes = _mm512_mask_max_epi32(codes, above, codes, _mm512_set1_epi32(1));
  }
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(codes));
}
#define ALGORITHMS
#include "host_updates.cpp"
#undef ALGORITHMS
#undef TARGET
}  // namespace avx512
#endif

// Gradual underflow and rounding to nearest, whatever the calling thread was set to: bits must not depend on it.
struct DefaultRounding {
#if defined(__x86_64__)
  unsigned saved = _mm_getcsr();
  DefaultRounding() { _mm_setcsr(0x1f80); }
  ~DefaultRounding() { _mm_setcsr(saved); }
#endif
};

// Runs `range` over blocks shared out evenly; threads meet only on block boundaries.
template <class Job>
void run(Range<Job> range, const Job& job, int64_t block = kBlock) {
  const int64_t blocks = (job.n + block - 1) / block, useful = (job.n + kFewest - 1) / kFewest;
  const int64_t threads = useful < job.threads ? (useful > 0 ? useful : 1) : job.threads;
#pragma omp parallel for schedule(static, 1) num_threads(static_cast<int>(threads))
  for (int64_t t = 0; t < threads; t++) {
    const DefaultRounding rounding;
    const int64_t begin = blocks * t / threads * block, end = blocks * (t + 1) / threads * block;
    range(job, begin, end < job.n ? end : job.n);
  }
}

bool supported(int variant) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (variant == kAvx512) return __builtin_cpu_supports("avx512f");
  // Half-precision conversion came with the same CPUs; not every compiler knows how to ask for it.
  if (variant == kAvx2) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
  return variant == kPlain;
}

}  // namespace

extern "C" int geminifx_supported(int variant) { return supported(variant); }

// Returns 0, or 1 where this CPU lacks the variant or the update names no rule, kind or way to store that exists.
extern "C" int geminifx_update(const Update* u, int variant) {
  if (!supported(variant) || u->rule < 0 || u->rule > kLion || u->kind < 0 || u->kind > kFloat32) return 1;
  if (u->stored < 0 || u->stored > kCodes) return 1;
  Range<Update> range = plain::kRanges[u->rule][u->kind];
#if defined(__x86_64__)
  if (variant == kAvx2) range = avx2::kRanges[u->rule][u->kind];
  if (variant == kAvx512) range = avx512::kRanges[u->rule][u->kind];
#endif
  run(range, *u, u->stored == kExact ? kBlock : kShared);
  return 0;
}

// Returns 0, or 1 where this CPU lacks the variant or the sum names no kind that exists.
extern "C" int geminifx_add(const Sum* s, int variant) {
  if (!supported(variant) || s->kind < 0 || s->kind > kFloat32) return 1;
  Range<Sum> range = plain::kSums[s->kind];
#if defined(__x86_64__)
  if (variant == kAvx2) range = avx2::kSums[s->kind];
  if (variant == kAvx512) range = avx512::kSums[s->kind];
#endif
  run(range, *s);
  return 0;
}

#else  // ALGORITHMS: once per instruction set, over its lanes

struct Streams {
  uint16_t* hi;
  int16_t* lo;
  const void* gradient;
  float *first, *second;
  uint16_t* new_hi;
  int16_t* new_lo;
  float *new_first, *new_second;
  Draws draws;  // of the element that the others begin with
};

TARGET FORCED F master(const Streams& s, int64_t i) {
  return s.lo ? load_pair(s.hi + i, s.lo + i) : load_gradient<kBfloat16>(s.hi, i);
}

template <bool kApart>
TARGET FORCED void put_master(const Streams& s, int64_t i, F w) {
  s.lo ? store_pair<kApart>(s.new_hi + i, s.new_lo + i, w) : store_rounded<kApart>(s.new_hi + i, w, s.draws, i);
}

// What is written apart from what is read goes past the caches: nobody reads it soon, and no line is read first.
template <bool kApart>
TARGET FORCED void put(float* p, F x) {
  kApart ? stream(p, x) : store(p, x);
}

// torch.optim.adam._single_tensor_adam on one vector. kRoots: squares are written as their roots.
template <int kKind, bool kRoots = false>
struct Adam {
  static constexpr int kGradient = kKind;
  F scale, l2, decay, step, lerp, keep, add, eps;
  Quotient correction;
  bool coupled, near;  // near: lerp starts from the mean, else from the gradient, as torch.lerp does from 0.5 on

  TARGET FORCED explicit Adam(const Update& u)
      : scale(splat(u.scale)), l2(splat(u.l2)), decay(splat(u.decay)), step(splat(u.step)),
        lerp(splat(u.lerp < 0.5f ? u.lerp : u.lerp - 1.0f)), keep(splat(u.keep)), add(splat(u.add)),
        eps(splat(u.eps)), correction(quotient(u.root)), coupled(u.l2 != 0.0f), near(u.lerp < 0.5f) {}

  template <bool kApart>
  TARGET FORCED void at(const Streams& s, int64_t i) const {
    F w = master(s, i), g = load_gradient<kKind>(s.gradient, i) * scale;
    F m = load(s.first + i), v = load(s.second + i);
    if (coupled) g = fma(l2, w, g);
    m = fma(lerp, g - m, near ? m : g);
    v = fma(add * g, g, v * keep);
    const F size = root(v);
    w = w * decay + step * m / (over(size, correction) + eps);
    put<kApart>(s.new_first + i, m);
    put<kApart>(s.new_second + i, kRoots ? size : v);
    put_master<kApart>(s, i, w);
  }
};

// torch.optim.sgd._single_tensor_sgd on one vector.
template <int kKind>
struct Sgd {
  static constexpr int kGradient = kKind;
  F scale, l2, step, keep, add;
  bool coupled, momentum, fresh, nesterov;

  TARGET FORCED explicit Sgd(const Update& u)
      : scale(splat(u.scale)), l2(splat(u.l2)), step(splat(u.step)), keep(splat(u.keep)), add(splat(u.add)),
        coupled(u.l2 != 0.0f), momentum(u.first != nullptr), fresh(u.fresh != 0), nesterov(u.nesterov != 0) {}

  template <bool kApart>
  TARGET FORCED void at(const Streams& s, int64_t i) const {
    F w = master(s, i), g = load_gradient<kKind>(s.gradient, i) * scale;
    if (coupled) g = fma(l2, w, g);
    if (momentum) {
      const F buffer = fresh ? g : fma(add, g, load(s.first + i) * keep);
      put<kApart>(s.new_first + i, buffer);
      g = nesterov ? fma(keep, buffer, g) : buffer;
    }
    put_master<kApart>(s, i, fma(step, g, w));
  }
};

// optimizer/lion.py on one vector.
template <int kKind>
struct Lion {
  static constexpr int kGradient = kKind;
  F scale, decay, step, keep, add, mix_keep, mix_add;

  TARGET FORCED explicit Lion(const Update& u)
      : scale(splat(u.scale)), decay(splat(u.decay)), step(splat(u.step)), keep(splat(u.keep)), add(splat(u.add)),
        mix_keep(splat(u.mix_keep)), mix_add(splat(u.mix_add)) {}

  template <bool kApart>
  TARGET FORCED void at(const Streams& s, int64_t i) const {
    const F w = master(s, i), g = load_gradient<kKind>(s.gradient, i) * scale, m = load(s.first + i);
    put<kApart>(s.new_first + i, fma(add, g, m * keep));
    put_master<kApart>(s, i, w * decay + step * sign(fma(mix_add, g, m * mix_keep)));
  }
};

template <bool kApart, class Step>
TARGET FORCED void block(const Step& rule, const Streams& s, int64_t i) {
  for (int64_t j = 0; j < kBlock; j += kLanes) rule.template at<kApart>(s, i + j);
}

template <bool kApart, class Step>
TARGET FORCED void blocks(const Step& rule, const Streams& s, int64_t begin, int64_t end) {
  constexpr int64_t kBytes = Step::kGradient == kFloat32 ? 4 : 2;
  const char* g = static_cast<const char*>(s.gradient);
  for (int64_t i = begin; i < end; i += kBlock) {
    ahead(s.hi + i, 0), ahead(g + i * kBytes, 0);
    if (s.lo) ahead(s.lo + i, 0);
    if (kBytes == 4) ahead(g + i * kBytes, 1);
    if (s.first) ahead(s.first + i, 0), ahead(s.first + i, 1);
    if (s.second) ahead(s.second + i, 0), ahead(s.second + i, 1);
    block<kApart>(rule, s, i);
  }
  if (kApart) streamed();
}

// Whether all that is written lies apart, at whole cache lines.
INLINE bool is_apart(const Streams& s, int64_t i) {
  const void* places[] = {s.new_hi + i, s.lo ? s.new_lo + i : nullptr, s.first ? s.new_first + i : nullptr,
                          s.second ? s.new_second + i : nullptr};
  for (const void* place : places)
    if (reinterpret_cast<uintptr_t>(place) % 64) return false;
  return s.new_hi != s.hi;
}

template <class Step>
TARGET FORCED void elements(const Step& rule, const Streams& s, int64_t begin, int64_t end) {
  constexpr int64_t kBytes = Step::kGradient == kFloat32 ? 4 : 2;
  const char* g = static_cast<const char*>(s.gradient);
  const int64_t i = begin + (end - begin) / kBlock * kBlock;
  is_apart(s, begin) ? blocks<true>(rule, s, begin, i) : blocks<false>(rule, s, begin, i);
  if (i >= end) return;
  // The tail runs as a whole block beside the arrays: the same code, so the same bits.
  uint16_t hi[kBlock] = {};
  int16_t lo[kBlock] = {};
  char gradient[kBlock * kBytes] = {};
  float first[kBlock] = {}, second[kBlock] = {};
  const size_t n = static_cast<size_t>(end - i);
  std::memcpy(hi, s.hi + i, n * 2);
  if (s.lo) std::memcpy(lo, s.lo + i, n * 2);
  std::memcpy(gradient, g + i * kBytes, n * kBytes);
  if (s.first) std::memcpy(first, s.first + i, n * 4);
  if (s.second) std::memcpy(second, s.second + i, n * 4);
  const Draws draws = {s.draws.low, s.draws.high, s.draws.element + static_cast<uint32_t>(i)};
  int16_t* rest = s.lo ? lo : nullptr;
  block<false>(rule, {hi, rest, gradient, s.first ? first : nullptr, second, hi, rest, first, second, draws}, 0);
  std::memcpy(s.new_hi + i, hi, n * 2);
  if (s.lo) std::memcpy(s.new_lo + i, lo, n * 2);
  if (s.first) std::memcpy(s.new_first + i, first, n * 4);
  if (s.second) std::memcpy(s.new_second + i, second, n * 4);
}

template <class Step>
TARGET void exact_range(const Update& u, int64_t begin, int64_t end) {
  const Streams s = {u.hi,     u.lo,     u.gradient,          floats(u.first),      floats(u.second),
                     u.new_hi, u.new_lo, floats(u.new_first), floats(u.new_second), {u.low, u.high, u.element}};
  elements(Step(u), s, begin, end);
}

// Moments as they are stored, in float32: n values of one block.
TARGET FORCED void widen_half(const uint16_t* from, float* to, int64_t n) {
  uint16_t whole[kShared];
  if (n < kShared) from = static_cast<uint16_t*>(std::memcpy(whole, from, static_cast<size_t>(n) * 2));
  for (int64_t j = 0; j < n; j += kLanes) store(to + j, load_gradient<kBfloat16>(from, j));
}

TARGET FORCED void narrow_half(const float* from, uint16_t* to, int64_t n) {
  uint16_t whole[kShared];
  uint16_t* place = n < kShared ? whole : to;
  for (int64_t j = 0; j < n; j += kLanes) store_half(place + j, load(from + j));
  if (n < kShared) std::memcpy(to, whole, static_cast<size_t>(n) * 2);
}

template <bool kSquares>
TARGET FORCED void widen_codes(const uint8_t* block, float* to) {
  float shared;
  std::memcpy(&shared, block + kShared, 4);
  const F one = splat(kSquares ? 1.0f / 255 : 1.0f / 127), scale = splat(shared);
  for (int64_t j = 0; j < kShared; j += kLanes) {
    const F x = load_codes<kSquares>(block + j) * one * scale;
    store(to + j, kSquares ? x * x : x);
  }
}

// `from` are roots where they stand for squares.
template <bool kSquares>
TARGET FORCED void narrow_codes(const float* from, uint8_t* block) {
  F sizes = splat(0.0f);
  for (int64_t j = 0; j < kShared; j += kLanes) sizes = larger(sizes, load(from + j));
  const uint32_t most = largest(sizes);
  const bool finite = most < 0x7f800000u;
  const float shared = from_bits(finite ? most : static_cast<uint32_t>(kNan));
  const float d = most ? shared : 1.0f;
  const F steps = splat(kSquares ? 255.0f : 127.0f);
  if (d > 0x1p-90f && d < 0x1p90f) {  // a remainder that underflows is one of what becomes 0
    const Quotient q = quotient(d);
    for (int64_t j = 0; j < kShared; j += kLanes) store_codes<kSquares>(block + j, over(load(from + j), q) * steps);
  } else {
    for (int64_t j = 0; j < kShared; j += kLanes) store_codes<kSquares>(block + j, load(from + j) / splat(d) * steps);
  }
  if (!finite) std::memset(block, 0, kShared);
  std::memcpy(block + kShared, &shared, 4);
}

template <int kStored, bool kSquares>
TARGET FORCED void widen(const void* moment, int64_t i, int64_t n, float* to) {
  if (!moment) return;
  if (kStored == kHalf) return widen_half(static_cast<const uint16_t*>(moment) + i, to, n);
  const uint8_t* block = static_cast<const uint8_t*>(moment) + i / kShared * (kShared + 4);
  for (int64_t line = 0; line < 5; line++) ahead(block, line);
  widen_codes<kSquares>(block, to);
}

template <int kStored, bool kSquares>
TARGET FORCED void narrow(float* from, void* moment, int64_t i, int64_t n) {
  if (!moment) return;
  if (kStored == kHalf) return narrow_half(from, static_cast<uint16_t*>(moment) + i, n);
  for (int64_t j = n; j < kShared; j++) from[j] = 0.0f;
  narrow_codes<kSquares>(from, static_cast<uint8_t*>(moment) + i / kShared * (kShared + 4));
}

// One block of stored moments after the other, in float32 while it is updated. Roots of squares are what the step
// leaves where codes are to stand for them.
template <class Step, int kStored>
TARGET void stored_range(const Update& u, int64_t begin, int64_t end) {
  constexpr int64_t kBytes = Step::kGradient == kFloat32 ? 4 : 2;
  alignas(64) float first[kShared], second[kShared];
  float *a = u.first ? first : nullptr, *b = u.second ? second : nullptr;
  const Step rule(u);
  for (int64_t i = begin; i < end; i += kShared) {
    const int64_t n = end - i < kShared ? end - i : kShared;
    widen<kStored, false>(u.first, i, n, first);
    widen<kStored, true>(u.second, i, n, second);
    const char* gradient = static_cast<const char*>(u.gradient) + i * kBytes;
    int16_t *lo = u.lo ? u.lo + i : nullptr, *new_lo = u.lo ? u.new_lo + i : nullptr;
    const Draws draws = {u.low, u.high, u.element + static_cast<uint32_t>(i)};
    elements(rule, {u.hi + i, lo, gradient, a, b, u.new_hi + i, new_lo, a, b, draws}, 0, n);
    narrow<kStored, false>(first, u.new_first, i, n);
    narrow<kStored, true>(second, u.new_second, i, n);
  }
}

template <class Step, class Rooted = Step>
TARGET void range(const Update& u, int64_t begin, int64_t end) {
  if (u.stored == kExact) return exact_range<Step>(u, begin, end);
  u.stored == kHalf ? stored_range<Step, kHalf>(u, begin, end) : stored_range<Rooted, kCodes>(u, begin, end);
}

template <int kKind>
TARGET void adam_range(const Update& u, int64_t begin, int64_t end) {
  range<Adam<kKind>, Adam<kKind, true>>(u, begin, end);
}

template <int kKind>
TARGET FORCED void add_block(float* total, const void* gradient, F scale, bool fresh, int64_t i) {
  for (int64_t j = i; j < i + kBlock; j += kLanes) {
    const F g = load_gradient<kKind>(gradient, j);
    store(total + j, fresh ? g * scale : fma(scale, g, load(total + j)));
  }
}

template <int kKind>
TARGET void add(const Sum& s, int64_t begin, int64_t end) {
  constexpr int64_t kBytes = kKind == kFloat32 ? 4 : 2;
  const F scale = splat(s.scale);
  const bool fresh = s.fresh != 0;
  const char* g = static_cast<const char*>(s.gradient);
  int64_t i = begin;
  for (; i + kBlock <= end; i += kBlock) {
    ahead(g + i * kBytes, 0), ahead(s.total + i, 0), ahead(s.total + i, 1);
    if (kBytes == 4) ahead(g + i * kBytes, 1);
    add_block<kKind>(s.total, g, scale, fresh, i);
  }
  if (i >= end) return;
  float total[kBlock] = {};
  char gradient[kBlock * kBytes] = {};
  const size_t n = static_cast<size_t>(end - i);
  std::memcpy(total, s.total + i, n * 4);
  std::memcpy(gradient, g + i * kBytes, n * kBytes);
  add_block<kKind>(total, gradient, scale, fresh, 0);
  std::memcpy(s.total + i, total, n * 4);
}

constexpr Range<Sum> kSums[3] = {add<kBfloat16>, add<kFloat16>, add<kFloat32>};

constexpr Range<Update> kRanges[][3] = {
    {adam_range<kBfloat16>, adam_range<kFloat16>, adam_range<kFloat32>},
    {range<Sgd<kBfloat16>>, range<Sgd<kFloat16>>, range<Sgd<kFloat32>>},
    {range<Lion<kBfloat16>>, range<Lion<kFloat16>>, range<Lion<kFloat32>>},
};
#endif
