"""Adaptive integration of an SDE on the device, with one step size per example."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jdiff._array import (
    add_zero,
    batch_time,
    call,
    check_count,
    check_positive,
    check_state,
    fold_in,
    is_concrete,
    lincomb,
    mean_event,
    per_example_keys,
    select,
    zero_like_batch,
)
from jdiff._typing import Array, Key, PyTree
from jdiff.sde import SDE
from jdiff.solvers.adaptive import Solution, anyone, check_tolerances
from jdiff.solvers.base import Noise, white

__all__ = ["integrate_adaptive_sde"]

# Jolicoeur-Martineau et al. 2021 (theta and r, as in their code); the two bounds are ours.
_SAFETY, _EXPONENT = 0.9, 0.9
_SHRINK, _GROW = 0.1, 10.0


class _Carry(NamedTuple):
    x: PyTree
    previous: PyTree
    t: Array
    h: Array
    evaluations: Array
    accepted: Array
    active: Array
    failed: Array
    turns: Array


def integrate_adaptive_sde(
    key: Key,
    sde: SDE,
    x: PyTree,
    t0: Array | float,
    t1: Array | float,
    *,
    rtol: float = 0.02,
    atol: float = 0.0078,
    first_step: float = 0.01,
    max_steps: int = 4096,
    noise: Noise = white,
    axis_name: str | None = None,
) -> Solution:
    """Integrate an SDE from t0 to t1, in either direction, with a step size for each example of the batch.

    Jolicoeur-Martineau et al. 2021 (arXiv 2105.14080), as their code has it: with h = s - t and one z for both stages,

    u = x_t + h f(x_t, t) + sqrt(|h|) g(x_t, t) z,    x_s = (x_t + u + h f(u, s) + sqrt(|h|) g(u, s) z) / 2,

    accepted where RMS((u - x_s) / max(atol, rtol max(|u|, |u'|))) <= 1, u' being the u of the last accepted step (x at
    first); of several arrays the largest norm counts. Two evaluations a try; the step that follows is 0.9 h error^-0.9,
    at least h/10 and at most 10 h. As in their code the better of the two, x_s, goes on, which is `stochastic_heun`,
    and with white noise a rejected try draws anew.

    That selects steps by their noise. On a mixture in 2-D it was a bias at every tolerance tried, 0.03 to 0.001
    (variances 6 to 33 % too large; at 0.01: tests/test_solvers_adaptive_sde.py). With `noise=brownian(...)` all tries
    of an example see one path, and the variance was right.

    An example's result depends on its own key alone: neither on its batch mates nor on the batch size.

    Args:
      key: one key, or one per example, shape (batch,).
      sde: drift and diffusion, such as `jdiff.reverse`; the diffusion depends on time alone, as there.
      x: state at t0, arrays of shape (batch, *event).
      t0: start, scalar or (batch,).
      t1: end, scalar or (batch,).
      rtol: relative tolerance (the authors': 0.01 to 0.1).
      atol: absolute tolerance; the default is the authors' for VP, one of 256 grey levels of [-1, 1].
      first_step: first |h|.
      max_steps: cap on the tries of one example; reaching it sets `failed`.
      noise: where unit normals come from; try n of example i hands it fold_in(key_i, n).
      axis_name: as in `integrate_adaptive`.

    Returns:
      Solution(x, evaluations, accepted, failed).

    Raises:
      ValueError: tolerances, first_step or max_steps not positive, an SDE without a diffusion, t0 = t1.
      TypeError: x is not floating point, max_steps no integer, keys that are not typed threefry keys.
    """
    keys = per_example_keys(key, check_state(x))
    check_tolerances(rtol, atol)
    if sde.diffusion is None:
        raise ValueError("this solver integrates SDEs, this one has no diffusion: see integrate_adaptive")
    diffusion = sde.diffusion
    check_count(max_steps, "max_steps")
    check_positive(first_step, "first_step")
    t0, t1 = batch_time(t0, x, "t0"), batch_time(t1, x, "t1")
    if is_concrete(t0) and is_concrete(t1) and bool((t0 == t1).any()):
        raise ValueError("t0 and t1 must differ")
    # As in `integrate_adaptive`: every carry varies over devices as x does.
    zero = zero_like_batch(x, t0.dtype)
    t0, t1, x = t0 + zero, t1 + zero, add_zero(x, zero)
    eps = jnp.finfo(t0.dtype).eps

    def norm(low, high, previous):
        def leaf(a, b, before):
            scale = jnp.maximum(atol, rtol * jnp.maximum(jnp.abs(a), jnp.abs(before)))
            return mean_event(((a - b) / scale).astype(t0.dtype) ** 2)

        means = [leaf(*leaves) for leaves in zip(*(jax.tree.leaves(tree) for tree in (low, high, previous)))]
        largest = jax.lax.stop_gradient(jnp.sqrt(jnp.max(jnp.stack(means), axis=0)))
        return jnp.where(jnp.isfinite(largest), largest, jnp.inf)

    def euler(x, at, t, h, z):
        """From x, with drift and diffusion at another state."""
        kick = jax.tree.map(jnp.multiply, call(diffusion, at, t), z)
        return lincomb((1.0, x), (h, call(sde.drift, at, t)), (jnp.sqrt(jnp.abs(h)), kick))

    def turn(carry):
        remaining = t1 - carry.t
        last = jnp.abs(remaining) <= 1.01 * jnp.abs(carry.h)
        h = jnp.where(carry.active, jnp.where(last, remaining, carry.h), 0)
        s = jnp.where(last, t1, carry.t + h)
        z = noise(fold_in(keys, carry.turns), carry.x, carry.t, s)
        low = euler(carry.x, carry.x, carry.t, h, z)
        high = lincomb((0.5, low), (0.5, euler(carry.x, low, s, h, z)))
        error = norm(low, high, carry.previous)
        accept = carry.active & (error <= 1)
        factor = jnp.clip(_SAFETY * jnp.clip(error, 1e-8, 1e8) ** -_EXPONENT, _SHRINK, _GROW)
        h_next = jax.lax.stop_gradient(h * factor)
        resolution = 4 * eps * jnp.maximum(jnp.abs(carry.t), eps * jnp.abs(t1 - t0))
        evaluations = carry.evaluations + 2 * carry.active.astype(jnp.int32)
        arrived = accept & last
        stuck = ~accept & (jnp.abs(h_next) < resolution)
        failed = carry.failed | (carry.active & (stuck | ((evaluations >= 2 * max_steps) & ~arrived)))
        return _Carry(
            x=select(accept, high, carry.x),
            previous=select(accept, low, carry.previous),
            t=jnp.where(accept, s, carry.t),
            h=jnp.where(carry.active, h_next, carry.h),
            evaluations=evaluations,
            accepted=carry.accepted + accept.astype(jnp.int32),
            active=carry.active & ~arrived & ~failed,
            failed=failed,
            turns=carry.turns + 1,
        )

    counter = zero.astype(jnp.int32)
    start = _Carry(
        x=x,
        previous=x,
        t=t0,
        h=jnp.sign(t1 - t0) * jnp.minimum(first_step, jnp.abs(t1 - t0)),
        evaluations=counter,
        accepted=counter,
        active=counter == 0,
        failed=counter != 0,
        turns=jnp.zeros((), jnp.int32),
    )
    end = jax.lax.while_loop(lambda carry: anyone(carry.active, axis_name), turn, start)
    return Solution(end.x, end.evaluations, end.accepted, end.failed)
