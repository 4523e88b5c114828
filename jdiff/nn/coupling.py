"""A discrete normalising flow of affine couplings, with its exact log-determinant and inverse."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from jdiff._array import check_array, check_positive
from jdiff._typing import Array
from jdiff.nn.conditioning import check_sizes, initializer

__all__ = ["CouplingFlow"]


class CouplingFlow(nn.Module):
    """Real NVP for small images: each coupling moves one half of the entries by functions of the other half.

        z_b = x_b exp(s(x_a)) + m(x_a),   z_a = x_a,   s = bound tanh(. / bound),   log |det dz/dx| = sum s

    Dinh et al. 2017 (arXiv 1605.08803), eqs. 4 to 8. The halves a and b are in turn the two colours of a checkerboard
    and, after 2x2 squeezing, the two halves of the four channels; then each with the roles changed. Images of odd size,
    and events that are no images, take every second entry. s and m come from one residual MLP, whose last layer is zero
    at first: the flow starts as the identity. It has no batch normalisation: standardise the data.

    Attributes:
        depth: number of couplings; after four each entry has moved twice.
        width: hidden units of each coupling's MLP.
        blocks: residual blocks of each.
        bound: of |s|.
        dropout: rate in the MLPs, in training only.
    """

    depth: int = 8
    width: int = 256
    blocks: int = 1
    bound: float = 2.0
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x: Array, *, inverse: bool = False, train: bool = False) -> tuple[Array, Array]:
        """Return z and log |det dz/dx| of each example, shape (batch,); or, inverse, x and log |det dx/dz| of z = x.

        Args:
            x: `(batch, *event)`, of order 1.
            inverse: from z to x.
            train: dropout on; `apply` then needs `rngs={"dropout": key}`.

        Raises:
            ValueError: less than two entries per example, sizes below 1, a bound that is not positive, a dropout
                outside [0, 1).
            TypeError: x not floating, sizes that are no integers.
        """
        check_sizes(self, depth=0, width=1, blocks=0)
        check_positive(self.bound, "bound")
        check_array(x)
        shape, size = x.shape, math.prod(x.shape[1:])
        if x.ndim < 2 or size < 2:
            raise ValueError(f"x must be (batch, *event) of at least two entries per example, got {shape}")
        x, log_det = jnp.asarray(x).reshape(shape[0], size), jnp.zeros_like(x, shape=shape[:1])
        for i in reversed(range(self.depth)) if inverse else range(self.depth):
            fixed = _mask(shape[1:], i)
            a, b = np.flatnonzero(fixed), np.flatnonzero(~fixed)
            scale, shift = self._conditioner(x[:, a], len(b), f"coupling_{i}", train)
            moved = x[:, b]
            moved = (moved - shift) * jnp.exp(-scale) if inverse else moved * jnp.exp(scale) + shift
            x = x.at[:, b].set(moved)
            log_det = log_det + (-1 if inverse else 1) * jnp.sum(scale, axis=1)
        return x.reshape(shape), log_det

    def log_prob(self, x: Array, *, train: bool = False) -> Array:
        """Return log p(x) = log N(z; 0, I) + log |det dz/dx| in nats, shape (batch,)."""
        z, log_det = self(x, train=train)
        z = z.reshape(len(z), -1)
        return -0.5 * jnp.sum(z**2 + math.log(2 * math.pi), axis=1) + log_det

    def inverse(self, z: Array) -> Array:
        """Return the x of a latent z: a sample where z is N(0, I)."""
        return self(z, inverse=True)[0]

    def _conditioner(self, x, size, name, train):
        def dense(units, name, scale=1.0):
            return nn.Dense(units, kernel_init=initializer(scale), dtype=x.dtype, name=name)

        def drop(h):
            return nn.Dropout(self.dropout, deterministic=not train)(h) if self.dropout else h

        h = dense(self.width, f"{name}_stem")(x)
        for j in range(self.blocks):
            y = dense(self.width, f"{name}_block_{j}_dense_0")(nn.swish(h))
            h = h + dense(self.width, f"{name}_block_{j}_dense_1", scale=0.1)(drop(nn.swish(y)))
        scale, shift = jnp.split(dense(2 * size, f"{name}_head", scale=0.0)(nn.swish(h)), 2, axis=-1)
        return self.bound * jnp.tanh(scale / self.bound), shift


def _mask(event, i):
    """Return which entries coupling i leaves as they are, a flat array of booleans."""
    if len(event) == 3 and event[0] % 2 == 0 and event[1] % 2 == 0:
        row, column, _ = np.indices(event)
        # Squeezed channels: the four pixels of a 2x2 block, split into its rows and, the next time, its columns.
        split = (row + column) % 2 if i % 4 < 2 else (row if i % 8 < 4 else column) % 2
    else:
        split = np.arange(math.prod(event)) % 2
    return split.ravel() == i % 2
