"""Against over-saturation: strong guidance drives x_0 out of the range of the data, and these bring it back.

Both act on x_0, whatever the field's kind: x_0 = p x + q prediction (`jdiff.predictions.conversion`), and what is added
to x_0 is added to the prediction in proportion. Neither is linear, so neither commutes with the conversions.
"""

from __future__ import annotations

import math

import jax.numpy as jnp

from jdiff._array import batch_time, call, check_array, coefficient_dtype, expand, flat, lincomb, root, scalars
from jdiff._typing import Array, Field, Kind, Process
from jdiff.guidance import Adjust
from jdiff.predictions import check_kind, conversion

__all__ = ["rescale", "threshold"]


def rescale(process: Process, mix: Array | float = 0.7, *, predict: Kind) -> Adjust:
    """Return the adjustment that brings the guided x_0 towards the spread that the strong x_0 has.

    x_0 -> mix std(strong x_0) / std(guided x_0) guided x_0 + (1 - mix) guided x_0, with the standard deviation over the
    entries of each example: Lin et al. 2023 (arXiv 2305.08891), eqs. 15 and 16.

    Args:
      process: the forward process.
      mix: phi of the paper, a scalar or (batch,); 0 changes nothing.
      predict: kind of the fields that are guided.

    Raises:
      ValueError: unknown kind.
    """
    check_kind(predict)

    def adjust(guided, strong, x, t):
        wanted = _spread(_x0(process, strong, x, t, predict)[0])

        def change(x0):
            found = _spread(x0)
            ratio = jnp.where(found > 0, wanted / jnp.where(found > 0, found, 1), 1)
            return lincomb((scalars(mix, x0, "mix") * (ratio - 1), x0))

        return _add_to_x0(process, guided, x, t, predict, change)

    return adjust


def threshold(
    process: Process, field: Field, *, predict: Kind, quantile: float = 0.995, low: float = -1.0, high: float = 1.0
) -> Field:
    """Return the field whose x_0 is clipped to a quantile of itself and scaled back into the range of the data.

    With y = (x_0 - middle) / half the range and s = max(1, the quantile of |y| over the entries of the example), y ->
    clip(y, -s, s) / s: dynamic thresholding, Saharia et al. 2022 (arXiv 2205.11487), section 2.3. A quantile of 0 is
    static thresholding, a clipping to the range.

    Args:
      process: the forward process.
      field: of any kind; guided, usually.
      predict: its kind.
      quantile: in [0, 1]; 0.995 is the 99.5th percentile.
      low: the least value of the data in model space.
      high: the largest.

    Raises:
      ValueError: unknown kind, quantile outside [0, 1], low >= high.
    """
    check_kind(predict)
    if not 0 <= quantile <= 1:
        raise ValueError(f"quantile must be in [0, 1], got {quantile}")
    if not -math.inf < low < high < math.inf:
        raise ValueError(f"low must be below high, both finite; got {low} and {high}")
    middle, half = 0.5 * (low + high), 0.5 * (high - low)

    def change(x0):
        y = (x0 - middle) / half
        sizes = flat(jnp.abs(y)).astype(coefficient_dtype(y))  # in half precision 0.999 would be 1
        largest = expand(jnp.maximum(1, jnp.quantile(sizes, jnp.asarray(quantile, sizes.dtype), axis=1)), y)
        return half * (jnp.clip(y, -largest, largest) / largest - y)

    def thresholded(x, t):
        check_array(x)
        t = batch_time(t, x)
        return _add_to_x0(process, call(field, x, t), x, t, predict, change)

    return thresholded


def _spread(x0):
    return root(jnp.var(flat(x0), axis=1))


def _x0(process, pred, x, t, predict):
    """Return x_0, and the number by which a change of x_0 changes the prediction, (batch,).

    Where alpha = 0, eps and score do not depend on x_0: the number is 0, and 0 stands in the place of x_0. Where sigma
    = 0, all kinds but x0 may be infinitely sensitive to it: they stay as they are too.
    """
    per_x0 = conversion(process, t, "x0", predict)[1]
    per_x0 = jnp.where(jnp.isfinite(per_x0), per_x0, 0)
    p, q = (jnp.where(per_x0 == 0, 0, c) for c in conversion(process, t, predict, "x0"))
    return lincomb((p, x), (q, pred)), per_x0


def _add_to_x0(process, pred, x, t, predict, change):
    """Return the prediction after x_0 -> x_0 + change(x_0): a difference, exact where nothing changes."""
    x0, per_x0 = _x0(process, pred, x, t, predict)
    return lincomb((1.0, pred), (per_x0, change(x0)))
