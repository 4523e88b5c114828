"""Adaptive Runge-Kutta integration on the device, with one step size and one error norm per example."""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jdiff._array import (
    add_zero,
    batch_time,
    call,
    check_count,
    check_positive,
    check_state,
    event_size,
    is_concrete,
    lincomb,
    mean_event,
    select,
    zero_like_batch,
)
from jdiff._typing import Array, PyTree
from jdiff.sde import SDE
from jdiff.solvers.ode import check_ode
from jdiff.solvers.tableaus import DORMAND_PRINCE, Tableau

__all__ = ["Solution", "integrate_adaptive"]

# Proportional-integral step control, Gustafsson 1991 (ACM TOMS 17(4)); exponents over the order of the error estimate.
_PROPORTIONAL, _INTEGRAL = 0.7, 0.4
_SAFETY, _SHRINK, _GROW = 0.9, 0.2, 10.0
_FIRST_EVALUATIONS = 2


class Solution(NamedTuple):
    """Result of an adaptive solve; statistics have shape (batch,)."""

    x: PyTree
    """State at t1; where `failed`, the last accepted state."""
    evaluations: Array
    """Evaluations of the drift, int32."""
    accepted: Array
    """Accepted steps, int32."""
    failed: Array
    """True where t1 was not reached: too many steps, a step below the resolution of t, or a non-finite drift."""


class _Carry(NamedTuple):
    x: PyTree
    slope: PyTree
    t: Array
    h: Array
    error: Array
    evaluations: Array
    accepted: Array
    active: Array
    failed: Array
    turns: Array


