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

} // namespace ssr_rec
