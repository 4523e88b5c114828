"""Guidance: functions from fields to fields.

Each kind has a stronger and a weaker prediction of the same thing and goes on from one to the other,

    weak + scale (strong - weak),

so that scale 1 is the stronger one. Linear combinations commute with the affine maps between prediction kinds
(`jdiff.predictions`): the fields may be of any one kind, of any process. At other scales than 1 the guided field is not
the score of any diffused density (Bradley & Nakkiran 2024, arXiv 2408.09000): docs/guidance.md says what a solver then
samples. What guidance does to x_0 is in `jdiff.saturation`.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jdiff._array import batch_time, call, check_array, check_per_example, check_state, lincomb, scalars, select
from jdiff._typing import Array, Field, Kind, Process, PyTree
from jdiff.predictions import check_kind, conversion

__all__ = [
    "Adjust",
    "Scale",
    "autoguidance",
    "classifier",
    "classifier_free",
    "interval",
    "limit_to",
]

Scale = Array | float | Callable[[Array], Array]
"""A scalar, one number per example, shape (batch,), or a function of t, (batch,) -> (batch,)."""
Adjust = Callable[[PyTree, PyTree, PyTree, Array], PyTree]
"""(guided, strong, x, t) -> guided: what is done to the combination, such as `jdiff.saturation.rescale`."""


def classifier(
    field: Field,
    log_prob: Callable[[Array, Array], Array],
    scale: Scale = 1.0,
    *,
    process: Process | None = None,
    predict: Kind = "score",
    adjust: Adjust | None = None,
) -> Field:
    """Return score(x, t) + scale grad_x log p(y | x, t), in the kind of `field`.

    Dhariwal & Nichol 2021 (arXiv 2105.05233), section 4; Song et al. 2021 (arXiv 2011.13456), eq. 14. A score s is
    p x + q s in another kind (`jdiff.predictions.conversion`): the gradient is multiplied by q. For x0, v and velocity
    q grows as 1/alpha, and with it the classifier's errors: `interval` keeps it to times that have a signal. Where
    alpha = 0 (the end of Rectified and Cosine) x_t says nothing about y, and nothing is added; but a score, whose q is
    1, takes the gradient as the classifier gives it.

    Args:
      field: the unconditional field, or a conditional one to be strengthened.
      log_prob: (x, t) -> log p(y | x_t = x), shape (batch,), each entry a function of its own example.
      scale: see `Scale`; at 1 the result is the score of p(x | y), at 0 it is `field`.
      process: the forward process; a score field needs none.
      predict: kind of `field` and of the result.
      adjust: see `Adjust`; the strong prediction is that of scale 1.

    Raises:
      ValueError: unknown kind, or another one than score without a process.
    """
    check_kind(predict)
    if process is None and predict != "score":
        raise ValueError(f"classifier guidance of a field of kind {predict!r} needs process=")

    def guided(x, t):
        check_array(x)
        t = batch_time(t, x)
        gradient = jax.grad(lambda x: jnp.sum(_per_example(log_prob(x, t.astype(x.dtype)), t)))(x)
        weak = call(field, x, t)
        factor = jnp.ones_like(t) if process is None else conversion(process, t, "score", predict)[1]
        known = jnp.isfinite(factor)
        factor = jnp.where(known, factor, 0)
        gradient = select(known, gradient, jax.tree.map(jnp.zeros_like, gradient))
        return _extrapolate(scale, lincomb((1.0, weak), (factor, gradient)), weak, adjust, x, t)

    return guided


def classifier_free(
    field: Callable[[PyTree, Array, PyTree], PyTree],
    cond: PyTree,
    null: PyTree,
    scale: Scale,
    *,
    adjust: Adjust | None = None,
) -> Field:
    """Return null + scale (cond - null) for the field's values under two conditions, from one call on twice the batch.

    Ho & Salimans 2022 (arXiv 2207.12598), eq. 6, with scale = 1 + w: 0 is unconditional, 1 is p(x | cond).

    Args:
      field: (x, t, cond) -> prediction, of any kind.
      cond: conditions, a pytree of arrays with a leading batch axis.
      null: the conditions of "none", likewise; a negative condition where it is one.
      scale: see `Scale`.
      adjust: see `Adjust`; it costs no evaluation.

    Raises:
      ValueError: conditions of another batch than x, or null of other shapes than cond (when the field is called).
    """

    def guided(x, t):
        batch = check_state(x)
        t = batch_time(t, x)
        _check_conditions(cond, null, batch)
        twice = lambda a, b: jax.tree.map(lambda a, b: jnp.concatenate([a, b]), a, b)
        both = call(lambda x, t: field(x, t, twice(cond, null)), twice(x, x), twice(t, t))
        strong, weak = (jax.tree.map(lambda leaf, part=part: leaf[part], both) for part in _halves(batch))
        return _extrapolate(scale, strong, weak, adjust, x, t)

    return guided


def autoguidance(strong: Field, weak: Field, scale: Scale, *, adjust: Adjust | None = None) -> Field:
    """Return strong + (scale - 1) (strong - weak): away from the errors that a worse model makes, and not its class.

    Karras et al. 2024 (arXiv 2406.02507), section 3: weak has the same condition and is trained less, or
    smaller, or both. Two calls.

    Args:
      strong: the field, of any kind; it may be guided itself.
      weak: a worse field of the same kind.
      scale: see `Scale`; 1 is `strong`.
      adjust: see `Adjust`.
    """

    def guided(x, t):
        t = batch_time(t, x)
        return _extrapolate(scale, call(strong, x, t), call(weak, x, t), adjust, x, t)

    return guided


def interval(scale: Scale, t_low: float, t_high: float, *, outside: Array | float = 1.0) -> Callable[[Array], Array]:
    """Return the scale that is `scale` for t in [t_low, t_high] and `outside` elsewhere, a function of t.

    Kynkaanniemi et al. 2024 (arXiv 2404.07724), section 3, in t. Outside, the guided field is the stronger prediction
    to the last digit, and no field is evaluated more often than without an interval.

    Raises:
      ValueError: t_low >= t_high.
    """
    _check_interval(t_low, t_high)
    return lambda t: jnp.where(_inside(t, t_low, t_high), _at(scale, t), outside)


def limit_to(guided: Field, plain: Field, t_low: float, t_high: float) -> Field:
    """Return `guided` for t in [t_low, t_high] and `plain` elsewhere, for any two fields of one kind.

    Both are evaluated, because one batch may hold examples inside and outside; values of the one that is not chosen do
    not matter, NaN among them. For classifier-free guidance `interval` does the same without a third evaluation.

    Raises:
      ValueError: t_low >= t_high.
    """
    _check_interval(t_low, t_high)

    def field(x, t):
        t = batch_time(t, x)
        return select(_inside(t, t_low, t_high), call(guided, x, t), call(plain, x, t))

    return field


def _per_example(log_prob, t):
    return check_per_example(log_prob, len(t), "log_prob")


def _at(scale, t):
    value = scale(t) if callable(scale) else scale
    switch = hasattr(value, "dtype") and jnp.issubdtype(value.dtype, jnp.bool_)
    return value.astype(t.dtype) if switch else value  # on or off


def _extrapolate(scale, strong, weak, adjust, x, t):
    scale = scalars(_at(scale, t), t, "scale")
    guided = lincomb((1.0 - scale, weak), (scale, strong))
    return guided if adjust is None else adjust(guided, strong, x, t)


def _halves(batch):
    return slice(None, batch), slice(batch, None)


def _check_conditions(cond, null, batch):
    want, got = (
        ([jnp.shape(leaf) for leaf in jax.tree.leaves(tree)], jax.tree.structure(tree)) for tree in (cond, null)
    )
    if want != got:
        raise ValueError(f"null must have the structure and shapes of cond, {want[0]}; got {got[0]}, {got[1]}")
    if any(shape[:1] != (batch,) for shape in want[0]):
        raise ValueError(f"cond must have a leading axis of {batch}, the batch of x; got shapes {want[0]}")


def _check_interval(t_low, t_high):
    if not t_low < t_high:
        raise ValueError(f"t_low must be below t_high, got {t_low} and {t_high}")


def _inside(t, t_low, t_high):
    return (t >= t_low) & (t <= t_high)
