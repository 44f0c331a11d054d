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

auto call_fusion_forward(
    const Tensor& x, const OptionalTensor& indices, const Tensor& weight, const Tensor& bias,
    const OptionalTensor& residual, const OptionalTensor& scale, const OptionalTensor& shift, double eps, bool save,
    const OptionalTensor& keep, double keep_share) {
  static const auto handle = op<decltype(view_fusion_forward)>("ssr_rec::view_fusion_forward");
  return handle.call(x, indices, weight, bias, residual, scale, shift, eps, save, keep, keep_share);
}

struct ViewFusion : torch::autograd::Function<ViewFusion> {
  static Tensor forward(
      AutogradContext* ctx, const Tensor& x, const OptionalTensor& indices, const Tensor& weight, const Tensor& bias,
      const OptionalTensor& residual, const OptionalTensor& scale, const OptionalTensor& shift, double eps,
      const OptionalTensor& keep, double keep_share) {
    at::AutoDispatchBelowADInplaceOrView below;
    auto [y, pre, stats] =
        call_fusion_forward(x, indices, weight, bias, residual, scale, shift, eps, true, keep, keep_share);
    ctx->save_for_backward(
        {x, indices.value_or(Tensor()), weight, bias, residual.value_or(Tensor()), scale.value_or(Tensor()), pre, stats,
         keep.value_or(Tensor())});
    ctx->saved_data["keep_share"] = keep_share;
    return y;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    refuse_second_derivative("view_fusion");
    const auto saved = ctx->get_saved_variables();
    static const auto handle = op<decltype(view_fusion_backward)>("ssr_rec::view_fusion_backward");
    const bool need_x = ctx->needs_input_grad(0);
    auto [x, weight, bias, residual, scale, shift] = handle.call(
        grads[0], saved[0], optional(saved[1]), saved[2], saved[3], optional(saved[4]), optional(saved[5]), saved[6],
        saved[7], need_x, optional(saved[8]), ctx->saved_data["keep_share"].toDouble());
    const bool no_norm = !saved[5].defined();
    return {undefined_if(!need_x, x), Tensor(), weight, bias, undefined_if(!saved[4].defined(), residual),
            undefined_if(no_norm, scale), undefined_if(no_norm, shift), Tensor(), Tensor(), Tensor()};
  }
};

Tensor view_fusion_autograd(
    const Tensor& x, const OptionalTensor& indices, const Tensor& weight, const Tensor& bias,
    const OptionalTensor& residual, const OptionalTensor& scale, const OptionalTensor& shift, double eps,
    const OptionalTensor& keep, double keep_share) {
  const auto needs = [](const OptionalTensor& tensor) { return tensor && tensor->requires_grad(); };
  if (c10::GradMode::is_enabled() &&
      (needs(x) || needs(weight) || needs(bias) || needs(residual) || needs(scale) || needs(shift))) {
    return ViewFusion::apply(x, indices, weight, bias, residual, scale, shift, eps, keep, keep_share);
  }
  at::AutoDispatchBelowADInplaceOrView below;
  return std::get<0>(
      call_fusion_forward(x, indices, weight, bias, residual, scale, shift, eps, false, keep, keep_share));
}

Tensor view_fusion(
    const Tensor& x, const OptionalTensor& indices, const Tensor& weight, const Tensor& bias,
    const OptionalTensor& residual, const OptionalTensor& scale, const OptionalTensor& shift, double eps,
    const OptionalTensor& keep, double keep_share) {
  return std::get<0>(
      call_fusion_forward(x, indices, weight, bias, residual, scale, shift, eps, false, keep, keep_share));
}

std::tuple<Tensor, Tensor, Tensor> view_fusion_forward_meta(
    const Tensor& x, const OptionalTensor& indices, const Tensor& weight, const Tensor& bias,
    const OptionalTensor& residual, const OptionalTensor& scale, const OptionalTensor& shift, double eps, bool save,
    const OptionalTensor& keep, double keep_share) {
  const auto B = x.sym_size(0), V = weight.sym_size(0), d = weight.sym_size(2);
  return {x.new_empty_symint({B, V, d}), save ? x.new_empty_symint({V, B, d}) : x.new_empty({0}),
          save && scale ? x.new_empty_symint({V, B, 2}, x.options().dtype(accumulate_type(x))) : x.new_empty({0})};
}

