"""Derivatives of a vector field along directions: what divergences and Jacobian norms are made of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import jax
import jax.numpy as jnp

from jdiff._array import (
    check_array,
    check_count,
    event_size,
    fold_in,
    normal_like,
    per_example_keys,
    rademacher_like,
    sum_event,
)
from jdiff._typing import Array, Key, PyTree

__all__ = ["Divergence", "check_divergence", "check_points", "directions", "trace", "value_and_products"]

Divergence = Literal["rademacher", "gaussian", "exact"]

# Directions whose derivatives are in memory together; the D of an exact divergence may be hundreds.
_AT_ONCE = 16


def check_divergence(key: Key | None, divergence: str, probes: int) -> None:
    """Raise ValueError for an unknown divergence, numbers of probes that it does not have, or probes without a key."""
    if divergence not in get_args(Divergence):
        raise ValueError(f"unknown divergence {divergence!r}; choose 'rademacher', 'gaussian' or 'exact'")
    check_count(probes, "probes")
    if divergence == "exact" and probes != 1:
        raise ValueError(f"probes must be at least 1, and 1 for the exact divergence; got {probes}")
    if divergence != "exact" and key is None:
        raise ValueError("random probes need a key, got None")


def check_points(x: Array) -> Array:
    """Return the points of a log-density as an array of JAX; times and log-determinants are of its dtype.

    Raises:
      ValueError: not of shape (batch, *event).
      TypeError: not floating point, or below float32.
    """
    check_array(x)
    x = jnp.asarray(x)
    if x.ndim < 2:
        raise ValueError(f"x must have shape (batch, *event), got {x.shape}")
    if jnp.finfo(x.dtype).bits < 32:
        raise TypeError(f"x must be float32 or wider, got {x.dtype}: times and log-determinants are of its dtype")
    return x


def directions(key: Key | None, x: Array, divergence: Divergence, probes: int) -> Array:
    """Return the directions of the derivatives, shape (probes or D, batch, *event)."""
    if divergence == "exact":
        size = event_size(x)
        basis = jnp.eye(size, dtype=x.dtype).reshape(size, 1, *x.shape[1:])
        return jnp.broadcast_to(basis, (size, *x.shape))
    draw = rademacher_like if divergence == "rademacher" else normal_like
    keys = per_example_keys(key, x.shape[0])
    return jnp.stack([draw(fold_in(keys, n), x) for n in range(probes)])


def trace(e: Array, derivative: Array) -> Array:
    """Return e . (dv/dx) e, shape (batch,), whose mean over probes, or sum over a basis, is div v."""
    return sum_event(e * derivative)


def value_and_products(
    velocity: Callable[[Array], Array],
    x: Array,
    tangents: Array,
    product: Callable[[Array, Array], PyTree] = trace,
) -> tuple[Array, PyTree]:
    """Return v(x) and product(e, (dv/dx) e) for each tangent e, (batch, len(tangents)), from one linearised pass."""

    def along(e):
        value, derivative = jax.jvp(velocity, (x,), (e,))
        return value, product(e, derivative)

    if len(tangents) == 1:
        value, found = along(tangents[0])
        return value, jax.tree.map(lambda leaf: leaf[:, None], found)
    if len(tangents) <= _AT_ONCE:
        return jax.vmap(along, out_axes=(None, 1))(tangents)
    # The value once, and its linear map for some directions at a time.
    value, derivative = jax.linearize(velocity, x)
    found = jax.lax.map(lambda e: product(e, derivative(e)), tangents, batch_size=_AT_ONCE)
    return value, jax.tree.map(jnp.transpose, found)
