"""Attention of a network's tokens to those of a condition."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from jdiff._typing import Array
from jdiff.nn.conditioning import initializer
from jdiff.nn.normalisation import at_least_float32

__all__ = ["CrossAttention"]


class CrossAttention(nn.Module):
    """`out(softmax(q k^T / sqrt(d)) v)`, q from the network's tokens, k and v from the condition's.

    Vaswani et al. 2017 (arXiv 1706.03762, section 3.2.3), with one token more, whose key and value are learned: it is
    what an example sees whose tokens are all masked. No position enters: the order of the tokens changes nothing.

    Attributes:
        heads: a divisor of the width.
        dtype: of the computation; the softmax is in at least float32.
    """

    heads: int
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, h: Array, tokens: Array, mask: Array) -> Array:
        """Map h `(batch, m, width)`, tokens `(batch, n, d)`, mask `(batch, n)` (False: not seen) to the shape of h."""
        batch, m, width = h.shape

        def split(x):
            return x.reshape(*x.shape[:2], -1, self.heads, width // self.heads)

        def dense(units, name, scale=1.0):
            return nn.Dense(units, kernel_init=initializer(scale), dtype=self.dtype, name=name)

        query = split(dense(width, "query")(h))[:, :, 0]
        tokens = jnp.where(mask[..., None], tokens, 0)  # what is not seen may be NaN
        pairs = dense(2 * width, "key_value")(tokens)
        null = self.param("null", nn.initializers.normal(1.0), (2 * width,), jnp.float32).astype(pairs.dtype)
        pairs = split(jnp.concatenate([pairs, jnp.broadcast_to(null, (batch, 1, 2 * width))], axis=1))
        mask = jnp.concatenate([mask, jnp.ones((batch, 1), bool)], axis=1)
        logits = at_least_float32(jnp.einsum("bmhd,bnhd->bhmn", query, pairs[:, :, 0])) * (width // self.heads) ** -0.5
        weights = jax.nn.softmax(jnp.where(mask[:, None, None], logits, -jnp.inf), axis=-1).astype(pairs.dtype)
        values = jnp.einsum("bhmn,bnhd->bmhd", weights, pairs[:, :, 1]).reshape(batch, m, width)
        return dense(width, "out", scale=0.1)(values)
