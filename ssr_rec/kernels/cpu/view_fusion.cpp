// Filter-and-fuse on the CPU: ssr_rec/kernels/__init__.py has the signatures, reference.py the plain form.
//
// Both directions go through blocks of rows that fit into the second-level cache, and through the views of a block one
// after another: what a view gathers, multiplies and normalises is still near when the next step reads it. Only x,
// the products before the bias and two figures a row are kept for the backward pass, which gathers again.

#include "ops.h"
#include "problem.h"
#include "transpose.h"

#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

namespace ssr_rec {
namespace {

template <typename T>
void forward_kernel(const Problem<T>& p, T* y, T* pre, T* stats) {
  const int64_t block = block_rows(p.B), blocks = (p.B + block - 1) / block;
  at::parallel_for(0, blocks, grain(block * p.V * p.N * p.d), [&](int64_t begin, int64_t end) {
    const int64_t gathers = p.indices ? block : 0;
    std::vector<T> x_columns(gathers * p.width), gathered(gathers * p.N);
    std::vector<T> products(pre ? 0 : block * p.d), row(2 * p.d);
    T unsaved[2];
    for (int64_t b0 = begin * block; b0 < std::min(end * block, p.B); b0 += block) {
      const int64_t rows = std::min(block, p.B - b0);
      if (p.indices) {
        transpose<T>(rows, p.width, rows_of(p.x + b0 * p.x_row, p.x_row), rows_of(x_columns.data(), block));
      }
      for (int64_t v = 0; v < p.V; ++v) {
        Factor<T> h{p.x + b0 * p.x_row + v * p.x_next, p.x_row};
        if (p.indices) {
          const auto seen = chosen_rows_of(x_columns.data(), block, p.indices + v * p.N);
          if (rows_only<T>()) {
            transpose<T>(p.N, rows, seen, rows_of(gathered.data(), p.N));
            h = {gathered.data(), p.N};
          } else {
            copy_rows<T>(p.N, rows, seen, rows_of(gathered.data(), rows));
            h = {gathered.data(), 1, rows};
          }
        }
        T* z = pre ? pre + (v * p.B + b0) * p.d : products.data();
        product<T>(rows, p.d, p.N, h, {p.weight + v * p.N * p.d, p.d}, z, p.d, false);
        for (int64_t r = 0; r < rows; ++r) {
          T* kept = stats ? stats + (v * p.B + b0 + r) * 2 : unsaved;
          fuse_row(z + r * p.d, p.epilogue(v, b0 + r), y + ((b0 + r) * p.V + v) * p.d, kept, row.data(), p.d, p.eps);
        }
      }
    }
  });
}

template <typename T>
struct Grads {
  const T *grad, *pre, *stats;
  const T* weight_t; // (V, d, N), or null where products take the weights as they are
  T *x; // null where nobody asks
  T *residual; // null without
  T *weight, *more_weight; // (V, N, d) of the first chunk, and (chunks - 1, V, N, d)
  T *rest; // (chunks, V, 3, d): bias, scale, shift
};

// The rows b0 .. b0 + rows of one view.
template <typename T>
struct Scratch {
  std::vector<T> grad_z, h_columns, grad_h, rows, x_columns, grad_x_columns;
  Scratch(const Problem<T>& p, int64_t block, bool need_x)
      : grad_z(block * p.d), h_columns(block * p.N), grad_h(p.indices && need_x ? block * p.N : 0), rows(3 * p.d),
        x_columns(p.indices ? block * p.width : 0), grad_x_columns(p.indices && need_x ? block * p.width : 0) {}
};

template <typename T>
void backward_block(
    const Problem<T>& p, const Grads<T>& g, int64_t chunk, int64_t v, int64_t b0, int64_t rows, int64_t block,
    bool first, Scratch<T>& s) {
  T* rest = g.rest + (chunk * p.V + v) * 3 * p.d;
  const EpilogueGrad<T> sums{rest, rest + p.d, rest + 2 * p.d};
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t own = ((b0 + r) * p.V + v) * p.d, kept = v * p.B + b0 + r;
    fuse_row_backward(
        g.grad + own, g.pre + kept * p.d, p.epilogue(v, b0 + r), g.stats ? g.stats + kept * 2 : nullptr,
        s.grad_z.data() + r * p.d, g.residual ? g.residual + own : nullptr, sums, s.rows.data(), p.d);
  }
  const int32_t* indices = p.indices ? p.indices + v * p.N : nullptr;
  const T *weight = p.weight + v * p.N * p.d, *h = p.x + b0 * p.x_row + v * p.x_next;
  Factor<T> h_columns{s.h_columns.data(), block};
  if (indices) {
    copy_rows<T>(p.N, rows, chosen_rows_of(s.x_columns.data(), block, indices), rows_of(s.h_columns.data(), block));
  } else if (rows_only<T>()) {
    transpose<T>(rows, p.N, rows_of(h, p.x_row), rows_of(s.h_columns.data(), block));
  } else {
    h_columns = {h, 1, p.x_row};
  }
  const Factor<T> grad_z{s.grad_z.data(), p.d};
  T* grad_weight = (chunk ? g.more_weight + (chunk - 1) * p.V * p.N * p.d : g.weight) + v * p.N * p.d;
  product<T>(p.N, p.d, rows, h_columns, grad_z, grad_weight, p.d, !first);
  if (!g.x) {
    return;
  }
  const Factor<T> weight_t = g.weight_t ? Factor<T>{g.weight_t + v * p.N * p.d, p.N} : Factor<T>{weight, 1, p.d};
  if (!indices) {
    product<T>(rows, p.N, p.d, grad_z, weight_t, g.x + (b0 * p.V + v) * p.N, p.V * p.N, false);
    return;
  }
  const auto to = chosen_rows_of(s.grad_x_columns.data(), block, indices);
  if (rows_only<T>()) {
    product<T>(rows, p.N, p.d, grad_z, weight_t, s.grad_h.data(), p.N, false);
    transpose<T>(rows, p.N, rows_of(s.grad_h.data(), p.N), to, true);
  } else {
    product<T>(p.N, rows, p.d, {weight, p.d}, {grad_z.start, 1, p.d}, s.grad_h.data(), rows, false);
    add_rows<T>(p.N, rows, rows_of(s.grad_h.data(), rows), to);
  }
}

// Runs of blocks whose sums over rows are kept apart and added in order: the number of threads does not decide the result.
int64_t chunk_count(int64_t B) {
  const int64_t blocks = (B + block_rows(B) - 1) / block_rows(B);
  return std::clamp<int64_t>(blocks / 2, std::min<int64_t>(2, blocks), 16);
}

template <typename T>
void backward_kernel(const Problem<T>& p, const Grads<T>& g, int64_t chunks) {
  const int64_t block = block_rows(p.B), blocks = (p.B + block - 1) / block;
  at::parallel_for(0, chunks, grain(2 * p.B * p.V * p.N * p.d / std::max<int64_t>(1, chunks)), [&](int64_t begin, int64_t end) {
    Scratch<T> scratch(p, block, g.x != nullptr);
    for (int64_t c = begin; c < end; ++c) {
      const int64_t from = blocks * c / chunks, to = blocks * (c + 1) / chunks;
      for (int64_t k = from; k < to; ++k) {
        const int64_t b0 = k * block, rows = std::min(block, p.B - b0);
        if (p.indices) {
          transpose<T>(rows, p.width, rows_of(p.x + b0 * p.x_row, p.x_row), rows_of(scratch.x_columns.data(), block));
          std::fill(scratch.grad_x_columns.begin(), scratch.grad_x_columns.end(), T(0));
        }
        for (int64_t v = 0; v < p.V; ++v) {
          backward_block(p, g, c, v, b0, rows, block, k == from, scratch);
        }
        if (p.indices && g.x) {
          const auto columns = rows_of(scratch.grad_x_columns.data(), block);
          transpose<T>(p.width, rows, columns, rows_of(g.x + b0 * p.width, p.width));
        }
      }
    }
  });
}

// sum (n) += each of the parts, first to last.
template <typename T>
void add_parts(T* sum, const T* parts, int64_t count, int64_t n) {
  at::parallel_for(0, n, 1 << 14, [&](int64_t begin, int64_t end) {
    for (int64_t c = 0; c < count; ++c) {
      for_vectors<T>(end - begin, [&](int64_t i, auto lanes) {
        add_to(sum + begin + i, load(parts + c * n + begin + i, lanes), lanes);
      });
    }
  });
}

// Contiguous inputs of a problem, kept alive with it.
template <typename T>
struct Inputs {
  at::Tensor x, weight, bias, residual, scale, shift, keep;
  std::vector<int32_t> indices;
  Problem<T> problem;
};

at::Tensor contiguous(const std::optional<at::Tensor>& tensor) {
  return tensor ? tensor->contiguous() : at::Tensor();
}

template <typename T>
const T* pointer(const at::Tensor& tensor) {
  return tensor.defined() ? tensor.const_data_ptr<T>() : nullptr;
}

template <typename T>
Inputs<T> inputs(
    const at::Tensor& x, const std::optional<at::Tensor>& indices, const at::Tensor& weight, const at::Tensor& bias,
    const std::optional<at::Tensor>& residual, const std::optional<at::Tensor>& scale,
    const std::optional<at::Tensor>& shift, double eps, const std::optional<at::Tensor>& keep, double keep_share) {
  Inputs<T> in{x.stride(-1) == 1 ? x : x.contiguous(), weight.contiguous(), bias.contiguous(), contiguous(residual),
               contiguous(scale), contiguous(shift), contiguous(keep), checked(indices, x.size(-1)), {}};
  in.problem = {
      x.size(0), weight.size(0), weight.size(1), weight.size(2), x.size(-1), pointer<T>(in.x), in.x.stride(0),
      in.x.stride(1), indices ? in.indices.data() : nullptr, pointer<T>(in.weight), pointer<T>(in.bias),
      pointer<T>(in.residual), pointer<T>(in.scale), pointer<T>(in.shift), static_cast<T>(eps), pointer<bool>(in.keep),
      static_cast<T>(1 / keep_share)};
  return in;
}

} // namespace

