// Filter-and-fuse for scoring: the samples of a block lie side by side in a vector.
//
// A view's input is then N rows of x's transpose, copied as they are (for bfloat16 rounded); its product is W^T h^T,
// summed in float; the mean and variance of LayerNorm are sums down the columns, with no sum across a vector; and the
// output is the transpose that the next layer gathers from. Only the first layer's input has to be turned.

#include "ops.h"
#include "problem.h"
#include "transpose.h"

#include <ATen/ops/empty.h>

#include <cstring>
#include <memory>

namespace ssr_rec {
namespace {

// Samples of a block: four vectors.
constexpr int64_t COLUMN_BLOCK = 64;
// Up to here a product with whole vectors of samples costs more than rows do.
constexpr int64_t FEW_SAMPLES = 12;

// y = LN(gelu(z + bias) + residual) * scale + shift for W vectors of samples, dim after dim; z is (d, COLUMN_BLOCK), as is
// residual, which may be null, and y (d, y_row).
template <int W>
void fuse_columns(
    float* z, const Epilogue<float>& view, const float* residual, int64_t d, float eps, float* y, int64_t y_row) {
  using V = Vec<float>;
  constexpr int64_t lanes = V::size();
  float* activations = view.scale ? z : y;
  const int64_t next = view.scale ? COLUMN_BLOCK : y_row;
  V sum[W], squares[W];
  for (int w = 0; w < W; ++w) {
    sum[w] = squares[w] = V(0.f);
  }
  for (int64_t f = 0; f < d; ++f) {
    const V bias(view.bias[f]);
    for (int w = 0; w < W; ++w) {
      V ai = gelu(V::loadu(z + f * COLUMN_BLOCK + w * lanes) + bias);
      if (residual) {
        ai = ai + V::loadu(residual + f * COLUMN_BLOCK + w * lanes);
      }
      ai.store(activations + f * next + w * lanes);
      sum[w] = sum[w] + ai;
    }
  }
  if (!view.scale) {
    return;
  }
  const V share(1.f / static_cast<float>(d));
  for (int w = 0; w < W; ++w) {
    sum[w] = sum[w] * share;
  }
  for (int64_t f = 0; f < d; ++f) {
    for (int w = 0; w < W; ++w) {
      const V centred = V::loadu(z + f * COLUMN_BLOCK + w * lanes) - sum[w];
      squares[w] = at::vec::fmadd(centred, centred, squares[w]);
    }
  }
  for (int w = 0; w < W; ++w) {
    squares[w] = V(1.f) / at::vec::fmadd(squares[w], share, V(eps)).sqrt();
  }
  for (int64_t f = 0; f < d; ++f) {
    const V scale(view.scale[f]), shift(view.shift[f]);
    for (int w = 0; w < W; ++w) {
      const V normal = (V::loadu(z + f * COLUMN_BLOCK + w * lanes) - sum[w]) * squares[w];
      at::vec::fmadd(normal, scale, shift).store(y + f * y_row + w * lanes);
    }
  }
}

// The number's high half, rounded to the nearest even; a NaN stays one.
uint32_t high_half(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return value != value ? 0x7fc0u : (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
}

// The rows of x that indices name, in bfloat16, each two in turns, as the product wants them; N is even.
void gather_pairs(
    const float* x, int64_t next, const int32_t* indices, int64_t N, int64_t samples, uint32_t* to) {
  for (int64_t j = 0; j < N; j += 2, to += COLUMN_BLOCK) {
    const float *even = x + indices[j] * next, *odd = x + indices[j + 1] * next;
    int64_t r = 0;
#if defined(CPU_CAPABILITY_AVX512)
    for (; r + 16 <= samples; r += 16) {
      const auto half = [](const float* from) {
        const __m512 value = _mm512_loadu_ps(from);
        const __m512i bits = _mm512_castps_si512(value);
        const __m512i up = _mm512_add_epi32(
            _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1)), _mm512_set1_epi32(0x7fff));
        const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
        return _mm512_mask_mov_epi32(_mm512_add_epi32(bits, up), nan, _mm512_set1_epi32(0x7fc00000));
      };
      const __m512i low = _mm512_srli_epi32(half(even + r), 16);
      _mm512_storeu_si512(
          to + r, _mm512_or_si512(low, _mm512_and_si512(half(odd + r), _mm512_set1_epi32(0xffff0000))));
    }
#endif
    for (; r < samples; ++r) {
      to[r] = high_half(even[r]) | high_half(odd[r]) << 16;
    }
  }
}

// The rows of x that indices name, as they are.
void gather_columns(const float* x, int64_t next, const int32_t* indices, int64_t N, int64_t samples, float* to) {
  for (int64_t j = 0; j < N; ++j) {
    std::copy_n(x + indices[j] * next, samples, to + j * COLUMN_BLOCK);
  }
}

// The same rounded to bfloat16, in float: what gather_pairs gives a processor without bfloat16 products.
void gather_rounded(const float* x, int64_t next, const int32_t* indices, int64_t N, int64_t samples, float* to) {
  for (int64_t j = 0; j < N; ++j) {
    const float* row = x + indices[j] * next;
    for (int64_t r = 0; r < samples; ++r) {
      const uint32_t bits = high_half(row[r]) << 16;
      std::memcpy(to + j * COLUMN_BLOCK + r, &bits, sizeof bits);
    }
  }
}

// Weights that were bfloat16, in float.
struct Widened {
  float value;
};
static_assert(sizeof(Widened) == sizeof(float));

// z (d, COLUMN_BLOCK) = weight (d, N) times the chosen rows of x, in the first columns, of which only samples count.
void multiply(
    const float* x, int64_t next, const int32_t* indices, int64_t N, int64_t d, int64_t samples, int64_t columns,
    const float* weight, float* gathered, float* z) {
  gather_columns(x, next, indices, N, samples, gathered);
  product<float>(d, columns, N, {weight, N}, {gathered, COLUMN_BLOCK}, z, COLUMN_BLOCK, false);
}

void multiply(
    const float* x, int64_t next, const int32_t* indices, int64_t N, int64_t d, int64_t samples, int64_t columns,
    const Widened* weight, float* gathered, float* z) {
  gather_rounded(x, next, indices, N, samples, gathered);
  product<float>(d, columns, N, {&weight->value, N}, {gathered, COLUMN_BLOCK}, z, COLUMN_BLOCK, false);
}

void multiply(
    const float* x, int64_t next, const int32_t* indices, int64_t N, int64_t d, int64_t samples, int64_t columns,
    const at::BFloat16* weight, float* gathered, float* z) {
  gather_pairs(x, next, indices, N, samples, reinterpret_cast<uint32_t*>(gathered));
  at::native::cpublas::brgemm(
      d, columns, N, N, COLUMN_BLOCK, COLUMN_BLOCK, false, weight, reinterpret_cast<const at::BFloat16*>(gathered), z);
}

// y (V, d, y_row) has a column for each sample, and room for a vector behind the last; with y_row = 0 it is (B, V, d).
// weight is (V, d, N); x may lie either way. With residual, N is d.
template <typename Weight>
void score(const Problem<float>& p, const Weight* weight, float* y, int64_t y_row, bool residual) {
  constexpr bool rounded = !std::is_same_v<Weight, float>;
  constexpr int64_t block = COLUMN_BLOCK, lanes = Vec<float>::size();
  const int64_t blocks = (p.B + block - 1) / block;
  at::parallel_for(0, blocks, grain(block * p.V * p.N * p.d), [&](int64_t begin, int64_t end) {
    const bool turned = p.x_row == 1 && p.x_next > 1;
    // Zeros where there are no samples: what is multiplied there must be numbers.
    std::vector<float> products(p.d * block), gathered(p.N * block), seen(rounded && residual ? p.N * block : 0);
    const std::unique_ptr<float[]> x_columns(turned ? nullptr : new float[p.width * block]);
    for (int64_t b0 = begin * block; b0 < std::min(end * block, p.B); b0 += block) {
      const int64_t rows = std::min(block, p.B - b0), vectors = (rows + lanes - 1) / lanes;
      const float* from = p.x + b0;
      if (!turned) {
        transpose<float>(rows, p.width, rows_of(p.x + b0 * p.x_row, p.x_row), rows_of(x_columns.get(), block));
        from = x_columns.get();
      }
      for (int64_t v = 0; v < p.V; ++v) {
        float *z = products.data(), *to = y_row ? y + v * p.d * y_row + b0 : z;
        const int64_t to_row = y_row ? y_row : block;
        const int64_t next = turned ? p.x_next : block;
        multiply(
            from, next, p.indices + v * p.N, p.N, p.d, rows, vectors * lanes, weight + v * p.N * p.d, gathered.data(), z);
        if (rounded && residual) {
          gather_columns(from, next, p.indices + v * p.N, p.N, rows, seen.data());
        }
        const float* added = !residual ? nullptr : rounded ? seen.data() : gathered.data();
        if (vectors * lanes == block) {
          fuse_columns<COLUMN_BLOCK / Vec<float>::size()>(z, p.epilogue(v, 0), added, p.d, p.eps, to, to_row);
        } else {
          for (int64_t w = 0; w < vectors; ++w) {
            const float* one = added ? added + w * lanes : nullptr;
            fuse_columns<1>(z + w * lanes, p.epilogue(v, 0), one, p.d, p.eps, to + w * lanes, to_row);
          }
        }
        if (!y_row) {
          const int64_t sample = p.V * p.d;
          transpose<float>(p.d, rows, rows_of(z, block), rows_of(y + b0 * sample + v * p.d, sample));
        }
      }
    }
    if constexpr (std::is_same_v<Weight, at::BFloat16>) {
      // Or torch takes a thread's AMX tiles for still configured, though another operator has configured them since.
      at::native::cpublas::brgemm_release();
    }
  });
}

// The same by rows, with weight (V, N, d).
void score_few(Problem<float> p, float* y, int64_t y_row, bool residual) {
  const int64_t dims = p.V * p.d;
  std::vector<float> rows(p.x_next == 1 ? 0 : p.B * p.width), out(y_row ? p.B * dims : 0);
  if (p.x_next != 1) {
    transpose<float>(p.width, p.B, rows_of(p.x, p.x_next), rows_of(rows.data(), p.width));
    p.x = rows.data();
    p.x_row = p.width;
    p.x_next = 1;
  }
  std::vector<float> seen(residual ? p.B * dims : 0);
  for (int64_t i = 0; i < static_cast<int64_t>(seen.size()); ++i) {
    seen[i] = p.x[i / dims * p.x_row + p.indices[i % dims]];
  }
  p.residual = residual ? seen.data() : nullptr;
  fuse_rows(p, y_row ? out.data() : y);
  if (!y_row) {
    return;
  }
  transpose<float>(p.B, dims, rows_of(out.data(), dims), rows_of(y, y_row));
}

} // namespace

