"""Stochastic solvers: Euler-Maruyama for any SDE, ancestral sampling for any process."""

from __future__ import annotations

import math
from typing import Literal

import jax
import jax.numpy as jnp

from jdiff._array import batch_time, call, expand, lincomb, root
from jdiff._typing import Field, Process
from jdiff.processes import log_snr, time_at
from jdiff.sde import SDE
from jdiff.solvers.base import Noise, Solver, State, white

__all__ = ["ancestral", "edm", "euler_maruyama", "stochastic_heun"]


def euler_maruyama(sde: SDE, *, noise: Noise = white) -> Solver:
    """Return x_s = x_t + (s - t) drift(x_t, t) + sqrt(|s - t|) diffusion(x_t, t) z. Weak order 1, one evaluation.

    Ito calculus, in either direction of time (Kloeden & Platen 1992, section 10.2). Without a diffusion it is Euler's
    method.
    """

    def step(keys, state, t, s):
        x = state.x
        t, s = batch_time(t, x), batch_time(s, x)
        terms = [(1.0, x), (s - t, call(sde.drift, x, t))]
        if sde.diffusion is not None:
            z = noise(keys, x, t, s)
            scaled = jax.tree.map(jnp.multiply, call(sde.diffusion, x, t), z)
            terms.append((jnp.sqrt(jnp.abs(s - t)), scaled))
        return State(lincomb(*terms))

    return Solver(State, step, 1)


def stochastic_heun(sde: SDE, *, noise: Noise = white) -> Solver:
    """Return Heun's method for an SDE whose diffusion depends on time alone. Weak order 2, two evaluations a step.

    u = x_t + h drift(x_t, t) + sqrt(|h|) diffusion(x_t, t) z, h = s - t, and

    x_s = x_t + h/2 (drift(x_t, t) + drift(u, s)) + sqrt(|h|)/2 (diffusion(x_t, t) + diffusion(u, s)) z:

    the predictor-corrector method of Kloeden & Platen 1992, section 15.5, with one z for both. Without a diffusion it
    is Heun's method. Reverse SDEs (`jdiff.reverse`) are of this kind; where the diffusion depends on x this is the
    Stratonovich integral.
    """

    def step(keys, state, t, s):
        x = state.x
        t, s = batch_time(t, x), batch_time(s, x)
        h = s - t
        first, kick, size = call(sde.drift, x, t), [], 0.5 * jnp.sqrt(jnp.abs(h))
        if sde.diffusion is not None:
            z = noise(keys, x, t, s)
            kick = [(2 * size, jax.tree.map(jnp.multiply, call(sde.diffusion, x, t), z))]
        u = lincomb((1.0, x), (h, first), *kick)
        terms = [(1.0, x), (0.5 * h, first), (0.5 * h, call(sde.drift, u, s))]
        if sde.diffusion is not None:
            terms += [(0.5 * c, scaled) for c, scaled in kick]
            terms.append((size, jax.tree.map(jnp.multiply, call(sde.diffusion, u, s), z)))
        return State(lincomb(*terms))

    return Solver(State, step, 2)


