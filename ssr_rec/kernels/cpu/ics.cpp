// Iterative Competitive Sparse on the CPU: ssr_rec/kernels/__init__.py has the signatures.
//
// While no alpha_t of a view is negative, every step lowers all survivors by the same amount and the dead stay dead, so
// that x_t = relu(z - theta_t) with one threshold a row: theta_0 = 0, theta_{t+1} = theta_t + alpha_t mean(x_t).
// Backwards, with g = grad * gamma, m_t = [z > theta_t] and n_t = sum(m_t):
//
//   D_T = -sum(g m_T)              D_t = D_{t+1} (1 - alpha_t n_t / d)         D is d loss / d theta
//   grad_alpha_t = D_{t+1} mean_t  grad_z = g m_T + sum_t D_{t+1} alpha_t / d * m_t
//
// A view with a negative (or NaN) alpha runs Algorithm 1 as it stands; its backward pass repeats the steps from z.

#include "ops.h"
#include "rows.h"

#include <ATen/Dispatch.h>
#include <ATen/Functions.h>

#include <cmath>
#include <limits>

namespace ssr_rec {
namespace {

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
      // A NaN threshold has the padding counted too.
      pulls[r * (T + 1) + t] = static_cast<A>(std::min(above, d));
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

template <typename A>
std::vector<char> closed_views(const A* alpha, int64_t V, int64_t T) {
  std::vector<char> closed(V);
  for (int64_t v = 0; v < V; ++v) {
    closed[v] = std::all_of(alpha + v * T, alpha + (v + 1) * T, [](A a) { return a >= A(0); });
  }
  return closed;
}

// The row as padded A: where it lies, or a copy in scratch.
template <typename T, typename A>
inline const A* padded_row(const T* from, A* scratch, int64_t d, int64_t width, A pad) {
  if constexpr (std::is_same_v<T, A>) {
    if (d == width) {
      return from;
    }
  }
  at::vec::convert(from, scratch, d);
  std::fill(scratch + d, scratch + width, pad);
  return scratch;
}

template <typename T>
struct Forward {
  using A = Accumulate<T>;
  const T* z;
  const A* alpha;
  const A* gamma; // null without
  T* y;
  A* means;
  int64_t V, steps, d, width;
  std::vector<char> closed;

  template <int R>
  void rows(int64_t first, A* scratch) const {
    const A* in[R];
    const A* rates[R];
    A* mean[R];
    A theta[R];
    for (int r = 0, v = first % V; r < R; ++r, v = v + 1 < V ? v + 1 : 0) {
      in[r] = padded_row(z + (first + r) * d, scratch + r * width, d, width, -std::numeric_limits<A>::infinity());
      rates[r] = alpha + v * steps;
      mean[r] = means + (first + r) * steps;
    }
    forward_thetas<A, R>(in, rates, mean, theta, steps, d, width);
    for (int r = 0, v = first % V; r < R; ++r, v = v + 1 < V ? v + 1 : 0) {
      if (!closed[v]) {
        std::copy_n(in[r], width, scratch + r * width);
        forward_literal(scratch + r * width, rates[r], mean[r], steps, d, width);
        in[r] = scratch + r * width;
        theta[r] = 0;
      }
      finish(in[r], theta[r], gamma ? gamma + v * d : nullptr, y + (first + r) * d, scratch + r * width);
    }
  }

  void finish(const A* x, A theta, const A* gains, T* to, A* scratch) const {
    A* out = scratch;
    if constexpr (std::is_same_v<T, A>) {
      out = to;
    }
    for_vectors<A>(d, [&](int64_t i, auto count) {
      const auto kept = relu(load(x + i, count) - Vectorized<A>(theta));
      store(out + i, gains ? kept * load(gains + i, count) : kept, count);
    });
    if constexpr (!std::is_same_v<T, A>) {
      at::vec::convert(scratch, to, d);
    }
  }
};

template <typename T>
void forward_kernel(
    const at::Tensor& z, const at::Tensor& alpha, const at::Tensor& gamma, at::Tensor& y, at::Tensor& means) {
  using A = Accumulate<T>;
  const int64_t V = z.size(1), d = z.size(2), steps = alpha.size(1), width = padded<A>(d);
  const A* rates = alpha.const_data_ptr<A>();
  const Forward<T> forward{
      z.const_data_ptr<T>(), rates, gamma.defined() ? gamma.const_data_ptr<A>() : nullptr, y.mutable_data_ptr<T>(),
      means.mutable_data_ptr<A>(), V, steps, d, width, closed_views(rates, V, steps)};
  const int64_t grain = std::max<int64_t>(1, 16384 / (width * (steps + 1)));
  at::parallel_for(0, z.size(0) * V, grain, [&](int64_t begin, int64_t end) {
    std::vector<A> scratch(8 * width);
    for (; begin + 8 <= end; begin += 8) {
      forward.template rows<8>(begin, scratch.data());
    }
    for (; begin < end; ++begin) {
      forward.template rows<1>(begin, scratch.data());
    }
  });
}

template <typename T>
struct Backward {
  using A = Accumulate<T>;
  const T* grad;
  const T* z;
  const A* means;
  const A* alpha;
  const A* gamma; // padded; null without
  T* grad_z;
  int64_t V, steps, d, width;
  std::vector<char> closed;

