"""Brownian noise: samples of one key follow the same path whatever the grid."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jdiff._array import batch_time, check_state, expand, fold_in, is_concrete, normal_like, per_example_keys, root
from jdiff._typing import Key, Process
from jdiff.solvers.base import Noise

__all__ = ["brownian"]

_DEPTH = 20


def brownian(key: Key, process: Process, *, t_min: float | None = None, t_max: float | None = None) -> Noise:
    """Return the noise of one Brownian path per example: z = (W(c_s) - W(c_t)) / sqrt(|c_s - c_t|).

    Steps that split a step add up to it: with 20 and with 40 steps a sample approaches the same image, where white
    noise draws another one. The clock is c = arctan(sigma/alpha), finite for every process; any smooth one would do,
    since a solver scales z itself. W is found by halving the interval of time around c (Gaines & Lyons 1997, SIAM J.
    Appl. Math. 57, 1455), 20 levels deep, each drawn from the example's key and the number of its node: nothing is
    stored, and a step costs 44 normals. Steps below 1e-6 of the range of c may share a leaf, and z is then not exact; a
    step of no length, such as a corrector's, has no noise at all.

    Args:
      key: one key, or one per example, shape (batch,); the keys that a solver hands on are not looked at. It must be
        another than the one of `sample`, whose start would repeat it.
      process: the forward process.
      t_min: smallest time of the path (default: process.t_min).
      t_max: largest (default: process.t_max).

    Raises:
      ValueError: t_min and t_max are not in order; from the noise, keys of another number, times of another shape.
      TypeError: key is not a typed threefry key.
    """
    ends = (process.t_max if t_max is None else t_max, process.t_min if t_min is None else t_min)
    if all(map(is_concrete, ends)) and not 0 <= ends[1] < ends[0] <= process.t_max * (1 + 1e-6):
        raise ValueError(f"0 <= t_min < t_max <= {process.t_max} must hold, got t_min = {ends[1]}, t_max = {ends[0]}")

    def noise(keys, x, t, s):
        own = per_example_keys(key, check_state(x))
        low, high = (_clock(process, batch_time(end, x)) for end in ends)
        times = batch_time(t, x), batch_time(s, x, "s")
        places = [jnp.clip((_clock(process, time) - low) / (high - low), 0, 1) for time in times]
        values = [_path(own, x, place) for place in places]
        scale = jax.lax.rsqrt(jnp.maximum(jnp.abs(places[1] - places[0]), 1e-12))
        return jax.tree.map(lambda a, b: expand(scale, a) * (b - a), *values)

    return noise


def _clock(process, t):
    alpha, sigma = process.marginal(t)
    return jnp.arctan2(sigma, alpha)


def _path(keys, x, place):
    """Return W(place) of each example, place in [0, 1], W(0) = 0."""
    start = jax.tree.map(jnp.zeros_like, x)
    end = normal_like(fold_in(keys, 0), x)

    def halve(level, carry):
        node, left, width, low, high = carry
        z = normal_like(jax.vmap(jax.random.fold_in)(keys, node), x)
        middle = jax.tree.map(
            lambda low, high, z: 0.5 * (low + high) + expand(0.5 * jnp.sqrt(width), z) * z, low, high, z
        )
        right = (place >= left + 0.5 * width).astype(width.dtype)
        choose = lambda a, b: jax.tree.map(lambda a, b: a + expand(right, a) * (b - a), a, b)
        low, high = choose(low, middle), choose(middle, high)
        return 2 * node + right.astype(node.dtype), left + 0.5 * width * right, 0.5 * width, low, high

    node = jnp.ones_like(place, jnp.uint32)
    width = jnp.ones_like(place)
    node, left, width, low, high = jax.lax.fori_loop(0, _DEPTH, halve, (node, 0 * width, width, start, end))
    share = (place - left) / width
    z = normal_like(jax.vmap(jax.random.fold_in)(keys, node), x)
    bridge = root(share * (1 - share) * width)  # 0 at the ends of the path
    return jax.tree.map(
        lambda low, high, z: low + expand(share, low) * (high - low) + expand(bridge, z) * z, low, high, z
    )
