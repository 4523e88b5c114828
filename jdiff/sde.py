"""Stochastic differential equations as pairs of functions, and the reverse of a process given any field.

dx = drift(x, t) dt + diffusion(x, t) dw with diagonal noise. Time runs from data to noise; sampling integrates with
decreasing t, where dt is negative and the noise has variance |dt|.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp

from jdiff._array import as_floating, batch_time, call, check_positive, expand, lincomb, scalars
from jdiff._typing import Array, Field, Kind, Process, PyTree
from jdiff.predictions import check_kind, conversion
from jdiff.processes import log_snr, rates, squared_diffusion, time_at

__all__ = ["SDE", "NoiseTime", "forward", "in_noise_time", "noise_time", "probability_flow", "reverse", "reverse_sde"]

NoiseTime = Literal["log_snr", "asinh", "angle"]


class SDE(NamedTuple):
    """An SDE with diagonal noise, or an ODE where diffusion is None.

    Both functions take (x, t) with t of shape (batch,) and return a state like x.
    """

    drift: Callable[[PyTree, Array], PyTree]
    diffusion: Callable[[PyTree, Array], PyTree] | None = None


def forward(process: Process) -> SDE:
    """Return the linear SDE with the process's marginals: drift alpha'/alpha x, diffusion g (see squared_diffusion).

    Song et al. 2021 (arXiv 2011.13456), eq. 5. Infinite where alpha = 0 (the end of Rectified and Cosine).
    """

    def drift(x, t):
        alpha, _, dalpha, _ = rates(process, batch_time(t, x))
        return lincomb((dalpha / alpha, x))

    return SDE(drift, _spread(lambda t: jnp.sqrt(squared_diffusion(process, t))))


def reverse(
    process: Process,
    field: Field,
    *,
    predict: Kind = "score",
    eta: Array | float = 1.0,
    diffusion: Callable[[Array], Array] | None = None,
) -> SDE:
    """Return the family of SDEs, run with decreasing t, that share the process's marginals.

    drift = velocity - w^2/2 score, diffusion = w. Any w(t) >= 0 keeps the marginals. The default is w = eta g: eta = 1
    is the reverse SDE of Anderson 1982 (Song et al. 2021, arXiv 2011.13456, eq. 6), eta = 0 the probability flow (eq.
    13).
    Where alpha(t_max) = 0 (Rectified, Cosine) g is infinite there, and the default is w = eta sigma; a field of kind
    x0, v or velocity may then start at t_max itself, eps and score (which say nothing about x_0 there) must start
    below.

    Args:
      process: the forward process.
      field: (x, t) -> prediction, of the kind named by predict.
      predict: kind of the field.
      eta: stochasticity.
      diffusion: w as a function of t, shape (batch,) -> (batch,), in place of the default; eta then scales it.

    Raises:
      ValueError: unknown kind.
    """
    check_kind(predict)

    def w(t):
        eta_t = scalars(eta, t, "eta")
        if diffusion is not None:
            return eta_t * diffusion(t)
        ends_without_signal = process.marginal(jnp.asarray(process.t_max, t.dtype))[0] == 0
        # Where g is not taken it must be finite, or derivatives are not.
        g = jnp.sqrt(squared_diffusion(process, jnp.where(ends_without_signal, 0.5 * process.t_max, t)))
        return eta_t * jnp.where(ends_without_signal, process.marginal(t)[1], g)

    def drift(x, t):
        t = batch_time(t, x)
        velocity_x, velocity_out = conversion(process, t, predict, "velocity")
        # At sigma = 0 the score is infinite where its product is not: the limit is taken from above, as of g^2.
        above = jnp.maximum(t, 1e-12 * process.t_max)
        score_x, score_out = conversion(process, above, predict, "score")
        half = 0.5 * w(above) ** 2
        return lincomb((velocity_x - half * score_x, x), (velocity_out - half * score_out, call(field, x, t)))

    return SDE(drift, _spread(w))


def probability_flow(process: Process, field: Field, *, predict: Kind = "score") -> SDE:
    """Return the probability-flow ODE dx/dt = velocity(x, t) of a field of any kind.

    Song et al. 2021 (arXiv 2011.13456), eq. 13. Flow matching is predict="velocity" on Rectified().

    Raises:
      ValueError: unknown kind.
    """
    check_kind(predict)

    def drift(x, t):
        t = batch_time(t, x)
        p, q = conversion(process, t, predict, "velocity")
        return lincomb((p, x), (q, call(field, x, t)))

    return SDE(drift)


def noise_time(process: Process, t: Array, variable: NoiseTime, *, scale: float = 0.03) -> Array:
    """Return the time u(t) of `in_noise_time`; infinite for "log_snr" and "asinh" where alpha = 0.

    Raises:
      ValueError: unknown variable, scale not positive.
    """
    _check_noise_time(variable, scale)
    if variable == "log_snr":
        return -0.5 * log_snr(process, t)
    alpha, sigma = process.marginal(as_floating(t))
    return jnp.arcsinh(sigma / (scale * alpha)) if variable == "asinh" else jnp.arctan2(sigma, alpha)


def in_noise_time(process: Process, ode: SDE, variable: NoiseTime, *, scale: float = 0.03) -> SDE:
    """Return an ODE in another time u, dx/du = drift(x, t(u)) dt/du, where the flow is less stiff.

    With rho = sigma/alpha, "log_snr": u = log rho, half the log-SNR with its sign changed, on which noise levels are
    alike (Lu et al. 2022, arXiv 2206.00927, section 3). "asinh": u = arcsinh(rho / scale), the same for large noise and
    linear in rho below `scale`, where the flow of data whose density is as wide is nearly straight (ours). "angle": u =
    arctan rho, the time in which the variance-normalised state x / sqrt(alpha^2 + sigma^2) moves by the v-prediction;
    finite also where alpha = 0. The ends of u are those of t by `noise_time`.

    Args:
      process: the process whose time the ODE has.
      ode: drift only; its state may be a pytree, such as (x, log-determinants).
      variable: which time.
      scale: of "asinh".

    Raises:
      ValueError: an SDE with diffusion, an unknown variable, scale not positive.
    """
    _check_noise_time(variable, scale)
    if ode.diffusion is not None:
        raise ValueError("only ODEs change their time here: the diffusion of an SDE would change as well")
    log_rho = {
        "log_snr": lambda u: u,
        "asinh": lambda u: jnp.log(scale * jnp.sinh(u)),
        # Not log tan: float32's pi/2 lies beyond the pole.
        "angle": lambda u: jnp.log(jnp.sin(u)) - jnp.log(jnp.maximum(jnp.cos(u), 0)),
    }[variable]

    def drift(x, u):
        t = time_at(process, -2 * log_rho(batch_time(u, x)))
        _, speed = jax.jvp(lambda t: noise_time(process, t, variable, scale=scale), (t,), (jnp.ones_like(t),))
        return lincomb((1 / speed, call(ode.drift, x, t)))

    return SDE(drift)


def _check_noise_time(variable, scale):
    check_positive(scale, "scale")
    if variable not in get_args(NoiseTime):
        raise ValueError(f"unknown variable {variable!r}; choose one of {', '.join(get_args(NoiseTime))}")


def reverse_sde(sde: SDE, score: Field, *, eta: Array | float = 1.0) -> SDE:
    """Return the reverse of a user's own SDE, given the score of its marginals.

    drift = f - (1 + eta^2)/2 (div(g^2) + g^2 score), diffusion = eta g; Song et al. 2021 (arXiv 2011.13456), eq. 37.
    g may depend on t and, component by component, on x: g_i(x_i, t), as in geometric Brownian motion (div(g^2) is then
    one jvp). A g_i that depends on other components is outside of this formula.

    Raises:
      ValueError: the SDE has no diffusion.
    """
    if sde.diffusion is None:
        raise ValueError("an ODE is its own reverse: run it with decreasing times")
    diffusion = sde.diffusion

    def drift(x, t):
        t = batch_time(t, x)
        half = 0.5 * (1 + scalars(eta, x, "eta") ** 2)

        def g2(x):
            return jax.tree.map(jnp.square, call(diffusion, x, t))

        squared, divergence = jax.jvp(g2, (x,), (jax.tree.map(jnp.ones_like, x),))
        pull = jax.tree.map(lambda g2, s, div: div + g2 * s, squared, call(score, x, t), divergence)
        return lincomb((1.0, call(sde.drift, x, t)), (-half, pull))

    return SDE(drift, lambda x, t: lincomb((scalars(eta, x, "eta"), call(diffusion, x, t))))


def _spread(w):
    """Turn w(t) into a diffusion like x."""

    def diffusion(x, t):
        values = w(batch_time(t, x))
        return jax.tree.map(lambda leaf: jnp.broadcast_to(expand(values, leaf), leaf.shape), x)

    return diffusion
