"""Registration of dataclasses as pytrees whose structures tell the classes apart."""

from __future__ import annotations

import dataclasses
from typing import TypeVar

import jax

__all__ = ["register_dataclass"]

_Class = TypeVar("_Class", bound=type)


def register_dataclass(cls: _Class) -> _Class:
    """Register a dataclass as a pytree: a decorator, for a process whose numbers change without a new compilation.

    Fields are leaves, except those of ``metadata={"static": True}``, which are part of the structure.

    In place of `jax.tree_util.register_dataclass`: in JAX 0.10.2 the structures of two of its classes compare equal
    where the numbers of leaves and the static fields agree, as those of VP and VE do. The caches of `jax.jit` tell them
    apart by their hashes alone, which fails for 1.5 % of all pairs: then a function compiled for one class runs for the
    other, without a word (docs/decisions.md). Structures of this function differ by class.

    Raises:
      TypeError: cls is not a dataclass, or has a field that its constructor does not take.
    """
    if not dataclasses.is_dataclass(cls):
        raise TypeError(
            f"{cls.__name__} must be a dataclass: put @dataclasses.dataclass(frozen=True) below the decorator"
        )
    if wrong := [field.name for field in dataclasses.fields(cls) if not field.init]:
        raise TypeError(f"{cls.__name__} has fields that its constructor does not take: {', '.join(wrong)}")
    static = tuple(field.name for field in dataclasses.fields(cls) if field.metadata.get("static", False))
    leaves = tuple(field.name for field in dataclasses.fields(cls) if field.name not in static)

    def flatten(node):
        return tuple(getattr(node, name) for name in leaves), tuple(getattr(node, name) for name in static)

    def flatten_with_keys(node):
        values, meta = flatten(node)
        return tuple((jax.tree_util.GetAttrKey(name), value) for name, value in zip(leaves, values, strict=True)), meta

    def unflatten(meta, values):
        return cls(**dict(zip(static, meta, strict=True)), **dict(zip(leaves, values, strict=True)))

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
    return cls
