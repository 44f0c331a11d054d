// What ids of whole rows, dicts or Arrow batches, have in common. ssr_rec/kernels/row_ids.py has the same structs.

#pragma once

#include "value_ids.h"

namespace {

// TO_FLOAT: numbers become the bits of doubles, NaN where they are missing.
enum To : int64_t { TO_TEXT, TO_BUCKET, TO_DRAWN, TO_FLOAT };

// One feature. Only common types are read here: with any other value a function returns false, and
// ssr_rec/serving/raw_rows.py reads the rows again its own way, which also says what is wrong with them.
struct Field {
  void* column;  // its name, a PyObject; or its place in an Arrow batch
  const void* to;
  int64_t kind;
  int64_t size;  // TO_DRAWN: ids are from 0 to size - 1
  int64_t is_list;
  int64_t max_length;
  int64_t keeps_last;

  static int64_t bits(double number) {
    int64_t found;
    std::memcpy(&found, &number, sizeof(found));
    return found;
  }
  const TextIds& texts() const {
    return *static_cast<const TextIds*>(to);
  }
  const Buckets& buckets() const {
    return *static_cast<const Buckets*>(to);
  }
  int64_t kept(int64_t length) const {
    return std::min(length, max_length);
  }
};

} // namespace
