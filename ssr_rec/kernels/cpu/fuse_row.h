// What follows the product of one row of one view: bias, GELU, residual, LayerNorm; both directions.
#pragma once

#include "rows.h"

#include <cmath>

namespace ssr_rec {

template <typename T>
using Vec = Vectorized<T>;

// erf(z / sqrt(2)).
inline Vec<double> erf_scaled(const Vec<double>& z) {
  return (z * Vec<double>(M_SQRT1_2)).erf();
}

// 1 / x to float precision.
inline Vec<float> reciprocal(const Vec<float>& x) {
#if defined(CPU_CAPABILITY_AVX512)
  const Vec<float> rough = _mm512_rcp14_ps(x);
  return rough * at::vec::fnmadd(x, rough, Vec<float>(2.f));
#else
  return Vec<float>(1.f) / x;
#endif
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
  return x * p * reciprocal(q);
}

// For x <= 0; 2e-7 of the exact one.
inline Vec<float> exponential(const Vec<float>& x) {
#if defined(CPU_CAPABILITY_AVX512)
  using at::vec::fmadd;
  // 2^-125 is the least power that leaves every result a normal number.
  const Vec<float> power = at::vec::clamp_min(x * Vec<float>(static_cast<float>(M_LOG2E)), Vec<float>(-125.f));
  const Vec<float> whole = power.round(), part = power - whole;
  Vec<float> p = fmadd(part, Vec<float>(0.0013274478f), Vec<float>(0.009681024f));
  p = fmadd(part, p, Vec<float>(0.055507693f));
  p = fmadd(part, p, Vec<float>(0.24021997f));
  p = fmadd(part, p, Vec<float>(0.6931469f));
  p = fmadd(part, p, Vec<float>(1.0000001f));
  return _mm512_scalef_ps(p, whole);
#else
  return x.exp_u20();
#endif
}

inline Vec<double> exponential(const Vec<double>& x) {
  return x.exp();
}

// The share of a standard normal below z; gelu(z) = z * normal_below(z).
template <typename T>
inline Vec<T> normal_below(const Vec<T>& z) {
  return at::vec::fmadd(erf_scaled(z), Vec<T>(T(0.5)), Vec<T>(T(0.5)));
}

template <typename T>
inline Vec<T> normal_density(const Vec<T>& z) {
  return exponential(z * z * Vec<T>(T(-0.5))) * Vec<T>(T(M_2_SQRTPI * M_SQRT1_2 / 2));
}

// What a view adds to its products, and does to the result; residual is one row, and all but bias may be null.
template <typename T>
struct Epilogue {
  const T* bias;
  const T* residual;
  const T* scale;
  const T* shift;
};

// y = LN(gelu(z + bias) + residual) * scale + shift for one row; a has room for d.
template <typename T>
void fuse_row(const T* z, const Epilogue<T>& view, T* y, T* stats, T* a, int64_t d, T eps) {
  Vec<T> sum(T(0));
  T* to = view.scale ? a : y;
  for_vectors<T>(d, [&](int64_t i, auto count) {
    const Vec<T> zi = load(z + i, count) + load(view.bias + i, count);
    Vec<T> ai = zi * normal_below(zi);
    if (view.residual) {
      ai = ai + load(view.residual + i, count);
    }
    store(to + i, ai, count);
    sum = sum + ai;
  });
  if (!view.scale) {
    return;
  }
  const T mean = sum_lanes(sum) / static_cast<T>(d);
  Vec<T> squares(T(0));
  for_vectors<T>(d, [&](int64_t i, auto count) {
    const Vec<T> centred = only(load(a + i, count) - Vec<T>(mean), count);
    squares = at::vec::fmadd(centred, centred, squares);
  });
  const T rstd = T(1) / std::sqrt(sum_lanes(squares) / static_cast<T>(d) + eps);
  stats[0] = mean;
  stats[1] = rstd;
  for_vectors<T>(d, [&](int64_t i, auto count) {
    const Vec<T> normal = (load(a + i, count) - Vec<T>(mean)) * Vec<T>(rstd);
    store(y + i, at::vec::fmadd(normal, load(view.scale + i, count), load(view.shift + i, count)), count);
  });
}

// Sums over rows for one view.
template <typename T>
struct EpilogueGrad {
  T* bias;
  T* scale; // null without, as is shift
  T* shift;
};

template <typename T, typename Count>
inline void add_to(T* sum, const Vec<T>& value, Count count) {
  store(sum, load(sum, count) + value, count);
}

// grad_z of one row, and grad_residual where that is not null; scratch has room for 2 d.
template <typename T>
void fuse_row_backward(
    const T* grad, const T* z, const Epilogue<T>& view, const T* stats, T* grad_z, T* grad_residual,
    const EpilogueGrad<T>& sums, T* scratch, int64_t d) {
  T *normals = scratch, *slopes = scratch + d;
  Vec<T> pull(T(0)), turn(T(0));
  const T mean = view.scale ? stats[0] : T(0), rstd = view.scale ? stats[1] : T(1);
  for_vectors<T>(d, [&](int64_t i, auto count) {
    const Vec<T> zi = load(z + i, count) + load(view.bias + i, count), below = normal_below(zi);
    store(slopes + i, at::vec::fmadd(zi, normal_density(zi), below), count);
    if (view.scale) {
      Vec<T> ai = zi * below;
      if (view.residual) {
        ai = ai + load(view.residual + i, count);
      }
      const Vec<T> normal = (ai - Vec<T>(mean)) * Vec<T>(rstd), gi = load(grad + i, count);
      store(normals + i, normal, count);
      add_to(sums.scale + i, gi * normal, count);
      add_to(sums.shift + i, gi, count);
      const Vec<T> scaled = gi * load(view.scale + i, count);
      pull = pull + scaled;
      turn = at::vec::fmadd(scaled, normal, turn);
    }
  });
  const Vec<T> mean_pull(sum_lanes(pull) / static_cast<T>(d)), mean_turn(sum_lanes(turn) / static_cast<T>(d));
  for_vectors<T>(d, [&](int64_t i, auto count) {
    Vec<T> ga = load(grad + i, count);
    if (view.scale) {
      const Vec<T> tangent = ga * load(view.scale + i, count) - mean_pull - load(normals + i, count) * mean_turn;
      ga = tangent * Vec<T>(rstd);
    }
    if (grad_residual) {
      store(grad_residual + i, ga, count);
    }
    const Vec<T> gz = ga * load(slopes + i, count);
    add_to(sums.bias + i, gz, count);
    store(grad_z + i, gz, count);
  });
}

} // namespace ssr_rec
