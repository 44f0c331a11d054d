// A filter-and-fuse problem as raw pointers, its matrix products, and how its rows are cut into blocks.
#pragma once

#include "fuse_row.h"

#include <ATen/native/CPUBlas.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/from_blob.h>

namespace ssr_rec {

#if defined(CPU_CAPABILITY_AVX512)
constexpr bool MAY_HAVE_BRGEMM = true;
#else
// Not asked for: with ATEN_CPU_CAPABILITY a processor must do what one with fewer instructions does.
constexpr bool MAY_HAVE_BRGEMM = false;
#endif

// Whether oneDNN's small-block product runs here; it needs x86 with AVX-512.
inline bool has_brgemm() {
  static const bool works = [] {
    try {
      float one = 1, product = 0;
      if (!MAY_HAVE_BRGEMM) {
        return false;
      }
      at::native::cpublas::brgemm(1, 1, 1, 1, 1, 1, false, &one, &one, &product, false);
      return product == 1;
    } catch (const c10::Error&) {
      return false;
    }
  }();
  return works;
}

// Whether it multiplies bfloat16 too.
inline bool has_bf16_brgemm() {
  static const bool works = [] {
    try {
      const at::BFloat16 one[2] = {1, 0};
      float product = 0;
      if (!MAY_HAVE_BRGEMM) {
        return false;
      }
      at::native::cpublas::brgemm(1, 1, 2, 2, 1, 1, false, one, one, &product);
      at::native::cpublas::brgemm_release();
      return product == 1;
    } catch (const c10::Error&) {
      return false;
    }
  }();
  return works;
}

// Whether products of T want their factors row after row, as brgemm does; other libraries take them turned as well.
template <typename T>
inline bool rows_only() {
  return std::is_same_v<T, float> && has_brgemm();
}

// A factor of a product, and how far apart its rows and its columns lie; one of the two is 1.
template <typename T>
struct Factor {
  const T* start;
  int64_t row, column = 1;

  at::Tensor tensor(int64_t rows, int64_t columns) const {
    const auto options = at::TensorOptions().dtype(c10::CppTypeToScalarType<T>::value);
    return at::from_blob(const_cast<T*>(start), {rows, columns}, {row, column}, options);
  }
};

// c (M, N) = or += a (M, K) b (K, N); c row after row, and where rows_only the factors as well.
template <typename T>
void product(int64_t M, int64_t N, int64_t K, const Factor<T>& a, const Factor<T>& b, T* c, int64_t ldc, bool add) {
  if constexpr (std::is_same_v<T, float>) {
    if (has_brgemm()) {
      at::native::cpublas::brgemm(M, N, K, a.row, b.row, ldc, add, a.start, b.start, c, false);
      return;
    }
  }
  auto out = Factor<T>{c, ldc}.tensor(M, N);
  at::addmm_out(out, out, a.tensor(M, K), b.tensor(K, N), add ? 1 : 0);
}

// Raw pointers to everything, and how it lies.
template <typename T>
struct Problem {
  int64_t B, V, N, d, width;
  const T* x;
  int64_t x_row, x_next; // strides of x: of rows, and of views; with indices, of dims
  const int32_t* indices; // (V, N), or null
  const T *weight, *bias, *residual, *scale, *shift;
  T eps;
  const bool* keep = nullptr; // (B, V, d), or null for no dropout
  T kept = 1;

  Epilogue<T> epilogue(int64_t v, int64_t b) const {
    const int64_t row = (b * V + v) * d;
    return {bias + v * d, residual ? residual + row : nullptr, scale ? scale + v * d : nullptr,
            shift ? shift + v * d : nullptr, keep ? keep + row : nullptr, kept};
  }
};

// y (B, V, d), by blocks of rows; the rows of x must lie one after another.
void fuse_rows(const Problem<float>& problem, float* y);

// Rows of a block: few enough that its pieces fit the second-level cache and that small batches keep two cores busy.
inline int64_t block_rows(int64_t B) {
  return B >= 512 ? 128 : B >= 128 ? 64 : 32;
}

// How many tasks of so many multiplications a thread must at least get, lest waking it costs more than it saves.
inline int64_t grain(int64_t multiplications) {
  return std::max<int64_t>(1, (int64_t(1) << 19) / std::max<int64_t>(1, multiplications));
}

// Checked, because a checkpoint brings them.
inline std::vector<int32_t> checked(const std::optional<at::Tensor>& indices, int64_t width) {
  if (!indices) {
    return {};
  }
  const auto all = indices->contiguous();
  const int64_t* from = all.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < all.numel(); ++i) {
    TORCH_CHECK_VALUE(from[i] >= 0 && from[i] < width, "view_fusion: index ", from[i], " of an input of ", width, " dims");
  }
  return std::vector<int32_t>(from, from + all.numel());
}

} // namespace ssr_rec
