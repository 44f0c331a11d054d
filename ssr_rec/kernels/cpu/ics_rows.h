// Rows of Iterative Competitive Sparse, both directions.
//
// While no alpha_t of a view is negative, every step lowers all survivors by the same amount and the dead stay dead, so
// that x_t = relu(z - theta_t) with one threshold a row: theta_0 = 0, theta_{t+1} = theta_t + alpha_t mean(x_t).
// Backwards, with g = grad * gamma, m_t = [z > theta_t] and n_t = sum(m_t):
//
//   D_T = -sum(g m_T)              D_t = D_{t+1} (1 - alpha_t n_t / d)         D is d loss / d theta
//   grad_alpha_t = D_{t+1} mean_t  grad_z = g m_T + sum_t D_{t+1} alpha_t / d * m_t
//
// A view with a negative (or NaN) alpha runs Algorithm 1 as it stands; its backward pass repeats the steps from z.

#pragma once

#include "rows.h"

#include <cmath>

namespace ssr_rec {

// The backward pass must meet the very thresholds of the forward pass: one function for both.
template <typename A>
inline A raise(A theta, A alpha, A mean) {
  return std::fma(alpha, mean, theta);
}

// x <- relu(x - step) in d of width lanes; the others stay 0, whatever the sign of step.
template <typename A>
inline void lower(const A* x, A step, A* to, int64_t d, int64_t width) {
  for (int64_t i = 0; i < width; i += Vectorized<A>::size()) {
    relu(Vectorized<A>::loadu(x + i) - Vectorized<A>(step)).store(to + i);
  }
  std::fill(to + d, to + width, A(0));
}

// Numbers added up one after another; of wider rows the parts are added, lest the roundings of a long sum show.
template <typename A>
constexpr int64_t IN_A_ROW = 64 * Vectorized<A>::size();

template <typename A>
inline A sum_row(const A* x, int64_t width) {
  Vectorized<A> sum(A(0));
  for (int64_t begin = 0; begin < width; begin += IN_A_ROW<A>) {
    Vectorized<A> part(A(0));
    for (int64_t i = begin; i < std::min(begin + IN_A_ROW<A>, width); i += Vectorized<A>::size()) {
      part = part + Vectorized<A>::loadu(x + i);
    }
    sum = sum + part;
  }
  return sum_lanes(sum);
}

// x_T before gamma, for a view with a negative alpha, into x, which comes with z.
template <typename A>
void forward_literal(A* x, const A* alpha, A* means, int64_t T, int64_t d, int64_t width) {
  lower(x, A(0), x, d, width);
  for (int64_t t = 0; t < T; ++t) {
    means[t] = sum_row(x, width) / static_cast<A>(d);
    lower(x, alpha[t] * means[t], x, d, width);
  }
}

// theta_T of one row, by the sums as they are defined: for what overflows in forward_thetas.
template <typename A>
A forward_theta(const A* z, const A* alpha, A* means, int64_t T, int64_t d, int64_t width) {
  using V = Vectorized<A>;
  A theta(0);
  for (int64_t t = 0; t < T; ++t) {
    V sum(A(0));
    for (int64_t i = 0; i < width; i += V::size()) {
      sum = sum + relu(V::loadu(z + i) - V(theta));
    }
    means[t] = sum_lanes(sum) / static_cast<A>(d);
    theta = raise(theta, alpha[t], means[t]);
  }
  return theta;
}

// sum[r] <- sum(max(z[r], theta[r])) from begin to end, lane by lane. Four rows at a time hide each other's latency.
template <typename A, int R, typename Max>
inline void sum_rows(
    const A* const* z, const A* theta, Vectorized<A>* sum, int64_t begin, int64_t end, Max max) {
  using V = Vectorized<A>;
  constexpr int together = R % 4 == 0 ? 4 : 1;
  for (int first = 0; first < R; first += together) {
    V part[together], threshold[together];
    for (int r = 0; r < together; ++r) {
      part[r] = V(A(0));
      threshold[r] = V(theta[first + r]);
    }
    for (int64_t i = begin; i < end; i += V::size()) {
      for (int r = 0; r < together; ++r) {
        part[r] = part[r] + max(V::loadu(z[first + r] + i), threshold[r]);
      }
    }
    std::copy_n(part, together, sum + first);
  }
}

// theta_T of R rows at a time, and their means (R, T). The rates of step t begin at rates + t * stride.
//
// sum(relu(z - theta)) is taken as sum(max(z, theta)) - width theta: one addition a vector instead of two, and additions
// are what this loop waits for. That is off by a few roundings of theta, which theta + alpha mean is anyway; in a sum
// over more than IN_A_ROW numbers it would be many.
template <typename A, int R>
void forward_thetas(
    const A* const* z, const A* rates, int64_t stride, A* means, A* last, int64_t T, int64_t d, int64_t width) {
  using V = Vectorized<A>;
  alignas(64) A theta[R] = {}, total[R], above[R], rate[R];
  V sum[R];
  const A dims = static_cast<A>(d);
  for (int64_t t = 0; t < T; ++t) {
    std::fill_n(above, R, A(0));
    for (int64_t begin = 0; begin < width; begin += IN_A_ROW<A>) {
      const int64_t end = std::min(begin + IN_A_ROW<A>, width);
      const A lanes = static_cast<A>(end - begin);
      if (t == 0) {
        sum_rows<A, R>(z, theta, sum, begin, end, [](const V& x, const V&) { return relu(x); });
      } else {
        sum_rows<A, R>(z, theta, sum, begin, end, [](const V& x, const V& floor) { return at_least(x, floor); });
      }
      sum_each<A, R>(sum, total);
#pragma omp simd
      for (int r = 0; r < R; ++r) {
        above[r] += total[r] - lanes * theta[r];
      }
    }
    std::copy_n(rates + t * stride, R, rate);
#pragma omp simd
    for (int r = 0; r < R; ++r) {
      // Rounding may leave less than nothing; a NaN stays.
      above[r] = (above[r] < A(0) ? A(0) : above[r]) / dims;
      theta[r] = raise(theta[r], rate[r], above[r]);
    }
    for (int r = 0; r < R; ++r) {
      means[r * T + t] = above[r];
    }
  }
  std::copy_n(theta, R, last);
}

// What one view's rows of one chunk share in the backward pass.
template <typename A>
struct ViewGrad {
  const A* alpha;
  const A* gamma; // null without
  A* alpha_grad;
  A* gamma_grad;
};

// grad_z of N vectors takes the pulls of the thresholds below z. Loads of theta and pull, not sums, bound it for N = 1.
template <typename A, int N>
inline void add_pulls(const A* z, A* grad_z, const A* theta, const A* pull, int64_t T) {
  using V = Vectorized<A>;
  V zi[N], gi[N];
  for (int k = 0; k < N; ++k) {
    zi[k] = V::loadu(z + k * V::size());
    gi[k] = V::loadu(grad_z + k * V::size());
  }
  for (int64_t t = 0; t < T; ++t) {
    const V threshold(theta[t]), amount(pull[t]);
    for (int k = 0; k < N; ++k) {
      gi[k] = add_above(gi[k], zi[k], threshold, amount);
    }
  }
  for (int k = 0; k < N; ++k) {
    gi[k].store(grad_z + k * V::size());
  }
}

// R rows of the closed form, in three stages so that the rows hide each other's latency.
// z and grad are padded, with -inf and 0; grad_z may be grad. thetas and pulls have room for R * (T + 1).
template <typename A, int R>
void backward_closed(
    const A* const* z, const A* const* grad, A* const* grad_z, const A* const* means, const ViewGrad<A>* view,
    A* thetas, A* pulls, int64_t T, int64_t d) {
  using V = Vectorized<A>;
  const int64_t width = padded<A>(d);
  A descent[R];
  for (int r = 0; r < R; ++r) {
    A* theta = thetas + r * (T + 1);
    theta[0] = 0;
    for (int64_t t = 0; t < T; ++t) {
      theta[t + 1] = raise(theta[t], view[r].alpha[t], means[r][t]);
    }
    const V last(theta[T]), zero(A(0));
    V alive(A(0));
    const A* gamma = view[r].gamma;
    A* gamma_grad = view[r].gamma_grad;
    for (int64_t i = 0; i < width; i += V::size()) {
      const V zi = V::loadu(z[r] + i);
      V gi = V::loadu(grad[r] + i);
      if (gamma != nullptr) {
        at::vec::fmadd(gi, relu(zi - last), V::loadu(gamma_grad + i)).store(gamma_grad + i);
        gi = gi * V::loadu(gamma + i);
      }
      gi = add_above(zero, zi, last, gi);
      gi.store(grad_z[r] + i);
      alive = alive + gi;
    }
    descent[r] = -sum_lanes(alive);
    for (int64_t t = 0; t < T; ++t) {
      const V threshold(theta[t]);
      int64_t above = 0, i = 0;
      for (; i + 4 * V::size() <= width; i += 4 * V::size()) {
        above += count_above_four(z[r] + i, threshold);
      }
      for (; i < width; i += V::size()) {
        above += count_above(V::loadu(z[r] + i), threshold);
      }
      pulls[r * (T + 1) + t] = static_cast<A>(above);
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int64_t t = T - 1; t >= 0; --t) {
      A& pull = pulls[r * (T + 1) + t];
      const A above = pull;
      view[r].alpha_grad[t] += descent[r] * means[r][t];
      pull = descent[r] * (view[r].alpha[t] / static_cast<A>(d));
      descent[r] -= pull * above;
    }
  }
  for (int r = 0; r < R; ++r) {
    const A *theta = thetas + r * (T + 1), *pull = pulls + r * (T + 1);
    int64_t i = 0;
    for (; i + 4 * V::size() <= width; i += 4 * V::size()) {
      add_pulls<A, 4>(z[r] + i, grad_z[r] + i, theta, pull, T);
    }
    for (; i < width; i += V::size()) {
      add_pulls<A, 1>(z[r] + i, grad_z[r] + i, theta, pull, T);
    }
  }
}

// One row through Algorithm 1; states has room for x_0 .. x_T.
template <typename A>
void backward_literal(
    const A* z, const A* grad, A* g, const A* means, const ViewGrad<A>& view, A* states, int64_t T, int64_t d) {
  using V = Vectorized<A>;
  constexpr int64_t lanes = V::size();
  const int64_t width = padded<A>(d);
  const V zero(A(0));
  lower(z, A(0), states, d, width);
  for (int64_t t = 0; t < T; ++t) {
    lower(states + t * width, view.alpha[t] * means[t], states + (t + 1) * width, d, width);
  }
  const A* x = states + T * width;
  for (int64_t i = 0; i < width; i += lanes) {
    V gi = V::loadu(grad + i);
    if (view.gamma != nullptr) {
      at::vec::fmadd(gi, V::loadu(x + i), V::loadu(view.gamma_grad + i)).store(view.gamma_grad + i);
      gi = gi * V::loadu(view.gamma + i);
    }
    gi.store(g + i);
  }
  for (int64_t t = T; t >= 0; --t) {
    x = states + t * width;
    V sum(A(0));
    for (int64_t i = 0; i < width; i += lanes) {
      const V gi = add_above(zero, V::loadu(x + i), zero, V::loadu(g + i));
      gi.store(g + i);
      sum = sum + gi;
    }
    if (t > 0) {
      const A total = sum_lanes(sum);
      view.alpha_grad[t - 1] -= total * means[t - 1];
      const V share(view.alpha[t - 1] * total / static_cast<A>(d));
      for (int64_t i = 0; i < width; i += lanes) {
        (V::loadu(g + i) - share).store(g + i);
      }
    }
  }
}

} // namespace ssr_rec
