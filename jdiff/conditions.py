"""Conditions as trees: the null condition of each, and dropping conditions in training.

What a condition holds is the business of the network that reads it (`jdiff.nn.Condition`); here it is an integer
array of labels or a dict of arrays with a leading batch axis.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jdiff._array import check_count, check_integers, check_key, is_concrete, select
from jdiff._typing import Array, Key, PyTree

__all__ = ["drop_condition", "with_null"]


def with_null(cond: PyTree, num_classes: int | None = None) -> tuple[PyTree, PyTree]:
    """Return (condition, its null condition), two trees of one structure, as `guidance.classifier_free` wants them.

    Labels become `num_classes`. A dict with more than labels gets an entry "present", (batch,) bool, True in the
    condition (where it has none) and False in the null: a flag for all kinds, so that no value of a vector, an image or
    a token has to be set apart to say "none". Its other entries are zeros in the null.

    Args:
      cond: integer labels (batch,), or a dict of arrays (batch, ...).
      num_classes: the null label; needed where there are labels.

    Raises:
      ValueError: labels without num_classes, or of a dtype that does not hold it.
      TypeError: labels that are not integers, entries that are no arrays, num_classes is no integer.
    """
    if num_classes is not None and is_concrete(num_classes):
        check_count(num_classes, "num_classes")

    def null_label(label):
        if num_classes is None:
            raise ValueError("the null label is num_classes: with_null(cond, num_classes)")
        check_integers(label, "cond, or its label,")
        if is_concrete(num_classes) and num_classes > (most := jnp.iinfo(label.dtype).max):
            raise ValueError(f"labels of {label.dtype} end at {most}: cast them to hold num_classes = {num_classes}")
        return jnp.full_like(label, num_classes)

    if not isinstance(cond, dict):
        return cond, null_label(cond)
    if wrong := [name for name, value in cond.items() if not hasattr(value, "dtype")]:
        raise TypeError(f"cond must hold arrays, got {type(cond[wrong[0]]).__name__} for {wrong[0]!r}")
    null = {name: null_label(value) if name == "label" else jnp.zeros_like(value) for name, value in cond.items()}
    if set(cond) <= {"label"}:
        return cond, null
    batch = next(iter(cond.values())).shape[:1]
    return {"present": jnp.ones(batch, bool)} | cond, null | {"present": jnp.zeros(batch, bool)}


def drop_condition(keys: Key, cond: PyTree, null: PyTree, rate: Array | float) -> PyTree:
    """Return `null` for each example with probability `rate`, all entries at once, else `cond`.

    Joint training of a conditional and an unconditional network (Ho & Salimans 2022, arXiv 2207.12598, algorithm 1).

    Args:
      keys: one key per example, shape (batch,); example i is dropped by key i alone.
      cond: arrays with a leading batch axis.
      null: of the same structure and shapes, such as `with_null` gives.
      rate: probability, a number.

    Raises:
      ValueError: keys that are not one per example, or trees that differ in structure or shapes, rate outside
        [0, 1].
      TypeError: keys not typed threefry keys.
    """
    check_key(keys)
    if any(keys.shape != leaf.shape[:1] for leaf in jax.tree.leaves(cond)):
        raise ValueError(f"keys must be one per example, shape (batch,), got shape {keys.shape}")
    if is_concrete(rate) and not 0 <= float(rate) <= 1:
        raise ValueError(f"rate must be a probability, got {rate}")
    shapes = lambda tree: jax.tree.map(jnp.shape, tree)
    if shapes(cond) != shapes(null):
        raise ValueError(f"cond and null must have one structure, got shapes {shapes(cond)} and {shapes(null)}")
    dropped = jax.vmap(lambda key: jax.random.bernoulli(key, jnp.asarray(rate, float)))(keys)
    return select(dropped, null, cond)
