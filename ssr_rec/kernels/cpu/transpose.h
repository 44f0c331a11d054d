// Transposes of matrices whose rows may lie anywhere.
#pragma once

#include "rows.h"

namespace ssr_rec {

#if defined(CPU_CAPABILITY_AVX512)
// at::vec has a transpose too, but it goes through memory, which makes it four times as slow.
template <typename From, typename To>
inline void transpose_tile(const From& from, const To& to, bool add) {
  __m512 a[16], b[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) {
    a[i] = _mm512_loadu_ps(from(i));
  }
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
  }
  const auto pairs = [](__m512 x) { return _mm512_castps_pd(x); };
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    a[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(pairs(b[i]), pairs(b[i + 2])));
    a[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(pairs(b[i]), pairs(b[i + 2])));
    a[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(pairs(b[i + 1]), pairs(b[i + 3])));
    a[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(pairs(b[i + 1]), pairs(b[i + 3])));
  }
  const auto put = [&](int i, __m512 value) {
    float* out = to(i);
    _mm512_storeu_ps(out, add ? _mm512_add_ps(value, _mm512_loadu_ps(out)) : value);
  };
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512 even = _mm512_shuffle_f32x4(a[i], a[i + 4], 0x88), odd = _mm512_shuffle_f32x4(a[i], a[i + 4], 0xdd);
    const __m512 even2 = _mm512_shuffle_f32x4(a[i + 8], a[i + 12], 0x88);
    const __m512 odd2 = _mm512_shuffle_f32x4(a[i + 8], a[i + 12], 0xdd);
    put(i, _mm512_shuffle_f32x4(even, even2, 0x88));
    put(i + 4, _mm512_shuffle_f32x4(odd, odd2, 0x88));
    put(i + 8, _mm512_shuffle_f32x4(even, even2, 0xdd));
    put(i + 12, _mm512_shuffle_f32x4(odd, odd2, 0xdd));
  }
}
#endif

// to(c)[r] = (add: +=) from(r)[c] for r < rows and c < columns; from and to say where a row begins.
template <typename T, typename From, typename To>
void transpose(int64_t rows, int64_t columns, const From& from, const To& to, bool add = false) {
  constexpr int64_t tile = 16;
  for (int64_t r = 0; r < rows; r += tile) {
    for (int64_t c = 0; c < columns; c += tile) {
      const int64_t m = std::min(tile, rows - r), n = std::min(tile, columns - c);
#if defined(CPU_CAPABILITY_AVX512)
      if (std::is_same_v<T, float> && m == tile && n == tile) {
        transpose_tile(
            [&](int i) { return reinterpret_cast<const float*>(from(r + i) + c); },
            [&](int i) { return reinterpret_cast<float*>(to(c + i) + r); }, add);
        continue;
      }
#endif
      for (int64_t j = 0; j < n; ++j) {
        T* out = to(c + j) + r;
        for (int64_t i = 0; i < m; ++i) {
          const T value = from(r + i)[c + j];
          out[i] = add ? out[i] + value : value;
        }
      }
    }
  }
}

// The function of r that says where row r begins.
template <typename T>
auto rows_of(T* start, int64_t stride) {
  return [=](int64_t r) { return start + r * stride; };
}

template <typename T>
auto chosen_rows_of(T* start, int64_t stride, const int32_t* indices) {
  return [=](int64_t r) { return start + indices[r] * stride; };
}

} // namespace ssr_rec
