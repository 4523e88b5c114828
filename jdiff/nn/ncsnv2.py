"""NCSNv2: a RefineNet that does not see the noise level, whose output is divided by it."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
from flax import linen as nn
from jax.typing import DTypeLike

from jdiff._typing import Array
from jdiff.nn.blocks import ACTIVATIONS, check_image, over_sigma
from jdiff.nn.conditioning import check_inputs, check_sizes
from jdiff.nn.conditions import read_condition
from jdiff.nn.normalisation import InstanceNormPlus
from jdiff.nn.resampling import downsample

__all__ = ["NCSNv2", "ncsnv2"]

# Stages: (channels over those of the first, dilation; 1 halves the resolution). Refinements: likewise, coarsest first.
_SIZES: dict[int, dict[str, Any]] = {
    64: {"stages": ((2, 1), (2, 2), (2, 4)), "refinements": (2, 2, 2, 1)},
    128: {"stages": ((2, 1), (2, 1), (4, 2), (4, 4)), "refinements": (4, 2, 2, 1, 1)},
    256: {"stages": ((2, 1), (2, 1), (2, 1), (4, 2), (4, 4)), "refinements": (4, 2, 2, 2, 1, 1)},
}
_INTERPOLATIONS = {"bilinear": "bilinear", "nearest_neighbor": "nearest"}


class NCSNv2(nn.Module):
    """RefineNet of Song & Ermon 2020 (arXiv 2006.09011, appendix A) after Lin et al. 2017; `ncsnv2` gives its sizes.

    Two residual blocks per stage on the way down, dilated instead of halving the resolution where a stage says so; on
    the way up each stage's output is refined together with the one below.

    Attributes:
        sigma: `(batch,) -> (batch,)`, from the time to what the output is divided by; None: not divided. The network
            sees the time nowhere else.
        channels: of the first stage.
        stages: of the second stage and on, channels over `channels` and dilation; dilation 1 halves the resolution.
        refinements: channels over `channels` of each refinement, coarsest stage first.
        activation: "elu", "swish", "relu" or "lrelu".
        interpolation: "bilinear" or "nearest_neighbor", of a stage's output to the size of the one above.
        out_channels: channels of the output; None is x's.
        center_input: the network sees `2 x - 1`: published networks of data in [0, 1].
        dtype: of the computation, such as bfloat16; None is x's. Parameters are float32, the last layer is in x's.
    """

    sigma: Callable[[Array], Array] | None
    channels: int = 128
    stages: tuple[tuple[int, int], ...] = _SIZES[64]["stages"]
    refinements: tuple[int, ...] = _SIZES[64]["refinements"]
    activation: str = "elu"
    interpolation: str = "bilinear"
    out_channels: int | None = None
    center_input: bool = False
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, x: Array, t: Array, cond: Array | None = None, *, train: bool = False) -> Array:
        """Evaluate the network; there is nothing random in it and no label.

        Args:
            x: `(batch, height, width, c)`, of order 1.
            t: `(batch,)`.
            cond: None.
            train: has no effect.

        Returns:
            `(batch, height, width, out_channels)` in the dtype of x.

        Raises:
            ValueError: wrong shapes, a height or width that the stages cannot halve, labels, an unknown option, sizes
                below 1.
            TypeError: x or t not floating, sizes that are no integers.
        """
        check_sizes(self, channels=1, out_channels=1)
        for name, known in (("activation", ACTIVATIONS), ("interpolation", _INTERPOLATIONS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        if len(self.refinements) != len(self.stages) + 1:
            raise ValueError(f"{len(self.stages)} stages need one more refinements, got {len(self.refinements)}")
        check_inputs(x, t)
        read_condition(cond, x)
        check_image(x.shape, 2 ** sum(dilation == 1 for _, dilation in self.stages), "use another size")
        act, dtype = ACTIVATIONS[self.activation], self.dtype or x.dtype

        h = _conv(2 * x - 1 if self.center_input else x, self.channels, "stem", dtype=dtype)
        outputs = []
        for i, (multiplier, dilation) in enumerate(((1, 1), *self.stages)):
            channels = multiplier * self.channels if i else None
            h = _Block(channels, dilation, self.activation, dtype, name=f"stage_{i}_block_0")(h)
            h = _Block(None, dilation, self.activation, dtype, name=f"stage_{i}_block_1")(h)
            outputs.append(h)
        refined: tuple[Array, ...] = ()
        for i, multiplier in enumerate(self.refinements):
            units = 3 if i == len(self.stages) else 1
            refine = partial(_Refinement, multiplier * self.channels, units, self.activation, self.interpolation)
            refined = (refine(dtype, name=f"refine_{i}")((outputs.pop(), *refined)),)
        h = act(InstanceNormPlus(dtype=dtype, name="head_norm")(refined[0]))
        h = _conv(h, self.out_channels or x.shape[-1], "head", dtype=x.dtype)
        return over_sigma(h, self.sigma, t)


def ncsnv2(sigma: Callable[[Array], Array] | None, *, size: int = 64, **changes: Any) -> NCSNv2:
    """NCSNv2 for images of up to 64, 128 or 256 pixels; for 32x32x3 it has 33,970,563 parameters.

    Args:
        sigma: what the output is divided by (see `NCSNv2`).
        size: 64, 128 or 256.
        **changes: attributes of `NCSNv2` that override those of the size.

    Raises:
        ValueError: unknown size.
    """
    if size not in _SIZES:
        raise ValueError(f"size must be one of {', '.join(map(str, _SIZES))}, got {size!r}")
    return NCSNv2(sigma, **(_SIZES[size] | changes))


class _Block(nn.Module):
    """Two convolutions, each after normalisation and activation; `channels` change, by halving or dilation, or stay."""

    channels: int | None
    dilation: int
    activation: str
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Array) -> Array:
        act, dilated = ACTIVATIONS[self.activation], {"dilation": self.dilation, "dtype": self.dtype}
        channels = self.channels or x.shape[-1]
        h = act(InstanceNormPlus(dtype=self.dtype, name="norm_0")(x))
        h = _conv(h, x.shape[-1], "conv_0", **dilated)
        h = act(InstanceNormPlus(dtype=self.dtype, name="norm_1")(h))
        if self.channels is None:
            return x + _conv(h, channels, "conv_1", **dilated)
        if self.dilation > 1:
            return _conv(x, channels, "shortcut", **dilated) + _conv(h, channels, "conv_1", **dilated)
        shortcut = nn.Conv(channels, (1, 1), dtype=self.dtype, name="shortcut")
        return downsample(shortcut(x)) + downsample(nn.Conv(channels, (3, 3), dtype=self.dtype, name="conv_1")(h))


class _Refinement(nn.Module):
    """RefineNet block (Lin et al. 2017, arXiv 1611.06612): residual units, fusion, chained pooling, residual units."""

    channels: int
    units: int
    activation: str
    interpolation: str
    dtype: DTypeLike

    @nn.compact
    def __call__(self, inputs: Sequence[Array]) -> Array:
        act = ACTIVATIONS[self.activation]

        def residual(h, name, units):
            for i in range(units):
                y = _conv(act(h), h.shape[-1], f"{name}_{2 * i}", bias=False, dtype=self.dtype)
                h = h + _conv(act(y), h.shape[-1], f"{name}_{2 * i + 1}", bias=False, dtype=self.dtype)
            return h

        adapted = [residual(h, f"adapt_{i}", 2) for i, h in enumerate(inputs)]
        h = adapted[0]
        if len(inputs) > 1:
            shape, method = (*h.shape[:3], self.channels), _INTERPOLATIONS[self.interpolation]
            parts = [_conv(y, self.channels, f"fuse_{i}", dtype=self.dtype) for i, y in enumerate(adapted)]
            h = sum(jax.image.resize(part, shape, method) for part in parts)
        h = path = act(h)
        for i in range(2):
            path = nn.max_pool(path, (5, 5), padding="SAME")
            path = _conv(path, self.channels, f"pool_{i}", bias=False, dtype=self.dtype)
            h = h + path
        return residual(h, "out", self.units)


def _conv(x, channels, name, *, dilation=1, bias=True, dtype):
    """3x3 convolution, weights and bias uniform on +-1/sqrt(fan in), as PyTorch's are."""
    limit = (9 * x.shape[-1]) ** -0.5
    uniform = lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -limit, limit)
    return nn.Conv(
        channels,
        (3, 3),
        kernel_dilation=dilation,
        use_bias=bias,
        kernel_init=uniform,
        bias_init=uniform,
        dtype=dtype,
        name=name,
    )(x)
