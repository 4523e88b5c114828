"""Paths between two arbitrary distributions, x_t = a(t) x0 + b(t) x1 + gamma(t) z with z ~ N(0, I).

Stochastic interpolants, Albergo, Boffi & Vanden-Eijnden 2023 (arXiv 2303.08797), with jdiff's direction of time: x0 at
t = 0, x1 at t = 1. Two conditional means are learned by regression, the velocity E[a' x0 + b' x1 + gamma' z | x_t] and
the noise E[z | x_t]; the first transports one end to the other, both together make SDEs with the same marginals. The
Gaussian processes are the one-sided case, b = 0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from jdiff._array import (
    as_floating,
    batch_time,
    call,
    check_array,
    check_like,
    check_positive,
    lincomb,
    mean_event,
    normal_like,
    per_example_keys,
    widened,
)
from jdiff._typing import Array, Field, Key, Process
from jdiff.sde import SDE

__all__ = [
    "Coefficients",
    "Interpolant",
    "Scalar",
    "bridge",
    "coefficients",
    "encoding_decoding",
    "interpolate",
    "linear",
    "loss",
    "one_sided",
    "score",
    "sine_squared",
    "stochastic",
    "trigonometric",
    "velocity",
]

Scalar = Callable[[Array], Array]
Interpolant = Callable[[Array], tuple[Array, Array, Array]]
"""A path: t -> (a, b, gamma), elementwise."""


class Coefficients(NamedTuple):
    """The scalars of a path and their time derivatives, each shaped like t."""

    a: Array
    b: Array
    gamma: Array
    da: Array
    db: Array
    dgamma: Array


def bridge(sigma: float = 2**0.5) -> Scalar:
    """Return gamma(t) = sigma sqrt(t (1 - t)): between fixed ends, the standard deviation of a Brownian bridge.

    sigma = sqrt(2) is the usual choice of Albergo et al. 2023 (arXiv 2303.08797); on `linear` it is the path of a
    Schroedinger bridge, if the ends are coupled as that one couples them. gamma' is infinite at both ends, gamma gamma'
    is finite: regress on times inside (0, 1).

    Raises:
      ValueError: sigma <= 0.
    """
    check_positive(sigma, "sigma")
    return lambda t: sigma * jnp.sqrt(t * (1 - t))


def sine_squared(t: Array) -> Array:
    """Return gamma(t) = sin^2(pi t): smooth at both ends."""
    return jnp.sin(jnp.pi * t) ** 2


def linear(gamma: Scalar = jnp.zeros_like) -> Interpolant:
    """Return x_t = (1 - t) x0 + t x1 + gamma z; without gamma the path of rectified flow between two data sets.

    Albergo et al. 2023 (arXiv 2303.08797), section 5.2; Liu et al. 2022 (arXiv 2209.03003), eq. 1.
    """
    return lambda t: (1 - t, t, gamma(t))


def trigonometric(gamma: Scalar = jnp.zeros_like) -> Interpolant:
    """Return x_t = r(t) (cos(pi t / 2) x0 + sin(pi t / 2) x1) + gamma z, r = sqrt(1 - gamma^2).

    Ends of one covariance keep it along the whole path. Albergo et al. 2023 (arXiv 2303.08797), section 5.2.
    gamma must stay below 1.
    """

    def path(t):
        noise = gamma(t)
        rest = jnp.sqrt(1 - noise**2)
        return rest * jnp.cos(0.5 * jnp.pi * t), rest * jnp.sin(0.5 * jnp.pi * t), noise

    return path


def encoding_decoding() -> Interpolant:
    """Return x_t = cos^2(pi t) (x0 for t < 1/2, x1 after it) + sin^2(pi t) z: through pure noise at t = 1/2.

    Albergo et al. 2023 (arXiv 2303.08797), section 5.2: the first half encodes, the second decodes.
    """

    def path(t):
        signal, zero = jnp.cos(jnp.pi * t) ** 2, jnp.zeros_like(t)
        return jnp.where(t < 0.5, signal, zero), jnp.where(t < 0.5, zero, signal), sine_squared(t)

    return path


def one_sided(process: Process) -> Interpolant:
    """Return the path of a Gaussian process, x_t = alpha x0 + sigma z; x1 is not used.

    Albergo et al. 2023 (arXiv 2303.08797), section 4.2. Its velocity is the kind "velocity" of `jdiff.predictions`, its
    noise the kind "eps".
    """

    def path(t):
        alpha, sigma = process.marginal(t)
        return alpha, jnp.zeros_like(t), sigma

    return path


def coefficients(interpolant: Interpolant, t: Array) -> Coefficients:
    """Return the scalars at t and their derivatives, by one jvp."""
    t = as_floating(t)
    values, slopes = jax.jvp(interpolant, (t,), (jnp.ones_like(t),))
    return Coefficients(*values, *slopes)


def interpolate(interpolant: Interpolant, x0: Array, x1: Array, z: Array, t: Array) -> Array:
    """Return x_t = a x0 + b x1 + gamma z, shape (batch, *event).

    Raises:
      ValueError: shapes that disagree.
    """
    _check(x0, x1, z)
    a, b, gamma = interpolant(batch_time(t, x0))
    return lincomb((a, x0), (b, x1), (gamma, z))


def velocity(interpolant: Interpolant, x0: Array, x1: Array, z: Array, t: Array) -> Array:
    """Return dx_t/dt = a' x0 + b' x1 + gamma' z, the regression target of the velocity.

    Albergo et al. 2023 (arXiv 2303.08797), section 2.2.

    Raises:
      ValueError: shapes that disagree.
    """
    _check(x0, x1, z)
    c = coefficients(interpolant, batch_time(t, x0))
    return lincomb((c.da, x0), (c.db, x1), (c.dgamma, z))


def loss(
    keys: Key,
    field: Field,
    interpolant: Interpolant,
    x0: Array,
    x1: Array,
    t: Array,
    *,
    predict: Literal["velocity", "noise"] = "velocity",
) -> Array:
    """Return mean_event |field(x_t, t) - target|^2 for each example; the target is `velocity` or z.

    Least for the conditional means E[target | x_t]: the quadratic objectives of Albergo et al. 2023 (arXiv
    2303.08797), section 2.2, up to terms that do not depend on the field.

    Args:
      keys: one key per example, shape (batch,), or one key; z_i is drawn from key i alone.
      field: (x, t) -> prediction.
      interpolant: the path.
      x0: one end, shape (batch, *event).
      x1: the other, in the same order: pairs, or independent draws, or pairs made by `jdiff.coupling`.
      t: times, scalar or (batch,), where gamma' is finite.
      predict: kind of the field.

    Returns:
      Losses, shape (batch,).

    Raises:
      ValueError: unknown kind, shapes that disagree.
      TypeError: ends not floating point, keys not typed threefry keys.
    """
    if predict not in ("velocity", "noise"):
        raise ValueError(f"unknown prediction kind {predict!r}; choose velocity or noise")
    batch = check_array(x0, "x0")
    z = normal_like(per_example_keys(keys, batch), x0)
    target = velocity(interpolant, x0, x1, z, t) if predict == "velocity" else z
    out = call(field, interpolate(interpolant, x0, x1, z, t), t)
    return mean_event(widened(out - target) ** 2)


def score(interpolant: Interpolant, noise: Field) -> Field:
    """Return the field grad log p_t(x) = -E[z | x_t = x] / gamma; not defined where gamma = 0.

    Albergo et al. 2023 (arXiv 2303.08797), theorem 2.8.
    """

    def field(x, t):
        _, _, gamma = interpolant(batch_time(t, x))
        return lincomb((-1 / gamma, call(noise, x, t)))

    return field


def stochastic(
    interpolant: Interpolant,
    velocity: Field,
    noise: Field,
    *,
    towards: Literal["x0", "x1"] = "x0",
    diffusion: Scalar | None = None,
) -> SDE:
    """Return an SDE with the marginals of the path: drift velocity -+ w^2/2 score, diffusion w.

    Minus to arrive at x0 by decreasing times, as all samplers of jdiff do; plus to arrive at x1 by increasing ones.
    Without noise it is the ODE `SDE(velocity)`, good for both directions. Albergo et al. 2023 (arXiv 2303.08797),
    section 2.3, where w^2 = 2 epsilon.

    Args:
      interpolant: the path.
      velocity: the velocity field.
      noise: the noise field.
      towards: the end at which it arrives.
      diffusion: w as a function of t; the default is gamma, with which nothing is divided by it.

    Raises:
      ValueError: towards is neither x0 nor x1.
    """
    if towards not in ("x0", "x1"):
        raise ValueError(f"towards must be 'x0' or 'x1', got {towards!r}")
    sign = 1 if towards == "x0" else -1

    def scalars(t):
        """Return w and w^2 / (2 gamma)."""
        _, _, gamma = interpolant(t)
        if diffusion is None:
            return gamma, 0.5 * gamma
        w = diffusion(t)
        return w, 0.5 * w**2 / gamma

    def drift(x, t):
        t = batch_time(t, x)
        return lincomb((1.0, call(velocity, x, t)), (sign * scalars(t)[1], call(noise, x, t)))

    def spread(x, t):
        return lincomb((scalars(batch_time(t, x))[0], jax.tree.map(jnp.ones_like, x)))

    return SDE(drift, spread)


def _check(x0, x1, z):
    check_array(x0, "x0")
    check_like(x1, x0, "x1", "x0")
    check_like(z, x0, "z", "x0")
