"""Layers of the image networks, NHWC: convolution, residual block, self-attention."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from jdiff._array import expand
from jdiff._typing import Array
from jdiff.nn.conditioning import initializer
from jdiff.nn.normalisation import GroupNorm, at_least_float32

__all__ = ["ACTIVATIONS", "Attention", "ResidualBlock", "check_image", "conv", "merge", "over_sigma"]

ACTIVATIONS = {
    "swish": nn.swish,
    "elu": nn.elu,
    "relu": nn.relu,
    "lrelu": lambda x: nn.leaky_relu(x, negative_slope=0.2),
}
"""Activations by the names of the 2021 configurations."""


def check_image(shape: tuple[int, ...], multiple: int, remedy: str) -> None:
    """Raise a ValueError unless `shape` is `(batch, height, width, channels)` of sizes that `multiple` divides."""
    if len(shape) != 4:
        raise ValueError(f"x must have shape (batch, height, width, channels), got {shape}")
    if shape[1] % multiple or shape[2] % multiple:
        size = f"height and width must be multiples of {multiple}, got {shape[1]}x{shape[2]}"
        raise ValueError(f"{size}: pad the images or {remedy}")


def over_sigma(h: Array, sigma: Callable[[Array], Array] | None, t: Array) -> Array:
    """Return `h / sigma(t)`, the network of a score whose output is the noise; h where sigma is None."""
    return h if sigma is None else h / expand(sigma(at_least_float32(t)), h)


def conv(
    channels: int, *, size: int = 3, scale: float = 1.0, dtype: DTypeLike | None = None, name: str | None = None
) -> nn.Conv:
    """Convolution of stride 1 with zero padding that keeps height and width."""
    return nn.Conv(channels, (size, size), kernel_init=initializer(scale), dtype=dtype, name=name)


def merge(x: Array, h: Array, rescale: bool) -> Array:
    """Return the sum of two branches, divided by sqrt(2) if `rescale`."""
    return (x + h) * 0.5**0.5 if rescale else x + h


class ResidualBlock(nn.Module):
    """Residual block, of BigGAN type (resampling inside) or of DDPM type (a plain one).

        h = conv(resample(act(norm(x)))) + dense(emb);   h = conv(dropout(act(norm(h))))
        out = (shortcut(resample(x)) + h) / sqrt(2)

    where the shortcut is a 1x1 convolution if the block changes channels or resolution, else the identity. Brock et al.
    2019 (arXiv 1809.11096), Song et al. 2021 (arXiv 2011.13456, appendix H), Ho et al. 2020 (arXiv 2006.11239).

    Attributes:
        channels: of the output.
        resample: applied to both branches, such as `upsample`, `downsample`; None keeps the resolution.
        dropout: rate, in training only.
        rescale: divide the sum by sqrt(2).
        activation: a key of `ACTIVATIONS`.
        groups: of the normalisations (see `GroupNorm`).
        dense: the shortcut is a dense layer over channels with small initial weights, as in DDPM: the same function.
        dtype: of the computation.
    """

    channels: int
    resample: Callable[[Array], Array] | None = None
    dropout: float = 0.0
    rescale: bool = True
    activation: str = "swish"
    groups: int | None = None
    dense: bool = False
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, x: Array, emb: Array | None, *, train: bool = False) -> Array:
        """Map x `(batch, h, w, c)` and emb, an activated `(batch, width)` or None, to `(batch, h', w', channels)`."""
        shortcut = self.resample is not None or x.shape[-1] != self.channels
        act = ACTIVATIONS[self.activation]
        h = act(GroupNorm(self.groups, dtype=self.dtype, name="norm_0")(x))
        if self.resample is not None:
            h, x = self.resample(h), self.resample(x)
        h = conv(self.channels, dtype=self.dtype, name="conv_0")(h)
        if emb is not None:
            shift = nn.Dense(self.channels, kernel_init=initializer(), dtype=self.dtype, name="embed")(emb)
            h = h + shift[:, None, None, :]
        h = act(GroupNorm(self.groups, dtype=self.dtype, name="norm_1")(h))
        h = nn.Dropout(self.dropout, deterministic=not train)(h)
        h = conv(self.channels, scale=0.0, dtype=self.dtype, name="conv_1")(h)
        if shortcut and self.dense:
            x = nn.Dense(self.channels, kernel_init=initializer(0.1), dtype=self.dtype, name="shortcut")(x)
        elif shortcut:
            x = conv(self.channels, size=1, dtype=self.dtype, name="shortcut")(x)
        return merge(x, h, self.rescale)


class Attention(nn.Module):
    """Self-attention over pixels, one head: `x + out(softmax(q k^T / sqrt(c)) v)`, `q, k, v` from `norm(x)`.

    Ho et al. 2020 (arXiv 2006.11239, appendix B). The bias of `key` shifts all logits of a query alike: it has
    no effect and its gradient is zero; it is kept because the published networks have it.

    Attributes:
        rescale: divide the sum by sqrt(2).
        groups: of the normalisation (see `GroupNorm`).
        dtype: of the computation; the softmax is in at least float32.
    """

    rescale: bool = True
    groups: int | None = None
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Map `(batch, h, w, c)` to the same shape."""
        b, height, width, c = x.shape

        def project(name, scale):
            return nn.Dense(c, kernel_init=initializer(scale), dtype=self.dtype, name=name)

        h = GroupNorm(self.groups, dtype=self.dtype, name="norm")(x).reshape(b, height * width, c)
        query, key, value = (project(name, 0.1)(h) for name in ("query", "key", "value"))
        logits = at_least_float32(jnp.einsum("bic,bjc->bij", query * c**-0.5, key))
        weights = jax.nn.softmax(logits, axis=-1).astype(value.dtype)
        h = project("out", 0.0)(jnp.einsum("bij,bjc->bic", weights, value)).reshape(x.shape)
        return merge(x, h, self.rescale)
