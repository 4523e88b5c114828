"""The reference's processes and tables in plain float32, as they were written, and the score of a field."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

import jdiff
from jdiff import predictions

Score = Callable[..., jax.Array]
T_MIN = 1e-5
"""Where likelihoods end and training times start; samples of VP and SubVP end at 1e-3."""


def marginal(process: jdiff.Process, t: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return alpha, sigma at t with the 1 - exp(.) that loses its digits near t = 0 (eqs. 29-31, 33).

    Raises:
      TypeError: another process than VP, SubVP and VE; so do all functions of a process here.
    """
    if is_ve(process):
        return jnp.ones_like(t), process.sigma_min * (process.sigma_max / process.sigma_min) ** t
    log_alpha = -0.25 * t**2 * (process.beta_max - process.beta_min) - 0.5 * t * process.beta_min
    variance = 1 - jnp.exp(2 * log_alpha)
    return jnp.exp(log_alpha), variance if isinstance(process, jdiff.SubVP) else jnp.sqrt(variance)


def coefficients(process: jdiff.Process, t: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return f, g of dx = f(t) x dt + g(t) dw (eqs. 8, 10, 14)."""
    if is_ve(process):
        ratio = math.log(process.sigma_max) - math.log(process.sigma_min)
        return jnp.zeros_like(t), marginal(process, t)[1] * math.sqrt(2 * ratio)
    slope = process.beta_max - process.beta_min
    beta = process.beta_min + t * slope
    g2 = beta
    if isinstance(process, jdiff.SubVP):
        g2 = beta * (1 - jnp.exp(-2 * process.beta_min * t - slope * t**2))
    return -0.5 * beta, jnp.sqrt(g2)


def betas(process: jdiff.VP, scales: int) -> jax.Array:
    """Return beta_i of the discrete VP, linear from beta_min / N to beta_max / N, shape (N,).

    Raises:
      ValueError: a beta of 1 or more, because there are too few scales.
    """
    if not process.beta_max < scales:
        raise ValueError(f"the discrete VP needs more than beta_max = {process.beta_max} scales, got {scales}")
    return jnp.linspace(process.beta_min / scales, process.beta_max / scales, scales, dtype=jnp.float32)


def alphas_cumprod(process: jdiff.VP, scales: int) -> jax.Array:
    """Return the products of 1 - beta_j over j <= i, the alpha^2 of the discrete VP, shape (N,)."""
    return jnp.cumprod(1 - betas(process, scales))


def sigmas(process: jdiff.VE, scales: int) -> jax.Array:
    """Return the geometric noise scales of the discrete VE, ascending, shape (N,)."""
    low, high = math.log(process.sigma_min), math.log(process.sigma_max)
    return jnp.exp(jnp.linspace(low, high, scales, dtype=jnp.float32))


def discretise(process: jdiff.Process, t: jax.Array, scales: int) -> tuple[jax.Array, jax.Array]:
    """Return f, G of one forward step x + f x + G z: DDPM's for VP, SMLD's for VE, Euler-Maruyama's for SubVP."""
    if isinstance(process, jdiff.VP):
        beta = betas(process, scales)[scale_index(t, scales)]
        return jnp.sqrt(1 - beta) - 1, jnp.sqrt(beta)
    if is_ve(process):
        sigma, below = adjacent_sigmas(process, t, scales)
        return jnp.zeros_like(t), jnp.sqrt(sigma**2 - below**2)
    f, g = coefficients(process, t)
    return f / scales, g * math.sqrt(1 / scales)


def score_fn(process: jdiff.Process, field: Score, predict: str = "eps", *, scales: int | None = None) -> Score:
    """Return the score of a field of time: a field of kind score itself, else -eps / sigma with the naive sigma.

    Args:
      process: the forward process.
      field: (x, t, *weights) -> prediction; what the network makes of t is its own matter (999 t, sigma, and the
        rounded number of a scale where it was trained with `smld_loss`).
      predict: its kind.
      scales: of a VP model that was trained with `ddpm_loss`: sigma is then the table's entry int(t (N - 1)).
    """

    def score(x, t, *weights):
        if predict == "score":
            return field(x, t, *weights)
        kind = lambda x, t: field(x, t, *weights)
        eps = kind if predict == "eps" else predictions.reparameterise(process, kind, predict, "eps")
        sigma = marginal(process, t)[1]
        if scales is not None and isinstance(process, jdiff.VP):
            sigma = jnp.sqrt(1 - alphas_cumprod(process, scales))[scale_index(t, scales)]
        return -eps(x, t) / wide(sigma, x)

    return score


def is_ve(process: jdiff.Process) -> bool:
    """Return whether it is VE; raise TypeError for another process than VP, SubVP and VE."""
    if not isinstance(process, jdiff.VP | jdiff.SubVP | jdiff.VE):
        raise TypeError(f"the reference has VP, SubVP and VE, not {type(process).__name__}")
    return isinstance(process, jdiff.VE)


def scale_index(t: jax.Array, scales: int) -> jax.Array:
    """Return the number 0 .. N-1 of the scale at t, rounded down."""
    return (t * (scales - 1)).astype(jnp.int32)


def scale_time(index: jax.Array, scales: int) -> jax.Array:
    """Return t of the scale of that number."""
    return index.astype(jnp.float32) / (scales - 1)


def adjacent_sigmas(process: jdiff.VE, t: jax.Array, scales: int) -> tuple[jax.Array, jax.Array]:
    """Return sigma of the scale at t, and of the one below (0 below the first)."""
    table, i = sigmas(process, scales), scale_index(t, scales)
    return table[i], jnp.where(i == 0, jnp.zeros_like(t), table[i - 1])


def wide(a: jax.Array, x: jax.Array) -> jax.Array:
    """Return a (batch,) with the axes of x, to multiply x."""
    return a.reshape(-1, *(1,) * (x.ndim - 1))
