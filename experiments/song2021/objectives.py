"""Objectives of the reference, per example: at given times or labels, with given noise."""

from __future__ import annotations

import jax
import jax.numpy as jnp

import jdiff
from experiments.song2021.process import Score, alphas_cumprod, coefficients, marginal, scale_time, sigmas, wide


def denoising_loss(
    process: jdiff.Process,
    score: Score,
    x0: jax.Array,
    t: jax.Array,
    eps: jax.Array,
    *,
    likelihood_weighting: bool = False,
    reduce_mean: bool = True,
) -> jax.Array:
    """Return |sigma score + eps|^2 or g^2 |score + eps / sigma|^2 per example (eq. 7), x_t = alpha x0 + sigma eps.

    The square is a mean over the image, or half the sum.
    """
    alpha, sigma = (wide(a, x0) for a in marginal(process, t))
    found = score(alpha * x0 + sigma * eps, t)
    if likelihood_weighting:
        return coefficients(process, t)[1] ** 2 * _reduce(found + eps / sigma, reduce_mean)
    return _reduce(found * sigma + eps, reduce_mean)


def ddpm_loss(
    process: jdiff.VP,
    field: Score,
    x0: jax.Array,
    labels: jax.Array,
    eps: jax.Array,
    *,
    scales: int = 1000,
    reduce_mean: bool = True,
) -> jax.Array:
    """Return |field - eps|^2 per example at the integer labels 0 .. N-1 of the discrete VP (Ho et al. 2020, eq. 14).

    field: (x, t) -> eps, at t = label / (N - 1).
    """
    alpha2 = wide(alphas_cumprod(process, scales)[labels], x0)
    x = jnp.sqrt(alpha2) * x0 + jnp.sqrt(1 - alpha2) * eps
    return _reduce(field(x, scale_time(labels, scales)) - eps, reduce_mean)


def smld_loss(
    process: jdiff.VE,
    field: Score,
    x0: jax.Array,
    labels: jax.Array,
    eps: jax.Array,
    *,
    scales: int = 1000,
    reduce_mean: bool = False,
) -> jax.Array:
    """Return sigma^2 |field + eps / sigma|^2 per example (Song and Ermon 2019, arXiv 1907.05600, eq. 6).

    labels are integers 0 .. N-1 that count from the largest sigma; field: (x, t) -> score, at t = 1 - label / (N - 1).
    """
    sigma = sigmas(process, scales)[::-1][labels]
    noise = wide(sigma, x0) * eps
    error = field(x0 + noise, scale_time(scales - 1 - labels, scales)) + noise / wide(sigma**2, x0)
    return sigma**2 * _reduce(error, reduce_mean)


def _reduce(error, reduce_mean):
    squares = jnp.square(error).reshape(len(error), -1)
    return jnp.mean(squares, axis=-1) if reduce_mean else 0.5 * jnp.sum(squares, axis=-1)
