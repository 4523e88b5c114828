"""Resampling of images by two, NHWC: plain, smoothed by the filter (1, 3, 3, 1), or with a convolution."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from jdiff._typing import Array
from jdiff.nn.conditioning import initializer

__all__ = ["Downsample", "Upsample", "downsample", "fir_downsample", "fir_upsample", "upsample"]


def upsample(x: Array) -> Array:
    """Nearest neighbour: `(batch, h, w, c) -> (batch, 2h, 2w, c)`."""
    b, h, w, c = x.shape
    return jnp.broadcast_to(x[:, :, None, :, None, :], (b, h, 2, w, 2, c)).reshape(b, 2 * h, 2 * w, c)


def downsample(x: Array) -> Array:
    """Mean over 2x2 squares: `(batch, 2h, 2w, c) -> (batch, h, w, c)`."""
    b, h, w, c = x.shape
    return x.reshape(b, h // 2, 2, w // 2, 2, c).mean(axis=(2, 4))


def fir_upsample(x: Array) -> Array:
    """Zeros between pixels, filtered by (1, 3, 3, 1) / 4 along each axis: `(batch, h, w, c) -> (batch, 2h, 2w, c)`.

        out[2i] = (x[i-1] + 3 x[i]) / 4,   out[2i+1] = (3 x[i] + x[i+1]) / 4,   0 outside the image

    Karras et al. 2020 (arXiv 1912.04958, appendix B), Zhang 2019 (arXiv 1904.11486). Sums of shifted images: no
    convolution by channel, which compilers handle badly.
    """
    for axis in (1, 2):
        before, _, after = _neighbours(x, axis, 3)
        pairs = jnp.stack([0.25 * before + 0.75 * x, 0.75 * x + 0.25 * after], axis=axis + 1)
        x = pairs.reshape(*x.shape[:axis], 2 * x.shape[axis], *x.shape[axis + 1 :])
    return x


def fir_downsample(x: Array) -> Array:
    """Every second pixel after the filter (1, 3, 3, 1) / 8 along each axis: `(batch, 2h, 2w, c) -> (batch, h, w, c)`.

    `out[i] = (x[2i-1] + 3 x[2i] + 3 x[2i+1] + x[2i+2]) / 8`, 0 outside the image; see `fir_upsample`.
    """
    for axis in (1, 2):
        x = _smooth(_pad(x, axis, 1), axis, stride=2)
    return x


class Upsample(nn.Module):
    """Upsampling, then a 3x3 convolution. With `fir`, it sees what the filter leaves beyond the border; else zeros.

    The former is the adjoint order of Karras et al. 2020: a transposed convolution, then the filter.

    Attributes:
        channels: of the output.
        fir: `fir_upsample` rather than `upsample`.
        dtype: of the computation.
    """

    channels: int
    fir: bool = False
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Map `(batch, h, w, c)` to `(batch, 2h, 2w, channels)`."""
        x = fir_upsample(_pad(_pad(x, 1, 1), 2, 1))[:, 1:-1, 1:-1] if self.fir else upsample(x)
        padding = "VALID" if self.fir else "SAME"
        return nn.Conv(
            self.channels, (3, 3), padding=padding, kernel_init=initializer(), dtype=self.dtype, name="conv"
        )(x)


class Downsample(nn.Module):
    """A 3x3 convolution of stride 2: with `fir`, after the filter (1, 3, 3, 1) / 8; else of x, with zeros after it.

    Attributes:
        channels: of the output.
        fir: filter first.
        dtype: of the computation.
    """

    channels: int
    fir: bool = False
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Map `(batch, 2h, 2w, c)` to `(batch, h, w, channels)`."""
        if self.fir:
            for axis in (1, 2):
                x = _smooth(_pad(x, axis, 2), axis, stride=1)
        # Of an even number of pixels, SAME with stride 2 pads one zero, at the end.
        padding = "VALID" if self.fir else "SAME"
        return nn.Conv(
            self.channels, (3, 3), (2, 2), padding, kernel_init=initializer(), dtype=self.dtype, name="conv"
        )(x)


def _smooth(x, axis, *, stride):
    a, b, c, d = _neighbours(x, axis, 4, stride=stride, padded=True)
    return 0.125 * (a + d) + 0.375 * (b + c)


def _neighbours(x, axis, count, *, stride=1, padded=False):
    """Return `count` images, of which the k-th is x from its k-th pixel on, one zero before and after unless padded."""
    x = x if padded else _pad(x, axis, 1)
    length = x.shape[axis] - count + 1
    return [jax.lax.slice_in_dim(x, k, k + length, stride, axis) for k in range(count)]


def _pad(x, axis, width):
    return jnp.pad(x, [(width, width) if i == axis else (0, 0) for i in range(x.ndim)])
