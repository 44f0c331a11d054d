// Iterative Competitive Sparse on the CPU: ssr_rec/kernels/__init__.py has the signatures, ics_rows.h the derivation.

#include "ics_rows.h"
#include "ops.h"

#include <ATen/Dispatch.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>

#include <limits>

namespace ssr_rec {
namespace {

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

// The rates step by step, alpha (V, T) transposed, its views repeated so that any ROWS rows find theirs side by side.
constexpr int ROWS = 16;

template <typename A>
std::vector<A> rates_by_step(const A* alpha, int64_t V, int64_t T) {
  std::vector<A> rates(T * (V + ROWS));
  for (int64_t t = 0; t < T; ++t) {
    for (int64_t i = 0; i < V + ROWS; ++i) {
      rates[t * (V + ROWS) + i] = alpha[i % V * T + t];
    }
  }
  return rates;
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
  std::vector<A> rates;

  template <int R>
  void rows(int64_t first, A* scratch) const {
    const A* in[R];
    A* const mean = means + first * steps;
    A theta[R];
    for (int r = 0; r < R; ++r) {
      in[r] = padded_row(z + (first + r) * d, scratch + r * width, d, width, -std::numeric_limits<A>::infinity());
    }
    forward_thetas<A, R>(in, rates.data() + first % V, V + ROWS, mean, theta, steps, d, width);
    for (int r = 0, v = first % V; r < R; ++r, v = v + 1 < V ? v + 1 : 0) {
      if (!closed[v]) {
        std::copy_n(in[r], width, scratch + r * width);
        forward_literal(scratch + r * width, alpha + v * steps, mean + r * steps, steps, d, width);
        in[r] = scratch + r * width;
        theta[r] = 0;
      } else if (!std::isfinite(theta[r])) {
        theta[r] = forward_theta(in[r], alpha + v * steps, mean + r * steps, steps, d, width);
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

// How many tasks of so many rows a thread must at least get, lest waking it costs more than it saves.
int64_t grain(int64_t rows, int64_t width, int64_t steps) {
  return std::max<int64_t>(1, (int64_t(1) << 15) / std::max<int64_t>(1, rows * width * (steps + 1)));
}

template <typename T>
void forward_kernel(
    const at::Tensor& z, const at::Tensor& alpha, const at::Tensor& gamma, at::Tensor& y, at::Tensor& means) {
  using A = Accumulate<T>;
  const int64_t V = z.size(1), d = z.size(2), steps = alpha.size(1), width = padded<A>(d);
  if (V == 0) {
    return;
  }
  const A* rates = alpha.const_data_ptr<A>();
  const Forward<T> forward{
      z.const_data_ptr<T>(), rates, gamma.defined() ? gamma.const_data_ptr<A>() : nullptr, y.mutable_data_ptr<T>(),
      means.mutable_data_ptr<A>(), V, steps, d, width, closed_views(rates, V, steps), rates_by_step(rates, V, steps)};
  at::parallel_for(0, z.size(0) * V, grain(1, width, steps), [&](int64_t begin, int64_t end) {
    std::vector<A> scratch(ROWS * width);
    for (; begin + ROWS <= end; begin += ROWS) {
      forward.template rows<ROWS>(begin, scratch.data());
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
    bool row_closed[R], all_closed = true;
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
      // Behind an infinite threshold lie NaNs, alive by Algorithm 1, that no comparison of z finds.
      row_closed[r] = closed[v] && std::all_of(mean[r], mean[r] + steps, [](A m) { return std::isfinite(m); });
      all_closed &= row_closed[r];
    }
    A* rest = scratch + 2 * R * width;
    if (all_closed) {
      backward_closed<A, R>(in, grads, out, mean, view, rest, rest + R * (steps + 1), steps, d);
    } else {
      for (int r = 0; r < R; ++r) {
        if (row_closed[r]) {
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
  const int64_t rows = B * V / std::max<int64_t>(1, chunks);
  at::parallel_for(0, chunks, grain(rows, backward.width, backward.steps), [&](int64_t begin, int64_t end) {
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
  // Results may not share memory, as contiguous() would leave the slices of a single view.
  const auto own = [&](int64_t from, int64_t to, at::ScalarType type) {
    return total.slice(1, from, to).to(type).clone(at::MemoryFormat::Contiguous);
  };
  const auto grad_gamma = gamma ? own(steps, steps + d, gamma->scalar_type()) : at::empty({0}, alpha.options());
  return {grad_z, own(0, steps, alpha.scalar_type()), grad_gamma};
}

} // namespace ssr_rec
