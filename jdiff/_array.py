"""Batch-axis plumbing: the only place that reshapes times to images, checks keys and draws per-example noise.

Every array has a leading batch axis. Times and coefficients are scalars or (batch,) arrays; states may be pytrees.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np

from jdiff._typing import Array, Field, Key, PyTree


def first_leaf(x: PyTree) -> Array:
    """Return the first leaf of a state; its batch size and dtype speak for the whole tree."""
    leaves = jax.tree.leaves(x)
    if not leaves:
        raise ValueError("x, the state, has no arrays in it")
    return leaves[0]


def check_state(x: PyTree, name: str = "x") -> int:
    """Return the batch size of a state of floating-point arrays with one leading batch axis.

    Raises:
      TypeError: a leaf is not a floating-point array.
      ValueError: a leaf has no batch axis or no entries, or the leaves disagree about the size of the batch.
    """
    sizes = set()
    for leaf in jax.tree.leaves(x):
        dtype = getattr(leaf, "dtype", None)
        if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
            got = type(leaf).__name__ if dtype is None else f"dtype {dtype}"
            raise TypeError(f"{name} must be floating point, got {got}; transform the data first")
        if jnp.ndim(leaf) < 1:
            raise ValueError(f"{name} needs a leading batch axis, got a scalar")
        if 0 in (shape := jnp.shape(leaf))[1:]:
            raise ValueError(f"{name} must have entries in each example, got shape {shape}")
        sizes.add(shape[0])
    if len(sizes) != 1:
        raise ValueError(f"{name} must have one batch size in all its arrays, got {sorted(sizes)}")
    return sizes.pop()


def check_array(x: Array, name: str = "x") -> int:
    """Like `check_state`, for functions that take one array only."""
    if not hasattr(x, "dtype"):
        raise TypeError(f"{name} must be one array of shape (batch, *event), got {type(x).__name__}")
    return check_state(x, name)


def check_like(value: Array, x: Array, name: str, of: str = "x") -> None:
    """Raise unless a value is a floating-point array of the shape of x: one that only broadcasts would be wrong.

    Raises:
      TypeError: it is not a floating-point array.
      ValueError: it has another shape.
    """
    check_array(value, name)
    if value.shape != x.shape:
        raise ValueError(f"{name} must have the shape of {of}, {x.shape}; got {value.shape}")


def check_per_example(value: Array, batch: int, name: str) -> Array:
    """Return what a function gave for a batch; raise ValueError unless it is one number per example."""
    if getattr(value, "shape", None) != (batch,):
        got = getattr(value, "shape", type(value).__name__)
        raise ValueError(f"{name} must give one number per example, shape {(batch,)}, got {got}")
    return value


def check_count(value: int, name: str, least: int = 1) -> None:
    """Raise TypeError unless value is an integer, ValueError where it is below the least."""
    try:
        integer = not isinstance(value, bool) and operator.index(value) is not None
    except TypeError:
        integer = False
    if not integer:
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def check_integers(value: Array, name: str) -> None:
    """Raise TypeError unless value is an array of integers."""
    dtype = getattr(value, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jnp.integer):
        raise TypeError(f"{name} must be an array of integers, got {dtype or type(value).__name__}")


def check_positive(value: Array | float, name: str) -> None:
    """Raise unless value is one real number (TypeError, ValueError) and, where it is known, positive and finite."""
    check_real(value, name)
    if jnp.shape(value) != ():
        raise ValueError(f"{name} must be one number, got shape {jnp.shape(value)}")
    if is_concrete(value) and not 0 < float(value) < math.inf:
        raise ValueError(f"{name} must be positive and finite, got {value}")


def check_shape(shape: tuple[int, ...], least: int = 0) -> None:
    """Raise ValueError unless shape is (batch, *event) of integers, batch at least the least and the others 1."""
    sizes = isinstance(shape, tuple | list) and all(isinstance(n, int | np.integer) for n in shape)
    if not sizes or len(shape) < 1 or shape[0] < least or any(n < 1 for n in shape[1:]):
        raise ValueError(f"shape must be (batch, *event) with batch >= {least} and sizes >= 1, got {shape!r}")


def check_real(value: Array | float, name: str) -> None:
    """Raise TypeError unless value is a real number or an array of such."""
    dtype = getattr(value, "dtype", None)
    real = isinstance(value, int | float) and not isinstance(value, bool)
    if not (real or (dtype is not None and any(jnp.issubdtype(dtype, kind) for kind in (jnp.floating, jnp.integer)))):
        raise TypeError(f"{name} must be a real number or an array of such, got {dtype or type(value).__name__}")


def as_floating(t: Array | float, name: str = "t") -> Array:
    """Return times of any shape as a floating-point array.

    Raises:
      TypeError: t is not real.
    """
    check_real(t, name)
    t = jnp.asarray(t)
    return t if jnp.issubdtype(t.dtype, jnp.floating) else t.astype(jnp.float32)


def scalars(value: Array | float, x: PyTree, name: str) -> Array | float:
    """Return a number as it is, and an array, one number or one per example, in `coefficient_dtype(x)`.

    Raises:
      ValueError: it is neither a scalar nor of shape (batch,): it would broadcast in silence.
      TypeError: it is not real.
    """
    check_real(value, name)
    if not hasattr(value, "dtype"):
        return value
    batch = first_leaf(x).shape[:1]
    if jnp.shape(value) not in ((), batch):
        raise ValueError(f"{name} must be a scalar or have shape {batch} (the batch of x), got {jnp.shape(value)}")
    return jnp.asarray(value).astype(coefficient_dtype(x))


def batch_time(t: Array | float, x: PyTree, name: str = "t") -> Array:
    """Return t as a (batch,) array, in `coefficient_dtype(x)`.

    Raises:
      ValueError: t is neither a scalar nor of shape (batch,), or x is no state.
      TypeError: t is not real, or x not floating point.
    """
    check_state(x)
    value = scalars(t, x, name)
    if not (isinstance(t, int) or jnp.issubdtype(getattr(t, "dtype", type(t)), jnp.floating)):
        raise TypeError(f"{name} must be floating point, got dtype {jnp.result_type(t)}")
    return jnp.broadcast_to(jnp.asarray(value, coefficient_dtype(x)), first_leaf(x).shape[:1])


def coefficient_dtype(x: PyTree) -> jnp.dtype:
    """Return the dtype of times and coefficients for a state: x's own, but never below float32."""
    dtype = first_leaf(x).dtype
    return dtype if jnp.finfo(dtype).bits >= 32 else jnp.dtype(jnp.float32)


