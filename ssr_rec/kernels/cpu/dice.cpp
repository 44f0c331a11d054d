// Dice of DIN in training, by the statistics of the batch: ssr_rec/kernels/dice.py has the equations.

#include "gelu.h"
#include "ops.h"

#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <cmath>

namespace ssr_rec {
namespace {

// Sums over rows are kept for runs of so many and added in order, so that the number of threads decides no bit.
constexpr int64_t RUN = 256;

int64_t runs_of(int64_t rows) {
  return (rows + RUN - 1) / RUN;
}

// How many runs a thread must at least get, lest waking it costs more than it saves.
int64_t grain(int64_t width) {
  return std::max<int64_t>(1, (int64_t(1) << 15) / std::max<int64_t>(1, RUN * width));
}

template <typename A>
struct Columns {
  const A* x; // (N, C)
  int64_t N, C;

  template <typename Body>
  void in_runs(Body&& body) const {
    at::parallel_for(0, runs_of(N), grain(C), [&](int64_t begin, int64_t end) {
      for (int64_t run = begin; run < end; ++run) {
        body(run, run * RUN, std::min(N, (run + 1) * RUN));
      }
    });
  }

  // The mean of each run, then its sum of squared differences from that mean, put together in double.
  void moments(A* mean, A* var) const {
    std::vector<A> partial(runs_of(N) * 2 * C, A(0));
    in_runs([&](int64_t run, int64_t first, int64_t last) {
      A* own = partial.data() + run * 2 * C;
      const Vectorized<A> share(A(1) / static_cast<A>(last - first));
      for_vectors<A>(C, [&](int64_t c, auto n) {
        Vectorized<A> sum(A(0)), rest(A(0)), squares(A(0));
        for (int64_t i = first; i < last; ++i) {
          sum = sum + load(x + i * C + c, n);
        }
        const auto near = sum * share;
        // Far from zero, sums of differences keep digits that sums lose.
        for (int64_t i = first; i < last; ++i) {
          rest = rest + (load(x + i * C + c, n) - near);
        }
        const auto middle = at::vec::fmadd(rest, share, near);
        for (int64_t i = first; i < last; ++i) {
          const auto apart = load(x + i * C + c, n) - middle;
          squares = at::vec::fmadd(apart, apart, squares);
        }
        store(own + c, middle, n);
        store(own + C + c, squares, n);
      });
    });
    for (int64_t c = 0; c < C; ++c) {
      double middle = partial[c], squares = partial[C + c], count = std::min(N, RUN);
      for (int64_t run = 1; run < runs_of(N); ++run) {
        const double more = static_cast<double>(std::min(N, (run + 1) * RUN) - run * RUN), all = count + more;
        const double apart = partial[run * 2 * C + c] - middle;
        middle += apart * more / all;
        squares += partial[(run * 2 + 1) * C + c] + apart * apart * count * more / all;
        count = all;
      }
      mean[c] = static_cast<A>(middle);
      var[c] = static_cast<A>(squares / count);
    }
  }
};

template <typename A>
struct Dice {
  Columns<A> columns;
  const A* alpha;
  const A* mean;
  std::vector<A> scale; // 1 / deviation

  Dice(const Columns<A>& columns, const A* alpha, const A* mean, const A* var, double eps)
      : columns(columns), alpha(alpha), mean(mean), scale(columns.C) {
    for (int64_t c = 0; c < columns.C; ++c) {
      scale[c] = static_cast<A>(1 / std::sqrt(static_cast<double>(var[c]) + eps));
    }
  }

  struct At {
    Vectorized<A> x, alpha, scale, normal, open, share; // open is p; share p + (1 - p) alpha
  };

  template <typename Count>
  At at(int64_t row, int64_t c, Count n) const {
    const Vectorized<A> one(A(1));
    At here{load(columns.x + row * columns.C + c, n), load(alpha + c, n), load(scale.data() + c, n)};
    here.normal = (here.x - load(mean + c, n)) * here.scale;
    // The product keeps a NaN, which the fast exponential loses.
    here.open = at::vec::fmadd(here.normal, Vectorized<A>(A(0)), one / (one + exponential(here.normal.neg())));
    here.share = at::vec::fmadd(one - here.open, here.alpha, here.open);
    return here;
  }

  // The gradient of what is normalised: grad x (1 - alpha) p (1 - p).
  static Vectorized<A> inner(const At& here, const Vectorized<A>& grad) {
    const Vectorized<A> one(A(1));
    return grad * here.x * (one - here.alpha) * here.open * (one - here.open);
  }

  void forward(A* y) const {
    const int64_t C = columns.C;
    columns.in_runs([&](int64_t, int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        for_vectors<A>(C, [&](int64_t c, auto n) {
          const At here = at(i, c, n);
          store(y + i * C + c, here.x * here.share, n);
        });
      }
    });
  }

