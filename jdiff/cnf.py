"""Continuous normalising flows by maximum likelihood: -log p(x) of a velocity field on a grid, made to be trained.

In one state with x run the log-determinant, dl/dt = div v (Chen et al. 2018, arXiv 1806.07366; FFJORD, Grathwohl et al.
2019, arXiv 1810.01367), and the two regularisers of RNODE (Finlay et al. 2020, arXiv 2002.02798).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jdiff import processes
from jdiff._array import check_array, check_grid, is_concrete, lincomb, sum_event
from jdiff._divergence import Divergence, check_divergence, directions, trace, value_and_products
from jdiff._typing import Array, Field, Key, Kind, Process
from jdiff.sde import SDE, probability_flow
from jdiff.solvers.base import integrate
from jdiff.solvers.ode import runge_kutta, stages
from jdiff.solvers.tableaus import RK4, Tableau

__all__ = ["Terms", "maximum_likelihood"]


class Terms(NamedTuple):
    """Per-example terms of the loss, shape (batch,)."""

    nll: Array
    """-log p(x) in nats."""
    kinetic: Array
    """int |v|^2 dt along the trajectory."""
    jacobian: Array
    """int |dv/dx|_F^2 dt along it, of the same directions as the divergence: with probes E |(dv/dx) e|^2."""


def maximum_likelihood(
    key: Key | None,
    process: Process,
    field: Field,
    x: Array,
    ts: Array,
    *,
    predict: Kind = "velocity",
    divergence: Divergence = "rademacher",
    probes: int = 1,
    tableau: Tableau = RK4,
    gradient: Literal["adjoint", "discrete"] = "adjoint",
    prior_log_prob: Callable[[Array], Array] | None = None,
) -> Terms:
    """Return -log p(x) = -log p_prior(z) - int div v dt and the regularisers, for each example, to be differentiated.

    The flow carries x at ts[0] to z at ts[-1] by a fixed-step Runge-Kutta method; a probe is fixed along its
    trajectory. `log_likelihood` evaluates the same density to a tolerance. To train, minimise the mean of nll +
    a kinetic + b jacobian (Finlay et al. 2020, section 4: both 0.01 there).

    Reverse mode by `gradient`: "adjoint" solves x and the adjoint equation d(lambda)/dt = -(d(v, rates)/dx)^T lambda
    backwards on the same grid (Pontryagin 1962; Chen et al. 2018, alg. 1), in memory that does not grow with the steps
    and at an error of the method's order; "discrete" is the exact gradient of the discretised loss and stores x at each
    step. Both evaluate the field as often. Values closed over by the field have gradients; forward mode is for
    "discrete".

    Args:
      key: one key or one per example; may be None for divergence="exact".
      process: whose prior the flow ends in; `Rectified()` has N(0, I) at t = 1, and its velocity field is any function.
      field: (x, t) -> prediction.
      x: data in model space, shape (batch, *event).
      ts: increasing times from the data's end, such as process.t_min, to process.t_max, shape (steps + 1,).
      predict: kind of the field.
      divergence: "rademacher" or "gaussian" probes, or "exact".
      probes: number of probes, averaged.
      tableau: the Runge-Kutta method.
      gradient: see above.
      prior_log_prob: z -> log-density at t_max, shape (batch,) (default: the process's prior).

    Raises:
      ValueError: unknown divergence, kind or gradient, probes < 1, a grid that does not increase to t_max, keys that do
        not fit.
      TypeError: x not floating point, keys not typed threefry keys.
    """
    check_array(x)
    if x.ndim < 2:
        raise ValueError(f"x must have shape (batch, *event), got {x.shape}")
    check_divergence(key, divergence, probes)
    if gradient not in ("adjoint", "discrete"):
        raise ValueError(f"unknown gradient {gradient!r}; choose 'adjoint' or 'discrete'")
    check_grid(ts, decreasing=False)
    if is_concrete(ts) and not np.isclose(last := np.asarray(ts)[-1], process.t_max):
        raise ValueError(f"ts must end at the prior's time t_max = {process.t_max}, got {last}")
    drift = probability_flow(process, field, predict=predict).drift
    tangents = directions(key, x, divergence, probes)
    ts, start = jnp.asarray(ts, x.dtype), (x, jnp.zeros((len(x), 3), x.dtype) + 0 * x.reshape(len(x), -1)[:, :1])
    if gradient == "discrete":
        solver = runge_kutta(SDE(_augmented(drift, tangents, exact=divergence == "exact")), tableau)
        (z, totals), _ = integrate(None, solver, start, ts, remat=True)
    else:
        drift, values, constants = _hoisted(drift, x, jnp.broadcast_to(ts[0], x.shape[:1]))
        constants = constants, tangents, ts
        z, totals = _adjoint(drift, tableau, divergence == "exact", start, values, constants)
    end = processes.prior_log_prob(process, z) if prior_log_prob is None else prior_log_prob(z)
    log_det, kinetic, jacobian = totals.T
    return Terms(-end - log_det, kinetic, jacobian)


def _augmented(drift, tangents, *, exact):
    """Return the drift of (x, totals), totals of shape (batch, 3): div v, |v|^2 and |dv/dx|_F^2."""
    reduce = jnp.sum if exact else jnp.mean

    def augmented(state, t):
        x, _ = state
        products = lambda e, derivative: (trace(e, derivative), sum_event(derivative**2))
        velocity, (traces, norms) = value_and_products(lambda x: drift(x, t), x, tangents, products)
        rates = reduce(traces, axis=1), sum_event(velocity**2), reduce(norms, axis=1)
        return velocity, jnp.stack(rates, axis=1)

    return augmented


def _hoisted(drift, x, t):
    """Return drift(x, t, values, constants), and what it closed over: floating-point values, and all else.

    `jax.closure_convert` leaves integers, such as labels, in the closure, out of which an enclosing scan's would leak.
    """
    traced = jax.make_jaxpr(drift)(x, t)
    floating = [jnp.issubdtype(value.dtype, jnp.floating) for value in traced.consts]

    def converted(x, t, values, constants):
        values, constants = iter(values), iter(constants)
        closed_over = [next(values) if is_float else next(constants) for is_float in floating]
        return jax.core.eval_jaxpr(traced.jaxpr, closed_over, x, t)[0]

    split = ([value for value, is_float in zip(traced.consts, floating) if is_float == wanted] for wanted in (1, 0))
    return converted, *split


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _adjoint(drift, tableau, exact, start, values, constants):
    """Integrate (x, totals) over the grid; differentiated by the adjoint equation in x and the closed-over values."""
    solver = runge_kutta(SDE(_closed(drift, exact, values, constants)), tableau)
    return integrate(None, solver, start, constants[-1])[0]


def _closed(drift, exact, values, constants):
    constants, tangents, _ = constants
    return _augmented(lambda x, t: drift(x, t, values, constants), tangents, exact=exact)


def _forwards(drift, tableau, exact, start, values, constants):
    end = _adjoint(drift, tableau, exact, start, values, constants)
    return end, (end, values, constants)


def _backwards(drift, tableau, exact, residuals, cotangents):
    (z, totals), values, constants = residuals
    of_z, of_totals = cotangents  # the rates do not depend on the totals: their adjoint is constant

    def adjoint(state, t):
        x, of_x, _ = state
        rates = lambda x, values: _closed(drift, exact, values, constants)((x, totals), t)
        (velocity, _), pull = jax.vjp(rates, x, values)
        return velocity, *jax.tree.map(jnp.negative, pull((of_x, of_totals)))

    def step(state, ends):
        t, s = ends
        slopes = stages(adjoint, tableau, state, t, s - t)
        return lincomb((1.0, state), *(((s - t) * b, k) for b, k in zip(tableau.b, slopes) if b != 0)), None

    # Zeros made from the values vary over devices as these do.
    state = z, of_z, jax.tree.map(lambda value: 0 * value, values)
    ts = constants[-1]
    (_, of_x, of_values), _ = jax.lax.scan(step, state, (ts[:0:-1], ts[-2::-1]))
    return (of_x, of_totals), of_values, None


_adjoint.defvjp(_forwards, _backwards)
