// What follows the product of one row of one view: bias, GELU, dropout, residual, LayerNorm; both directions.
#pragma once

#include "gelu.h"

namespace ssr_rec {

// What a view adds to its products, and does to the result; residual and keep are one row; all but bias may be null.
template <typename T>
struct Epilogue {
  const T* bias;
  const T* residual;
  const T* scale;
  const T* shift;
  const bool* keep;
  T kept; // what dropout multiplies the dims by that it keeps
};

// What dropout multiplies a row by. A loop of its own, of which the compiler makes vectors.
template <typename T>
inline void dropout_factors(const bool* keep, T kept, T* __restrict factors, int64_t d) {
  const auto* bytes = reinterpret_cast<const uint8_t*>(keep);
  for (int64_t i = 0; i < d; ++i) {
    factors[i] = static_cast<T>(static_cast<int32_t>(bytes[i])) * kept;
  }
}

// y = LN(dropout(gelu(z + bias)) + residual) * scale + shift for one row; scratch has room for 2 d.
template <typename T>
void fuse_row(const T* z, const Epilogue<T>& view, T* y, T* stats, T* scratch, int64_t d, T eps) {
  T *a = scratch, *factors = scratch + d;
  if (view.keep) {
    dropout_factors(view.keep, view.kept, factors, d);
  }
  Vec<T> sum(T(0));
  T* to = view.scale ? a : y;
  for_vectors<T>(d, [&](int64_t i, auto count) {
    const Vec<T> zi = load(z + i, count) + load(view.bias + i, count);
    Vec<T> ai = gelu(zi);
    if (view.keep) {
      ai = ai * load(factors + i, count);
    }
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

// grad_z of one row, and grad_residual where that is not null; scratch has room for 3 d.
template <typename T>
void fuse_row_backward(
    const T* grad, const T* z, const Epilogue<T>& view, const T* stats, T* grad_z, T* grad_residual,
    const EpilogueGrad<T>& sums, T* scratch, int64_t d) {
  T *normals = scratch, *slopes = scratch + d, *factors = scratch + 2 * d;
  if (view.keep) {
    dropout_factors(view.keep, view.kept, factors, d);
  }
  Vec<T> pull(T(0)), turn(T(0));
  const T mean = view.scale ? stats[0] : T(0), rstd = view.scale ? stats[1] : T(1);
  for_vectors<T>(d, [&](int64_t i, auto count) {
    auto [ai, slope] = gelu_and_slope(load(z + i, count) + load(view.bias + i, count));
    if (view.keep) {
      const Vec<T> factor = load(factors + i, count);
      ai = ai * factor;
      slope = slope * factor;
    }
    store(slopes + i, slope, count);
    if (view.scale) {
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
