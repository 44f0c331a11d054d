// Ids of rows that are Python's dicts, from Python's own objects. The caller holds the GIL.
//
// Of Python's C interface only what is stable from 3.10 on is used and declared here, so that a host needs no headers
// of it.

#include <vector>

#include "raw_rows.h"

extern "C" {
struct PyObject;
extern PyObject _Py_NoneStruct, _Py_TrueStruct, _Py_FalseStruct;
extern PyObject PyDict_Type, PyList_Type, PyTuple_Type, PyUnicode_Type, PyLong_Type, PyFloat_Type;
PyObject* PyObject_Type(PyObject*);
void Py_DecRef(PyObject*);
void PyErr_Clear();
PyObject* PyErr_Occurred();
PyObject* PyDict_GetItemWithError(PyObject*, PyObject*);
int PyDict_Next(PyObject*, intptr_t*, PyObject**, PyObject**);
intptr_t PyDict_Size(PyObject*);
intptr_t PyList_Size(PyObject*);
PyObject* PyList_GetItem(PyObject*, intptr_t);
intptr_t PyTuple_Size(PyObject*);
PyObject* PyTuple_GetItem(PyObject*, intptr_t);
int PyUnicode_Compare(PyObject*, PyObject*);
const char* PyUnicode_AsUTF8AndSize(PyObject*, intptr_t*);
long long PyLong_AsLongLongAndOverflow(PyObject*, int*);
double PyFloat_AsDouble(PyObject*);
}

namespace {

const PyObject* type_of(PyObject* object) {
  PyObject* type = PyObject_Type(object);
  Py_DecRef(type);  // the object holds it
  return type;
}

PyObject* value_of(PyObject* row, const Field& field) {
  PyObject* found = PyDict_GetItemWithError(row, static_cast<PyObject*>(field.column));
  return found ? found : &_Py_NoneStruct;
}

bool is_key(PyObject* key, const Field& field) {
  PyObject* column = static_cast<PyObject*>(field.column);
  return key == column || (type_of(key) == &PyUnicode_Type && PyUnicode_Compare(key, column) == 0);
}

// The values of all fields, row by row. Rows often have the keys of the first one in its order, the same objects: then
// to walk through a dict takes a fraction of looking for each key.
std::vector<PyObject*> values_of(PyObject* rows, const Field* fields, int64_t count) {
  const int64_t num_rows = PyList_Size(rows);
  std::vector<PyObject*> found(num_rows * count, &_Py_NoneStruct);
  if (!num_rows) {
    return found;
  }
  PyObject *key, *value;
  std::vector<PyObject*> keys;
  for (intptr_t at = 0; PyDict_Next(PyList_GetItem(rows, 0), &at, &key, &value);) {
    keys.push_back(key);
  }
  std::vector<int64_t> places(keys.size(), -1);  // the field of each key, if it has one
  std::vector<int64_t> others;  // fields that the first row lacks, or of a column that another one has taken
  size_t at = 0;
  for (int64_t field = 0; field < count; ++field) {
    size_t looked_at = 0;
    // The order is often that of the fields, so that the next key is the one.
    for (; looked_at < keys.size() && !is_key(keys[at], fields[field]); ++looked_at) {
      at = at + 1 < keys.size() ? at + 1 : 0;
    }
    if (looked_at < keys.size() && places[at] < 0) {
      places[at] = field;
    } else {
      others.push_back(field);
    }
  }
  for (int64_t row = 0; row < num_rows; ++row) {
    PyObject* dict = PyList_GetItem(rows, row);
    PyObject** own = found.data() + row * count;
    const bool is_as_large = PyDict_Size(dict) == static_cast<intptr_t>(keys.size());
    size_t step = 0;
    for (intptr_t next = 0; is_as_large && PyDict_Next(dict, &next, &key, &value) && key == keys[step]; ++step) {
      if (places[step] >= 0) {
        own[places[step]] = value;
      }
    }
    if (is_as_large && step == keys.size()) {
      for (const int64_t field : others) {
        own[field] = value_of(dict, fields[field]);
      }
      continue;
    }
    for (int64_t field = 0; field < count; ++field) {
      own[field] = value_of(dict, fields[field]);
    }
  }
  return found;
}

// Whether a value is text, a number or a boolean; one that is missing has no text.
bool read_text(PyObject* value, char* digits, bool is_canonical, bool& is_there, Text& text) {
  is_there = false;
  if (value == &_Py_NoneStruct) {
    return true;
  }
  if (value == &_Py_TrueStruct || value == &_Py_FalseStruct) {
    text = value == &_Py_TrueStruct ? "true" : "false";
    return is_there = true;
  }
  const PyObject* type = type_of(value);
  if (type == &PyUnicode_Type) {
    intptr_t size = 0;
    const char* begin = PyUnicode_AsUTF8AndSize(value, &size);
    if (!begin) {
      PyErr_Clear();  // half of a surrogate pair
      return false;
    }
    text = Text(begin, size);
    text = is_canonical ? canonical(text) : text;
    is_there = !is_canonical || !text.empty();
    return true;
  }
  int64_t whole = 0;
  if (type == &PyLong_Type) {
    int overflow = 0;
    whole = PyLong_AsLongLongAndOverflow(value, &overflow);
    if (overflow) {
      return false;
    }
  } else if (type == &PyFloat_Type) {
    const double number = PyFloat_AsDouble(value);
    if (std::isnan(number)) {
      return true;
    }
    if (!(std::fabs(number) <= MAX_EXACT && number == std::floor(number))) {
      return false;
    }
    whole = static_cast<int64_t>(number);
  } else {
    return false;
  }
  text = Text(digits, std::to_chars(digits, digits + DIGITS, whole).ptr - digits);
  return is_there = true;
}

bool read_number(PyObject* value, double& number) {
  number = NAN;
  if (value == &_Py_NoneStruct) {
    return true;
  }
  if (value == &_Py_TrueStruct || value == &_Py_FalseStruct) {
    number = value == &_Py_TrueStruct;
    return true;
  }
  const PyObject* type = type_of(value);
  if (type == &PyFloat_Type) {
    number = PyFloat_AsDouble(value);
    return !std::isinf(number);
  }
  int overflow = 1;
  if (type == &PyLong_Type) {
    number = static_cast<double>(PyLong_AsLongLongAndOverflow(value, &overflow));
  }
  return !overflow;
}

bool write_ids(const Field& field, const std::vector<PyObject*>& values, int64_t* out) {
  const int64_t count = values.size();
  bool good = true;
  if (field.kind == TO_TEXT) {
    char digits[AT_ONCE][DIGITS];
    each(field.texts(), count, out, [&](int64_t row, int64_t place, Text& text) {
      bool is_there = false;
      good &= read_text(values[row], digits[place], field.texts().is_canonical, is_there, text);
      return is_there;
    });
    return good;
  }
  for (int64_t at = 0; at < count && good; ++at) {
    if (field.kind == TO_BUCKET) {
      double number;
      good = read_number(values[at], number);
      out[at] = good ? bucket_of(field.buckets(), number) : 0;
    } else if (field.kind == TO_FLOAT) {
      double number;
      good = read_number(values[at], number);
      out[at] = Field::bits(number);
    } else {
      int overflow = 1;
      if (type_of(values[at]) == &PyLong_Type) {
        out[at] = PyLong_AsLongLongAndOverflow(values[at], &overflow);
      }
      good = !overflow && out[at] >= 0 && out[at] < field.size;
    }
  }
  return good;
}

// Whether a value is missing, a list or a tuple.
bool read_length(PyObject* value, int64_t& length) {
  length = 0;
  if (value == &_Py_NoneStruct) {
    return true;
  }
  const PyObject* type = type_of(value);
  if (type == &PyList_Type) {
    length = PyList_Size(value);
    return true;
  }
  if (type == &PyTuple_Type) {
    length = PyTuple_Size(value);
    return true;
  }
  return false;
}

} // namespace

