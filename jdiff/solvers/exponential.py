"""Exponential integrators: the linear part of the flow solved exactly in log-SNR time, given a denoiser.

With half log-SNR l = log(alpha/sigma), the probability flow is d(x/sigma)/dl = e^l x_0(x, l): only the denoiser's
change over a step is approximated (Lu et al. 2022, arXiv 2206.00927 and 2211.01095).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jdiff._array import batch_time, call, full_like_batch, lincomb
from jdiff._typing import Array, Field, Process
from jdiff.processes import log_snr
from jdiff.solvers.base import Noise, Solver, State, white

__all__ = ["ddim", "dpmpp_2m"]


def ddim(process: Process, denoise: Field, eta: Array | float = 0.0, *, noise: Noise = white) -> Solver:
    """Return DDIM with stochasticity eta in [0, 1]. Order 1, one evaluation a step.

    Song, Meng & Ermon 2021 (arXiv 2010.02502), eqs. 12 and 16:

    x_s = alpha_s x_0 + sqrt(sigma_s^2 - w^2) eps + w z, w = eta sigma_s sqrt(1 - SNR_t / SNR_s). eta = 0 is the
    exponential Euler method of the probability flow, in either direction of time; eta = 1 is ancestral sampling with
    small variance. On any process; at alpha_t = 0 (the start of Rectified and Cosine) as well.

    Args:
      process: the forward process.
      denoise: an x0-field.
      eta: stochasticity; the Python number 0 needs no key. eta > 0 needs s < t.
      noise: where unit normals come from.

    Raises:
      ValueError: a Python number eta outside [0, 1].
    """
    if isinstance(eta, (int, float)) and not 0 <= eta <= 1:
        raise ValueError(f"eta must be in [0, 1], got {eta}")
    deterministic = isinstance(eta, (int, float)) and eta == 0

    def step(keys, state, t, s):
        x = state.x
        t, s = batch_time(t, x), batch_time(s, x)
        (_, sigma_t), (alpha_s, sigma_s) = process.marginal(t), process.marginal(s)
        log_r2 = log_snr(process, t) - log_snr(process, s)
        # sqrt(sigma_s^2 - w^2) = sigma_s exp(log_kept); both coefficients come without a difference of large numbers.
        log_kept = 0.0 if deterministic else 0.5 * jnp.log1p(eta**2 * jnp.expm1(log_r2))
        terms = [
            (sigma_s / sigma_t * jnp.exp(log_kept), x),
            (-alpha_s * jnp.expm1(0.5 * log_r2 + log_kept), call(denoise, x, t)),
        ]
        if not deterministic:
            terms.append((eta * sigma_s * jnp.sqrt(-jnp.expm1(log_r2)), noise(keys, x, t, s)))
        return State(lincomb(*terms))

    return Solver(State, step, 1)


def dpmpp_2m(process: Process, denoise: Field) -> Solver:
    """Return DPM-Solver++(2M), the two-step exponential method. Order 2, one evaluation a step.

    Lu et al. 2022 (arXiv 2211.01095), alg. 2:

    x_s = sigma_s/sigma_t x_t - alpha_s (e^-h - 1) D, h = l_s - l_t, D = x_0(t) + h / (2 h') (x_0(t) - x_0(t')), where
    t' is the previous time and h' = l_t - l_t'. The first step, and a step from alpha = 0, is DDIM.

    Args:
      process: the forward process.
      denoise: an x0-field.
    """

    def init(x):
        return State(x, (jax.tree.map(jnp.zeros_like, x), full_like_batch(x, jnp.inf)))

    def step(key, state, t, s):
        x, (x0_before, h_before) = state
        t, s = batch_time(t, x), batch_time(s, x)
        (_, sigma_t), (alpha_s, sigma_s) = process.marginal(t), process.marginal(s)
        h = 0.5 * (log_snr(process, s) - log_snr(process, t))
        x0 = call(denoise, x, t)
        # h' is infinite before the first step and after one from alpha = 0: the correction vanishes, as it should.
        slope = jnp.where(jnp.isfinite(h), h, 0) / (2 * h_before)
        gain = -alpha_s * jnp.expm1(-h)
        x = lincomb((sigma_s / sigma_t, x), (gain * (1 + slope), x0), (-gain * slope, x0_before))
        # The zero makes h vary over devices as x does, as shard_map asks of what is carried.
        return State(x, (x0, h + full_like_batch(x, 0)))

    return Solver(init, step, 2)
