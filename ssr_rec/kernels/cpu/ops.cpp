// The operators' schemas, shape functions and autograd formulas.

#include "ops.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty_like.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

namespace ssr_rec {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using OptionalTensor = std::optional<Tensor>;

template <typename Signature>
auto op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

auto call_ics_forward(const Tensor& z, const Tensor& alpha, const OptionalTensor& gamma) {
  static const auto handle = op<decltype(ics_forward)>("ssr_rec::ics_forward");
  return handle.call(z, alpha, gamma);
}

OptionalTensor optional(const Tensor& tensor) {
  return tensor.defined() ? OptionalTensor(tensor) : std::nullopt;
}

Tensor undefined_if(bool absent, const Tensor& tensor) {
  return absent ? Tensor() : tensor;
}

void refuse_second_derivative(const char* name) {
  TORCH_CHECK(
      !c10::GradMode::is_enabled(),
      name, " has no second derivative: use ssr_rec.kernels.", name, "_reference for create_graph=True");
}

struct Ics : torch::autograd::Function<Ics> {
  static Tensor forward(AutogradContext* ctx, const Tensor& z, const Tensor& alpha, const OptionalTensor& gamma) {
    at::AutoDispatchBelowADInplaceOrView below;
    auto [y, means] = call_ics_forward(z, alpha, gamma);
    ctx->save_for_backward({z, alpha, gamma.value_or(Tensor()), means});
    return y;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    refuse_second_derivative("ics");
    const auto saved = ctx->get_saved_variables();
    static const auto handle = op<decltype(ics_backward)>("ssr_rec::ics_backward");
    auto [z, alpha, gamma] = handle.call(grads[0], saved[0], saved[3], saved[1], optional(saved[2]));
    return {z, alpha, undefined_if(!saved[2].defined(), gamma)};
  }
};

Tensor ics_autograd(const Tensor& z, const Tensor& alpha, const OptionalTensor& gamma) {
  return Ics::apply(z, alpha, gamma);
}

Tensor ics(const Tensor& z, const Tensor& alpha, const OptionalTensor& gamma) {
  return std::get<0>(call_ics_forward(z, alpha, gamma));
}

at::ScalarType accumulate_type(const Tensor& z) {
  return z.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

std::tuple<Tensor, Tensor> ics_forward_meta(const Tensor& z, const Tensor& alpha, const OptionalTensor& gamma) {
  const auto means = z.new_empty_symint(
      {z.sym_size(0), z.sym_size(1), alpha.sym_size(1)}, z.options().dtype(accumulate_type(z)));
  return {z.new_empty_symint(z.sym_sizes()), means};
}

std::tuple<Tensor, Tensor, Tensor> ics_backward_meta(
    const Tensor& grad, const Tensor& z, const Tensor& means, const Tensor& alpha, const OptionalTensor& gamma) {
  const auto grad_gamma = gamma ? gamma->new_empty_symint(gamma->sym_sizes()) : alpha.new_empty({0});
  return {z.new_empty_symint(z.sym_sizes()), alpha.new_empty_symint(alpha.sym_sizes()), grad_gamma};
}

} // namespace
} // namespace ssr_rec

TORCH_LIBRARY(ssr_rec, m) {
  m.def("ics(Tensor z, Tensor alpha, Tensor? gamma) -> Tensor", {at::Tag::pt2_compliant_tag});
  m.def("ics_forward(Tensor z, Tensor alpha, Tensor? gamma) -> (Tensor, Tensor)", {at::Tag::pt2_compliant_tag});
  m.def(
      "ics_backward(Tensor grad, Tensor z, Tensor means, Tensor alpha, Tensor? gamma) -> (Tensor, Tensor, Tensor)",
      {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(ssr_rec, CompositeExplicitAutograd, m) {
  m.impl("ics", ssr_rec::ics);
}

TORCH_LIBRARY_IMPL(ssr_rec, Autograd, m) {
  m.impl("ics", ssr_rec::ics_autograd);
}

TORCH_LIBRARY_IMPL(ssr_rec, CPU, m) {
  m.impl("ics_forward", ssr_rec::ics_forward);
  m.impl("ics_backward", ssr_rec::ics_backward);
}

TORCH_LIBRARY_IMPL(ssr_rec, Meta, m) {
  m.impl("ics_forward", ssr_rec::ics_forward_meta);
  m.impl("ics_backward", ssr_rec::ics_backward_meta);
}