def integrate_adaptive(
    ode: SDE,
    x: PyTree,
    t0: Array | float,
    t1: Array | float,
    *,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    tableau: Tableau = DORMAND_PRINCE,
    max_steps: int = 4096,
    norm: Literal["largest", "joint"] = "largest",
    axis_name: str | None = None,
) -> Solution:
    """Integrate an ODE from t0 to t1, in either direction, with a step size for each example of the batch.

    A step is accepted where the error norm of an example is at most 1: RMS(error / (atol + rtol max(|x|, |x_new|))),
    the largest over the arrays of its state or the joint one of all their entries. An example's result therefore does
    not depend on its batch mates. All examples advance in one `while_loop`, which ends with the slowest; examples that
    are done are held.

    Forward-mode derivatives hold the step sizes constant; reverse mode needs a fixed grid (`integrate`) or an adjoint
    (`to_diffrax`).

    Args:
      ode: drift only.
      x: state at t0, arrays of shape (batch, *event).
      t0: start, scalar or (batch,).
      t1: end, scalar or (batch,).
      rtol: relative tolerance.
      atol: absolute tolerance.
      tableau: a pair with an error estimate (BOGACKI_SHAMPINE, DORMAND_PRINCE, TSITOURAS, PRINCE_DORMAND).
      max_steps: cap on the steps of one example, accepted and rejected; reaching it sets `failed`.
      norm: "largest" of the arrays' norms, or the "joint" norm.
      axis_name: inside shard_map or pmap, for a drift that itself communicates: all devices then do the same number of
        iterations.

    Returns:
      Solution(x, evaluations, accepted, failed).

    Raises:
      ValueError: tolerances or max_steps not positive, an ODE with a diffusion, a tableau without an error estimate, t0
        = t1, unknown norm.
      TypeError: x is not floating point, max_steps no integer.
    """
    check_state(x)
    check_ode(ode)
    check_tolerances(rtol, atol)
    check_count(max_steps, "max_steps")
    if tableau.error is None or not tableau.fsal:
        raise ValueError("the tableau must have an error estimate and its last stage first in the next step (fsal)")
    if norm not in ("largest", "joint"):
        raise ValueError(f"unknown norm {norm!r}; choose 'largest' or 'joint'")
    t0, t1 = batch_time(t0, x, "t0"), batch_time(t1, x, "t1")
    if is_concrete(t0) and is_concrete(t1) and bool((t0 == t1).any()):
        raise ValueError("t0 and t1 must differ")
    # Adding a zero of x makes every carry vary over devices as x does, which shard_map checks, whatever the drift is.
    zero = zero_like_batch(x, t0.dtype)
    t0, t1 = t0 + zero, t1 + zero
    x = add_zero(x, zero)
    direction = jnp.sign(t1 - t0)
    exponent, eps = 1 / tableau.order, jnp.finfo(t0.dtype).eps

    def error_norm(error, x, x_new):
        def leaf(e, a, b):
            scale = atol + rtol * jnp.maximum(jnp.abs(a), jnp.abs(b))
            return mean_event((e / scale).astype(t0.dtype) ** 2)

        means = [leaf(*leaves) for leaves in zip(*(jax.tree.leaves(tree) for tree in (error, x, x_new)))]
        if norm == "largest":
            square = jnp.max(jnp.stack(means), axis=0)
        else:
            square = sum(event_size(leaf) / event_size(x) * mean for leaf, mean in zip(jax.tree.leaves(x), means))
        found = jax.lax.stop_gradient(jnp.sqrt(square))
        # A non-finite stage is an error too large to accept, not a NaN to carry.
        return jnp.where(jnp.isfinite(found), found, jnp.inf)

    def drift(x, t):
        return add_zero(call(ode.drift, x, t), zero)

    count = len(tableau.b)
    rows, c = jnp.asarray(tableau.matrix, t0.dtype), jnp.asarray(tableau.c, t0.dtype)
    # What is measured after turn 0, turn 1 and all others: the first slope, its change ahead, the step's error.
    weights = np.zeros((3, count))
    weights[0, 0], weights[1, :2], weights[2] = 1, (-1, 1), tableau.error
    measured = jnp.asarray(weights, t0.dtype)
    size = error_norm(x, x, x)

    def turn(carry):
        """Evaluate the stages of one step and decide about it.

        Turns 0 and 1 evaluate one stage each, at the start and a little ahead, to choose the first step (Hairer,
        Norsett & Wanner 1993, section II.4): turns of the same loop, so that the drift is compiled once, and not once a
        stage, which is most of the compile time.
        """
        first, second = carry.turns == 0, carry.turns == 1
        starting = first | second
        remaining = t1 - carry.t
        # Take the end exactly, and do not leave a sliver behind it.
        last = jnp.abs(remaining) <= 1.01 * jnp.abs(carry.h)
        h = jnp.where(carry.active, jnp.where(last & ~starting, remaining, carry.h), 0)
        slopes = jax.tree.map(lambda k: jnp.zeros_like(k, shape=(count, *k.shape)).at[0].set(k), carry.slope)

        def stage(i, slopes):
            slope = drift(lincomb((1.0, carry.x), (h, _weighted(rows[i], slopes))), carry.t + c[i] * h)
            return jax.tree.map(lambda all_, k: all_.at[i].set(k), slopes, slope)

        low, high = jnp.where(first, 0, 1), jnp.where(first, 1, jnp.where(second, 2, count))
        slopes = jax.lax.fori_loop(low, high, stage, slopes)

        x_new = lincomb((1.0, carry.x), (h, _weighted(tableau.b, slopes)))
        per = jnp.where(first, 1, jnp.where(second, 1 / jnp.abs(c[1] * h), h))
        error = error_norm(lincomb((per, _weighted(measured[jnp.minimum(carry.turns, 2)], slopes))), carry.x, x_new)

        accept = carry.active & ~starting & (error <= 1)
        safe = jnp.clip(error, 1e-8, 1e8)
        factor = _SAFETY * safe ** (-_PROPORTIONAL * exponent) * carry.error ** (_INTEGRAL * exponent)
        # After a rejection the integral term speaks of another step: use the error alone, and never grow.
        shrink = jnp.clip(_SAFETY * safe**-exponent, _SHRINK, _SAFETY)
        h_next = h * jnp.where(accept, jnp.clip(factor, _SHRINK, _GROW), shrink)
        h_next = jnp.where(first, probe_step(error), jnp.where(second, first_step(h, carry.error, error), h_next))
        evaluations = carry.evaluations + jnp.where(carry.active, high - low, 0)
        # Near t = 0 times are fine without end: a step of eps^2 of the way is taken for none.
        resolution = 4 * eps * jnp.maximum(jnp.abs(carry.t), eps * jnp.abs(t1 - t0))
        stuck = ~starting & ~accept & (jnp.abs(h_next) < resolution)
        full = evaluations >= _FIRST_EVALUATIONS + (count - 1) * max_steps
        arrived = accept & last
        # Where the first slope is not finite no step is small enough.
        hopeless = first & ~jnp.isfinite(error)
        failed = carry.failed | (carry.active & (stuck | hopeless | (full & ~arrived)))
        slope = jax.tree.map(lambda k: k[jnp.where(starting, 0, count - 1)], slopes)
        error = jnp.where(first, error, jnp.where(second, 1, jnp.where(accept, jnp.maximum(safe, 1e-4), carry.error)))
        return _Carry(
            x=select(accept, x_new, carry.x),
            slope=select(accept | starting, slope, carry.slope),
            t=jnp.where(accept, jnp.where(last, t1, carry.t + h), carry.t),
            h=jax.lax.stop_gradient(jnp.where(carry.active, h_next, carry.h)),
            error=jax.lax.stop_gradient(error),
            evaluations=evaluations,
            accepted=carry.accepted + accept.astype(jnp.int32),
            active=carry.active & ~arrived & ~failed,
            failed=failed,
            turns=carry.turns + 1,
        )

    def probe_step(speed):
        """Return the h of turn 1, whose stage 1 is c_1 h (and a_10 h) ahead."""
        small = (size < 1e-5) | (speed < 1e-5) | ~jnp.isfinite(speed)
        ahead = jnp.minimum(jnp.where(small, 1e-6, 0.01 * size / jnp.where(small, 1, speed)), jnp.abs(t1 - t0))
        return direction * ahead / c[1]

    def first_step(h, speed, bend):
        ahead, largest = jnp.abs(c[1] * h), jnp.maximum(speed, bend)
        flat = (largest <= 1e-15) | ~jnp.isfinite(largest)
        length = (0.01 / jnp.where(flat, 1, largest)) ** exponent
        length = jnp.where(flat, jnp.maximum(1e-6, ahead * 1e-3), length)
        return direction * jnp.minimum(jnp.minimum(100 * ahead, length), jnp.abs(t1 - t0))

    counter = zero.astype(jnp.int32)
    start = _Carry(
        x=x,
        slope=jax.tree.map(jnp.zeros_like, x),
        t=t0,
        h=jnp.zeros_like(t0),
        error=jnp.ones_like(t0),
        evaluations=counter,
        accepted=counter,
        active=counter == 0,
        failed=counter != 0,
        turns=jnp.zeros((), jnp.int32),
    )
    end = jax.lax.while_loop(lambda carry: anyone(carry.active, axis_name), turn, start)
    return Solution(end.x, end.evaluations, end.accepted, end.failed)


def anyone(active: Array, axis_name: str | None) -> Array:
    """Tell whether an example is active, on any of the devices of an axis where one is named."""
    here = jnp.any(active)
    return here if axis_name is None else jax.lax.pmax(here.astype(jnp.int32), axis_name) > 0


def check_tolerances(rtol: float, atol: float) -> None:
    """Raise ValueError unless both tolerances, where their values are known, are positive and finite."""
    check_positive(rtol, "rtol")
    check_positive(atol, "atol")


def _weighted(weights, slopes):
    """Return sum_i weights_i slopes_i. Not a dot product: accelerators would round its inputs."""

    def leaf(k):
        w = jnp.asarray(weights, k.dtype).reshape(-1, *(1,) * (k.ndim - 1))
        return jnp.sum(w * k, axis=0)

    return jax.tree.map(leaf, slopes)
