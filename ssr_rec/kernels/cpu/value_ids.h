// Ids of raw values by vocabulary, hash or logarithmic bucket, whatever holds the values.

#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <charconv>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <string_view>

namespace {

using Text = std::string_view;

// The order of ssr_rec/kernels/value_ids.py.
enum Kind : int64_t { VOCABULARY, HASH, RAW_HASH };

struct TextIds {
  const char* text;        // of all values of a vocabulary, one after another
  const int64_t* offsets;  // value v is text[offsets[v] .. offsets[v + 1])
  const int64_t* ids;
  const uint64_t* slots;  // open addressing: upper half of the hash, and the value's number + 1; 0 is empty
  int64_t mask;           // slots - 1
  int64_t values, text_size;
  int64_t kind;
  int64_t is_canonical;  // text gets the one form that preparation gave it
  int64_t missing;
  int64_t other;  // VOCABULARY: the id of unknown values; else the first one
  int64_t num_buckets;
};

struct Buckets {
  double low, width;
  int64_t num_buckets;  // 0: there is one, for every number
  int64_t missing, first;
};

// A part of an Arrow array: its buffers, and where in them it begins.
struct Column {
  const void* data;
  const void* offsets;  // of texts
  const uint8_t* validity;
  int64_t first, rows;
  int64_t is_large;  // 64-bit offsets

