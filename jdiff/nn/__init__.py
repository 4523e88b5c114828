"""Flax Linen networks, all called as `(x, t, cond=None, *, train=False)`, and `as_field`, which makes a field.

`CouplingFlow` is the exception: `(x) -> (z, log_det)`, a density by itself.
"""

from jdiff.nn.as_field import as_field
from jdiff.nn.conditioning import Conditioning
from jdiff.nn.conditions import Condition, image_tokens, read_condition
from jdiff.nn.coupling import CouplingFlow
from jdiff.nn.mlp import ResidualMLP
from jdiff.nn.ncsnv2 import NCSNv2, ncsnv2
from jdiff.nn.transformer import PatchTransformer
from jdiff.nn.unet import UNet, ddpm, ddpmpp, ncsnpp
from jdiff.nn.wide_resnet import WideResNet

__all__ = [
    "Condition",
    "Conditioning",
    "CouplingFlow",
    "NCSNv2",
    "PatchTransformer",
    "ResidualMLP",
    "UNet",
    "WideResNet",
    "as_field",
    "ddpm",
    "ddpmpp",
    "image_tokens",
    "ncsnpp",
    "ncsnv2",
    "read_condition",
]
