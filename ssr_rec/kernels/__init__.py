"""The hot operators of the over-archs, one function each, on plain tensors."""

from ssr_rec.kernels.ics import ics

__all__ = ["ics"]