at::Tensor view_scoring(
    const at::Tensor& x, const at::Tensor& indices, const at::Tensor& weight_t, const at::Tensor& bias,
    const std::optional<at::Tensor>& scale, const std::optional<at::Tensor>& shift, double eps,
    const std::optional<at::Tensor>& weight, bool turned, bool residual) {
  static_assert(Vec<float>::size() <= COLUMNS_APART);
  const int64_t B = x.size(0), V = weight_t.size(0), d = weight_t.size(1), N = weight_t.size(2);
  // A few numbers between the dims, lest all of them fall into the same lines of the caches.
  auto y = turned ? at::empty({V, d, B + COLUMNS_APART}, x.options()).narrow(2, 0, B).permute({2, 0, 1})
                  : at::empty({B, V, d}, x.options());
  const int64_t y_row = turned ? B + COLUMNS_APART : 0;
  const auto input = x.stride(0) == 1 || x.stride(1) == 1 ? x : x.contiguous();
  const auto chosen = checked(indices, x.size(1));
  const auto biases = bias.contiguous(), scales = scale ? scale->contiguous() : at::Tensor();
  const auto shifts = shift ? shift->contiguous() : at::Tensor();
  Problem<float> problem{
      B, V, N, d, x.size(1), input.const_data_ptr<float>(), input.stride(0), input.stride(1), chosen.data(), nullptr,
      biases.const_data_ptr<float>(), nullptr, scale ? scales.const_data_ptr<float>() : nullptr,
      shift ? shifts.const_data_ptr<float>() : nullptr, static_cast<float>(eps)};
  float* to = y.mutable_data_ptr<float>();
  if (weight && B <= FEW_SAMPLES) {
    const auto plain = weight->contiguous();
    problem.weight = plain.const_data_ptr<float>();
    score_few(problem, to, y_row, residual);
  } else if (weight_t.scalar_type() == at::kBFloat16 && has_bf16_brgemm() && N % 2 == 0) {
    const auto half = weight_t.contiguous();
    score(problem, half.const_data_ptr<at::BFloat16>(), to, y_row, residual);
  } else if (weight_t.scalar_type() == at::kBFloat16 && N % 2 == 0) {
    const auto whole = weight_t.to(at::kFloat).contiguous();
    score(problem, reinterpret_cast<const Widened*>(whole.const_data_ptr<float>()), to, y_row, residual);
  } else {
    const auto whole = weight_t.to(at::kFloat).contiguous();
    score(problem, whole.const_data_ptr<float>(), to, y_row, residual);
  }
  return y;
}

} // namespace ssr_rec