void fuse_rows(const Problem<float>& problem, float* y) {
  forward_kernel<float>(problem, y, nullptr, nullptr);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> view_fusion_forward(
    const at::Tensor& x, const std::optional<at::Tensor>& indices, const at::Tensor& weight, const at::Tensor& bias,
    const std::optional<at::Tensor>& residual, const std::optional<at::Tensor>& scale,
    const std::optional<at::Tensor>& shift, double eps, bool save,
    const std::optional<at::Tensor>& keep, double keep_share) {
  const int64_t B = x.size(0), V = weight.size(0), d = weight.size(2);
  auto y = at::empty({B, V, d}, x.options());
  auto pre = save ? at::empty({V, B, d}, x.options()) : at::empty({0}, x.options());
  auto stats = save && scale ? at::empty({V, B, 2}, x.options()) : at::empty({0}, x.options());
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "view_fusion_forward", [&] {
    const auto in = inputs<scalar_t>(x, indices, weight, bias, residual, scale, shift, eps, keep, keep_share);
    forward_kernel(
        in.problem, y.mutable_data_ptr<scalar_t>(), save ? pre.mutable_data_ptr<scalar_t>() : nullptr,
        save && scale ? stats.mutable_data_ptr<scalar_t>() : nullptr);
  });
  return {y, pre, stats};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> view_fusion_backward(
    const at::Tensor& grad, const at::Tensor& x, const std::optional<at::Tensor>& indices, const at::Tensor& weight,
    const at::Tensor& bias, const std::optional<at::Tensor>& residual, const std::optional<at::Tensor>& scale,
    const at::Tensor& pre, const at::Tensor& stats, bool need_x,
    const std::optional<at::Tensor>& keep, double keep_share) {
  const int64_t B = x.size(0), V = weight.size(0), N = weight.size(1), d = weight.size(2), chunks = chunk_count(B);
  const auto none = [&] { return at::empty({0}, x.options()); };
  const auto grads = grad.contiguous(), saved = pre.contiguous(), figures = stats.contiguous();
  auto grad_x = need_x ? at::empty(x.sizes(), x.options()) : none();
  auto grad_residual = residual ? at::empty({B, V, d}, x.options()) : none();
  auto grad_weight = chunks ? at::empty({V, N, d}, x.options()) : at::zeros({V, N, d}, x.options());
  auto more_weight = at::empty({std::max<int64_t>(chunks - 1, 0), V, N, d}, x.options());
  auto rest = at::zeros({chunks, V, 3, d}, x.options());
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "view_fusion_backward", [&] {
    const auto in = inputs<scalar_t>(x, indices, weight, bias, residual, scale, std::nullopt, 0, keep, keep_share);
    std::vector<scalar_t> weight_t(rows_only<scalar_t>() && need_x ? weight.numel() : 0);
    for (int64_t v = 0; v < V && !weight_t.empty(); ++v) {
      transpose<scalar_t>(N, d, rows_of(in.problem.weight + v * N * d, d), rows_of(weight_t.data() + v * N * d, N));
    }
    const Grads<scalar_t> out{
        grads.const_data_ptr<scalar_t>(), saved.const_data_ptr<scalar_t>(),
        scale ? figures.const_data_ptr<scalar_t>() : nullptr, weight_t.empty() ? nullptr : weight_t.data(), need_x ? grad_x.mutable_data_ptr<scalar_t>() : nullptr,
        residual ? grad_residual.mutable_data_ptr<scalar_t>() : nullptr, grad_weight.mutable_data_ptr<scalar_t>(),
        more_weight.mutable_data_ptr<scalar_t>(), rest.mutable_data_ptr<scalar_t>()};
    backward_kernel(in.problem, out, chunks);
    add_parts(out.weight, out.more_weight, more_weight.size(0), grad_weight.numel());
  });
  const auto sums = rest.sum(0);
  // Results may not share memory, as contiguous() would leave those of a single view.
  const auto own = [&](int64_t which) { return sums.select(1, which).clone(at::MemoryFormat::Contiguous); };
  return {grad_x, grad_weight, own(0), grad_residual, scale ? own(1) : none(), scale ? own(2) : none()};
}

} // namespace ssr_rec
