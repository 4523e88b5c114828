"""A residual MLP for small images and for vectors."""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.typing import DTypeLike

from jdiff._typing import Array
from jdiff.nn.conditioning import SMOOTH_FREQUENCIES, Conditioning, check_inputs, check_sizes, initializer
from jdiff.nn.conditions import Condition
from jdiff.nn.normalisation import GroupNorm

__all__ = ["ResidualMLP"]


class ResidualMLP(nn.Module):
    """MLP on the flattened x; each block is scaled and shifted by the noise level and label (FiLM).

        h <- h + dense(dropout(swish(dense(swish((1 + scale) norm(h) + shift))))),   [scale, shift] = dense(emb)

    with layer normalisation without parameters. FiLM: Perez et al. 2018 (arXiv 1709.07871).

    Attributes:
        noise_level: `(batch,) -> (batch,)`, from the time to what `embedding` embeds, log-SNR for "smooth" (see
            `Conditioning`).
        width: hidden units.
        depth: number of blocks.
        dropout: rate, in training only.
        embedding: "smooth", "positional" or "fourier".
        frequencies: angular frequencies of "smooth".
        fourier_scale: standard deviation of the frequencies of "fourier".
        num_classes: labels are `0 ... num_classes - 1`, and `num_classes` is the null label. None: no labels.
        vector_size: entries of a vector that is known (see `read_condition`). None: no vector.
        out_channels: size of the output's last axis; None is x's.
        dtype: of the computation, such as bfloat16; None is x's. Parameters are float32, the last layer is in x's.
    """

    noise_level: Callable[[Array], Array]
    width: int = 384
    depth: int = 3
    dropout: float = 0.1
    embedding: str = "smooth"
    frequencies: tuple[float, ...] = SMOOTH_FREQUENCIES
    fourier_scale: float = 16.0
    num_classes: int | None = None
    vector_size: int | None = None
    out_channels: int | None = None
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, x: Array, t: Array, cond: Condition = None, *, train: bool = False) -> Array:
        """Evaluate the network.

        Args:
            x: `(batch, *event)`, of order 1; with `out_channels` at least one axis besides the batch.
            t: `(batch,)`.
            cond: labels `(batch,)`, or a dict of what the network was built for (see `read_condition`); None is the
                null condition. A label out of range gives NaN.
            train: dropout on; `apply` then needs `rngs={"dropout": key}`.

        Returns:
            Shape of x, but for `out_channels` on the last axis, and dtype of x.

        Raises:
            ValueError: wrong shapes, sizes below 1, a dropout outside [0, 1), what `read_condition` raises.
            TypeError: x or t not floating, sizes that are no integers, what `read_condition` raises.
        """
        check_sizes(self, width=1, depth=0, out_channels=1)
        check_inputs(x, t)
        if self.out_channels is not None and x.ndim < 2:
            raise ValueError(f"out_channels is the size of the last axis, which x of shape {x.shape} does not have")
        dtype = self.dtype or x.dtype

        def dense(units, name, scale=1.0, dtype=dtype):
            return nn.Dense(units, kernel_init=initializer(scale), dtype=dtype, name=name)

        emb = Conditioning(
            self.noise_level,
            self.width,
            embedding=self.embedding,
            features=self.width,
            frequencies=self.frequencies,
            fourier_scale=self.fourier_scale,
            num_classes=self.num_classes,
            vector_size=self.vector_size,
            dtype=dtype,
            name="conditioning",
        )(x, t, cond)
        emb = nn.swish(emb)
        size = int(np.prod(x.shape[1:]))
        h = dense(self.width, "stem")(x.reshape(x.shape[0], size))
        for i in range(self.depth):
            scale, shift = jnp.split(dense(2 * self.width, f"block_{i}_film")(emb), 2, axis=-1)
            y = GroupNorm(1, affine=False, dtype=dtype)(h) * (1 + scale) + shift
            y = dense(self.width, f"block_{i}_dense_0")(nn.swish(y))
            y = nn.Dropout(self.dropout, deterministic=not train)(nn.swish(y))
            h = h + dense(self.width, f"block_{i}_dense_1", scale=0.0)(y)
        h = nn.swish(GroupNorm(1, dtype=dtype, name="head_norm")(h))
        shape = (*x.shape[:-1], self.out_channels or x.shape[-1])
        return dense(int(np.prod(shape[1:])), "head", scale=0.0, dtype=x.dtype)(h).reshape(shape)