def full_like_batch(x: PyTree, value: Array | float) -> Array:
    """Return a (batch,) array of one value in `coefficient_dtype(x)`, varying over devices as x does."""
    leaf = first_leaf(x)
    zeros = jnp.zeros_like(flat(leaf)[:, 0], coefficient_dtype(x))
    return zeros + jnp.asarray(value, zeros.dtype)


def expand(c: Array | float, x: Array) -> Array:
    """Reshape a scalar or (batch,) coefficient to broadcast against x of shape (batch, *event), in x's dtype."""
    c = jnp.asarray(c)
    if c.ndim == 0:
        return c.astype(x.dtype)
    if c.shape != x.shape[:1]:
        raise ValueError(f"a coefficient must be a scalar or have shape {x.shape[:1]}, one per example; got {c.shape}")
    return c.astype(x.dtype).reshape(c.shape + (1,) * (x.ndim - c.ndim))


def flat(x: Array) -> Array:
    """Return x as (batch, entries), also where the batch is empty."""
    return x.reshape(x.shape[0], math.prod(x.shape[1:]))


def add_up(terms: Iterable[Array]) -> Array:
    """Return the sum of arrays, the first one first; Python's own starts from the integer 0."""
    first, *rest = terms
    return sum(rest, start=first)


def lincomb(*terms: tuple[Array | float, PyTree]) -> PyTree:
    """Return sum_i c_i x_i for pairs (c_i, x_i) of scalar or (batch,) coefficients and states."""
    coefficients, states = zip(*terms)

    def leaf(*xs):
        return add_up(expand(c, x) * x for c, x in zip(coefficients, xs))

    return jax.tree.map(leaf, *states)


def zero_like_batch(x: PyTree, dtype: jnp.dtype) -> Array:
    """Return (batch,) zeros that vary over devices as any of the leaves does: carries of a loop begin with them."""
    return add_up(full_like_batch(leaf, 0).astype(dtype) for leaf in jax.tree.leaves(x))


def add_zero(x: PyTree, zero: Array) -> PyTree:
    """Add a (batch,) array of zeros to a state, which then varies over devices as the zeros do."""
    return jax.tree.map(lambda leaf: leaf + expand(zero, leaf), x)


def select(where: Array, new: PyTree, old: PyTree) -> PyTree:
    """Return the examples of `new` where a (batch,) array of booleans is true, else those of `old`."""
    return jax.tree.map(lambda a, b: jnp.where(expand(where, a).astype(bool), a, b), new, old)


def call(field: Field, x: PyTree, t: Array) -> PyTree:
    """Call a field by the contract: t of shape (batch,) in x's dtype, a result like x.

    Raises:
      ValueError: the result has another structure or shape (one that only broadcasts would be wrong in silence).
    """
    out = field(x, batch_time(t, x).astype(first_leaf(x).dtype))
    want, got = (([jnp.shape(leaf) for leaf in jax.tree.leaves(tree)], jax.tree.structure(tree)) for tree in (x, out))
    if got != want:
        raise ValueError(f"a field must return the shape of its x, {want[0]}; got {got[0]}, {got[1]}")
    return out


