// Adam of the rows that bags looked up: ssr_rec/kernels/bag_adam.py has the equations and the shapes.

#include "rows.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
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
  float lr, beta1, beta2, eps, decay, correction1, correction2;

  void step(float* weight, float* first, float* second, const float* gradient, int64_t dim) const {
    using V = Vectorized<float>;
    for_vectors<float>(dim, [&](int64_t d, auto n) {
      const V g = load(gradient + d, n), w = load(weight + d, n);
      const V m = V(beta1) * load(first + d, n) + V(1 - beta1) * g;
      const V v = V(beta2) * load(second + d, n) + V(1 - beta2) * g * g;
      const V moved = m * V(correction1) / ((v * V(correction2)).sqrt() + V(eps)) + V(decay) * w;
      store(first + d, m, n);
      store(second + d, v, n);
      store(weight + d, w - V(lr) * moved, n);
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
};

template <typename Index>
void move_rows(
    const Bags<Index>& bags, const Adam& adam, const float* grad, float* weights, float* first, float* second) {
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
  // Which thread moves a row decides no bit of it: the ids of a row are added up by one, in their order.
  at::parallel_for(0, N, GRAIN, [&](int64_t a, int64_t z) {
    std::vector<float> sum(width);
    const auto same = [&](int64_t i, int64_t j) {
      return row_of(keys[i]) == row_of(keys[j]) && table_of[i] == table_of[j];
    };
    while (a < z && a > 0 && same(a - 1, a)) {
      ++a; // of the thread before
    }
    for (int64_t i = a; i < z;) {
      const int64_t feature = groups[table_of[i]], dim = bags.columns[feature + 1] - bags.columns[feature];
      const auto start = [&](int64_t place) { return bags.tables[feature] + row_of(keys[place]) * dim; };
      if (i + AHEAD < N && table_of[i + AHEAD] == table_of[i]) {
        for (const float* of : {weights, first, second}) {
          __builtin_prefetch(of + start(i + AHEAD), 1);
        }
      }
      const int64_t here = start(i);
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
      adam.step(weights + here, first + here, second + here, sum.data(), dim);
      i = next;
    }
  });
}

void bag_adam(
    const at::Tensor& weights, const at::Tensor& first, const at::Tensor& second, const at::Tensor& grad,
    const at::Tensor& tables, const at::Tensor& columns, const at::Tensor& ids, const at::Tensor& offsets,
    const std::optional<at::Tensor>& id_weights, bool mean, c10::ArrayRef<double> settings, int64_t t) {
  for (const auto& state : {weights, first, second}) {
    TORCH_CHECK(
        state.scalar_type() == at::kFloat && state.is_contiguous() && state.numel() == weights.numel(),
        "bag_adam: weights and moments must be contiguous float32 of one size");
  }
  TORCH_CHECK(settings.size() == 5 && t > 0, "bag_adam: five settings and a step from 1 on");
  TORCH_CHECK(ids.scalar_type() == offsets.scalar_type(), "bag_adam: ids and offsets must be of one type");
  const int64_t features = tables.numel();
  TORCH_CHECK(columns.numel() == features + 1 && features > 0, "bag_adam: columns must be one more than tables");
  TORCH_CHECK(ids.numel() < int64_t(1) << 31 && offsets.numel() < int64_t(1) << 31, "bag_adam: too many ids");
  const auto gradient = grad.to(at::kFloat).contiguous();
  const auto places = tables.to(at::kLong).contiguous(), widths = columns.to(at::kInt).contiguous();
  const auto values = ids.contiguous(), ends = offsets.contiguous();
  const auto shares = id_weights ? id_weights->to(at::kFloat).contiguous() : at::Tensor();
  const auto [lr, beta1, beta2, eps, decay] =
      std::array<double, 5>{settings[0], settings[1], settings[2], settings[3], settings[4]};
  const auto count = static_cast<double>(t);
  const Adam adam{
      static_cast<float>(lr),
      static_cast<float>(beta1),
      static_cast<float>(beta2),
      static_cast<float>(eps),
      static_cast<float>(decay),
      static_cast<float>(1 / (1 - std::pow(beta1, count))),
      static_cast<float>(1 / (1 - std::pow(beta2, count)))};
  const auto move = [&](auto index) {
    using Index = decltype(index);
    const Bags<Index> bags{
        places.const_data_ptr<int64_t>(),
        widths.const_data_ptr<int32_t>(),
        values.const_data_ptr<Index>(),
        ends.const_data_ptr<Index>(),
        shares.defined() ? shares.const_data_ptr<float>() : nullptr,
        features,
        (ends.numel() - 1) / features,
        mean};
    move_rows(
        bags, adam, gradient.const_data_ptr<float>(), weights.mutable_data_ptr<float>(),
        first.mutable_data_ptr<float>(), second.mutable_data_ptr<float>());
  };
  if (values.scalar_type() == at::kInt) {
    move(int32_t());
  } else {
    TORCH_CHECK(values.scalar_type() == at::kLong, "bag_adam: ids must be int32 or int64");
    move(int64_t());
  }
}

} // namespace
} // namespace ssr_rec

TORCH_LIBRARY_FRAGMENT(ssr_rec, m) {
  m.def(
      "bag_adam(Tensor(a!) weights, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor grad, Tensor tables, "
      "Tensor columns, Tensor ids, Tensor offsets, Tensor? id_weights, bool mean, float[] settings, int step) -> ()");
}

TORCH_LIBRARY_IMPL(ssr_rec, CPU, m) {
  m.impl("bag_adam", ssr_rec::bag_adam);
}
