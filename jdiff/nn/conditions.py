"""The one door by which a condition enters a network: labels, vectors, images, tokens."""

from typing import Any

import jax.numpy as jnp

from jdiff._array import check_array, check_count
from jdiff._typing import Array

__all__ = ["Condition", "image_tokens", "read_condition"]

Condition = Any
"""None (nothing is known), labels (batch,), or a dict of "label" (batch,), "vector" (batch, d), "image" (batch, h, w,
c), "tokens" (batch, n, d), "tokens_mask" (batch, n) and "present" (batch,)."""

# entry -> the network's attribute that asks for it
_KINDS = {
    "label": "num_classes",
    "vector": "vector_size",
    "image": "image_channels",
    "tokens": "token_size",
}


def read_condition(cond: Condition, x: Array, **sizes: int | None) -> dict[str, Array]:
    """Return what a network built with these sizes sees of `cond`: every kind that it asks for, and "present".

    A condition has an entry for each kind that the network was built with and no other; a plain integer array is
    `{"label": ...}`. Where `present` is False for an example its condition is the null one, whatever its entries say:
    the null label, and no vector, image or token, which is not the same as zeros. Without `present` all are present;
    None is the null condition of every example.

    Args:
        cond: see `Condition`. Floating entries are cast to x's dtype.
        x: the network's input, `(batch, ...)`.
        **sizes: `num_classes`, `vector_size`, `image_channels`, `token_size` of the network, None for what it has not.

    Returns:
        "label" (the null label, num_classes, where absent; num_classes + 1, which is none, where negative), "vector",
        "image", "tokens", "tokens_mask", as asked for, and "present", `(batch,)` bool.

    Raises:
        ValueError: missing or extra entries, or wrong shapes, by name; a size below 1.
        TypeError: labels not integer, masks not bool, other entries not floating; a size that is no integer, or that no
            condition has.
    """
    if unknown := [name for name in sizes if name not in _KINDS.values()]:
        raise TypeError(f"sizes must be {', '.join(_KINDS.values())}, got {', '.join(unknown)}")
    check_array(x)
    wanted = {kind: size for kind, name in _KINDS.items() if (size := sizes.get(name)) is not None}
    for kind, size in wanted.items():
        check_count(size, _KINDS[kind])
    batch = x.shape[0]
    if cond is None:
        return _null(wanted, x)
    given = dict(cond) if isinstance(cond, dict) else {"label": cond}
    seen = {name: _as_array(value, name) for name, value in given.items()}
    optional = {"present"} | ({"tokens_mask"} if "tokens" in wanted else set())
    if not isinstance(cond, dict) and set(wanted) != {"label"}:
        if "label" not in wanted:
            raise ValueError("cond was given to a network without labels: build it with num_classes")
        raise ValueError(f"cond must be a dict of {', '.join(wanted)}, got an array")
    if missing := [kind for kind in wanted if kind not in given]:
        raise ValueError(f"cond lacks {', '.join(missing)}; the network was built for {', '.join(wanted)}")
    if extra := [name for name in given if name not in {*wanted, *optional}]:
        remedy = ", ".join(_KINDS[name] for name in extra if name in _KINDS)
        hint = f": build it with {remedy}" if remedy else ""
        raise ValueError(
            f"cond has {', '.join(map(str, extra))}; the network takes {', '.join(wanted) or 'nothing'}{hint}"
        )
    for kind, size in wanted.items():
        shape = _shape(kind, size, x, seen)
        if seen[kind].shape != shape:
            what = f"cond[{kind!r}]" if isinstance(cond, dict) else "cond"
            raise ValueError(f"{what} must have shape {shape} for x {x.shape}, got {seen[kind].shape}")
        dtype = seen[kind].dtype
        if kind == "label":
            if not jnp.issubdtype(dtype, jnp.integer):
                raise TypeError(f"cond must hold integer class labels, got {dtype}")
        elif not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(f"cond[{kind!r}] must be floating, got {dtype}")
        else:
            seen[kind] = seen[kind].astype(x.dtype)
    for name, shape in {
        "present": (batch,),
        "tokens_mask": seen["tokens"].shape[:2] if "tokens" in seen else (),
    }.items():
        if name in seen and (seen[name].shape != shape or seen[name].dtype != bool):
            found = f"{seen[name].shape} {seen[name].dtype}"
            error = TypeError if seen[name].dtype != bool else ValueError
            raise error(f"cond[{name!r}] must be bool of shape {shape}, got {found}")
    if "label" in seen:
        # Wide enough for both numbers; a negative index would count from the end of the table.
        label = seen["label"].astype(int)
        seen["label"] = jnp.where(label < 0, wanted["label"] + 1, label)
    if "tokens" in wanted:
        seen.setdefault("tokens_mask", jnp.ones(seen["tokens"].shape[:2], bool))
    if "present" not in seen:
        return seen | {"present": jnp.ones(batch, bool)}
    if "label" in seen:
        seen["label"] = jnp.where(seen["present"], seen["label"], wanted["label"])
    return seen


