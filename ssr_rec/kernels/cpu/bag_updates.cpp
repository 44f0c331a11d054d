// Moves the rows that bags looked up: ssr_rec/kernels/bag_updates.py has the equations and the shapes.

#include "rows.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <optional>
#include <vector>

namespace ssr_rec {
namespace {

constexpr int64_t DIGIT_BITS = 11, DIGITS = int64_t(1) << DIGIT_BITS;
constexpr int64_t FEW = 64; // ids that are sorted sooner by comparing them
constexpr int64_t GRAIN = 1024; // ids of a thread, at least
constexpr int64_t AHEAD = 8; // ids whose rows are fetched before they are needed

// A looked-up row of the table and, below it, the place of its id: in their order, ids of a row keep theirs.
using Key = uint64_t;
constexpr int PLACE_BITS = 32;

int64_t row_of(Key key) {
  return static_cast<int64_t>(key >> PLACE_BITS);
}

int64_t place_of(Key key) {
  return static_cast<int64_t>(key & 0xFFFFFFFF);
}

void sort_keys(Key* keys, Key* spare, int64_t n) {
  if (n <= FEW) {
    std::sort(keys, keys + n);
    return;
  }
  const Key largest = *std::max_element(keys, keys + n) >> PLACE_BITS;
  const int64_t bits = 64 - std::countl_zero(largest);
  Key* from = keys;
  Key* to = spare;
  std::vector<int64_t> starts(DIGITS);
  for (int64_t shift = 0; shift < bits; shift += DIGIT_BITS) {
    const auto digit = [&](Key key) { return (key >> (PLACE_BITS + shift)) & (DIGITS - 1); };
    std::fill(starts.begin(), starts.end(), 0);
    for (int64_t i = 0; i < n; ++i) {
      ++starts[digit(from[i])];
    }
    int64_t before = 0;
    for (auto& start : starts) {
      before += std::exchange(start, before);
    }
    for (int64_t i = 0; i < n; ++i) {
      to[starts[digit(from[i])]++] = from[i];
    }
    std::swap(from, to);
  }
  if (from != keys) {
    std::copy(from, from + n, keys);
  }
}

struct Adam {
  float* first;
  float* second;
  float lr, beta1, beta2, eps, decay, correction1, correction2;

  // Of a row: where its moments begin, which is where it begins itself.
  static int64_t place(int64_t, int64_t, int64_t start) {
    return start;
  }

  void fetch(int64_t at) const {
    __builtin_prefetch(first + at, 1);
    __builtin_prefetch(second + at, 1);
  }

  void move(float* weight, int64_t at, const float* gradient, int64_t dim) const {
    using V = Vectorized<float>;
    float* const own_first = first + at;
    float* const own_second = second + at;
    for_vectors<float>(dim, [&](int64_t d, auto n) {
      const V g = load(gradient + d, n), w = load(weight + d, n);
      const V m = V(beta1) * load(own_first + d, n) + V(1 - beta1) * g;
      const V v = V(beta2) * load(own_second + d, n) + V(1 - beta2) * g * g;
      const V moved = m * V(correction1) / ((v * V(correction2)).sqrt() + V(eps)) + V(decay) * w;
      store(own_first + d, m, n);
      store(own_second + d, v, n);
      store(weight + d, w - V(lr) * moved, n);
    });
  }
};

struct RowWiseAdagrad {
  float* sums;
  const int64_t* tables; // (F,): where in the sums a feature's table begins
  float lr, eps;

  int64_t place(int64_t feature, int64_t row, int64_t) const {
    return tables[feature] + row;
  }

  void fetch(int64_t at) const {
    __builtin_prefetch(sums + at, 1);
  }

  void move(float* weight, int64_t at, const float* gradient, int64_t dim) const {
    using V = Vectorized<float>;
    V squares(0.f);
    for_vectors<float>(dim, [&](int64_t d, auto n) {
      const V g = only(load(gradient + d, n), n);
      squares = squares + g * g;
    });
    sums[at] += sum_lanes(squares) / static_cast<float>(dim);
    const float rate = lr / (std::sqrt(sums[at]) + eps);
    for_vectors<float>(dim, [&](int64_t d, auto n) {
      store(weight + d, load(weight + d, n) - V(rate) * load(gradient + d, n), n);
    });
  }
};

template <typename Index>
struct Bags {
  const int64_t* tables; // (F,): where in the weights a feature's table begins; features of a table follow one another
  const int32_t* columns; // (F + 1,): of the gradient
  const Index* ids; // (N,), feature after feature
  const Index* offsets; // (F B + 1,): where the ids of a bag begin
  const float* id_weights; // (N,), or null
  int64_t features, batch;
  bool mean;