def widened(x: Array) -> Array:
    """Return x in `coefficient_dtype(x)`, in which it is squared: half precision has no squares above 65504."""
    return x.astype(coefficient_dtype(x))


def root(x: Array) -> Array:
    """Return the square root of x, 0 with derivative 0 where x <= 0; NaN stays."""
    return jnp.where(x <= 0, 0, jnp.sqrt(jnp.where(x <= 0, 1, x)))


def sum_event(x: Array) -> Array:
    """Sum over all axes but the first, in `coefficient_dtype(x)`."""
    return jnp.sum(widened(x), axis=tuple(range(1, x.ndim)))


def mean_event(x: Array) -> Array:
    """Average over all axes but the first, in `coefficient_dtype(x)`."""
    return jnp.mean(widened(x), axis=tuple(range(1, x.ndim)))


def event_size(x: PyTree) -> int:
    """Return the number of entries per example."""
    return sum(math.prod(leaf.shape[1:]) for leaf in jax.tree.leaves(x))


def check_key(key: Key | None) -> Key:
    """Return the key; raise TypeError unless it is a typed threefry key (jax.random.key)."""
    if not isinstance(key, jax.Array) or not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        got = getattr(key, "dtype", type(key).__name__)
        raise TypeError(f"key must be a typed key made by jax.random.key, got {got}")
    if key.dtype != _THREEFRY:
        raise TypeError(f"key must be a threefry key (the same on every device and batch size), got {key.dtype}")
    return key


def check_one_key(key: Key | None) -> Key:
    """Return the key; raise as `check_key`, and ValueError where there are several."""
    key = check_key(key)
    if key.shape != ():
        raise ValueError(f"key must be one key for the whole batch, got shape {key.shape}")
    return key


def per_example_keys(key: Key | None, batch: int) -> Key:
    """Return one key per example, shape (batch,): a single key is split once, per-example keys pass through.

    Raises:
      TypeError: key is not a typed threefry key.
      ValueError: key has another shape than () or (batch,).
    """
    key = check_key(key)
    if key.shape == ():
        return jax.random.split(key, batch)
    if key.shape != (batch,):
        raise ValueError(f"key must be one key or one key per example, shape ({batch},); got shape {key.shape}")
    return key


def fold_in(keys: Key, data: Array | int) -> Key:
    """Fold one integer into each of the per-example keys."""
    return jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, data)


def normal_like(keys: Key, x: PyTree) -> PyTree:
    """Draw unit normals like x, example i from keys[i] alone."""
    return _draw_like(jax.random.normal, keys, x)


def rademacher_like(keys: Key, x: PyTree) -> PyTree:
    """Draw +-1 with equal probability like x, example i from keys[i] alone."""
    return _draw_like(jax.random.rademacher, keys, x)


def is_concrete(x: object) -> bool:
    """Tell whether x has values that can be looked at now (it is not a tracer)."""
    return not isinstance(x, jax.core.Tracer)


def check_grid(ts: Array, *, decreasing: bool | None = None) -> None:
    """Check a time grid of at least two entries, strictly monotone; values only where they can be seen.

    Raises:
      ValueError: another rank or length, not monotone, not finite, or running in the wrong direction.
      TypeError: ts is not floating point.
    """
    dtype = getattr(ts, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"ts must be an array of floating point, got {type(ts).__name__} of dtype {dtype}")
    if jnp.ndim(ts) != 1 or jnp.shape(ts)[0] < 2:
        raise ValueError(f"ts must be a vector of at least two times, got shape {jnp.shape(ts)}")
    if not is_concrete(ts):
        return
    values = np.asarray(ts)
    finite = bool(np.all(np.isfinite(values)))
    steps = np.diff(values if finite else np.zeros(2))  # a difference of infinities would warn
    if not finite or not (np.all(steps > 0) or np.all(steps < 0)):
        raise ValueError("ts must be strictly monotone and finite: repeated, reversed or non-finite times in it")
    if decreasing is not None and bool(steps[0] < 0) != decreasing:
        want, got = ("decrease", "increases") if decreasing else ("increase", "decreases")
        raise ValueError(f"ts must {want} here, but it {got}: from {float(values[0]):g} to {float(values[-1]):g}")


_THREEFRY = jax.eval_shape(lambda: jax.random.key(0, impl="threefry2x32")).dtype


def _draw_like(draw, keys, x):
    leaves, structure = jax.tree.flatten(x)
    drawn = []
    for i, leaf in enumerate(leaves):
        # A single array uses the keys as they are, so its noise is what a user would draw from them.
        leaf_keys = keys if len(leaves) == 1 else fold_in(keys, i)
        drawn.append(jax.vmap(lambda k, leaf=leaf: draw(k, leaf.shape[1:], leaf.dtype))(leaf_keys))
    return jax.tree.unflatten(structure, drawn)
