"""From a Linen network and its parameters to a field."""

from collections.abc import Callable
from typing import cast

import jax
import jax.numpy as jnp
from flax import linen as nn

from jdiff._array import check_key, per_example_keys
from jdiff._typing import Array, Field, PyTree
from jdiff.nn.conditions import Condition

__all__ = ["as_field"]


def as_field(
    module: nn.Module,
    params: PyTree,
    *,
    cond: Condition = None,
    train: bool = False,
    rngs: dict[str, Array] | None = None,
) -> Field:
    """Close a network over its parameters, condition and keys: `field(x, t)`, or `field(x, t, cond)` for guidance.

    The field calls `module.apply({"params": params}, x, t, cond, train=train, rngs=rngs)`: any Linen module whose
    `__call__` is `(x, t, cond=None, *, train=False)` and whose only variables are parameters will do. Build it inside
    the traced function with `params` as an argument of that function: a field is a function, not a pytree.

    Args:
        module: the network.
        params: the bare `params` collection, `module.init(key, x, t)["params"]`, without the outer `{"params": ...}`.
        cond: labels `(batch,)` or a dict of arrays with a leading batch axis, as the network takes it (see
            `jdiff.nn.Condition`): the default of the field's third argument. None is the null condition.
        train: dropout on; needs `rngs={"dropout": ...}`.
        rngs: typed keys by name: one key each, or one key per example each, shape `(batch,)`. With keys per
            example the dropout of example i depends on key i alone, not on the size, order or sharding of the batch.

    Raises:
        TypeError: keys that are not typed (`jax.random.key`), before anything is traced; a module that is none.
        ValueError: keys of more than one axis, or one key here and one per example there; when the field is called,
            another number of keys or conditions than of examples.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a flax.linen.Module, got {type(module).__name__}")
    per_example = _keys_per_example(rngs or {})
    # It has no mutable variables, which would come out beside the array.
    apply = cast(Callable[..., Array], module.apply)

    def field(x: Array, t: Array, cond: Condition = cond) -> Array:
        if not per_example:
            return apply({"params": params}, x, t, cond, train=train, rngs=rngs)

        for key in (rngs or {}).values():
            per_example_keys(key, len(x))
        if wrong := [jnp.shape(leaf) for leaf in jax.tree.leaves(cond) if jnp.shape(leaf)[:1] != x.shape[:1]]:
            raise ValueError(f"cond must have the batch of x, {x.shape[:1]}, got {wrong[0]}")

        def single(keys, x, t, cond):
            cond = jax.tree.map(lambda leaf: leaf[None], cond)
            return apply({"params": params}, x[None], t[None], cond, train=train, rngs=keys)[0]

        return jax.vmap(single)(rngs, x, t, cond)

    return field


def _keys_per_example(rngs: dict[str, Array]) -> bool:
    for key in rngs.values():
        check_key(key)
    ranks = {name: key.ndim for name, key in rngs.items()}
    if any(rank > 1 for rank in ranks.values()) or len(set(ranks.values())) > 1:
        raise ValueError(f"rngs must all be one key, or all one key per example (batch,), got axes {ranks}")
    return 1 in ranks.values()