  int64_t first_id(int64_t feature) const {
    return static_cast<int64_t>(offsets[feature * batch]);
  }

  int64_t dim(int64_t feature) const {
    return columns[feature + 1] - columns[feature];
  }
};

template <typename Index, typename Update>
void move_rows(const Bags<Index>& bags, const Update& update, const float* grad, float* weights) {
  const int64_t N = bags.first_id(bags.features), width = bags.columns[bags.features];
  std::vector<int64_t> groups{0}; // the first feature of each table, and the end
  for (int64_t feature = 1; feature <= bags.features; ++feature) {
    if (feature == bags.features || bags.tables[feature] != bags.tables[feature - 1]) {
      groups.push_back(feature);
    }
  }
  const int64_t tables = static_cast<int64_t>(groups.size()) - 1;
  std::vector<Key> keys(N), spare(N);
  std::vector<int32_t> bag_of(N), table_of(N);
  at::parallel_for(0, tables, std::max<int64_t>(1, GRAIN * tables / std::max<int64_t>(1, N)), [&](int64_t a, int64_t z) {
    for (int64_t table = a; table < z; ++table) {
      const int64_t begin = bags.first_id(groups[table]), end = bags.first_id(groups[table + 1]);
      for (int64_t bag = groups[table] * bags.batch; bag < groups[table + 1] * bags.batch; ++bag) {
        for (int64_t place = bags.offsets[bag]; place < static_cast<int64_t>(bags.offsets[bag + 1]); ++place) {
          keys[place] = static_cast<Key>(bags.ids[place]) << PLACE_BITS | static_cast<Key>(place);
          bag_of[place] = static_cast<int32_t>(bag);
          table_of[place] = static_cast<int32_t>(table);
        }
      }
      sort_keys(keys.data() + begin, spare.data() + begin, end - begin);
    }
  });
  const auto same = [&](int64_t i, int64_t j) {
    return row_of(keys[i]) == row_of(keys[j]) && table_of[i] == table_of[j];
  };
  // Which thread moves a row decides no bit of it: the ids of a row are added up by one, in their order.
  at::parallel_for(0, N, GRAIN, [&](int64_t a, int64_t z) {
    std::vector<float> sum(width);
    while (a < z && a > 0 && same(a - 1, a)) {
      ++a; // of the thread before
    }
    for (int64_t i = a; i < z;) {
      const int64_t feature = groups[table_of[i]], dim = bags.dim(feature);
      const auto start = [&](int64_t row) { return bags.tables[feature] + row * dim; };
      if (i + AHEAD < N && table_of[i + AHEAD] == table_of[i]) {
        const int64_t row = row_of(keys[i + AHEAD]);
        __builtin_prefetch(weights + start(row), 1);
        update.fetch(update.place(feature, row, start(row)));
      }
      std::fill(sum.begin(), sum.begin() + dim, 0.f);
      int64_t next = i;
      do {
        const int64_t place = place_of(keys[next]), bag = bag_of[place];
        float share = bags.id_weights != nullptr ? bags.id_weights[place] : 1.f;
        if (bags.mean) {
          share /= static_cast<float>(bags.offsets[bag + 1] - bags.offsets[bag]);
        }
        const float* own = grad + bag % bags.batch * width + bags.columns[bag / bags.batch];
        for_vectors<float>(dim, [&](int64_t d, auto n) {
          store(sum.data() + d, load(sum.data() + d, n) + Vectorized<float>(share) * load(own + d, n), n);
        });
        ++next;
      } while (next < N && same(i, next));
      const int64_t row = row_of(keys[i]);
      update.move(weights + start(row), update.place(feature, row, start(row)), sum.data(), dim);
      i = next;
    }
  });
}

float* data_of(const at::Tensor& state) {
  TORCH_CHECK(
      state.scalar_type() == at::kFloat && state.is_contiguous() && state.dim() == 1,
      "bag updates: weights and state must be contiguous float32 (n,)");
  return state.mutable_data_ptr<float>();
}

// The arguments of every operator after its state.
struct Given {
  at::Tensor grad, tables, columns, ids, offsets, id_weights;
  bool mean;

  Given(
      const at::Tensor& grad, const at::Tensor& tables, const at::Tensor& columns, const at::Tensor& ids,
      const at::Tensor& offsets, const std::optional<at::Tensor>& id_weights, bool mean)
      : grad(grad.to(at::kFloat).contiguous()),
        tables(tables.to(at::kLong).contiguous()),
        columns(columns.to(at::kInt).contiguous()),
        ids(ids.contiguous()),
        offsets(offsets.contiguous()),
        id_weights(id_weights ? id_weights->to(at::kFloat).contiguous() : at::Tensor()),
        mean(mean) {
    const int64_t features = tables.numel();
    TORCH_CHECK(columns.numel() == features + 1 && features > 0, "bag updates: columns must be one more than tables");
    TORCH_CHECK(ids.scalar_type() == offsets.scalar_type(), "bag updates: ids and offsets must be of one type");
    TORCH_CHECK(ids.numel() < int64_t(1) << 31 && offsets.numel() < int64_t(1) << 31, "bag updates: too many ids");
    TORCH_CHECK((offsets.numel() - 1) % features == 0, "bag updates: as many bags of each feature");
  }

