// The lane types of the CPU: one SIMD register of float or double, as wide as the instruction set that this file is
// compiled for.
//
// They are written with the vector extensions of GCC and Clang, so one text serves SSE2, AVX2, AVX-512 and NEON. The
// arithmetic maps to single instructions. Loads and stores are unaligned. All of this stands in a namespace of its own
// for each instruction set, and it includes no header of std or torch with inline functions. Otherwise the linker might
// keep the AVX-512 copy of a shared inline function, and an older machine would stop with SIGILL.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "../launch.h"

#if defined(__AVX512F__)
#define ABSGD_REGISTER_BYTES 64
#elif defined(__AVX2__)
#define ABSGD_REGISTER_BYTES 32
#else
#define ABSGD_REGISTER_BYTES 16
#endif

namespace absgd {
namespace ABSGD_ISA_NAMESPACE {

// The storage formats that C++ has no arithmetic type for.
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

ABSGD_FN int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

template <class T>
struct Traits;
template <>
struct Traits<float> {
  using Int = int32_t;
  using UInt = uint32_t;
  static constexpr int mantissa = 23;
  static constexpr float round = 12582912.0f;  // 1.5 * 2^23: adding it leaves a rounded integer in the low bits
  static constexpr float exp_bias = 126;       // exponent bias - 1
  static constexpr float exp_lowest = -87.3f, exp_highest = 89.5f;  // there 2^(k-1) is 0 and inf, see exp
  static constexpr float ln2_hi = 0.693359375f, ln2_lo = -2.12194440e-4f;
  // Minimax polynomial on |x| <= ln(2)/2 with exp(0) = 1 exactly: error 2.6e-9 relative, 0.9 ulp after rounding.
  static constexpr int exp_terms = 7;
  static constexpr float exp_coefficients[exp_terms] = {
      1.0f, 1.00000004967f, 0.500000043465f, 0.166663653155f, 0.0416647765084f, 0.00837902069907f, 0.00140612762496f};
  static constexpr int log_terms = 5;  // of the atanh series; the next term is below 2^-24
};
template <>
struct Traits<double> {
  using Int = int64_t;
  using UInt = uint64_t;
  static constexpr int mantissa = 52;
  static constexpr double round = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double exp_bias = 1022;
  static constexpr double exp_lowest = -708.4, exp_highest = 710.5;
  static constexpr double ln2_hi = 6.93145751953125e-1, ln2_lo = 1.42860682030941723212e-6;
  static constexpr int exp_terms = 14;  // of the Taylor series; the next term is 4e-18
  static constexpr double exp_coefficients[exp_terms] = {
      1.0,        1.0,         1.0 / 2,      1.0 / 6,       1.0 / 24,       1.0 / 120,       1.0 / 720,
      1.0 / 5040, 1.0 / 40320, 1.0 / 362880, 1.0 / 3628800, 1.0 / 39916800, 1.0 / 479001600, 1.0 / 6227020800};
  static constexpr int log_terms = 12;
};

template <class To, class From>
ABSGD_FN To bits_as(From value) {
  static_assert(sizeof(To) == sizeof(From), "bits_as keeps the size");
  To out;
  __builtin_memcpy(&out, &value, sizeof(out));
  return out;
}

// N values of type T side by side. Bytes: their size, at most that of a register. sizeof(T) makes a single value.
template <class T, int Bytes = ABSGD_REGISTER_BYTES>
struct Lanes {
  using Scalar = T;
  using Int = typename Traits<T>::Int;
  using UInt = typename Traits<T>::UInt;
  static constexpr int N = Bytes / int(sizeof(T));
  typedef T V __attribute__((vector_size(Bytes)));
  typedef Int I __attribute__((vector_size(Bytes)));  // also the type of a comparison's result
  typedef UInt U __attribute__((vector_size(Bytes)));
  typedef uint16_t Half __attribute__((vector_size(Bytes / sizeof(T) * 2)));
  typedef uint8_t Flags __attribute__((vector_size(Bytes / sizeof(T))));

  static ABSGD_FN V set(T x) { return V{} + x; }
  static ABSGD_FN I set_int(Int x) { return I{} + x; }
  static ABSGD_FN V select(I condition, V a, V b) { return condition ? a : b; }
  // Each is one instruction on x86, which gives b if a or b is NaN. A constant operand has to be hidden: GCC 12 turns a
  // comparison with a constant around, finds that NaN would then give something else, and compares and blends.
  static ABSGD_FN V max(V a, V b) { return a > b ? a : b; }
  static ABSGD_FN V min(V a, V b) { return a < b ? a : b; }
  static ABSGD_FN V hidden(V x) {
#if defined(__AVX512F__)
    asm("" : "+v"(x));
#elif defined(__SSE2__)
    asm("" : "+x"(x));
#endif
    return x;
  }
  static ABSGD_FN I iota() {
    I out;
    for (int j = 0; j < N; ++j) out[j] = j;
    return out;
  }

