"""From integer levels to densities: draws inside a level's cell, with the log-density of the draw.

For any q(x | k) that lives on the cell of k alone, and P(k) = int_cell p(x) dx the model's probability of the levels,

    log P(k) = log E_q[p(x) / q(x | k)] >= E_q[log (1/K) sum_i p(x_i) / q(x_i | k)] >= E_q[log p(x) - log q(x | k)]

(Burda et al. 2016, arXiv 1509.00519, theorem 1, for the middle one). All is in the model space: no constant is added.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.special import erf, logsumexp
from jax.typing import DTypeLike

from jdiff._array import (
    batch_time,
    check_array,
    check_positive,
    event_size,
    expand,
    per_example_keys,
    sum_event,
    widened,
)
from jdiff._typing import Array, Key, Process
from jdiff.processes import time_at
from jdiff.transforms import DataTransform, check_images, size_of

__all__ = ["Dequantised", "importance_weighted", "level_bits", "start_time", "truncated_normal", "uniform"]


class Dequantised(NamedTuple):
    """A draw x ~ q(x | levels)."""

    x: Array
    """The draw in the model space, shape (batch, *event)."""
    log_q: Array
    """log q(x | levels) in nats, shape (batch,): subtract it from log p(x)."""


def uniform(key: Key, transform: DataTransform, levels: Array, *, dtype: DTypeLike = jnp.float32) -> Dequantised:
    """Draw x uniformly in the cells of levels: log p - log_q is `log p + transform.log_det_at(x)`.

    In an affine model space log_q is the constant -D log width.

    Theis et al. 2016 (arXiv 1511.01844), section 3.1. Arguments and errors as in `DataTransform.dequantise`.
    """
    check_images(levels, transform.levels, "levels")
    x = transform.forward(transform.dequantise(key, levels, dtype=dtype))
    return Dequantised(x, -transform.log_det_at(x))


def truncated_normal(
    key: Key,
    transform: DataTransform,
    levels: Array,
    process: Process,
    t: Array | float,
    *,
    dtype: DTypeLike = jnp.float32,
) -> Dequantised:
    """Draw x = alpha c + sigma z, z ~ N(0, 1) cut to [-tau, tau], tau = alpha width / (2 sigma).

    c is the middle of the cell. x follows the diffusion's own marginal of noiseless images at t but for its tails, and
    lives on the cells scaled by alpha; log q = -|z|^2/2 - D log(sqrt(2 pi) sigma erf(tau / sqrt(2))). Zheng et al.
    2023 (arXiv 2305.03935). For tau -> 0 it is uniform, for tau >> 1 a normal.

    Args:
      key: one key or one per example.
      transform: the levels and their cells.
      levels: integer levels, (batch, *event).
      process: the forward process.
      t: the start time, scalar or (batch,), at which log p is evaluated too: log_likelihood(..., t_min=t).
      dtype: the floating-point type of x.

    Raises:
      TypeError: levels not integer, or keys not typed threefry keys.
      ValueError: no batch axis, another number of keys, levels below 2, or a dtype too coarse for them.
    """
    check_images(levels, transform.levels, "levels")
    center = transform.center(levels, dtype=dtype)
    keys = per_example_keys(key, center.shape[0])
    alpha, sigma = process.marginal(batch_time(t, center))
    tau = (0.5 * transform.width * alpha / sigma).astype(center.dtype)
    z = jax.vmap(lambda k, end: jax.random.truncated_normal(k, -end, end, center.shape[1:], center.dtype))(keys, tau)
    log_norm = jnp.log(sigma) + jnp.log(erf(tau.astype(sigma.dtype) / math.sqrt(2))) + 0.5 * math.log(2 * math.pi)
    log_q = -0.5 * sum_event(widened(z) ** 2) - event_size(center) * log_norm
    return Dequantised(expand(alpha, center) * center + expand(sigma, center) * z, log_q)


def start_time(process: Process, transform: DataTransform, tau: float = 3.0) -> Array:
    """Return t where half a cell is tau standard deviations of the noise, alpha width / (2 sigma) = tau.

    Zheng et al. 2023's networks start at log-SNR 13.3, tau = 3 for 256 levels: a truncated normal loses 0.3 % there.

    Raises:
      ValueError: tau not positive and finite.
    """
    check_positive(tau, "tau")
    return time_at(process, jnp.asarray(2 * math.log(2 * tau / transform.width)))


def importance_weighted(log_weights: Array) -> Array:
    """Return log (1/K) sum_i exp(log_weights_i), shape (batch,), for log p(x_i) - log q(x_i) of shape (K, batch).

    A lower bound of log P(k) in expectation, never lower with a larger K (Burda et al. 2016, arXiv 1509.00519).

    Raises:
      ValueError: another rank, or no draws.
      TypeError: log_weights not floating point.
    """
    check_array(log_weights, "log_weights")
    if log_weights.ndim != 2 or len(log_weights) < 1:
        raise ValueError(f"log_weights must have shape (draws, batch), got {log_weights.shape}")
    return logsumexp(log_weights, axis=0) - math.log(log_weights.shape[0])


def level_bits(log_prob: Array, event_shape: Sequence[int]) -> Array:
    """Return bits per dimension, -log_prob / (D log 2), of log-probabilities of levels in nats (not of densities).

    Raises:
      ValueError: event_shape is not a shape of positive sizes.
    """
    return -log_prob / (size_of(event_shape) * math.log(2))