extern "C" {

// Writes how many items each row has in each list field, (lists, rows). Returns whether the rows can be read here.
int64_t ssr_rec_lengths_of_dicts(PyObject* rows, const Field* fields, int64_t count, int64_t* lengths) {
  const int64_t num_rows = PyList_Size(rows);
  for (int64_t row = 0; row < num_rows; ++row) {
    if (type_of(PyList_GetItem(rows, row)) != &PyDict_Type) {
      return 0;
    }
  }
  for (const Field* field = fields; field < fields + count; ++field) {
    for (int64_t row = 0; field->is_list && row < num_rows; ++row) {
      if (!read_length(value_of(PyList_GetItem(rows, row), *field), *lengths++)) {
        return 0;
      }
    }
  }
  return 1;
}

// Writes the ids of each field to its array of `outs`, which has room for `lengths`: another thread may have changed a
// list since they were written. Returns whether the rows can be read here.
int64_t ssr_rec_ids_of_dicts(
    PyObject* rows, const Field* fields, int64_t count, const int64_t* lengths, int64_t* const* outs) {
  const int64_t num_rows = PyList_Size(rows);
  const std::vector<PyObject*> found = values_of(rows, fields, count);
  if (PyErr_Occurred()) {
    PyErr_Clear();
    return 0;
  }
  std::vector<PyObject*> values;
  for (int64_t at = 0; at < count; ++at) {
    values.clear();
    for (int64_t row = 0; row < num_rows; ++row) {
      PyObject* value = found[row * count + at];
      if (!fields[at].is_list) {
        values.push_back(value);
        continue;
      }
      int64_t length = 0;
      if (!read_length(value, length) || length != *lengths++) {
        return 0;
      }
      const int64_t kept = fields[at].kept(length), first = fields[at].keeps_last ? length - kept : 0;
      const bool is_list = length && type_of(value) == &PyList_Type;
      for (int64_t item = first; item < first + kept; ++item) {
        values.push_back(is_list ? PyList_GetItem(value, item) : PyTuple_GetItem(value, item));
      }
    }
    if (!write_ids(fields[at], values, outs[at])) {
      return 0;
    }
  }
  return 1;
}

} // extern "C"
