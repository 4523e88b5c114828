"""A classifier of noisy images, for guidance: the wide residual network of Song et al. 2021."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from jdiff._typing import Array
from jdiff.nn.blocks import check_image
from jdiff.nn.conditioning import SMOOTH_FREQUENCIES, Conditioning, check_inputs, check_sizes, initializer
from jdiff.nn.conditions import read_condition, space_to_depth
from jdiff.nn.normalisation import GroupNorm, at_least_float32
from jdiff.nn.resampling import downsample

__all__ = ["WideResNet"]


class WideResNet(nn.Module):
    """Logits of p(y | x_t): a wide residual network (Zagoruyko & Komodakis 2016, arXiv 1605.07146) that knows t.

        h = conv(relu(norm(x))) + dense(swish(emb));   out = shortcut(x) + conv(dropout(relu(norm(h))))

    in three groups of (depth - 4) / 6 blocks, of 16, 32 and 64 times `widen` channels, the last two at half the
    resolution of the one before; the shortcut is a mean over 2x2 squares and zeros for channels that x has not (and,
    where a side is odd, for the pixels that it has not). Every
    image is brought to mean 0 and standard deviation 1 first, so that any process can be fed as it is. With the
    defaults, for 32x32x3, it is the noise-conditional WideResNet-28-10 of Song et al. 2021 (arXiv 2011.13456, appendix
    I.1), of 38,913,242 parameters for 10 classes.

    Attributes:
        noise_level: `(batch,) -> (batch,)`, from the time to what `embedding` embeds: `log sigma` for the published
            network (see `Conditioning`).
        num_classes: labels are `0 ... num_classes - 1`.
        depth: convolutions, 6 n + 4.
        widen: channels over those of the narrowest network.
        patch: side of the squares of pixels that become one pixel's channels first: 2 spares a CPU 3/4 of the work.
        dropout: rate, in training only.
        embedding: "fourier", "smooth" or "positional".
        features: of the embedding; its vector is 4 times as wide.
        frequencies: angular frequencies of "smooth".
        fourier_scale: standard deviation of the frequencies of "fourier".
        dtype: of the computation, such as bfloat16; None is x's. Parameters are float32, the last layer is in x's.
    """

    noise_level: Callable[[Array], Array]
    num_classes: int
    depth: int = 28
    widen: int = 10
    patch: int = 1
    dropout: float = 0.0
    embedding: str = "fourier"
    features: int = 128
    frequencies: tuple[float, ...] = SMOOTH_FREQUENCIES
    fourier_scale: float = 16.0
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, x: Array, t: Array, cond: None = None, *, train: bool = False) -> Array:
        """Map x `(batch, height, width, c)` and t `(batch,)` to logits `(batch, num_classes)` in the dtype of x.

        `cond` is there because every network has it, and must be None. With `train` and a dropout, `apply` needs
        `rngs={"dropout": key}`.

        Raises:
            ValueError: wrong shapes, a side that `patch` does not divide, a depth that is not 6 n + 4, sizes below 1, a
                dropout outside [0, 1), a `cond`.
            TypeError: x or t not floating, sizes that are no integers.
        """
        check_sizes(self, num_classes=1, depth=10, widen=1, patch=1, features=1)
        check_inputs(x, t)
        read_condition(cond, x)
        check_image(x.shape, self.patch, "use another patch")
        if (self.depth - 4) % 6:
            raise ValueError(f"depth must be 10, 16, 22, 28, ..., got {self.depth}")
        dtype = self.dtype or x.dtype
        emb = Conditioning(
            self.noise_level,
            4 * self.features,
            embedding=self.embedding,
            features=self.features,
            frequencies=self.frequencies,
            fourier_scale=self.fourier_scale,
            dtype=dtype,
            name="conditioning",
        )(x, t)
        emb = nn.swish(emb)

        def norm(h, name):
            return nn.relu(GroupNorm(dtype=dtype, name=name)(h))

        def conv(h, channels, name, stride=1):
            init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")  # He et al. 2015, arXiv 1502.01852
            return nn.Conv(
                channels, (3, 3), (stride, stride), use_bias=False, kernel_init=init, dtype=dtype, name=name
            )(h)

        h = conv(space_to_depth(_standardise(x), self.patch).astype(dtype), 16, "stem")
        for group in range(3):
            channels = 2**group * 16 * self.widen
            for i in range((self.depth - 4) // 6):
                name, stride = f"group_{group}_block_{i}", 2 if group and not i else 1
                y = norm(h, f"{name}_norm_0")
                if group == i == 0:
                    h = y  # the stem's output is activated on both ways
                y = conv(y, channels, f"{name}_conv_0", stride)
                y = (
                    y
                    + nn.Dense(channels, kernel_init=initializer(), dtype=dtype, name=f"{name}_embed")(emb)[
                        :, None, None
                    ]
                )
                y = nn.Dropout(self.dropout, deterministic=not train)(norm(y, f"{name}_norm_1"))
                h = _shortcut(h, channels, stride) + conv(y, channels, f"{name}_conv_1")
        pooled = norm(h, "head_norm").mean(axis=(1, 2)).astype(x.dtype)
        return nn.Dense(self.num_classes, kernel_init=initializer(), dtype=x.dtype, name="head")(pooled)


def _standardise(x: Array) -> Array:
    """`(x - mean) / max(std, 1/sqrt(n))` per example, moments over its n entries, in at least float32."""
    wide = at_least_float32(x)
    axes = tuple(range(1, x.ndim))
    centred = wide - wide.mean(axis=axes, keepdims=True)
    variance = jnp.square(centred).mean(axis=axes, keepdims=True)
    return centred * jax.lax.rsqrt(jnp.maximum(variance, 1 / math.prod(x.shape[1:])))


def _shortcut(x, channels, stride):
    if stride > 1:
        x = downsample(jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, x.shape[2] % 2), (0, 0))))
    return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, channels - x.shape[-1])))
