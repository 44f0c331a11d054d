// Filter-and-fuse for scoring with weights in bfloat16: the samples of a block lie side by side in a vector.
//
// A view's input is then N rows of x's transpose, rounded as they are copied; its product is W^T h^T, summed in float;
// the mean and variance of LayerNorm are sums down the columns, with no sum across a vector; and the output is the
// transpose that the next layer gathers from. Only the first layer's input has to be turned.
#pragma once

#include "problem.h"
#include "transpose.h"

#include <cstring>

namespace ssr_rec {

// Samples of a block: four vectors.
constexpr int64_t COLUMN_BLOCK = 64;

// z = LN(gelu(z + bias)) * scale + shift for W vectors of samples, dim after dim; z is (d, COLUMN_BLOCK).
template <int W>
void fuse_columns(float* z, const Epilogue<float>& view, int64_t d, float eps) {
  using V = Vec<float>;
  constexpr int64_t lanes = V::size();
  V sum[W], squares[W];
  for (int w = 0; w < W; ++w) {
    sum[w] = squares[w] = V(0.f);
  }
  for (int64_t f = 0; f < d; ++f) {
    const V bias(view.bias[f]);
    for (int w = 0; w < W; ++w) {
      float* at = z + f * COLUMN_BLOCK + w * lanes;
      const V zi = V::loadu(at) + bias, ai = zi * normal_below(zi);
      ai.store(at);
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
      float* at = z + f * COLUMN_BLOCK + w * lanes;
      at::vec::fmadd((V::loadu(at) - sum[w]) * squares[w], scale, shift).store(at);
    }
  }
}

// The number's high half, rounded to the nearest even; a NaN stays one.
inline uint32_t high_half(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return value != value ? 0x7fc0u : (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
}

// The rows of x that indices name, in bfloat16, each two in turns, as the product wants them; N is even.
inline void gather_pairs(
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

// y (V, d, y_row) has a column for each sample; weight is (V, d, N); x may lie either way.
inline void forward_columns(const Problem<float>& p, const at::BFloat16* weight, float* y, int64_t y_row) {
  constexpr int64_t block = COLUMN_BLOCK, lanes = Vec<float>::size();
  const int64_t blocks = (p.B + block - 1) / block;
  at::parallel_for(0, blocks, grain(block * p.V * p.N * p.d), [&](int64_t begin, int64_t end) {
    const bool turned = p.x_row == 1 && p.x_next > 1;
    std::vector<float> x_columns(turned ? 0 : p.width * block), products(p.d * block);
    // Zeros where there are no samples: the products of what is left there must be numbers.
    std::vector<uint32_t> gathered(p.N / 2 * block);
    for (int64_t b0 = begin * block; b0 < std::min(end * block, p.B); b0 += block) {
      const int64_t rows = std::min(block, p.B - b0), vectors = (rows + lanes - 1) / lanes;
      const float* from = p.x + b0;
      if (!turned) {
        transpose<float>(rows, p.width, rows_of(p.x + b0 * p.x_row, p.x_row), rows_of(x_columns.data(), block));
        from = x_columns.data();
      }
      for (int64_t v = 0; v < p.V; ++v) {
        gather_pairs(from, turned ? p.x_next : block, p.indices + v * p.N, p.N, rows, gathered.data());
        float* z = products.data();
        at::native::cpublas::brgemm(
            p.d, vectors * lanes, p.N, p.N, block, block, false, weight + v * p.N * p.d,
            reinterpret_cast<const at::BFloat16*>(gathered.data()), z);
        if (vectors * lanes == block) {
          fuse_columns<COLUMN_BLOCK / Vec<float>::size()>(z, p.epilogue(v, 0), p.d, p.eps);
        } else {
          for (int64_t w = 0; w < vectors; ++w) {
            fuse_columns<1>(z + w * lanes, p.epilogue(v, 0), p.d, p.eps);
          }
        }
        for (int64_t f = 0; f < p.d; ++f) {
          std::copy_n(z + f * block, rows, y + (v * p.d + f) * y_row + b0);
        }
      }
    }
  });
}

} // namespace ssr_rec