def edm(
    process: Process,
    denoise: Field,
    *,
    churn: float = 0.0,
    s_min: float = 0.0,
    s_max: float = math.inf,
    s_noise: float = 1.0,
    noise: Noise = white,
) -> Solver:
    """Return the sampler of EDM on any process: Heun's method in rho = sigma/alpha, after a step back to more noise.

    Karras et al. 2022 (arXiv 2206.00364), algs. 1 and 2, for y = x/alpha. With gamma = churn where s_min <= rho <=
    s_max, else 0,

    rho' = (1 + gamma) rho, y' = y + s_noise sqrt(rho'^2 - rho^2) z, then from rho' to rho_s by Heun's method for
    dy/drho = (y - x_0)/rho, which takes a Euler step where sigma_s = 0 (and where alpha = 0).

    Order 2 without churn, two evaluations a step. No noise is added beyond the process's own t_max: rho' stops there.

    Args:
      process: the forward process.
      denoise: an x0-field.
      churn: gamma; min(S_churn/N, sqrt(2) - 1) for N steps in the paper's words. The number 0 needs no key.
      s_min: smallest rho with churn.
      s_max: largest rho with churn.
      s_noise: standard deviation of the added noise over the right one.
      noise: where unit normals come from.

    Raises:
      ValueError: a negative number, or s_min > s_max.
    """
    if not (0 <= churn < math.inf and 0 <= s_min <= s_max and 0 <= s_noise < math.inf):
        given = f"churn = {churn}, s_min = {s_min}, s_max = {s_max}, s_noise = {s_noise}"
        raise ValueError(f"edm needs churn, s_min <= s_max and s_noise not negative, got {given}")

    def step(keys, state, t, s):
        x = state.x
        t, s = batch_time(t, x), batch_time(s, x)
        if churn > 0:
            alpha, sigma = process.marginal(t)
            # Where alpha = 0 there is no more noise to go back to.
            inside = (s_min * alpha <= sigma) & (sigma <= s_max * alpha) & (alpha > 0)
            alpha = jnp.where(inside, alpha, 1)
            rho = jnp.where(inside, sigma, 1) / alpha
            back = jnp.where(inside, time_at(process, -2 * jnp.log((1 + churn) * rho)), t)
            alpha_back, sigma_back = process.marginal(back)
            added = root(jnp.where(inside, sigma_back**2 - (alpha_back * rho) ** 2, 0))
            scale = jnp.where(inside, alpha_back / alpha, 1)
            x, t = lincomb((scale, x), (s_noise * added, noise(keys, x, t, s))), back
        (alpha_t, sigma_t), (alpha_s, sigma_s) = process.marginal(t), process.marginal(s)
        h = 0.5 * (log_snr(process, s) - log_snr(process, t))
        x0 = call(denoise, x, t)
        # Euler's method in rho is DDIM.
        euler = lincomb((sigma_s / sigma_t, x), (-alpha_s * jnp.expm1(-h), x0))
        # alpha_s (rho_s - rho_t) / 2, times the change of the noise prediction.
        whole = jnp.isfinite(h)
        half = -0.5 * sigma_s * jnp.expm1(jnp.where(whole, h, 0))
        safe = jnp.where(whole, sigma_s, 1)
        after = call(denoise, euler, s)
        return State(
            lincomb(
                (1.0, euler),
                (half / safe, euler),
                (-half * alpha_s / safe, after),
                (-half / sigma_t, x),
                (half * alpha_t / sigma_t, x0),
            )
        )

    return Solver(State, step, 2)


def ancestral(
    process: Process,
    denoise: Field,
    *,
    variance: Literal["small", "large", "learned"] = "small",
    noise: Noise = white,
) -> Solver:
    """Return ancestral sampling x_s ~ q(x_s | x_t, x_0 = denoise(x_t, t)), s < t. Weak order 1, one evaluation a step.

    With r = alpha_t sigma_s / (alpha_s sigma_t) (so r^2 = SNR_t / SNR_s), the mean is (sigma_s/sigma_t) r x_t + alpha_s
    (1 - r^2) x_0 and the variance sigma_s^2 (1 - r^2) ("small", the posterior's) or sigma_t^2 (1 - r^2) ("large", of
    q(x_t | x_s)). Ho et al. 2020 (arXiv 2006.11239), eqs. 6, 7 and section 3.2, in continuous time on any process.

    "learned" interpolates between the two in logarithms, entry by entry, by a second output v of the field:
    variance = large^v small^(1 - v) (Nichol & Dhariwal 2021, arXiv 2102.09672, eq. 15); none where sigma_s = 0.

    Args:
      process: the forward process.
      denoise: an x0-field; with variance="learned" (x, t) -> (x_0, v), both like x.
      variance: which of the three.
      noise: where unit normals come from.

    Raises:
      ValueError: unknown variance.
    """
    if variance not in ("small", "large", "learned"):
        raise ValueError(f"unknown variance {variance!r}; choose 'small', 'large' or 'learned'")

    def step(keys, state, t, s):
        x = state.x
        t, s = batch_time(t, x), batch_time(s, x)
        (_, sigma_t), (alpha_s, sigma_s) = process.marginal(t), process.marginal(s)
        log_r2 = log_snr(process, t) - log_snr(process, s)
        rest = -jnp.expm1(log_r2)
        std = jnp.sqrt(rest) * (sigma_t if variance == "large" else sigma_s)
        z = noise(keys, x, t, s)
        if variance == "learned":
            # As one field whose state is a pair, so that both outputs are checked.
            x0, v = call(lambda pair, t: denoise(pair[0], t), (x, x), t)
            ratio = jnp.log(sigma_t / jnp.where(sigma_s > 0, sigma_s, sigma_t))
            z = jax.tree.map(lambda v, z: jnp.exp(v * expand(ratio, v)) * z, v, z)
        else:
            x0 = call(denoise, x, t)
        return State(lincomb((sigma_s / sigma_t * jnp.exp(0.5 * log_r2), x), (alpha_s * rest, x0), (std, z)))

    return Solver(State, step, 1)