  // ---- memory: unaligned, in any storage format ----
  static ABSGD_FN V load(const T* p) {
    V out;
    __builtin_memcpy(&out, p, sizeof(out));
    return out;
  }
  static ABSGD_FN void store(T* p, V x) { __builtin_memcpy(p, &x, sizeof(x)); }
  static ABSGD_FN V load(const bf16* p) {
    Half h;
    __builtin_memcpy(&h, p, sizeof(h));
    return bits_as<V>(__builtin_convertvector(h, U) << 16);
  }
  static ABSGD_FN void store(bf16* p, V x) {
    const U u = bits_as<U>(x);
    const U rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;  // to nearest, ties to even
    const Half h = __builtin_convertvector(U(x == x ? I(rounded) : set_int(0x7fc0)), Half);
    __builtin_memcpy(p, &h, sizeof(h));
  }
  // 2 N adjacent values at once: the even ones in the first register, and the odd ones in the second. No value changes
  // its lane on the way. This takes 3 instructions instead of 6, and 11 instead of 18 for a store.
  static ABSGD_FN void load_even_odd(const bf16* p, V* out) {
    U u;
    __builtin_memcpy(&u, p, sizeof(u));
    out[0] = bits_as<V>(u << 16);
    out[1] = bits_as<V>(u & 0xffff0000);
  }
  // Rounds as store does. The last 16 bits of a NaN have to be 0, or rounding may make a number of it.
  static ABSGD_FN void store_even_odd(bf16* p, const V* x) {
    U u[2];
    for (int j = 0; j < 2; ++j) {
      u[j] = bits_as<U>(x[j]);
      u[j] += 0x7fff + ((u[j] >> 16) & 1);
    }
    const U both = (u[0] >> 16) | (u[1] & 0xffff0000);
    __builtin_memcpy(p, &both, sizeof(both));
  }
  static ABSGD_FN V load(const f16* p) {
    Half h;
    __builtin_memcpy(&h, p, sizeof(h));
    const U u = __builtin_convertvector(h, U);
    // The bits are shifted to where float has them, and one multiplication rescales the exponent. This serves normal
    // and subnormal numbers.
    const V small = bits_as<V>((u & 0x7fff) << 13) * set(0x1p112f);
    const U special = ((u & 0x7fff) << 13) | 0x7f800000;
    const U magnitude = U(((u & 0x7c00) == 0x7c00) ? I(special) : bits_as<I>(small));
    return bits_as<V>(magnitude | ((u & 0x8000) << 16));
  }
  static ABSGD_FN void store(f16* p, V x) {
    const U u = bits_as<U>(x), sign = (u >> 16) & 0x8000;
    const V a = bits_as<V>(u & 0x7fffffff);
    const U bits = bits_as<U>(a);
    const U normal = (bits + 0xfff + ((bits >> 13) & 1) - 0x38000000) >> 13;  // to nearest, ties to even
    const U subnormal = bits_as<U>(a + set(0.5f)) - bits_as<U>(set(0.5f));    // the addition rounds
    const I nan_or_inf = a != a ? set_int(0x7e00) : set_int(0x7c00);
    const I finite = a < set(0x1p-14f) ? I(subnormal) : I(normal);
    const U out = U(a < set(65520.0f) ? finite : nan_or_inf) | sign;
    const Half h = __builtin_convertvector(out, Half);
    __builtin_memcpy(p, &h, sizeof(h));
  }
  static ABSGD_FN I load_flags(const uint8_t* p) {
    Flags b;
    __builtin_memcpy(&b, p, sizeof(b));
    return __builtin_convertvector(b, I) != 0;
  }

  // ---- reductions over the lanes, always in the same order: by halves, by quarters, ... ----
  static ABSGD_FN T sum(V x) {
    return fold<Bytes>(x, [](auto a, auto b) { return a + b; });
  }
  static ABSGD_FN T highest(V x) {
    return fold<Bytes>(x, [](auto a, auto b) { return a > b ? a : b; });
  }
  template <int Width, class W, class F>
  static ABSGD_FN T fold(W x, F f) {
    if constexpr (Width > 16) {
      typedef T Part __attribute__((vector_size(Width / 2)));
      Part half[2];
      __builtin_memcpy(half, &x, Width);
      return fold<Width / 2>(f(half[0], half[1]), f);
    } else if constexpr (sizeof(T) == 8) {
      return f(T(x[0]), T(x[1]));
    } else {
      return f(f(T(x[0]), T(x[2])), f(T(x[1]), T(x[3])));
    }
  }

