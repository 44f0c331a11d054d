// Ids of an Arrow record batch, handed over whole by Arrow's C data interface.

#include "raw_rows.h"

namespace {

// As the specification of the C data interface has them.
struct ArrowSchema {
  const char *format, *name, *metadata;
  int64_t flags, n_children;
  ArrowSchema **children, *dictionary;
  void (*release)(ArrowSchema*);
  void* private_data;
};

struct ArrowArray {
  int64_t length, null_count, offset, n_buffers, n_children;
  const void** buffers;
  ArrowArray **children, *dictionary;
  void (*release)(ArrowArray*);
  void* private_data;
};

constexpr bool is(const char* format, const char* wanted) {
  return std::strcmp(format, wanted) == 0;
}

// Some rows of an array that holds values. Its buffers are values, or offsets and text, after the nulls.
Column column_of(const ArrowArray& array, int64_t first, int64_t rows, bool is_text, bool is_large) {
  return {
      array.buffers[is_text ? 2 : 1],
      is_text ? array.buffers[1] : nullptr,
      static_cast<const uint8_t*>(array.buffers[0]),
      array.offset + first,
      rows,
      is_large,
  };
}

template <typename T>
void write_numbers(const Column& column, int64_t* out) {
  for (int64_t row = 0; row < column.rows; ++row) {
    out[row] = Field::bits(column.is_null(row) ? NAN : static_cast<double>(column.value<T>(row)));
  }
}

template <typename T>
bool write_integers(const Field& field, const Column& column, int64_t* out) {
  if (field.kind == TO_FLOAT) {
    write_numbers<T>(column, out);
    return true;
  }
  if (field.kind == TO_TEXT) {
    return ids_of_integers<T>(field.texts(), column, out) < 0;
  }
  if (field.kind == TO_BUCKET) {
    return bucket_each<T>(field.buckets(), column, out) < 0;
  }
  for (int64_t row = 0; row < column.rows; ++row) {
    out[row] = column.value<T>(row);
    if (column.is_null(row) || out[row] < 0 || out[row] >= field.size) {
      return false;
    }
  }
  return true;
}

template <typename T>
bool write_floats(const Field& field, const Column& column, int64_t* out) {
  if (field.kind == TO_FLOAT) {
    write_numbers<T>(column, out);
    return true;
  }
  return field.kind == TO_TEXT ? ids_of_floats<T>(field.texts(), column, out) < 0
      : field.kind == TO_BUCKET && bucket_each<T>(field.buckets(), column, out) < 0;
}

bool write_booleans(const Field& field, const Column& column, int64_t* out) {
  const auto value = [&](int64_t row) {
    const int64_t bit = column.first + row;
    return static_cast<const uint8_t*>(column.data)[bit >> 3] >> (bit & 7) & 1;
  };
  if (field.kind == TO_DRAWN || field.kind == TO_FLOAT) {
    return false;
  }
  if (field.kind == TO_TEXT) {
    each(field.texts(), column.rows, out, [&](int64_t row, int64_t, Text& text) {
      text = value(row) ? "true" : "false";
      return !column.is_null(row);
    });
    return true;
  }
  for (int64_t row = 0; row < column.rows; ++row) {
    out[row] = bucket_of(field.buckets(), column.is_null(row) ? NAN : static_cast<double>(value(row)));
  }
  return true;
}

bool write_nulls(const Field& field, int64_t rows, int64_t* out) {
  if (field.kind == TO_DRAWN || field.kind == TO_FLOAT) {
    return false;
  }
  std::fill(out, out + rows, field.kind == TO_TEXT ? field.texts().missing : field.buckets().missing);
  return true;
}

bool write_ids(
    const Field& field, const char* format, const ArrowArray& array, int64_t first, int64_t rows, int64_t* out) {
  if (is(format, "n")) {
    return write_nulls(field, rows, out);
  }
  const bool is_large = is(format, "U"), is_text = is_large || is(format, "u");
  if (array.dictionary || std::strlen(format) != 1 || !std::strchr("uUbcCsSiIlfg", *format)) {
    return false;
  }
  const Column column = column_of(array, first, rows, is_text, is_large);
  switch (*format) {
    case 'u':
    case 'U': return field.kind == TO_TEXT && ids_of_texts(field.texts(), column, out) < 0;
    case 'b': return write_booleans(field, column, out);
    case 'c': return write_integers<int8_t>(field, column, out);
    case 'C': return write_integers<uint8_t>(field, column, out);
    case 's': return write_integers<int16_t>(field, column, out);
    case 'S': return write_integers<uint16_t>(field, column, out);
    case 'i': return write_integers<int32_t>(field, column, out);
    case 'I': return write_integers<uint32_t>(field, column, out);
    case 'l': return write_integers<int64_t>(field, column, out);
    case 'f': return write_floats<float>(field, column, out);
    default: return write_floats<double>(field, column, out);
  }
}

// The lists of a batch's column.
struct Lists {
  const ArrowArray& array;
  int64_t first;
  bool is_large;

