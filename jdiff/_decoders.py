"""Decoders of `bounds`: what the start of the diffusion says of the levels."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.scipy.special import log_ndtr

from jdiff._array import batch_time, check_array, check_integers, expand, scalars, sum_event, widened
from jdiff._typing import Array, Process
from jdiff.transforms import DataTransform

__all__ = ["decode", "decode_cells"]


def decode(process: Process, z: Array, t: Array, levels: Array, transform: DataTransform) -> Array:
    """Return log p(levels | z), shape (batch,), with p(k | z) proportional to q(z | x_0 = c_k), entry by entry.

    The exact posterior of independent entries with equally likely levels (Kingma et al. 2021, arXiv 2107.00630).

    Raises:
      ValueError: levels of another shape than z, times that are not scalar or (batch,).
      TypeError: z not floating point, levels not integer.
    """
    check_array(z, "z")
    _check_levels(levels, z, "z")
    z = widened(z)
    alpha, sigma = (expand(c, z)[..., None] for c in process.marginal(batch_time(t, z)))
    centers = transform.center(jnp.arange(transform.levels), dtype=z.dtype)
    centers = centers.reshape((1,) * z.ndim + centers.shape)
    logits = -0.5 * ((z[..., None] - alpha * centers) / sigma) ** 2
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits, axis=-1), levels[..., None].astype(jnp.int32), axis=-1)
    return sum_event(picked)


def decode_cells(mean: Array, std: Array, levels: Array, transform: DataTransform) -> Array:
    """Return log p(levels), shape (batch,), of N(mean, std^2) integrated over each cell, the outer two open.

    Ho et al. 2020 (arXiv 2006.11239), eq. 13. mean is in the model space, (batch, *event); std is a scalar or
    (batch,).

    Raises:
      ValueError: levels of another shape than mean, std that is not scalar or (batch,).
      TypeError: mean not floating point, levels not integer.
    """
    check_array(mean, "mean")
    _check_levels(levels, mean, "mean")
    mean = widened(mean)  # the normal distribution has no half precision
    center, std = transform.center(levels, dtype=mean.dtype), expand(scalars(std, mean, "std"), mean)
    a, b = ((center + side * transform.width - mean) / std for side in (-0.5, 0.5))
    a = jnp.where(levels == 0, -jnp.inf, a)
    b = jnp.where(levels == transform.levels - 1, jnp.inf, b)
    # In the lower tail, by symmetry, where differences of the cdf keep their digits.
    flip = a + b > 0
    log_low, log_high = log_ndtr(jnp.where(flip, -b, a)), log_ndtr(jnp.where(flip, -a, b))
    return sum_event(log_high + jnp.log(-jnp.expm1(log_low - log_high)))


def _check_levels(levels, x, name):
    check_integers(levels, "levels")
    if levels.shape != x.shape:
        raise ValueError(f"levels must have the shape of {name}, {x.shape}; got {levels.shape}")