  template <typename Update>
  void apply(const Update& update, float* weights) const {
    if (ids.scalar_type() == at::kInt) {
      apply_to<int32_t>(update, weights);
    } else {
      TORCH_CHECK(ids.scalar_type() == at::kLong, "bag updates: ids must be int32 or int64");
      apply_to<int64_t>(update, weights);
    }
  }

 private:
  template <typename Index, typename Update>
  void apply_to(const Update& update, float* weights) const {
    const int64_t features = tables.numel(), batch = (offsets.numel() - 1) / features;
    TORCH_CHECK(
        grad.dim() == 2 && grad.size(0) == batch && grad.size(1) == columns.const_data_ptr<int32_t>()[features],
        "bag updates: the gradient must be of every bag's columns, and is ", grad.sizes());
    const Bags<Index> bags{
        tables.const_data_ptr<int64_t>(),
        columns.const_data_ptr<int32_t>(),
        ids.const_data_ptr<Index>(),
        offsets.const_data_ptr<Index>(),
        id_weights.defined() ? id_weights.const_data_ptr<float>() : nullptr,
        features,
        batch,
        mean};
    move_rows(bags, update, grad.const_data_ptr<float>(), weights);
  }
};

void bag_adam(
    const at::Tensor& weights, const at::Tensor& exp_avg, const at::Tensor& exp_avg_sq, const at::Tensor& grad,
    const at::Tensor& tables, const at::Tensor& columns, const at::Tensor& ids, const at::Tensor& offsets,
    const std::optional<at::Tensor>& id_weights, bool mean, c10::ArrayRef<double> settings, int64_t t) {
  TORCH_CHECK(
      exp_avg.numel() == weights.numel() && exp_avg_sq.numel() == weights.numel() && settings.size() == 5 && t > 0,
      "bag_adam: moments as many as weights, five settings, and a step from 1 on");
  const auto as_float = [](double value) { return static_cast<float>(value); };
  const Adam adam{
      data_of(exp_avg),
      data_of(exp_avg_sq),
      as_float(settings[0]),
      as_float(settings[1]),
      as_float(settings[2]),
      as_float(settings[3]),
      as_float(settings[4]),
      as_float(1 / (1 - std::pow(settings[1], static_cast<double>(t)))),
      as_float(1 / (1 - std::pow(settings[2], static_cast<double>(t))))};
  Given(grad, tables, columns, ids, offsets, id_weights, mean).apply(adam, data_of(weights));
}

void bag_rowwise_adagrad(
    const at::Tensor& weights, const at::Tensor& sums, const at::Tensor& grad, const at::Tensor& tables,
    const at::Tensor& columns, const at::Tensor& ids, const at::Tensor& offsets,
    const std::optional<at::Tensor>& id_weights, bool mean, const at::Tensor& sums_tables, double lr, double eps) {
  TORCH_CHECK(sums_tables.numel() == tables.numel(), "bag_rowwise_adagrad: as many tables of sums as of weights");
  const auto places = sums_tables.to(at::kLong).contiguous();
  const RowWiseAdagrad adagrad{
      data_of(sums), places.const_data_ptr<int64_t>(), static_cast<float>(lr), static_cast<float>(eps)};
  Given(grad, tables, columns, ids, offsets, id_weights, mean).apply(adagrad, data_of(weights));
}

} // namespace
} // namespace ssr_rec

TORCH_LIBRARY_FRAGMENT(ssr_rec, m) {
  m.def(
      "bag_adam(Tensor(a!) weights, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor grad, Tensor tables, "
      "Tensor columns, Tensor ids, Tensor offsets, Tensor? id_weights, bool mean, float[] settings, int t) -> ()");
  m.def(
      "bag_rowwise_adagrad(Tensor(a!) weights, Tensor(b!) sums, Tensor grad, Tensor tables, Tensor columns, Tensor ids, "
      "Tensor offsets, Tensor? id_weights, bool mean, Tensor sums_tables, float lr, float eps) -> ()");
}

TORCH_LIBRARY_IMPL(ssr_rec, CPU, m) {
  m.impl("bag_adam", ssr_rec::bag_adam);
  m.impl("bag_rowwise_adagrad", ssr_rec::bag_rowwise_adagrad);
}