  // The views first .. first + R of row b; sums, for every view, has grad_alpha and then grad_gamma.
  template <int R>
  void views(int64_t b, int64_t first, A* sums, A* scratch) const {
    const A *in[R], *grads[R], *mean[R];
    A* out[R];
    ViewGrad<A> view[R];
    bool all_closed = true;
    for (int r = 0; r < R; ++r) {
      const int64_t v = first + r, row = b * V + v;
      A* own = sums + v * (steps + width);
      view[r] = {alpha + v * steps, gamma ? gamma + v * width : nullptr, own, own + steps};
      mean[r] = means + row * steps;
      in[r] = padded_row(z + row * d, scratch + r * width, d, width, -std::numeric_limits<A>::infinity());
      grads[r] = padded_row(grad + row * d, scratch + (R + r) * width, d, width, A(0));
      out[r] = scratch + (R + r) * width;
      if constexpr (std::is_same_v<T, A>) {
        out[r] = d == width ? grad_z + row * d : out[r];
      }
      all_closed &= closed[v] != 0;
    }
    A* rest = scratch + 2 * R * width;
    if (all_closed) {
      backward_closed<A, R>(in, grads, out, mean, view, rest, rest + R * (steps + 1), steps, d);
    } else {
      for (int r = 0; r < R; ++r) {
        if (closed[first + r]) {
          backward_closed<A, 1>(in + r, grads + r, out + r, mean + r, view + r, rest, rest + steps + 1, steps, d);
        } else {
          backward_literal(in[r], grads[r], out[r], mean[r], view[r], rest, steps, d);
        }
      }
    }
    for (int r = 0; r < R; ++r) {
      if (static_cast<const void*>(out[r]) != grad_z + (b * V + first + r) * d) {
        at::vec::convert(out[r], grad_z + (b * V + first + r) * d, d);
      }
    }
  }

  int64_t scratch_size() const {
    return 8 * width + (steps + 1) * std::max<int64_t>(8, width);
  }
};

// Sums over rows are kept for each of `chunks` runs of rows and added in order, so that the number of threads does not
// decide the result.
template <typename T>
void backward_kernel(const Backward<T>& backward, int64_t B, at::Tensor& sums) {
  using A = Accumulate<T>;
  const int64_t chunks = sums.size(0), V = backward.V;
  A* all_sums = sums.mutable_data_ptr<A>();
  at::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
    std::vector<A> scratch(backward.scratch_size());
    for (int64_t c = begin; c < end; ++c) {
      A* own = all_sums + c * sums.stride(0);
      for (int64_t b = B * c / chunks; b < B * (c + 1) / chunks; ++b) {
        int64_t v = 0;
        for (; v + 4 <= V; v += 4) {
          backward.template views<4>(b, v, own, scratch.data());
        }
        for (; v < V; ++v) {
          backward.template views<1>(b, v, own, scratch.data());
        }
      }
    }
  });
}

at::ScalarType accumulate_type(const at::Tensor& z) {
  return z.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

} // namespace

std::tuple<at::Tensor, at::Tensor> ics_forward(
    const at::Tensor& z, const at::Tensor& alpha, const std::optional<at::Tensor>& gamma) {
  const auto type = accumulate_type(z);
  const auto input = z.contiguous(), rates = alpha.to(type).contiguous();
  const auto gains = gamma ? gamma->to(type).contiguous() : at::Tensor();
  auto y = at::empty_like(input);
  auto means = at::empty({z.size(0), z.size(1), alpha.size(1)}, z.options().dtype(type));
  AT_DISPATCH_FLOATING_TYPES_AND(at::kBFloat16, z.scalar_type(), "ics_forward", [&] {
    forward_kernel<scalar_t>(input, rates, gains, y, means);
  });
  return {y, means};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> ics_backward(
    const at::Tensor& grad, const at::Tensor& z, const at::Tensor& means, const at::Tensor& alpha,
    const std::optional<at::Tensor>& gamma) {
  const auto type = accumulate_type(z);
  const int64_t V = z.size(1), d = z.size(2), steps = alpha.size(1);
  const int64_t width = type == at::kDouble ? padded<double>(d) : padded<float>(d);
  const auto input = z.contiguous(), rates = alpha.to(type).contiguous(), grads = grad.to(z.scalar_type()).contiguous();
  const auto gains = gamma ? at::constant_pad_nd(gamma->to(type), {0, width - d}).contiguous() : at::Tensor();
  const auto saved = means.contiguous();
  auto grad_z = at::empty_like(input);
  const int64_t chunks = std::clamp<int64_t>(z.size(0) / 32, 1, 16);
  auto sums = at::zeros({chunks, V, steps + width}, z.options().dtype(type));
  AT_DISPATCH_FLOATING_TYPES_AND(at::kBFloat16, z.scalar_type(), "ics_backward", [&] {
    using A = Accumulate<scalar_t>;
    const A* alphas = rates.const_data_ptr<A>();
    const Backward<scalar_t> backward{
        grads.const_data_ptr<scalar_t>(), input.const_data_ptr<scalar_t>(), saved.const_data_ptr<A>(), alphas,
        gamma ? gains.const_data_ptr<A>() : nullptr, grad_z.mutable_data_ptr<scalar_t>(), V, steps, d, width,
        closed_views(alphas, V, steps)};
    backward_kernel(backward, z.size(0), sums);
  });
  const auto total = sums.sum(0);
  const auto grad_gamma = gamma ? total.slice(1, steps, steps + d).to(gamma->scalar_type()).contiguous()
                                : at::empty({0}, alpha.options());
  return {grad_z, total.slice(1, 0, steps).to(alpha.scalar_type()).contiguous(), grad_gamma};
}

} // namespace ssr_rec
