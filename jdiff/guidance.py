"""Guidance: functions from fields to fields.

Linear combinations of fields commute with the affine maps between prediction kinds (`jdiff.predictions`), so
`classifier_free` may be applied to a field of any kind. At other scales than 1 the guided field is not the score of any
diffused density (Bradley & Nakkiran 2024, arXiv 2408.09000).
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jdiff._array import batch_time, call, check_array, check_state, expand, lincomb
from jdiff._typing import Array, Field, PyTree

__all__ = ["classifier", "classifier_free", "limit_to"]


def classifier(score: Field, log_prob: Callable[[Array, Array], Array], scale: Array | float = 1.0) -> Field:
    """Return score(x, t) + scale grad_x log p(y | x, t), a score field.

    Dhariwal & Nichol 2021 (arXiv 2105.05233), section 4; Song et al. 2021 (arXiv 2011.13456), eq. 14.

    Args:
      score: the unconditional score.
      log_prob: (x, t) -> log p(y | x_t = x), shape (batch,), each entry a function of its own example.
      scale: scalar or (batch,); at 1 the result is the score of p(x | y).
    """

    def field(x, t):
        check_array(x)
        gradient = jax.grad(lambda x: jnp.sum(log_prob(x, t)))(x)
        return lincomb((1.0, call(score, x, t)), (scale, gradient))

    return field


def classifier_free(
    field: Callable[[PyTree, Array, PyTree], PyTree], cond: PyTree, null: PyTree, scale: Array | float
) -> Field:
    """Return null + scale (cond - null) for the field's values under two conditions, from one call on twice the batch.

    Ho & Salimans 2022 (arXiv 2207.12598), eq. 6, with scale = 1 + w: 0 is unconditional, 1 is p(x | cond).

    Args:
      field: (x, t, cond) -> prediction, of any kind.
      cond: conditions, arrays with a leading batch axis.
      null: the conditions of "none", likewise; a negative condition where it is one.
      scale: scalar or (batch,).
    """

    def guided(x, t):
        batch = check_state(x)
        t = batch_time(t, x)
        twice = lambda a, b: jax.tree.map(lambda a, b: jnp.concatenate([a, b]), a, b)
        both = call(lambda x, t: field(x, t, twice(cond, null)), twice(x, x), twice(t, t))
        with_cond = jax.tree.map(lambda leaf: leaf[:batch], both)
        without = jax.tree.map(lambda leaf: leaf[batch:], both)
        return lincomb((1.0 - scale, without), (scale, with_cond))

    return guided


def limit_to(guided: Field, plain: Field, t_low: float, t_high: float) -> Field:
    """Return `guided` for t in [t_low, t_high] and `plain` elsewhere (Kynkaanniemi et al. 2024, arXiv 2404.07724).

    Both are evaluated: one batch may hold examples inside and outside.

    Raises:
      ValueError: t_low >= t_high.
    """
    if not t_low < t_high:
        raise ValueError(f"t_low must be below t_high, got {t_low} and {t_high}")

    def field(x, t):
        t = batch_time(t, x)
        inside = (t >= t_low) & (t <= t_high)
        choose = lambda a, b: jnp.where(expand(inside, a).astype(bool), a, b)
        return jax.tree.map(choose, call(guided, x, t), call(plain, x, t))

    return field