  bool is_null(int64_t row) const {
    const int64_t bit = first + row;
    return validity && !(validity[bit >> 3] >> (bit & 7) & 1);
  }
  template <typename T>
  T value(int64_t row) const {
    return static_cast<const T*>(data)[first + row];
  }
  Text text(int64_t row) const {
    return is_large ? cut<int64_t>(row) : cut<int32_t>(row);
  }
  template <typename O>
  Text cut(int64_t row) const {
    const O* at = static_cast<const O*>(offsets) + first + row;
    return {static_cast<const char*>(data) + at[0], static_cast<size_t>(at[1] - at[0])};
  }
};

constexpr double MAX_EXACT = 9007199254740992.;  // 2^53

uint64_t mixed(uint64_t a, uint64_t b) {
  const unsigned __int128 product = static_cast<unsigned __int128>(a) * b;
  return static_cast<uint64_t>(product) ^ static_cast<uint64_t>(product >> 64);
}

uint64_t hash_of(Text text) {
  uint64_t hash = 0x9E3779B97F4A7C15ull ^ text.size();
  const char* at = text.data();
  size_t left = text.size();
  for (; left >= 8; at += 8, left -= 8) {
    uint64_t word;
    std::memcpy(&word, at, 8);
    hash = mixed(hash ^ word, 0xA0761D6478BD642Full);
  }
  uint64_t word = 0;
  std::memcpy(&word, at, left);
  return mixed(mixed(hash ^ word, 0xE7037ED1A0B428DBull), 0x8EBC6AF09C88C6E3ull);
}

// Of an index that points beyond itself, which no reader of ids takes for one.
constexpr int64_t DAMAGED = -1;

int64_t found(const TextIds& to, Text text, uint64_t hash) {
  // A mapped index may be damaged: nothing beyond it is read, and a hash table without an empty slot ends.
  for (int64_t looks = 0; looks <= to.mask; ++looks) {
    const uint64_t at = (hash + looks) & to.mask;
    const uint64_t slot = to.slots[at];
    if (slot == 0) {
      return to.other;
    }
    if (slot >> 32 == hash >> 32) {
      const int64_t value = static_cast<int64_t>(slot & 0xFFFFFFFF) - 1;
      if (value < 0 || value >= to.values) {
        return DAMAGED;
      }
      const int64_t begin = to.offsets[value], end = to.offsets[value + 1];
      if (begin < 0 || end < begin || end > to.text_size) {
        return DAMAGED;
      }
      if (Text(to.text + begin, end - begin) == text) {
        return to.ids[value];
      }
    }
  }
  return DAMAGED;
}

// The two halves of the digest of RFC 1321, as the number that its hexadecimal digits are.
std::array<uint64_t, 2> md5(Text text) {
  static const std::array<uint32_t, 64> sines = [] {
    std::array<uint32_t, 64> made;
    for (int i = 0; i < 64; ++i) {
      made[i] = static_cast<uint32_t>(std::floor(std::fabs(std::sin(i + 1.)) * 4294967296.));
    }
    return made;
  }();
  static const int turns[4][4] = {{7, 12, 17, 22}, {5, 9, 14, 20}, {4, 11, 16, 23}, {6, 10, 15, 21}};
  uint32_t state[4] = {0x67452301, 0xEFCDAB89, 0x98BADCFE, 0x10325476};
  const size_t size = text.size();
  const size_t blocks = (size + 8) / 64 + 1;
  for (size_t block = 0; block < blocks; ++block) {
    uint32_t words[16] = {};
    const size_t from = block * 64, kept = from < size ? std::min<size_t>(64, size - from) : 0;
    if (kept) {
      std::memcpy(words, text.data() + from, kept);
    }
    if (kept < 64 && from + kept == size && from <= size) {
      reinterpret_cast<unsigned char*>(words)[kept] = 0x80;
    }
    if (block == blocks - 1) {
      words[14] = static_cast<uint32_t>(size << 3);
      words[15] = static_cast<uint32_t>(size >> 29);
    }
    uint32_t a = state[0], b = state[1], c = state[2], d = state[3];
    for (int i = 0; i < 64; ++i) {
      uint32_t f;
      int word;
      switch (i >> 4) {
        case 0: f = (b & c) | (~b & d), word = i; break;
        case 1: f = (d & b) | (~d & c), word = (5 * i + 1) & 15; break;
        case 2: f = b ^ c ^ d, word = (3 * i + 5) & 15; break;
        default: f = c ^ (b | ~d), word = (7 * i) & 15;
      }
      const uint32_t next = b + std::rotl(a + f + sines[i] + words[word], turns[i >> 4][i & 3]);
      a = d, d = c, c = b, b = next;
    }
    state[0] += a, state[1] += b, state[2] += c, state[3] += d;
  }
  const auto half = [&](int at) {
    return static_cast<uint64_t>(__builtin_bswap32(state[at])) << 32 | __builtin_bswap32(state[at + 1]);
  };
  return {half(0), half(2)};
}

int64_t hashed(const TextIds& to, Text text) {
  const auto [high, low] = md5(text);
  if (to.kind == RAW_HASH) {
    return to.other + static_cast<int64_t>(high >> 4);
  }
  const unsigned __int128 whole = static_cast<unsigned __int128>(high) << 64 | low;
  return to.other + static_cast<int64_t>(whole % static_cast<uint64_t>(to.num_buckets));
}

// What preparation/sources.py makes of a text: 7.0 is 7 and True is true; empty is missing.
Text canonical(Text text) {
  if (text == "True" || text == "TRUE") {
    return "true";
  }
  if (text == "False" || text == "FALSE") {
    return "false";
  }
  if (text.empty() || text.back() != '0') {
    return text;
  }
  const size_t digits = text.find_last_not_of('0');
  if (digits == Text::npos || text[digits] != '.') {
    return text;
  }
  const size_t sign = text[0] == '-';
  if (digits == sign) {
    return text;
  }
  for (size_t at = sign; at < digits; ++at) {
    if (text[at] < '0' || text[at] > '9') {
      return text;
    }
  }
  return text.substr(0, digits);
}

// Some rows at a time, so that the memory they look at is fetched meanwhile.
constexpr int64_t AT_ONCE = 32;

// `text_of` gives the text of a row, and whether there is one.
template <typename TextOf>
void each(const TextIds& to, int64_t rows, int64_t* out, TextOf text_of) {
  Text texts[AT_ONCE];
  uint64_t hashes[AT_ONCE];
  bool is_there[AT_ONCE];
  for (int64_t start = 0; start < rows; start += AT_ONCE) {
    const int64_t count = std::min(AT_ONCE, rows - start);
    for (int64_t i = 0; i < count; ++i) {
      is_there[i] = text_of(start + i, i, texts[i]);
      if (is_there[i] && to.kind == VOCABULARY) {
        hashes[i] = hash_of(texts[i]);
        __builtin_prefetch(to.slots + (hashes[i] & to.mask));
      }
    }
    for (int64_t i = 0; i < count; ++i) {
      out[start + i] = !is_there[i]           ? to.missing
          : to.kind == VOCABULARY ? found(to, texts[i], hashes[i])
                                  : hashed(to, texts[i]);
    }
  }
}

// Of a number that is not infinite.
int64_t bucket_of(const Buckets& to, double number) {
  if (std::isnan(number)) {
    return to.missing;
  }
  double position = 0;
  if (to.num_buckets) {
    const double transformed = std::copysign(std::log(1. + std::fabs(number)), number);
    position = std::floor((transformed - to.low) / to.width);
    position = std::min(std::max(position, 0.), static_cast<double>(to.num_buckets - 1));
  }
  return to.first + static_cast<int64_t>(position);
}

template <typename T>
int64_t bucket_each(const Buckets& to, const Column& column, int64_t* out) {
  for (int64_t row = 0; row < column.rows; ++row) {
    const double number = column.is_null(row) ? NAN : static_cast<double>(column.value<T>(row));
    if (std::isinf(number)) {
      return row;
    }
    out[row] = bucket_of(to, number);
  }
  return -1;
}

constexpr int64_t DIGITS = 24;

int64_t ids_of_texts(const TextIds& to, const Column& column, int64_t* out) {
  each(to, column.rows, out, [&](int64_t row, int64_t, Text& text) {
    if (column.is_null(row)) {
      return false;
    }
    text = column.text(row);
    if (to.is_canonical) {
      text = canonical(text);
      return !text.empty();
    }
    return true;
  });
  return -1;
}

template <typename T = int64_t>
int64_t ids_of_integers(const TextIds& to, const Column& column, int64_t* out) {
  char digits[AT_ONCE][DIGITS];
  each(to, column.rows, out, [&](int64_t row, int64_t place, Text& text) {
    if (column.is_null(row)) {
      return false;
    }
    char* begin = digits[place];
    text = Text(begin, std::to_chars(begin, begin + DIGITS, column.value<T>(row)).ptr - begin);
    return true;
  });
  return -1;
}

// A whole number is that integer. Returns the first row with another number, -1 if there is none.
template <typename T = double>
int64_t ids_of_floats(const TextIds& to, const Column& column, int64_t* out) {
  for (int64_t row = 0; row < column.rows; ++row) {
    const double number = column.is_null(row) ? NAN : column.value<T>(row);
    if (!std::isnan(number) && !(std::fabs(number) <= MAX_EXACT && number == std::floor(number))) {
      return row;
    }
  }
  char digits[AT_ONCE][DIGITS];
  each(to, column.rows, out, [&](int64_t row, int64_t place, Text& text) {
    const double number = column.is_null(row) ? NAN : column.value<T>(row);
    if (std::isnan(number)) {
      return false;
    }
    char* begin = digits[place];
    text = Text(begin, std::to_chars(begin, begin + DIGITS, static_cast<int64_t>(number)).ptr - begin);
    return true;
  });
  return -1;
}

} // namespace