def _as_array(value, name):
    try:
        return jnp.asarray(value)
    except (TypeError, ValueError) as error:
        raise TypeError(f"cond must hold arrays, got {type(value).__name__} for {name!r}") from error


def _shape(kind, size, x, seen):
    batch = x.shape[0]
    if kind == "label":
        return (batch,)
    if kind == "vector":
        return (batch, size)
    if kind == "image":
        return (*x.shape[:-1], size)
    tokens = seen["tokens"]
    return (batch, tokens.shape[1] if tokens.ndim > 1 else "n", size)


def _null(wanted, x):
    batch = x.shape[0]
    shapes = {"vector": (batch,), "image": x.shape[:-1], "tokens": (batch, 1)}
    seen = {kind: jnp.zeros((*shapes[kind], size), x.dtype) for kind, size in wanted.items() if kind != "label"}
    if "label" in wanted:
        seen["label"] = jnp.full(batch, wanted["label"])
    if "tokens" in wanted:
        seen["tokens_mask"] = jnp.zeros((batch, 1), bool)
    return seen | {"present": jnp.zeros(batch, bool)}


def absent_is_zero(value: Array, present: Array) -> Array:
    """Return `value` `(batch, ...)` where present, zeros elsewhere."""
    return jnp.where(present.reshape(-1, *(1,) * (value.ndim - 1)), value, jnp.zeros_like(value))


def with_image(x: Array, image: Array, present: Array) -> Array:
    """Append an image that is known, and a channel of ones where it is, to the channels of x; zeros where it is not."""
    known = jnp.ones((*x.shape[:-1], 1), x.dtype)
    return jnp.concatenate([x, absent_is_zero(jnp.concatenate([image, known], axis=-1), present)], axis=-1)


def image_tokens(image: Array, patch: int) -> Array:
    """Squares of an image, of any size, as tokens for cross-attention: `(batch, n, patch^2 c + 2)`.

    The last two entries are the square's place, row and column from -1 to 1, because attention sees no order.

    Args:
        image: `(batch, h, w, c)`, floating.
        patch: side of a square, a divisor of h and w.

    Raises:
        ValueError: another number of axes, sides that `patch` does not divide, a patch below 1.
        TypeError: image not floating, patch no integer.
    """
    check_count(patch, "patch")
    check_array(image, "image")
    if image.ndim != 4 or image.shape[1] % patch or image.shape[2] % patch:
        raise ValueError(f"image must be (batch, height, width, c) of multiples of patch = {patch}, got {image.shape}")
    squares = space_to_depth(image, patch)
    batch, rows, columns, size = squares.shape
    places = jnp.meshgrid(jnp.linspace(-1, 1, rows), jnp.linspace(-1, 1, columns), indexing="ij")
    place = jnp.broadcast_to(jnp.stack(places, axis=-1).astype(image.dtype)[None], (batch, rows, columns, 2))
    return jnp.concatenate([squares, place], axis=-1).reshape(batch, rows * columns, size + 2)


def space_to_depth(x: Array, side: int) -> Array:
    """Squares of pixels as the channels of one: `(batch, h, w, c) -> (batch, h / side, w / side, side^2 c)`."""
    b, height, width, c = x.shape
    x = x.reshape(b, height // side, side, width // side, side, c).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(b, height // side, width // side, side * side * c)
