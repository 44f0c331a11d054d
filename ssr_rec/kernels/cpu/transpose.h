// Transposes of matrices whose rows may lie anywhere.
#pragma once

#include "rows.h"

namespace ssr_rec {

// Rows and columns of a tile that is turned in registers, where it is of floats.
#if defined(CPU_CAPABILITY_AVX512)
constexpr int64_t TILE = 16;
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
#elif defined(CPU_CAPABILITY_AVX2)
constexpr int64_t TILE = 8;

template <typename From, typename To>
inline void transpose_tile(const From& from, const To& to, bool add) {
  __m256 a[8], b[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    // Rows 0 to 3 beside rows 4 to 7: the halves need not be exchanged in the end, which only one unit can do.
    const int row = i % 4, half = i / 4 * 4;
    const __m128 low = _mm_loadu_ps(from(row) + half), high = _mm_loadu_ps(from(row + 4) + half);
    a[i] = _mm256_insertf128_ps(_mm256_castps128_ps256(low), high, 1);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    b[i] = _mm256_unpacklo_ps(a[i], a[i + 1]);
    b[i + 1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
  }
  const auto put = [&](int i, __m256 value) {
    float* out = to(i);
    _mm256_storeu_ps(out, add ? _mm256_add_ps(value, _mm256_loadu_ps(out)) : value);
  };
#pragma GCC unroll 2
  for (int half = 0; half < 8; half += 4) {
    put(half, _mm256_shuffle_ps(b[half], b[half + 2], 0x44));
    put(half + 1, _mm256_shuffle_ps(b[half], b[half + 2], 0xee));
    put(half + 2, _mm256_shuffle_ps(b[half + 1], b[half + 3], 0x44));
    put(half + 3, _mm256_shuffle_ps(b[half + 1], b[half + 3], 0xee));
  }
}
#else
constexpr int64_t TILE = 16;
#endif

// to(c)[r] = (add: +=) from(r)[c] for r < rows and c < columns; from and to say where a row begins.
template <typename T, typename From, typename To>
void transpose(int64_t rows, int64_t columns, const From& from, const To& to, bool add = false) {
  for (int64_t r = 0; r < rows; r += TILE) {
    for (int64_t c = 0; c < columns; c += TILE) {
      const int64_t m = std::min(TILE, rows - r), n = std::min(TILE, columns - c);
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
      if (std::is_same_v<T, float> && m == TILE && n == TILE) {
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

// to(r)[c] = from(r)[c].
template <typename T, typename From, typename To>
void copy_rows(int64_t rows, int64_t columns, const From& from, const To& to) {
  for (int64_t r = 0; r < rows; ++r) {
    std::copy_n(from(r), columns, to(r));
  }
}

// to(r)[c] += from(r)[c].
template <typename T, typename From, typename To>
void add_rows(int64_t rows, int64_t columns, const From& from, const To& to) {
  for (int64_t r = 0; r < rows; ++r) {
    const T* values = from(r);
    T* sums = to(r);
    for_vectors<T>(columns, [&](int64_t i, auto count) {
      store(sums + i, load(sums + i, count) + load(values + i, count), count);
    });
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