  void backward(const A* grad, A* grad_x, A* grad_alpha) const {
    const int64_t C = columns.C, runs = runs_of(columns.N);
    std::vector<A> partial(runs * 3 * C, A(0)), means(2 * C);
    columns.in_runs([&](int64_t run, int64_t first, int64_t last) {
      A* own = partial.data() + run * 3 * C;
      for_vectors<A>(C, [&](int64_t c, auto n) {
        Vectorized<A> inside(A(0)), along(A(0)), closed(A(0));
        for (int64_t i = first; i < last; ++i) {
          const At here = at(i, c, n);
          const auto g = load(grad + i * C + c, n), q = inner(here, g);
          inside = inside + q;
          along = at::vec::fmadd(q, here.normal, along);
          closed = at::vec::fmadd(g * here.x, Vectorized<A>(A(1)) - here.open, closed);
        }
        store(own + c, inside, n);
        store(own + C + c, along, n);
        store(own + 2 * C + c, closed, n);
      });
    });
    for (int64_t c = 0; c < C; ++c) {
      double sums[3] = {0, 0, 0};
      for (int64_t run = 0; run < runs; ++run) {
        for (int k = 0; k < 3; ++k) {
          sums[k] += partial[(run * 3 + k) * C + c];
        }
      }
      means[c] = static_cast<A>(sums[0] / columns.N);
      means[C + c] = static_cast<A>(sums[1] / columns.N);
      grad_alpha[c] = static_cast<A>(sums[2]);
    }
    columns.in_runs([&](int64_t, int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        for_vectors<A>(C, [&](int64_t c, auto n) {
          const At here = at(i, c, n);
          const auto g = load(grad + i * C + c, n);
          const auto rest = inner(here, g) - load(means.data() + c, n) - here.normal * load(means.data() + C + c, n);
          store(grad_x + i * C + c, at::vec::fmadd(here.scale, rest, g * here.share), n);
        });
      }
    });
  }
};

void check_dice(const at::Tensor& x, const at::Tensor& columns) {
  TORCH_CHECK(
      x.dim() == 2 && x.size(0) > 0 && columns.dim() == 1 && columns.size(0) == x.size(1) &&
          columns.scalar_type() == x.scalar_type(),
      "dice: x must be (N, C) with N at least 1, alpha, mean and var (C,), all of one type; x is ", x.sizes(),
      ", one of them ", columns.sizes());
}

} // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor> dice_forward(const at::Tensor& x, const at::Tensor& alpha, double eps) {
  check_dice(x, alpha);
  const auto input = x.contiguous(), slopes = alpha.contiguous();
  auto y = at::empty_like(input), mean = at::empty_like(slopes), var = at::empty_like(slopes);
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "dice_forward", [&] {
    const Columns<scalar_t> columns{input.const_data_ptr<scalar_t>(), x.size(0), x.size(1)};
    columns.moments(mean.mutable_data_ptr<scalar_t>(), var.mutable_data_ptr<scalar_t>());
    Dice<scalar_t>(
        columns, slopes.const_data_ptr<scalar_t>(), mean.const_data_ptr<scalar_t>(), var.const_data_ptr<scalar_t>(), eps)
        .forward(y.mutable_data_ptr<scalar_t>());
  });
  return {y, mean, var};
}

std::tuple<at::Tensor, at::Tensor> dice_backward(
    const at::Tensor& grad, const at::Tensor& x, const at::Tensor& mean, const at::Tensor& var,
    const at::Tensor& alpha, double eps) {
  for (const auto& columns : {mean, var, alpha}) {
    check_dice(x, columns);
  }
  TORCH_CHECK(
      grad.sizes() == x.sizes() && grad.scalar_type() == x.scalar_type(), "dice: the gradient must be like x");
  const auto input = x.contiguous(), slopes = alpha.contiguous(), grads = grad.contiguous();
  const auto middles = mean.contiguous(), spreads = var.contiguous();
  auto grad_x = at::empty_like(input), grad_alpha = at::empty_like(slopes);
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "dice_backward", [&] {
    const Columns<scalar_t> columns{input.const_data_ptr<scalar_t>(), x.size(0), x.size(1)};
    Dice<scalar_t>(
        columns, slopes.const_data_ptr<scalar_t>(), middles.const_data_ptr<scalar_t>(),
        spreads.const_data_ptr<scalar_t>(), eps)
        .backward(
            grads.const_data_ptr<scalar_t>(), grad_x.mutable_data_ptr<scalar_t>(),
            grad_alpha.mutable_data_ptr<scalar_t>());
  });
  return {grad_x, grad_alpha};
}

} // namespace ssr_rec
