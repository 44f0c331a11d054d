// Vector helpers for kernels that work on one row of one view at a time.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <vector>

namespace ssr_rec {

using at::vec::Vectorized;

// The type the arithmetic is done in.
template <typename T>
using Accumulate = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <typename A>
inline int64_t padded(int64_t n) {
  constexpr int64_t lanes = Vectorized<A>::size();
  return (n + lanes - 1) / lanes * lanes;
}

// body(offset, count) for every vector of n elements; count is a constant, except in a last part vector.
template <typename A, typename Body>
inline void for_vectors(int64_t n, Body&& body) {
  constexpr int64_t lanes = Vectorized<A>::size();
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) {
    body(i, std::integral_constant<int64_t, lanes>());
  }
  if (i < n) {
    body(i, n - i);
  }
}

template <typename A, typename Count>
inline Vectorized<A> load(const A* from, Count count) {
  if constexpr (std::is_same_v<Count, int64_t>) {
    return Vectorized<A>::loadu(from, count);
  } else {
    return Vectorized<A>::loadu(from);
  }
}

template <typename A, typename Count>
inline void store(A* to, const Vectorized<A>& value, Count count) {
  if constexpr (std::is_same_v<Count, int64_t>) {
    value.store(to, static_cast<int>(count));
  } else {
    value.store(to);
  }
}

// value in the first count lanes, 0 behind them.
template <typename A, typename Count>
inline Vectorized<A> only(const Vectorized<A>& value, Count count) {
  if constexpr (std::is_same_v<Count, int64_t>) {
    return Vectorized<A>::set(Vectorized<A>(A(0)), value, count);
  } else {
    return value;
  }
}

template <typename A>
inline A sum_lanes(const Vectorized<A>& value) {
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (std::is_same_v<A, float>) {
    // In the order of sum_each: a row's sum must not depend on how many are summed together.
    const __m512 pairs = value + Vectorized<A>(_mm512_permute_ps(value, 0b01001110));
    const __m512 fours = _mm512_add_ps(pairs, _mm512_permute_ps(pairs, 0b10110001));
    const __m512 halves = _mm512_add_ps(fours, _mm512_shuffle_f32x4(fours, fours, 0b10110001));
    return _mm512_cvtss_f32(_mm512_add_ps(halves, _mm512_shuffle_f32x4(halves, halves, 0b01001110)));
  }
#endif
  return at::vec::vec_reduce_all<A>([](const auto& a, const auto& b) { return a + b; }, value);
}

#if defined(CPU_CAPABILITY_AVX512)
inline __m512 add_quarters(__m512 a, __m512 b) {
  return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0b10001000), _mm512_shuffle_f32x4(a, b, 0b11011101));
}

// Lane i of the result is the sum of value[i]; three instructions a pair instead of eight a vector.
inline __m512 sum_sixteen(const Vectorized<float>* value) {
  __m512 fours[4];
  for (int i = 0; i < 4; ++i) {
    const __m512 a = value[4 * i], b = value[4 * i + 1], c = value[4 * i + 2], e = value[4 * i + 3];
    const __m512d ab = _mm512_castps_pd(_mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)));
    const __m512d ce = _mm512_castps_pd(_mm512_add_ps(_mm512_unpacklo_ps(c, e), _mm512_unpackhi_ps(c, e)));
    fours[i] = _mm512_add_ps(
        _mm512_castpd_ps(_mm512_unpacklo_pd(ab, ce)), _mm512_castpd_ps(_mm512_unpackhi_pd(ab, ce)));
  }
  return add_quarters(add_quarters(fours[0], fours[1]), add_quarters(fours[2], fours[3]));
}
#endif

// sums[r] is the sum of value[r].
template <typename A, int R>
inline void sum_each(const Vectorized<A>* value, A* sums) {
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (std::is_same_v<A, float> && R == 16) {
    _mm512_storeu_ps(sums, sum_sixteen(value));
    return;
  }
#endif
  for (int r = 0; r < R; ++r) {
    sums[r] = sum_lanes(value[r]);
  }
}

// 0 where x <= 0 and NaN where x is, like torch.relu.
template <typename A>
inline Vectorized<A> relu(const Vectorized<A>& x) {
  return at::vec::clamp_min(x, Vectorized<A>(A(0)));
}

// max(x, floor) for a floor that is not negative. A NaN x with its sign set is lost: look for NaNs elsewhere.
template <typename A>
inline Vectorized<A> at_least(const Vectorized<A>& x, const Vectorized<A>& floor) {
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (std::is_same_v<A, float>) {
    // The bits of floats that are not negative order like integers, whose units do not compete with the sums' adders.
    return Vectorized<A>(_mm512_castsi512_ps(_mm512_max_epi32(_mm512_castps_si512(x), _mm512_castps_si512(floor))));
  }
#endif
  return at::vec::clamp_min(x, floor);
}

// sum + (x <= threshold ? 0 : value): a NaN counts as above, as in the gradient of torch.relu.
template <typename A>
inline Vectorized<A> add_above(
    const Vectorized<A>& sum,
    const Vectorized<A>& x,
    const Vectorized<A>& threshold,
    const Vectorized<A>& value) {
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (std::is_same_v<A, float>) {
    return _mm512_mask_add_ps(sum, _mm512_cmp_ps_mask(x, threshold, _CMP_NLE_UQ), sum, value);
  }
#endif
  return sum + Vectorized<A>::blendv(value, Vectorized<A>(A(0)), x <= threshold);
}

// How many lanes add_above would add to.
template <typename A>
inline int64_t count_above(const Vectorized<A>& x, const Vectorized<A>& threshold) {
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (std::is_same_v<A, float>) {
    return __builtin_popcount(_mm512_cmp_ps_mask(x, threshold, _CMP_NLE_UQ));
  }
#endif
  const auto dead = static_cast<uint64_t>(relu(x - threshold).zero_mask());
  return Vectorized<A>::size() - __builtin_popcountll(dead);
}

// count_above of four vectors that lie side by side.
template <typename A>
inline int64_t count_above_four(const A* x, const Vectorized<A>& threshold) {
  using V = Vectorized<A>;
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (std::is_same_v<A, float>) {
    const auto above = [&](int k) { return _mm512_cmp_ps_mask(V::loadu(x + k * V::size()), threshold, _CMP_NLE_UQ); };
    // One transfer out of the mask registers for all: it costs more than a comparison.
    const auto all = _mm512_kunpackd(_mm512_kunpackw(above(0), above(1)), _mm512_kunpackw(above(2), above(3)));
    return __builtin_popcountll(_cvtmask64_u64(all));
  }
#endif
  int64_t count = 0;
  for (int k = 0; k < 4; ++k) {
    count += count_above(V::loadu(x + k * V::size()), threshold);
  }
  return count;
}

} // namespace ssr_rec
