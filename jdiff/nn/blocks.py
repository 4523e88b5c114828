"""Layers of the image networks, NHWC: convolution, residual block, self-attention, resampling by two."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn

from jdiff._typing import Array
from jdiff.nn.conditioning import initializer
from jdiff.nn.normalisation import GroupNorm, at_least_float32

_SQRT_HALF = 0.5**0.5


def upsample(x: Array) -> Array:
    """Nearest neighbour: `(batch, h, w, c) -> (batch, 2h, 2w, c)`."""
    b, h, w, c = x.shape
    return jnp.broadcast_to(x[:, :, None, :, None, :], (b, h, 2, w, 2, c)).reshape(b, 2 * h, 2 * w, c)


def downsample(x: Array) -> Array:
    """Mean over 2x2 squares: `(batch, 2h, 2w, c) -> (batch, h, w, c)`."""
    b, h, w, c = x.shape
    return x.reshape(b, h // 2, 2, w // 2, 2, c).mean(axis=(2, 4))


def conv(channels: int, *, size: int = 3, scale: float = 1.0, dtype=None, name: str | None = None) -> nn.Conv:
    """Convolution of stride 1 with zero padding that keeps height and width."""
    return nn.Conv(channels, (size, size), kernel_init=initializer(scale), dtype=dtype, name=name)


class ResidualBlock(nn.Module):
    """Residual block of BigGAN type, resampling inside.

        h = conv(resample(swish(norm(x)))) + dense(emb);   h = conv(dropout(swish(norm(h))))
        out = (shortcut(resample(x)) + h) / sqrt(2)

    where the shortcut is a 1x1 convolution if the block changes channels or resolution, else the identity. Brock et al.
    2019 (arXiv 1809.11096), Song et al. 2021 (arXiv 2011.13456, appendix H).

    Attributes:
        channels: of the output.
        resample: applied to both branches, such as `upsample`, `downsample`; None keeps the resolution.
        dropout: rate, in training only.
        rescale: divide the sum by sqrt(2).
        dtype: of the computation.
    """

    channels: int
    resample: Callable[[Array], Array] | None = None
    dropout: float = 0.0
    rescale: bool = True
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, x: Array, emb: Array, *, train: bool = False) -> Array:
        """Map x `(batch, h, w, c)` and an activated embedding `(batch, width)` to `(batch, h', w', channels)`."""
        shortcut = self.resample is not None or x.shape[-1] != self.channels
        h = nn.swish(GroupNorm(dtype=self.dtype, name="norm_0")(x))
        if self.resample is not None:
            h, x = self.resample(h), self.resample(x)
        h = conv(self.channels, dtype=self.dtype, name="conv_0")(h)
        shift = nn.Dense(self.channels, kernel_init=initializer(), dtype=self.dtype, name="embed")(emb)
        h = h + shift[:, None, None, :]
        h = nn.swish(GroupNorm(dtype=self.dtype, name="norm_1")(h))
        h = nn.Dropout(self.dropout, deterministic=not train)(h)
        h = conv(self.channels, scale=0.0, dtype=self.dtype, name="conv_1")(h)
        if shortcut:
            x = conv(self.channels, size=1, dtype=self.dtype, name="shortcut")(x)
        return (x + h) * _SQRT_HALF if self.rescale else x + h


class Attention(nn.Module):
    """Self-attention over pixels, one head: `x + out(softmax(q k^T / sqrt(c)) v)`, `q, k, v` from `norm(x)`.

    Ho et al. 2020 (arXiv 2006.11239, appendix B). The bias of `key` shifts all logits of a query alike: it has
    no effect and its gradient is zero; it is kept because the published networks have it.

    Attributes:
        rescale: divide the sum by sqrt(2).
        dtype: of the computation; the softmax is in at least float32.
    """

    rescale: bool = True
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Map `(batch, h, w, c)` to the same shape."""
        b, height, width, c = x.shape

        def project(name, scale):
            return nn.Dense(c, kernel_init=initializer(scale), dtype=self.dtype, name=name)

        h = GroupNorm(dtype=self.dtype, name="norm")(x).reshape(b, height * width, c)
        query, key, value = (project(name, 0.1)(h) for name in ("query", "key", "value"))
        logits = at_least_float32(jnp.einsum("bic,bjc->bij", query * c**-0.5, key))
        weights = jax.nn.softmax(logits, axis=-1).astype(value.dtype)
        h = project("out", 0.0)(jnp.einsum("bij,bjc->bic", weights, value)).reshape(x.shape)
        return (x + h) * _SQRT_HALF if self.rescale else x + h