  // ---- functions ----
  // Compilers make one instruction of this loop over the lanes (checked in the disassembly).
  static ABSGD_FN V sqrt(V x) {
    V out;
    for (int j = 0; j < N; ++j) out[j] = sizeof(T) == 8 ? __builtin_sqrt(x[j]) : __builtin_sqrtf(x[j]);
    return out;
  }
  // exp(x) = 2 exp(r) 2^(k-1), |r| <= ln(2)/2. No branch tests for special cases. x is clamped to where 2^(k-1) has
  // become 0 or inf, so results below 2^-125 are 0. A NaN passes max and min, as their second operand, and reaches the
  // final product.
  static ABSGD_FN V exp(V x) { return exp_below(min(hidden(set(Traits<T>::exp_highest)), x)); }
  // exp(x) for an x that is known not to exceed exp_highest, as a logit minus the maximum of its row. This saves one
  // instruction in sixteen.
  static ABSGD_FN V exp_below(V x) {
    exp_below_each<1>(&x);
    return x;
  }
  // The same of kCount registers in place, step by step for all of them. An exponential is a chain of 15 instructions,
  // each of which waits 4 cycles for the one before. A processor finds work for its two units of arithmetic only if
  // other chains are near: 0.247 -> 0.211 ns per element with four chains on AVX-512, 0.447 -> 0.381 on AVX2.
  template <int kCount>
  static ABSGD_FN void exp_below_each(V* x) {
    using K = Traits<T>;
    V shifted[kCount], r[kCount], p[kCount];
    const V lowest = hidden(set(K::exp_lowest));
    for (int u = 0; u < kCount; ++u) x[u] = max(lowest, x[u]);
    for (int u = 0; u < kCount; ++u) shifted[u] = x[u] * set(T(1.4426950408889634)) + set(K::round + K::exp_bias);
    for (int u = 0; u < kCount; ++u) r[u] = shifted[u] - set(K::round + K::exp_bias);
    for (int u = 0; u < kCount; ++u) x[u] = x[u] - r[u] * set(K::ln2_hi);
    for (int u = 0; u < kCount; ++u) r[u] = x[u] - r[u] * set(K::ln2_lo);
    for (int u = 0; u < kCount; ++u) p[u] = set(2 * K::exp_coefficients[K::exp_terms - 1]);
    for (int j = K::exp_terms - 2; j >= 0; --j)
      for (int u = 0; u < kCount; ++u) p[u] = p[u] * r[u] + set(2 * K::exp_coefficients[j]);
    for (int u = 0; u < kCount; ++u) x[u] = p[u] * bits_as<V>(bits_as<I>(shifted[u]) << K::mantissa);
  }
  // log(x) for x > 0: x = 2^k m with sqrt(1/2) <= m < sqrt(2), and log m = 2 atanh((m - 1) / (m + 1)). inf and NaN are
  // returned as they are.
  static ABSGD_FN V log(V x) {
    using K = Traits<T>;
    const I offset = bits_as<I>(set(T(0.70710678118654752)));
    const I shifted = bits_as<I>(x) - offset;
    const I k = shifted >> K::mantissa;
    const V m = bits_as<V>(bits_as<I>(x) - (k << K::mantissa));
    const V s = (m - set(1)) / (m + set(1)), s2 = s * s;
    V series = set(T(1.0 / (2 * K::log_terms + 1)));
    for (int j = K::log_terms - 1; j >= 1; --j) series = series * s2 + set(T(1.0 / (2 * j + 1)));
    const V log_m = s * set(2) + s * set(2) * s2 * series;
    const V kf = __builtin_convertvector(k, V);
    const V out = kf * set(K::ln2_hi) + (log_m + kf * set(K::ln2_lo));
    return x < set(T(__builtin_inf())) ? out : x;
  }
  // log(1 + x) for x >= 0. The second term restores what the rounding of 1 + x has lost.
  static ABSGD_FN V log1p(V x) {
    const V u = set(1) + x;
    const V out = log(u) + (x - (u - set(1))) / u;
    return u < set(T(__builtin_inf())) ? out : u;
  }
};

// ---- templates over dtypes: f(Type<storage type>{}, Type<real type>{}) ----------------------------------------------

template <class T>
struct Type {
  using type = T;
};

template <class F>
ABSGD_FN auto for_storage(Dtype dtype, F f) {
  switch (dtype) {
    case Dtype::f64:
      return f(Type<double>{}, Type<double>{});
    case Dtype::bf16:
      return f(Type<bf16>{}, Type<float>{});
    case Dtype::f16:
      return f(Type<f16>{}, Type<float>{});
    default:
      return f(Type<float>{}, Type<float>{});
  }
}

template <class F>
ABSGD_FN auto for_real(Dtype dtype, F f) {
  return dtype == Dtype::f64 ? f(Type<double>{}) : f(Type<float>{});
}

// A lane type of one double, for the update of the state. The builtins are calls into libm, not inline functions.
struct StateLane {
  using V = double;
  static ABSGD_FN V set(double x) { return x; }
  static ABSGD_FN V select(bool condition, V a, V b) { return condition ? a : b; }
  static ABSGD_FN V exp(V x) { return __builtin_exp(x); }
  static ABSGD_FN V log(V x) { return __builtin_log(x); }
  static ABSGD_FN V log1p(V x) { return __builtin_log1p(x); }
  static ABSGD_FN V sqrt(V x) { return __builtin_sqrt(x); }
};

}  // namespace ABSGD_ISA_NAMESPACE
}  // namespace absgd
