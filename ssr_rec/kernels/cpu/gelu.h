// The exact GELU, z times the share of a standard normal below z, and its slope.
#pragma once

#include "rows.h"

#include <cmath>
#include <utility>

namespace ssr_rec {

template <typename T>
using Vec = Vectorized<T>;

// erf(z / sqrt(2)).
inline Vec<double> erf_scaled(const Vec<double>& z) {
  return (z * Vec<double>(M_SQRT1_2)).erf();
}

// The rational approximation of erf of Eigen and XLA, 1e-7 of the exact one: half the operations of an exponential.
inline Vec<float> erf_scaled(const Vec<float>& z) {
  using at::vec::fmadd;
  // A NaN passes clamp_min and clamp_max as it is.
  const Vec<float> x = at::vec::clamp_max(
      at::vec::clamp_min(z * Vec<float>(static_cast<float>(M_SQRT1_2)), Vec<float>(-4.f)), Vec<float>(4.f));
  const Vec<float> y = x * x;
  Vec<float> p = fmadd(y, Vec<float>(-2.72614225801306e-10f), Vec<float>(2.77068142495902e-08f));
  p = fmadd(y, p, Vec<float>(-2.10102402082508e-06f));
  p = fmadd(y, p, Vec<float>(-5.69250639462346e-05f));
  p = fmadd(y, p, Vec<float>(-7.34990630326855e-04f));
  p = fmadd(y, p, Vec<float>(-2.95459980854025e-03f));
  p = fmadd(y, p, Vec<float>(-1.60960333262415e-02f));
  Vec<float> q = fmadd(y, Vec<float>(-1.45660718464996e-05f), Vec<float>(-2.13374055278905e-04f));
  q = fmadd(y, q, Vec<float>(-1.68282697438203e-03f));
  q = fmadd(y, q, Vec<float>(-7.37332916720468e-03f));
  q = fmadd(y, q, Vec<float>(-1.42647390514189e-02f));
  return x * p * (Vec<float>(1.f) / q);
}

// A NaN is lost.
inline Vec<float> exponential(const Vec<float>& x) {
  return x.exp_u20();
}

inline Vec<double> exponential(const Vec<double>& x) {
  return x.exp();
}

// The share of a standard normal below z.
template <typename T>
inline Vec<T> normal_below(const Vec<T>& z) {
  return at::vec::fmadd(erf_scaled(z), Vec<T>(T(0.5)), Vec<T>(T(0.5)));
}

template <typename T>
inline Vec<T> normal_density(const Vec<T>& z) {
  return exponential(z * z * Vec<T>(T(-0.5))) * Vec<T>(T(M_2_SQRTPI * M_SQRT1_2 / 2));
}

template <typename T>
inline Vec<T> gelu(const Vec<T>& z) {
  return z * normal_below(z);
}

// The second is d gelu / d z.
template <typename T>
inline std::pair<Vec<T>, Vec<T>> gelu_and_slope(const Vec<T>& z) {
  const Vec<T> below = normal_below(z);
  return {z * below, at::vec::fmadd(z, normal_density(z), below)};
}

#if defined(CPU_CAPABILITY_AVX512)
// Of t = |z|: the share of a standard normal above t, and that less t times the density at t. Lane k holds the
// coefficients, constant first, of the fit by Chebyshev polynomials of degree 4 in t GELU_NODES - k between k - 1/2 and
// k + 1/2. GELU is then within 3e-7 and its slope within 6e-7 of the exact ones, at half the operations of erf.
constexpr float GELU_NODES = 2.75f, GELU_LAST = 15.49f / GELU_NODES;
alignas(64) constexpr float ABOVE[5][16] = {
    {0.5f, 0.358064801f, 0.233529449f, 0.13765645f, 0.0728975683f, 0.0345181711f, 0.0145614762f, 0.00545677822f,
     0.00181240728f, 0.000532576232f, 0.000138257135f, 3.1671334e-05f, 6.39594464e-06f, 1.13778992e-06f, 1.78178681e-07f, 1.56754041e-08f},
    {-0.14506954f, -0.13578786f, -0.111358277f, -0.0800124481f, -0.0503691733f, -0.0277806595f, -0.0134241981f, -0.00568328425f,
     -0.0021080079f, -0.000685019419f, -0.000195023415f, -4.86428144e-05f, -1.06290117e-05f, -2.03471131e-06f, -3.41225388e-07f, -5.01303248e-08f},
    {-6.09355266e-06f, 0.00897755753f, 0.0147248162f, 0.0158699937f, 0.0133206146f, 0.00918364618f, 0.00532534719f, 0.00263036066f,
     0.0011150511f, 0.000407661195f, 0.00012896469f, 3.53863943e-05f, 8.43631915e-06f, 1.74982586e-06f, 3.16086982e-07f, 4.97667934e-08f},
    {0.00323134963f, 0.00258317031f, 0.00115554186f, -0.000325313478f, -0.00122655858f, -0.00140421872f, -0.00111069495f, -0.000687869673f,
     -0.000349007256f, -0.00014829087f, -5.34273131e-05f, -1.64507383e-05f, -4.35185211e-06f, -9.9278634e-07f, -1.95852721e-07f, -3.34816974e-08f},
    {-7.85614102e-05f, -0.000281475077f, -0.000398286473f, -0.00031520988f, -0.000130202403f, 2.97572806e-05f, 0.000102334554f, 0.000100470847f,
     6.71609523e-05f, 3.48061076e-05f, 1.46647517e-05f, 5.14177373e-06f, 1.52060863e-06f, 3.82575365e-07f, 8.23681532e-08f, 1.52396566e-08f},
};
alignas(64) constexpr float ABOVE_SLOPE[5][16] = {
    {0.49999997f, 0.222276092f, 0.0108128525f, -0.102379046f, -0.128576159f, -0.104382798f, -0.0659830421f, -0.0343268923f,
     -0.0150527917f, -0.0056335344f, -0.00181252533f, -0.000503649819f, -0.000121244651f, -2.53417238e-05f, -4.60621868e-06f, -4.47962492e-07f},
    {-0.290137559f, -0.253617465f, -0.163817808f, -0.0648078769f, 0.00582379196f, 0.0362740159f, 0.03705604f, 0.0254591964f,
     0.0136253322f, 0.00596809248f, 0.00218929793f, 0.000681207457f, 0.000181201001f, 4.14194874e-05f, 8.16566626e-06f, 1.39211193e-06f},
    {-3.63639483e-05f, 0.0347223245f, 0.0511101708f, 0.0445933677f, 0.0251007024f, 0.00637621805f, -0.00404862035f, -0.006521584f,
     -0.00497649703f, -0.0027359426f, -0.00118960638f, -0.000424706552f, -0.000126919884f, -3.21124862e-05f, -6.9299299e-06f, -1.28206557e-06f},
    {0.0129929092f, 0.00918168668f, 0.00144003797f, -0.00506024389f, -0.00696729589f, -0.00501271849f, -0.00198890246f, 5.59788459e-05f,
     0.000748874561f, 0.000658020203f, 0.000372473907f, 0.00016049562f, 5.56828709e-05f, 1.59752799e-05f, 3.84775285e-06f, 7.85502209e-07f},
    {-0.000469962426f, -0.00162144785f, -0.00200461084f, -0.001102507f, 0.000108659202f, 0.000743126147f, 0.000683157181f, 0.000328504946f,
     4.50089028e-05f, -6.55816402e-05f, -6.70439767e-05f, -3.83372098e-05f, -1.60653581e-05f, -5.32287322e-06f, -1.44215153e-06f, -3.2545708e-07f},
};

// Where in the tables a size lies: the lane, and the distance from its node.
struct GeluPlace {
  __m512i lane;
  __m512 from;
};

inline GeluPlace gelu_place(__m512 size) {
  // Added, it leaves no bits for what is behind the point: the sum's last bits are the nearest whole number.
  const __m512 nodes = _mm512_set1_ps(GELU_NODES), whole = _mm512_set1_ps(0x1.8p23f);
  const __m512 within = _mm512_min_ps(size, _mm512_set1_ps(GELU_LAST));
  const __m512 shifted = _mm512_fmadd_ps(within, nodes, whole);
  return {_mm512_castps_si512(shifted), _mm512_fmsub_ps(within, nodes, _mm512_sub_ps(shifted, whole))};
}

inline __m512 from_table(const float (&table)[5][16], const GeluPlace& place) {
  const auto at = [&](int power) { return _mm512_permutexvar_ps(place.lane, _mm512_load_ps(table[power])); };
  __m512 value = at(4);
  for (int power = 3; power >= 0; --power) {
    value = _mm512_fmadd_ps(value, place.from, at(power));
  }
  return value;
}

inline Vec<float> gelu(const Vec<float>& z) {
  const __m512 size = _mm512_abs_ps(z);
  const __m512 above = from_table(ABOVE, gelu_place(size));
  // max gives its second operand for a NaN, and the sum keeps it.
  return _mm512_fnmadd_ps(size, above, _mm512_max_ps(_mm512_setzero_ps(), z));
}

inline std::pair<Vec<float>, Vec<float>> gelu_and_slope(const Vec<float>& z) {
  const __m512 size = _mm512_abs_ps(z), zero = _mm512_setzero_ps();
  const GeluPlace place = gelu_place(size);
  const __m512 value = _mm512_fnmadd_ps(size, from_table(ABOVE, place), _mm512_max_ps(zero, z));
  const __m512 slope = from_table(ABOVE_SLOPE, place);
  const __mmask16 below_zero = _mm512_cmp_ps_mask(z, zero, _CMP_LT_OQ);
  const __m512 turned = _mm512_mask_sub_ps(slope, _knot_mask16(below_zero), _mm512_set1_ps(1.f), slope);
  // A NaN has no place in the table.
  const __mmask16 nan = _mm512_cmp_ps_mask(z, z, _CMP_UNORD_Q);
  return {value, _mm512_mask_mov_ps(turned, nan, z)};
}
#elif defined(CPU_CAPABILITY_AVX2)
// Of t = |z|: exp(-t^2 / 2), and the share of a standard normal above t as that times a polynomial in 1 / (1 + .28 t) (the
// form of Abramowitz and Stegun, 7.1.26, fitted for t times the share: within 6e-9 of the exact one before rounding). One
// exponential serves both the value and the slope.
struct GeluTail {
  __m256 size, above, exponential;
};

inline GeluTail gelu_tail(__m256 z) {
  const auto all = [](float value) { return _mm256_set1_ps(value); };
  const __m256 size = _mm256_andnot_ps(all(-0.f), z);
  // Further out both are 0 beside z; a NaN stays, being the second.
  const __m256 t = _mm256_min_ps(all(12.f), size);
  // 2^power by its nearest whole number, whose bits the sum leaves last, and what is left of it.
  const __m256 power = _mm256_mul_ps(_mm256_mul_ps(t, t), all(-0.5f * static_cast<float>(M_LOG2E)));
  const __m256 shifted = _mm256_add_ps(power, all(0x1.8p23f));
  const __m256 rest = _mm256_sub_ps(power, _mm256_sub_ps(shifted, all(0x1.8p23f)));
  __m256 part = _mm256_fmadd_ps(rest, all(0.0013264725f), all(0.00967151299f));
  part = _mm256_fmadd_ps(part, rest, all(0.0555073358f));
  part = _mm256_fmadd_ps(part, rest, all(0.240222424f));
  part = _mm256_fmadd_ps(part, rest, all(0.693147004f));
  part = _mm256_fmadd_ps(part, rest, all(1.f));
  const __m256 exponential = _mm256_castsi256_ps(
      _mm256_add_epi32(_mm256_castps_si256(part), _mm256_slli_epi32(_mm256_castps_si256(shifted), 23)));
  const __m256 k = _mm256_div_ps(all(1.f), _mm256_fmadd_ps(t, all(0.28f), all(1.f)));
  __m256 mills = _mm256_fmadd_ps(k, all(-0.10703411777310906f), all(0.39493252957194463f));
  mills = _mm256_fmadd_ps(mills, k, all(-0.2452890812689404f));
  mills = _mm256_fmadd_ps(mills, k, all(0.275666592101357f));
  mills = _mm256_fmadd_ps(mills, k, all(0.06476451349189843f));
  mills = _mm256_fmadd_ps(mills, k, all(0.11695954582848189f));
  return {t, _mm256_mul_ps(_mm256_mul_ps(mills, k), exponential), exponential};
}

inline __m256 gelu_of(__m256 z, const GeluTail& tail) {
  // max gives its second operand for a NaN.
  return _mm256_fnmadd_ps(tail.size, tail.above, _mm256_max_ps(_mm256_setzero_ps(), z));
}

inline Vec<float> gelu(const Vec<float>& z) {
  return gelu_of(z, gelu_tail(z));
}

inline std::pair<Vec<float>, Vec<float>> gelu_and_slope(const Vec<float>& z) {
  const GeluTail tail = gelu_tail(z);
  const __m256 density = _mm256_mul_ps(tail.exponential, _mm256_set1_ps(static_cast<float>(M_2_SQRTPI * M_SQRT1_2 / 2)));
  const __m256 below_zero = _mm256_fnmadd_ps(tail.size, density, tail.above);
  const __m256 slope = _mm256_blendv_ps(_mm256_sub_ps(_mm256_set1_ps(1.f), below_zero), below_zero, z);
  return {gelu_of(z, tail), slope};
}
#endif

} // namespace ssr_rec
