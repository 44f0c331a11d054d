// Filter-and-fuse with the samples of a block side by side in a vector, for when nothing is kept for a backward pass.
//
// A view's input is then N rows of x's transpose, copied as they are; its product is W^T h^T; the mean and variance of
// LayerNorm are sums down the columns, with no sum across a vector; and the output is the transpose that the next layer
// gathers from. Only the first layer's input has to be turned.
#pragma once

#include "problem.h"
#include "transpose.h"

namespace ssr_rec {

// y = LN(gelu(z + bias)) * scale + shift for W vectors of samples; z (d, ld) is overwritten, y has y_row to a dim.
template <typename T, int W>
void fuse_columns(T* z, int64_t ld, const Epilogue<T>& view, T* y, int64_t y_row, int64_t samples, int64_t d, T eps) {
  using V = Vec<T>;
  constexpr int64_t lanes = V::size();
  const auto put = [&](int64_t f, int w, const V& value) {
    const int64_t left = samples - w * lanes;
    value.store(y + f * y_row + w * lanes, static_cast<int>(std::min(left, lanes)));
  };
  const bool whole = samples == W * lanes;
  V sum[W], squares[W];
  for (int w = 0; w < W; ++w) {
    sum[w] = squares[w] = V(T(0));
  }
  for (int64_t f = 0; f < d; ++f) {
    const V bias(view.bias[f]);
    for (int w = 0; w < W; ++w) {
      const V zi = V::loadu(z + f * ld + w * lanes) + bias, ai = zi * normal_below(zi);
      if (view.scale) {
        ai.store(z + f * ld + w * lanes);
        sum[w] = sum[w] + ai;
      } else {
        put(f, w, ai);
      }
    }
  }
  if (!view.scale) {
    return;
  }
  const V share(T(1) / static_cast<T>(d));
  for (int w = 0; w < W; ++w) {
    sum[w] = sum[w] * share;
  }
  for (int64_t f = 0; f < d; ++f) {
    for (int w = 0; w < W; ++w) {
      const V centred = V::loadu(z + f * ld + w * lanes) - sum[w];
      squares[w] = at::vec::fmadd(centred, centred, squares[w]);
    }
  }
  for (int w = 0; w < W; ++w) {
    squares[w] = V(T(1)) / at::vec::fmadd(squares[w], share, V(eps)).sqrt();
  }
  for (int64_t f = 0; f < d; ++f) {
    const V scale(view.scale[f]), shift(view.shift[f]);
    for (int w = 0; w < W; ++w) {
      const V normal = (V::loadu(z + f * ld + w * lanes) - sum[w]) * squares[w];
      const V out = at::vec::fmadd(normal, scale, shift);
      if (whole) {
        out.store(y + f * y_row + w * lanes);
      } else {
        put(f, w, out);
      }
    }
  }
}

// W^T of every view, (V, d, N).
template <typename T>
std::vector<T> turned_weight(const Problem<T>& p) {
  std::vector<T> weight(p.V * p.N * p.d);
  at::parallel_for(0, p.V, 1, [&](int64_t begin, int64_t end) {
    for (int64_t v = begin; v < end; ++v) {
      const int64_t first = v * p.N * p.d;
      transpose<T>(p.N, p.d, rows_of(p.weight + first, p.d), rows_of(weight.data() + first, p.N));
    }
  });
  return weight;
}

// y is (V, d, B); x may lie either way.
template <typename T>
void forward_columns(const Problem<T>& p, T* y) {
  constexpr int64_t lanes = Vec<T>::size(), block = 4 * lanes;
  const std::vector<T> own = p.turned ? std::vector<T>() : turned_weight(p);
  const T* weight = p.turned ? p.weight : own.data();
  const int64_t blocks = (p.B + block - 1) / block;
  at::parallel_for(0, blocks, grain(block * p.V * p.N * p.d), [&](int64_t begin, int64_t end) {
    const bool turns = p.x_row != 1 || p.x_next == 1;
    std::vector<T> x_columns(turns ? p.width * block : 0), gathered(p.N * block), products(p.d * block);
    for (int64_t b0 = begin * block; b0 < std::min(end * block, p.B); b0 += block) {
      const int64_t rows = std::min(block, p.B - b0), padded_rows = padded<T>(rows);
      if (turns) {
        transpose<T>(rows, p.width, rows_of(p.x + b0 * p.x_row, p.x_row), rows_of(x_columns.data(), block));
      }
      const T* from = turns ? x_columns.data() : p.x + b0;
      const int64_t next = turns ? block : p.x_next;
      for (int64_t v = 0; v < p.V; ++v) {
        const int32_t* indices = p.indices + v * p.N;
        for (int64_t j = 0; j < p.N; ++j) {
          std::copy_n(from + indices[j] * next, rows, gathered.data() + j * block);
        }
        const T* w = weight + v * p.N * p.d;
        product(p.d, padded_rows, p.N, w, p.N, gathered.data(), block, products.data(), block, false);
        T* to = y + v * p.d * p.B + b0;
        const auto view = p.epilogue(v, 0);
        if (rows == block) {
          fuse_columns<T, 4>(products.data(), block, view, to, p.B, rows, p.d, p.eps);
          continue;
        }
        for (int64_t r = 0; r < rows; r += lanes) {
          fuse_columns<T, 1>(products.data() + r, block, view, to + r, p.B, std::min(lanes, rows - r), p.d, p.eps);
        }
      }
    }
  });
}

} // namespace ssr_rec
