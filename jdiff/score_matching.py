"""Score matching without a target: for scores of noisy or clean data alike, since neither needs to know the noise.

For x ~ p, E[div s + |s|^2/2] = E|s - grad log p|^2 / 2 - E|grad log p|^2 / 2 (Hyvarinen 2005, theorem 1), which is
the denoising loss E|s + eps/sigma|^2 / 2 of x = alpha x_0 + sigma eps less D / (2 sigma^2), whatever s is (Vincent
2011).
"""

from __future__ import annotations

from typing import Literal

import jax.numpy as jnp

from jdiff._array import batch_time, call, check_array, sum_event, widened
from jdiff._divergence import check_divergence, directions, value_and_products
from jdiff._typing import Array, Field, Key

__all__ = ["implicit", "sliced"]


def implicit(score: Field, x: Array, t: Array | float) -> Array:
    """Return div s(x, t) + |s(x, t)|^2 / 2 for each example: Hyvarinen 2005 (JMLR 6), eq. 4.

    The divergence is exact, of D forward derivatives; summed over the event, not averaged.

    Args:
      score: (x, t) -> score.
      x: data, clean or of the process at t, shape (batch, *event).
      t: times, scalar or (batch,).

    Returns:
      Losses, shape (batch,). The caller weights, averages and masks.

    Raises:
      ValueError: shapes that disagree.
      TypeError: x or t not floating point.
    """
    check_array(x)
    value, traces = _derivatives(score, x, t, directions(None, x, "exact", 1))
    return 0.5 * sum_event(widened(value) ** 2) + jnp.sum(traces, axis=1)


def sliced(
    key: Key,
    score: Field,
    x: Array,
    t: Array | float,
    *,
    probe: Literal["rademacher", "gaussian"] = "rademacher",
    probes: int = 1,
    reduce_variance: bool = True,
) -> Array:
    """Return e . (ds/dx) e + |s|^2 / 2, or + (e . s)^2 / 2, averaged over random directions e, for each example.

    Its mean over e is `implicit`. Song et al. 2019 (arXiv 1905.07088), section 3: with reduced variance, and the
    original, where the second term is sliced too.

    Args:
      key: one key or one per example.
      score: (x, t) -> score.
      x: data, clean or of the process at t, shape (batch, *event).
      t: times, scalar or (batch,).
      probe: distribution of the directions.
      probes: their number for an example.
      reduce_variance: the second term without slicing.

    Returns:
      Losses, shape (batch,).

    Raises:
      ValueError: unknown probe, probes < 1, shapes that disagree, keys that do not fit.
      TypeError: x or t not floating point, keys not typed threefry keys.
    """
    check_array(x)
    if probe not in ("rademacher", "gaussian"):
        raise ValueError(f"unknown probe {probe!r}; choose 'rademacher' or 'gaussian'")
    check_divergence(key, probe, probes)
    tangents = directions(key, x, probe, probes)
    value, traces = _derivatives(score, x, t, tangents)
    if reduce_variance:
        return 0.5 * sum_event(widened(value) ** 2) + jnp.mean(traces, axis=1)
    slices = jnp.sum(widened(tangents * value[None]), axis=tuple(range(2, tangents.ndim)))
    return 0.5 * jnp.mean(slices**2, axis=0) + jnp.mean(traces, axis=1)


def _derivatives(score, x, t, tangents):
    t = batch_time(t, x)
    return value_and_products(lambda x: call(score, x, t), x, tangents)