  int64_t begin(int64_t row) const {
    const int64_t at = first + row;
    return is_large ? static_cast<const int64_t*>(array.buffers[1])[at]
                    : static_cast<const int32_t*>(array.buffers[1])[at];
  }
  int64_t length(int64_t row) const {
    const auto* validity = static_cast<const uint8_t*>(array.buffers[0]);
    const int64_t bit = first + row;
    const bool is_null = validity && !(validity[bit >> 3] >> (bit & 7) & 1);
    return is_null ? 0 : begin(row + 1) - begin(row);
  }
};

Lists lists_of(const ArrowArray& array, int64_t offset, const char* format) {
  return {array, array.offset + offset, is(format, "+L")};
}

bool write_lists(const Field& field, const ArrowSchema& schema, const ArrowArray& array, int64_t offset,
                 int64_t rows, int64_t* out) {
  const Lists lists = lists_of(array, offset, schema.format);
  const char* format = schema.children[0]->format;
  // Lists that follow one another are one call.
  int64_t from = 0, size = 0;
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t length = lists.length(row), kept = field.kept(length);
    const int64_t start = kept ? lists.begin(row) + (field.keeps_last ? length - kept : 0) : from + size;
    if (start != from + size) {
      if (size && !write_ids(field, format, *array.children[0], from, size, out)) {
        return false;
      }
      out += size;
      from = start, size = 0;
    }
    size += kept;
  }
  return size == 0 || write_ids(field, format, *array.children[0], from, size, out);
}

} // namespace

extern "C" {

// Writes how many items each row has in each list field, (lists, rows). Returns whether the batch can be read here.
int64_t ssr_rec_lengths_of_batch(
    const ArrowSchema* schema, const ArrowArray* batch, const Field* fields, int64_t count, int64_t* lengths) {
  for (const Field* field = fields; field < fields + count; ++field) {
    if (!field->is_list) {
      continue;
    }
    const int64_t place = reinterpret_cast<intptr_t>(field->column);
    const char* format = schema->children[place]->format;
    if (!is(format, "+l") && !is(format, "+L")) {
      return 0;
    }
    const Lists lists = lists_of(*batch->children[place], batch->offset, format);
    for (int64_t row = 0; row < batch->length; ++row) {
      *lengths++ = lists.length(row);
    }
  }
  return 1;
}

// Writes the ids of each field to its array of `outs`. Returns whether the batch can be read here. What it holds does not
// change, so that `lengths` are as they were.
int64_t ssr_rec_ids_of_batch(const ArrowSchema* schema, const ArrowArray* batch, const Field* fields, int64_t count,
                             const int64_t* /*lengths*/, int64_t* const* outs) {
  for (int64_t at = 0; at < count; ++at) {
    const int64_t place = reinterpret_cast<intptr_t>(fields[at].column);
    const ArrowSchema& own = *schema->children[place];
    const ArrowArray& array = *batch->children[place];
    const bool good = fields[at].is_list
        ? write_lists(fields[at], own, array, batch->offset, batch->length, outs[at])
        : write_ids(fields[at], own.format, array, batch->offset, batch->length, outs[at]);
    if (!good) {
      return 0;
    }
  }
  return 1;
}

// Lets Arrow free what it handed over.
void ssr_rec_release_batch(ArrowSchema* schema, ArrowArray* batch) {
  schema->release(schema);
  batch->release(batch);
}

} // extern "C"
