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

template <typename A>
inline A sum_row(const A* x, int64_t width) {
  Vectorized<A> sum(A(0));
  for (int64_t i = 0; i < width; i += Vectorized<A>::size()) {
    sum = sum + Vectorized<A>::loadu(x + i);
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

// theta_T of R rows at a time: their sums hide each other's latency.
template <typename A, int R>
void forward_thetas(const A* const* z, const A* const* alpha, A* const* means, A* theta, int64_t T, int64_t d, int64_t width) {
  using V = Vectorized<A>;
  const V one(A(1));
  std::fill(theta, theta + R, A(0));
  for (int64_t t = 0; t < T; ++t) {
    V threshold[R], sum[R];
    for (int r = 0; r < R; ++r) {
      threshold[r] = V(theta[r]);
      sum[r] = V(A(0));
    }
    for (int64_t i = 0; i < width; i += V::size()) {
      for (int r = 0; r < R; ++r) {
        const V x = relu(V::loadu(z[r] + i) - threshold[r]);
        // The same sum twice: half of them on the multipliers, because the adders are what this loop waits for.
        sum[r] = r % 2 == 0 ? sum[r] + x : at::vec::fmadd(x, one, sum[r]);
      }
    }
    for (int r = 0; r < R; ++r) {
      means[r][t] = sum_lanes(sum[r]) / static_cast<A>(d);
      theta[r] = raise(theta[r], alpha[r][t], means[r][t]);
    }
  }
}

// What one view's rows of one chunk share in the backward pass.
template <typename A>
struct ViewGrad {
  const A* alpha;
  const A* gamma; // null without
  A* alpha_grad;
  A* gamma_grad;
};

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
      int64_t above = 0;
      for (int64_t i = 0; i < width; i += V::size()) {
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
    for (int64_t i = 0; i < width; i += V::size()) {
      const V zi = V::loadu(z[r] + i);
      V gi = V::loadu(grad_z[r] + i);
      for (int64_t t = 0; t < T; ++t) {
        gi = add_above(gi, zi, V(thetas[r * (T + 1) + t]), V(pulls[r * (T + 1) + t]));
      }
      gi.store(grad_z[r] + i);
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
