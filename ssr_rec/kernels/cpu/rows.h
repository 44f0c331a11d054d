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
  return at::vec::vec_reduce_all<A>([](const auto& a, const auto& b) { return a + b; }, value);
}

// 0 where x <= 0 and NaN where x is, like torch.relu.
template <typename A>
inline Vectorized<A> relu(const Vectorized<A>& x) {
  return at::vec::clamp_min(x, Vectorized<A>(A(0)));
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

} // namespace ssr_rec
