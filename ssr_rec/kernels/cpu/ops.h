// The operators' CPU implementations; ssr_rec/kernels/__init__.py has the signatures and shapes.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

namespace ssr_rec {

std::tuple<at::Tensor, at::Tensor> ics_forward(
    const at::Tensor& z, const at::Tensor& alpha, const std::optional<at::Tensor>& gamma);

std::tuple<at::Tensor, at::Tensor, at::Tensor> ics_backward(
    const at::Tensor& grad, const at::Tensor& z, const at::Tensor& means, const at::Tensor& alpha,
    const std::optional<at::Tensor>& gamma);

std::tuple<at::Tensor, at::Tensor, at::Tensor> view_fusion_forward(
    const at::Tensor& x, const std::optional<at::Tensor>& indices, const at::Tensor& weight, const at::Tensor& bias,
    const std::optional<at::Tensor>& residual, const std::optional<at::Tensor>& scale,
    const std::optional<at::Tensor>& shift, double eps, bool save,
    const std::optional<at::Tensor>& keep, double keep_share);

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> view_fusion_backward(
    const at::Tensor& grad, const at::Tensor& x, const std::optional<at::Tensor>& indices, const at::Tensor& weight,
    const at::Tensor& bias, const std::optional<at::Tensor>& residual, const std::optional<at::Tensor>& scale,
    const at::Tensor& pre, const at::Tensor& stats, bool need_x,
    const std::optional<at::Tensor>& keep, double keep_share);

// If turned, y (B, V, d) has strides (1, d (B + COLUMNS_APART), B + COLUMNS_APART).
at::Tensor view_scoring(
    const at::Tensor& x, const at::Tensor& indices, const at::Tensor& weight_t, const at::Tensor& bias,
    const std::optional<at::Tensor>& scale, const std::optional<at::Tensor>& shift, double eps,
    const std::optional<at::Tensor>& weight, bool turned, bool residual);

std::tuple<at::Tensor, at::Tensor, at::Tensor> dice_forward(const at::Tensor& x, const at::Tensor& alpha, double eps);

std::tuple<at::Tensor, at::Tensor> dice_backward(
    const at::Tensor& grad, const at::Tensor& x, const at::Tensor& mean, const at::Tensor& var,
    const at::Tensor& alpha, double eps);

constexpr int64_t COLUMNS_APART = 16;

} // namespace ssr_rec
