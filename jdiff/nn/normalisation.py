"""Group normalisation, with layer normalisation as its case of one group, and instance normalisation++."""

import math

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from jdiff._typing import Array

__all__ = ["GroupNorm", "InstanceNormPlus", "at_least_float32"]


class GroupNorm(nn.Module):
    """`scale (x - mean) / sqrt(var + 1e-6) + bias`, moments over all axes but the batch, by groups of channels.

    Wu & He 2018 (arXiv 1803.08494). Statistics are in at least float32, the variance from centred values. (Linen's own
    refuses bfloat16 and float64 where JAX's dtype promotion is strict.)

    Attributes:
        groups: number of groups, or the next below that divides the channels. None: min(channels // 4, 32), likewise.
        affine: have `scale` and `bias`, `(channels,)`.
        dtype: of the result; None is x's.
    """

    groups: int | None = None
    affine: bool = True
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Map `(batch, ..., channels)` to the same shape."""
        channels = x.shape[-1]
        most = self.groups or max(min(channels // 4, 32), 1)
        groups = next(g for g in range(min(most, channels), 0, -1) if channels % g == 0)
        wide = at_least_float32(x)
        over = tuple(range(1, x.ndim - 1))
        member = jnp.repeat(jnp.eye(groups, dtype=wide.dtype), channels // groups, axis=0)
        share = member / (math.prod(x.shape[1:]) // groups)

        def of_group(values):
            """Mean over each group, for each of its channels: sums over pixels first, then two thin products."""
            means = jnp.matmul(values.sum(axis=over), share, precision="highest")
            means = jnp.matmul(means, member.T, precision="highest")
            return means.reshape(x.shape[0], *(1,) * len(over), channels)

        # The result does not depend on what is subtracted first, a constant to differentiation: this keeps digits, and
        # the backward pass of an affine map of x costs less than that of centred values (benchmarks.group_norm).
        wide = wide - jax.lax.stop_gradient(of_group(wide))
        mean = of_group(wide)
        factor = jax.lax.rsqrt(of_group(jnp.square(wide)) - jnp.square(mean) + 1e-6)
        shift = -mean * factor
        if self.affine:
            scale = self.param("scale", nn.initializers.ones, (channels,), jnp.float32)
            bias = self.param("bias", nn.initializers.zeros, (channels,), jnp.float32)
            scale, bias = (p.astype(wide.dtype).reshape(*(1,) * (x.ndim - 1), channels) for p in (scale, bias))
            factor, shift = factor * scale, shift * scale + bias
        out = wide * factor + shift
        return out.astype(self.dtype or x.dtype)


class InstanceNormPlus(nn.Module):
    """`gamma ((x - mean) / sqrt(var + 1e-5) + alpha m) + beta`, moments over pixels, per channel.

    `m` are the means themselves, normalised over channels, so that they are not lost. InstanceNorm++ of Song & Ermon
    2019 (arXiv 1907.05600, appendix A). Statistics are in at least float32.

    Attributes:
        dtype: of the result; None is x's.
    """

    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Map `(batch, h, w, channels)` to the same shape."""
        near_one = lambda *args: 1 + nn.initializers.normal(0.02)(*args)
        inits = {"alpha": near_one, "gamma": near_one, "beta": nn.initializers.zeros}
        wide = at_least_float32(x)
        param = {name: self.param(name, init, x.shape[-1:], jnp.float32) for name, init in inits.items()}
        alpha, gamma, beta = (param[name].astype(wide.dtype)[None, None, None] for name in ("alpha", "gamma", "beta"))
        mean = wide.mean(axis=(1, 2), keepdims=True)
        out = _standardise(wide, (1, 2)) + alpha * _standardise(mean, (3,))
        return (gamma * out + beta).astype(self.dtype or x.dtype)


def _standardise(x, axes):
    centred = x - x.mean(axis=axes, keepdims=True)
    return centred * jax.lax.rsqrt(jnp.square(centred).mean(axis=axes, keepdims=True) + 1e-5)


def at_least_float32(x: Array) -> Array:
    """Widen 16-bit floats to float32; leave float32 and float64 alone."""
    return x if jnp.finfo(x.dtype).bits >= 32 else x.astype(jnp.float32)
