"""Stochastic solvers: Euler-Maruyama for any SDE, ancestral sampling for any process."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp

from jdiff._array import batch_time, call, lincomb
from jdiff._typing import Field, Process
from jdiff.processes import log_snr
from jdiff.sde import SDE
from jdiff.solvers.base import Noise, Solver, State, white

__all__ = ["ancestral", "euler_maruyama"]


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


def ancestral(
    process: Process, denoise: Field, *, variance: Literal["small", "large"] = "small", noise: Noise = white
) -> Solver:
    """Return ancestral sampling x_s ~ q(x_s | x_t, x_0 = denoise(x_t, t)), s < t. Weak order 1, one evaluation a step.

    With r = alpha_t sigma_s / (alpha_s sigma_t) (so r^2 = SNR_t / SNR_s), the mean is (sigma_s/sigma_t) r x_t + alpha_s
    (1 - r^2) x_0 and the variance sigma_s^2 (1 - r^2) ("small", the posterior's) or sigma_t^2 (1 - r^2) ("large", of
    q(x_t | x_s)). Ho et al. 2020 (arXiv 2006.11239), eqs. 6, 7 and section 3.2, in continuous time on any process.

    Args:
      process: the forward process.
      denoise: an x0-field.
      variance: the two choices of Ho et al. 2020.
      noise: where unit normals come from.

    Raises:
      ValueError: unknown variance.
    """
    if variance not in ("small", "large"):
        raise ValueError(f"unknown variance {variance!r}; choose 'small' or 'large'")

    def step(keys, state, t, s):
        x = state.x
        t, s = batch_time(t, x), batch_time(s, x)
        (_, sigma_t), (alpha_s, sigma_s) = process.marginal(t), process.marginal(s)
        log_r2 = log_snr(process, t) - log_snr(process, s)
        rest = -jnp.expm1(log_r2)
        std = jnp.sqrt(rest) * (sigma_s if variance == "small" else sigma_t)
        x0 = call(denoise, x, t)
        return State(
            lincomb(
                (sigma_s / sigma_t * jnp.exp(0.5 * log_r2), x),
                (alpha_s * rest, x0),
                (std, noise(keys, x, t, s)),
            )
        )

    return Solver(State, step, 1)
