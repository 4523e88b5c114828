"""The probability flow, solved by SciPy on the host under one error norm for all images of a batch."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy

import jdiff
from experiments.song2021.process import T_MIN, Score, coefficients, wide
from experiments.song2021.samplers import reverse_diffusion
from jdiff import processes
from jdiff.transforms import DataTransform


@functools.partial(jax.jit, static_argnums=(0, 1))
def drift(process: jdiff.Process, score: Score, x: jax.Array, t: jax.Array, *weights: Any) -> jax.Array:
    """Return the probability flow f x - g^2 score / 2 at t (batch,), eq. 13."""
    f, g = coefficients(process, t)
    return wide(f, x) * x - 0.5 * wide(g, x) ** 2 * score(x, t, *weights)


@functools.partial(jax.jit, static_argnums=(0, 1))
def divergence(process, score, x, t, probe, *weights):
    """Return probe . grad(drift . probe) per example, Hutchinson's estimate of the trace (eq. 40)."""
    inner = lambda x: jnp.sum(drift(process, score, x, t, *weights) * probe)
    return jnp.sum(probe * jax.grad(inner)(x), axis=tuple(range(1, x.ndim)))


@functools.partial(jax.jit, static_argnums=(0, 1, 4))
def _denoised(process, score, x, t, scales, *weights):
    closed = lambda x, t: score(x, t, *weights)
    return reverse_diffusion(process, closed, x, t, jnp.zeros_like(x), scales)[1]


def _solve(slope, span, start, rtol, atol):
    """Return where RK45 takes start, NaN if it does not arrive, and its evaluations."""
    lost = np.full_like(start, np.nan)
    if not np.isfinite(slope(span[0], start)).all():  # SciPy's first step would be NaN, and shortened for ever
        return lost, 1
    solved = scipy.integrate.solve_ivp(slope, span, start, "RK45", rtol=rtol, atol=atol)
    return solved.y[:, -1] if solved.success else lost, solved.nfev


def ode_sampler(
    process: jdiff.Process,
    score: Score,
    z: jax.Array,
    *weights: Any,
    t_min: float = 1e-3,
    denoise: bool = False,
    scales: int = 1000,
    rtol: float = 1e-5,
    atol: float = 1e-5,
) -> tuple[jax.Array, int]:
    """Return the samples that the probability flow makes of z, and the evaluations that RK45 took from 1 to t_min.

    SciPy solves all images as one system in float64; the drift is float32. `denoise` adds the mean of one reverse
    diffusion step at t_min.

    Args:
      process: the forward process.
      score: (x, t, *weights) -> score.
      z: samples of the prior, (batch, *event).
      *weights: given to the score.
      t_min: where the samples are.
      denoise: one more step.
      scales: of that step.
      rtol: tolerance relative to the joint norm.
      atol: absolute tolerance.

    Raises:
      FloatingPointError: the solver did not arrive.
    """
    state = lambda y: jnp.asarray(y, jnp.float32).reshape(z.shape)
    time = lambda t: jnp.full(len(z), t, jnp.float32)
    slope = lambda t, y: np.asarray(drift(process, score, state(y), time(t), *weights), np.float64).ravel()
    y, evaluations = _solve(slope, (1.0, t_min), np.asarray(z, np.float64).ravel(), rtol, atol)
    if not np.isfinite(y).all():
        raise FloatingPointError(f"RK45 did not arrive at t = {t_min:g}: the flow has values that are not finite")
    x = state(y)
    return _denoised(process, score, x, time(t_min), scales, *weights) if denoise else x, evaluations


class Likelihood(NamedTuple):
    """Of a batch in model space, in nats: log p(x) = prior_logp + delta_logp, each (batch,)."""

    prior_logp: np.ndarray
    delta_logp: np.ndarray
    latent: np.ndarray
    """Where the flow takes the images, at t = 1."""
    evaluations: int


def log_likelihood(
    process: jdiff.Process,
    score: Score,
    x: jax.Array,
    probe: jax.Array,
    *weights: Any,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    t_min: float = T_MIN,
) -> Likelihood:
    """Return the log-density of x with one probe per image: RK45 from t_min to 1 (section 4.3, eq. 39).

    One system in float64 holds all images and all their log-densities, under one error norm: what an image gets depends
    on its batch. The right-hand side is float32, drift and divergence two calls. If RK45 does not arrive, all is NaN.
    """
    batch, size = len(x), x.size

    def slope(t, y):
        images = jnp.asarray(y[:size], jnp.float32).reshape(x.shape)
        t = jnp.full(batch, t, jnp.float32)
        flow = drift(process, score, images, t, *weights)
        trace = divergence(process, score, images, t, probe, *weights)
        return np.concatenate([np.asarray(flow, np.float64).ravel(), np.asarray(trace, np.float64)])

    start = np.concatenate([np.asarray(x, np.float64).ravel(), np.zeros(batch)])
    y, evaluations = _solve(slope, (t_min, 1.0), start, rtol, atol)
    latent = y[:size].reshape(x.shape).astype(np.float32)
    prior = np.asarray(processes.prior_log_prob(process, jnp.asarray(latent)))
    return Likelihood(prior, y[size:].astype(np.float32), latent, evaluations)


def bits_per_dim(
    key: jax.Array,
    process: jdiff.Process,
    score: Score,
    images: jax.Array,
    *weights: Any,
    transform: DataTransform,
    probe: str = "rademacher",
    rtol: float = 1e-5,
    atol: float = 1e-5,
) -> dict[str, Any]:
    """Return the published bits/dim of integer images: uniform dequantisation and `log_likelihood`.

    -(log p(x) / (D ln 2)) + log2 L, minus 1 where data are in [-1, 1]: the offsets 7 and 8 of 256 levels.

    Args:
      key: of dequantisation and probe.
      process: the forward process.
      score: (x, t, *weights) -> score.
      images: levels, (batch, *event).
      *weights: given to the score.
      transform: between levels and model space.
      probe: "rademacher" or "gaussian".
      rtol: tolerance relative to the joint norm.
      atol: absolute tolerance.

    Returns:
      bits_per_dim, prior_logp, delta_logp, each (batch,), latent, and evaluations, one number for the batch.

    Raises:
      ValueError: unknown probe.
    """
    draws = {"rademacher": jax.random.rademacher, "gaussian": jax.random.normal}
    if probe not in draws:
        raise ValueError(f"probe = {probe!r} is unknown; choose one of {', '.join(draws)}")
    for_noise, for_probe = jax.random.split(key)
    x = transform.forward(transform.dequantise(for_noise, jnp.asarray(images)))
    eps = draws[probe](for_probe, x.shape, x.dtype)
    found = log_likelihood(process, score, x, eps, *weights, rtol=rtol, atol=atol)
    return found._asdict() | {"bits_per_dim": level_bits(found, transform)}


def level_bits(found: Likelihood, transform: DataTransform) -> np.ndarray:
    """Return bits/dim of levels from the log-density of their dequantised images, (batch,)."""
    offset = math.log2(transform.levels) - (1 if transform.centered else 0)
    return -(found.prior_logp + found.delta_logp) / (math.log(2) * found.latent[0].size) + offset
