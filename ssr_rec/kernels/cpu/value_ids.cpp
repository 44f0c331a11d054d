// Ids of raw values: the columns of Arrow arrays, without a copy.
//
// ssr_rec/kernels/value_ids.py calls these functions and keeps what the pointers point to alive.

#include "value_ids.h"

namespace {

// In the order of ssr_rec/kernels/value_ids.py.
enum Function : int64_t { TEXTS, INTEGERS, FLOATS, BUCKETS_OF_INTEGERS, BUCKETS_OF_FLOATS };

struct Job {
  int64_t function;
  const void* to;
  Column column;
  int64_t* out;
};

// Returns the first row with a value that is refused, -1 if there is none.
int64_t done(const Job& job) {
  const auto& texts = *static_cast<const TextIds*>(job.to);
  const auto& buckets = *static_cast<const Buckets*>(job.to);
  switch (job.function) {
    case TEXTS: return ids_of_texts(texts, job.column, job.out);
    case INTEGERS: return ids_of_integers(texts, job.column, job.out);
    case FLOATS: return ids_of_floats(texts, job.column, job.out);
    case BUCKETS_OF_INTEGERS: return bucket_each<int64_t>(buckets, job.column, job.out);
    default: return bucket_each<double>(buckets, job.column, job.out);
  }
}

} // namespace

extern "C" {

// Fills `slots`, which are all 0; of equal values the last one counts.
void ssr_rec_index_values(uint64_t* slots, int64_t mask, const char* text, const int64_t* offsets, int64_t values) {
  for (int64_t value = 0; value < values; ++value) {
    const Text own(text + offsets[value], offsets[value + 1] - offsets[value]);
    const uint64_t hash = hash_of(own), high = hash & 0xFFFFFFFF00000000ull;
    uint64_t at = hash & mask;
    while (slots[at]) {
      const int64_t there = static_cast<int64_t>(slots[at] & 0xFFFFFFFF) - 1;
      if (Text(text + offsets[there], offsets[there + 1] - offsets[there]) == own) {
        break;
      }
      at = (at + 1) & mask;
    }
    slots[at] = high | static_cast<uint64_t>(value + 1);
  }
}

// Returns the first job with a value that is refused and, in `row`, where it is; -1 if there is none.
int64_t ssr_rec_write_ids(const Job* jobs, int64_t count, int64_t* row) {
  for (int64_t job = 0; job < count; ++job) {
    *row = done(jobs[job]);
    if (*row >= 0) {
      return job;
    }
  }
  return -1;
}

} // extern "C"
