"""Defines the hot operators of the over-archs, one function each, on plain tensors.

``ics`` and ``view_fusion`` are the entry points. Each is a torch operator, ``ssr_rec::ics`` and
``ssr_rec::view_fusion``, whose autograd formula is made of four more, with one implementation per device. An
implementation is a pair of functions with these signatures; shapes as in ``ssr_rec.over_archs``, ``N`` the dims a
view's dense layer sees, ``A`` the type the arithmetic is done in: float64 for float64, else float32::

    ics_forward(z (B,V,d), alpha (V,T), gamma (V,d) | None)
        -> y (B,V,d) of z's type, means (B,V,T) of type A: mean_d(x_t), t = 0 .. T-1, as Algorithm 1 meets them
    ics_backward(grad (B,V,d), z, means, alpha, gamma | None)
        -> grad_z (B,V,d) of z's type, grad_alpha (V,T) of alpha's, grad_gamma (V,d) of gamma's; (0,) without gamma

    view_fusion_forward(x, indices (V,N) int64 | None, weight (V,N,d), bias (V,d), residual (B,V,d) | None,
                        scale (V,d) | None, shift (V,d) | None, eps: float, save: bool,
                        keep (B,V,d) bool | None, keep_share: float)
        -> y (B,V,d), pre (V,B,d): h W before the bias, stats (V,B,2): mean and 1 / deviation of each row
           x is (B, width) with indices, (B,V,N) without; scale and shift come together or not at all.
           save=False: nothing follows that needs pre and stats, and they are (0,); stats is (0,) without scale too.
    view_fusion_backward(grad (B,V,d), x, indices | None, weight, bias, residual | None, scale | None, pre, stats,
                         need_x: bool, keep | None, keep_share: float)
        -> grad_x like x, grad_weight, grad_bias, grad_residual, grad_scale, grad_shift; (0,) for what is None,
           and for grad_x with need_x=False

From ``means`` the thresholds follow: theta_0 = 0, theta_{t+1} = theta_t + alpha_t * means_t. On the CPU they are C++
(``extension.py``); a GPU's are registered for the same operators: ``torch.library.impl("ssr_rec::ics_forward",
"CUDA", function)``. ``reference.py`` is the plain form: the fallback, and what the tests compare with.

``view_scoring`` is ``view_fusion`` for scoring, an operator without gradients, on the CPU alone.
"""

from ssr_rec.kernels.ics import ics
from ssr_rec.kernels.reference import gather_views, ics_reference, view_fusion_reference
from ssr_rec.kernels.view_fusion import view_fusion
from ssr_rec.kernels.view_scoring import view_scoring

__all__ = ["gather_views", "ics", "ics_reference", "view_fusion", "view_fusion_reference", "view_scoring"]
