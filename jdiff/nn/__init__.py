"""Flax Linen networks, all called as `(x, t, cond=None, *, train=False)`, and `as_field`, which makes a field."""

from jdiff.nn.as_field import as_field
from jdiff.nn.conditioning import SMOOTH_FREQUENCIES, Conditioning
from jdiff.nn.mlp import MLP
from jdiff.nn.unet import UNet, ddpmpp

__all__ = ["MLP", "SMOOTH_FREQUENCIES", "Conditioning", "UNet", "as_field", "ddpmpp"]