Tensor view_scoring_meta(
    const Tensor& x, const Tensor& indices, const Tensor& weight_t, const Tensor& bias, const OptionalTensor& scale,
    const OptionalTensor& shift, double eps, const OptionalTensor& weight, bool turned, bool residual) {
  const auto B = x.sym_size(0), V = weight_t.sym_size(0), d = weight_t.sym_size(1);
  if (!turned) {
    return x.new_empty_symint({B, V, d});
  }
  const auto y = x.new_empty_symint({V, d, B + COLUMNS_APART});
  return y.narrow_symint(2, 0, B).permute({2, 0, 1});
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> view_fusion_backward_meta(
    const Tensor& grad, const Tensor& x, const OptionalTensor& indices, const Tensor& weight, const Tensor& bias,
    const OptionalTensor& residual, const OptionalTensor& scale, const Tensor& pre, const Tensor& stats, bool need_x,
    const OptionalTensor& keep, double keep_share) {
  const auto like = [&](const Tensor& tensor, bool present = true) {
    return present ? tensor.new_empty_symint(tensor.sym_sizes()) : x.new_empty({0});
  };
  return {like(x, need_x), like(weight), like(bias), like(grad, residual.has_value()), like(bias, scale.has_value()),
          like(bias, scale.has_value())};
}

Tensor new_like(const Tensor& tensor) {
  return tensor.new_empty_symint(tensor.sym_sizes());
}

std::tuple<Tensor, Tensor, Tensor> dice_forward_meta(const Tensor& x, const Tensor& alpha, double eps) {
  return {new_like(x), new_like(alpha), new_like(alpha)};
}

std::tuple<Tensor, Tensor> dice_backward_meta(
    const Tensor& grad, const Tensor& x, const Tensor& mean, const Tensor& var, const Tensor& alpha, double eps) {
  return {new_like(x), new_like(alpha)};
}

} // namespace
} // namespace ssr_rec

TORCH_LIBRARY(ssr_rec, m) {
  m.def("ics(Tensor z, Tensor alpha, Tensor? gamma) -> Tensor", {at::Tag::pt2_compliant_tag});
  m.def("ics_forward(Tensor z, Tensor alpha, Tensor? gamma) -> (Tensor, Tensor)", {at::Tag::pt2_compliant_tag});
  m.def(
      "ics_backward(Tensor grad, Tensor z, Tensor means, Tensor alpha, Tensor? gamma) -> (Tensor, Tensor, Tensor)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "view_fusion(Tensor x, Tensor? indices, Tensor weight, Tensor bias, Tensor? residual, Tensor? scale, "
      "Tensor? shift, float eps, Tensor? keep=None, float keep_share=1.0) -> Tensor",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "view_fusion_forward(Tensor x, Tensor? indices, Tensor weight, Tensor bias, Tensor? residual, Tensor? scale, "
      "Tensor? shift, float eps, bool save, Tensor? keep=None, float keep_share=1.0) -> (Tensor, Tensor, Tensor)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "view_fusion_backward(Tensor grad, Tensor x, Tensor? indices, Tensor weight, Tensor bias, Tensor? residual, "
      "Tensor? scale, Tensor pre, Tensor stats, bool need_x, Tensor? keep=None, float keep_share=1.0) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "view_scoring(Tensor x, Tensor indices, Tensor weight_t, Tensor bias, Tensor? scale, Tensor? shift, "
      "float eps, Tensor? weight, bool turned, bool residual=False) -> Tensor",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "dice_forward(Tensor x, Tensor alpha, float eps) -> (Tensor, Tensor, Tensor)", {at::Tag::pt2_compliant_tag});
  m.def(
      "dice_backward(Tensor grad, Tensor x, Tensor mean, Tensor var, Tensor alpha, float eps) -> (Tensor, Tensor)",
      {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(ssr_rec, CompositeExplicitAutograd, m) {
  m.impl("view_fusion", ssr_rec::view_fusion);
  m.impl("ics", ssr_rec::ics);
}

TORCH_LIBRARY_IMPL(ssr_rec, Autograd, m) {
  m.impl("view_fusion", ssr_rec::view_fusion_autograd);
  m.impl("ics", ssr_rec::ics_autograd);
}

TORCH_LIBRARY_IMPL(ssr_rec, CPU, m) {
  m.impl("view_fusion_forward", ssr_rec::view_fusion_forward);
  m.impl("view_fusion_backward", ssr_rec::view_fusion_backward);
  m.impl("view_scoring", ssr_rec::view_scoring);
  m.impl("ics_forward", ssr_rec::ics_forward);
  m.impl("ics_backward", ssr_rec::ics_backward);
  m.impl("dice_forward", ssr_rec::dice_forward);
  m.impl("dice_backward", ssr_rec::dice_backward);
}

TORCH_LIBRARY_IMPL(ssr_rec, Meta, m) {
  m.impl("view_fusion_forward", ssr_rec::view_fusion_forward_meta);
  m.impl("view_fusion_backward", ssr_rec::view_fusion_backward_meta);
  m.impl("view_scoring", ssr_rec::view_scoring_meta);
  m.impl("ics_forward", ssr_rec::ics_forward_meta);
  m.impl("ics_backward", ssr_rec::ics_backward_meta);
  m.impl("dice_forward", ssr_rec::dice_forward_meta);
  m.impl("dice_backward", ssr_rec::dice_backward_meta);
}
