"""Single-step exponential integrators: the linear part of the flow solved exactly in log-SNR time, given a denoiser.

With half log-SNR l = log(alpha/sigma), the probability flow is d(x/sigma)/dl = e^l x_0(x, l): only the denoiser's
change over a step is approximated (Lu et al. 2022, arXiv 2206.00927 and 2211.01095).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp

from jdiff._array import batch_time, call, lincomb, scalars
from jdiff._typing import Array, Field, Process
from jdiff.processes import log_snr, time_at
from jdiff.solvers.base import Noise, Solver, State, white

__all__ = ["ddim", "dpm_solver", "dpmpp_2s"]


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
        t, s, w = batch_time(t, x), batch_time(s, x), scalars(eta, x, "eta")
        (_, sigma_t), (alpha_s, sigma_s) = process.marginal(t), process.marginal(s)
        log_r2 = log_snr(process, t) - log_snr(process, s)
        # sqrt(sigma_s^2 - w^2) = sigma_s exp(log_kept); both coefficients come without a difference of large numbers.
        log_kept = 0.0 if deterministic else 0.5 * jnp.log1p(w**2 * jnp.expm1(log_r2))
        terms = [
            (sigma_s / sigma_t * jnp.exp(log_kept), x),
            (-alpha_s * jnp.expm1(0.5 * log_r2 + log_kept), call(denoise, x, t)),
        ]
        if not deterministic:
            terms.append((w * sigma_s * jnp.sqrt(-jnp.expm1(log_r2)), noise(keys, x, t, s)))
        return State(lincomb(*terms))

    return Solver(State, step, 1)


def dpm_solver(process: Process, denoise: Field, order: int = 2) -> Solver:
    """Return DPM-Solver-1, 2 or 3, the single-step exponential Runge-Kutta methods of the noise prediction.

    Lu et al. 2022 (arXiv 2206.00927), section 3 (order 2: alg. 1). With h = l_s - l_t and eps_t = (x_t - alpha_t
    x_0)/sigma_t, order 1 is DDIM, x_s = alpha_s/alpha_t x_t - sigma_s (e^h - 1) eps_t. Order 2 takes it to u at
    l_t + h/2, and

    x_s = DDIM - sigma_s (e^h - 1) D_1, D_1 = eps(u) - eps_t.

    Order 3 takes it to u_1 at l_t + h/3, then to u_2 at l_t + 2h/3 with - 2 sigma ((e^(2h/3) - 1)/(2h/3) - 1) D_1, and

    x_s = DDIM - 3/2 sigma_s ((e^h - 1)/h - 1) D_2, D_i = eps(u_i) - eps_t.

    As many evaluations a step as its order. A step from alpha = 0, or to sigma = 0, is DDIM.

    Args:
      process: the forward process.
      denoise: an x0-field.
      order: 1, 2 or 3.

    Raises:
      ValueError: another order.
    """
    if order not in (1, 2, 3):
        raise ValueError(f"dpm_solver has orders 1, 2 and 3, got {order}")
    if order == 1:
        return ddim(process, denoise)

    def step(keys, state, t, s):
        x = state.x
        t, s = batch_time(t, x), batch_time(s, x)
        start, inside = _half_log_snr(process, t), _between(process, t, s)
        h = inside.h

        def eps(x, x0, time):
            alpha, sigma = process.marginal(time)
            return lincomb((1 / sigma, x), (-alpha / sigma, x0))

        def ddim_to(time):
            (_, sigma_t), (alpha, sigma) = process.marginal(t), process.marginal(time)
            gain = -alpha * jnp.expm1(start - _half_log_snr(process, time))
            return sigma, [(sigma / sigma_t, x), (gain, x0)]

        x0 = call(denoise, x, t)
        first = eps(x, x0, t)
        slope = lambda x, time: lincomb((1.0, eps(x, call(denoise, x, time), time)), (-1.0, first))
        if order == 2:
            u = inside.at(1 / 2)
            difference = slope(lincomb(*ddim_to(u)[1]), u)
            sigma, terms = ddim_to(s)
            return State(lincomb(*terms, (-sigma * jnp.expm1(h), difference)))
        u, v = inside.at(1 / 3), inside.at(2 / 3)
        difference = slope(lincomb(*ddim_to(u)[1]), u)
        sigma, terms = ddim_to(v)
        difference = slope(lincomb(*terms, (-2 * sigma * _expm1_over(2 * h / 3), difference)), v)
        sigma, terms = ddim_to(s)
        return State(lincomb(*terms, (-1.5 * sigma * _expm1_over(h), difference)))

    return Solver(State, step, order)


def dpmpp_2s(process: Process, denoise: Field) -> Solver:
    """Return DPM-Solver++(2S), the exponential midpoint rule in log-SNR. Order 2, two evaluations a step.

    Lu et al. 2022 (arXiv 2211.01095), 2S with r = 1/2: DDIM from t to u, in the middle of [l_t, l_s], then over the
    whole step with x_0(x_u, u) in the place of x_0(x_t, t). A step from alpha = 0, or to sigma = 0, is DDIM.

    Args:
      process: the forward process.
      denoise: an x0-field.
    """

    def step(keys, state, t, s):
        x = state.x
        t, s = batch_time(t, x), batch_time(s, x)
        start, inside = _half_log_snr(process, t), _between(process, t, s)
        (_, sigma_t), (alpha_s, sigma_s) = process.marginal(t), process.marginal(s)
        u = inside.at(1 / 2)
        alpha_u, sigma_u = process.marginal(u)
        x0 = call(denoise, x, t)
        gain = -alpha_u * jnp.expm1(start - _half_log_snr(process, u))
        middle = call(denoise, lincomb((sigma_u / sigma_t, x), (gain, x0)), u)
        gain = -alpha_s * jnp.expm1(start - _half_log_snr(process, s))
        own = jnp.where(inside.finite, 0.0, 1.0)
        return State(lincomb((sigma_s / sigma_t, x), (gain * (1 - own), middle), (gain * own, x0)))

    return Solver(State, step, 2)


class _Between(NamedTuple):
    """The step from t to s in half log-SNR; where that is infinitely long (alpha_t = 0, sigma_s = 0) h is 0 instead."""

    h: Array
    finite: Array
    at: Callable[[float], Array]
    """Fraction -> time there; from alpha = 0 it is s, to sigma = 0 it is t."""


def _between(process, t, s):
    start, end = _half_log_snr(process, t), _half_log_snr(process, s)
    known = jnp.isfinite(start)
    finite = known & jnp.isfinite(end)
    h = jnp.where(finite, end - start, 0)
    # With end -> inf the times inside go to s, where x_0(x, s) = x / alpha_s: 2S and DPM-Solver-3 then end in DDIM's
    # alpha_s x_0(x_t, t), DPM-Solver-2 in 0/0. All take DDIM's, and ask no field at sigma = 0, where some are NaN.
    last = jnp.where(jnp.isfinite(end), end, jnp.where(known, start, 0))
    return _Between(h, finite, lambda fraction: time_at(process, 2 * (last - (1 - fraction) * h)))


def _half_log_snr(process, t):
    return 0.5 * log_snr(process, t)


def _expm1_over(h):
    """(e^h - 1)/h - 1, by its series where the difference would lose digits."""
    small = jnp.abs(h) < 1e-2
    safe = jnp.where(small, 1, h)
    series = h / 2 * (1 + h / 3 * (1 + h / 4 * (1 + h / 5)))
    return jnp.where(small, series, jnp.expm1(safe) / safe - 1)
