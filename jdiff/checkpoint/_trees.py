"""What a checkpoint holds of a tree or of a JSON value: paths, nested dictionaries, descriptions, places."""

import base64
import hashlib
import itertools
import json
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding

from jdiff.checkpoint._digests import digests

PACKED = "packed bytes"
# Bytes of an array, and of all of an item, that are written as one: beyond, Orbax shares the work among processes.
_SMALL, _PACKED = 2**18, 2**26


def flatten(name, tree):
    """A tree as {"path/of/leaf": leaf}, in the order of its leaves."""
    leaves: dict[str, Any] = {}
    names: set[str] = set()
    parents: set[str] = set()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        text = jax.tree_util.keystr(path, simple=True, separator="/")
        dtype = getattr(leaf, "dtype", None)
        if dtype is None or not (jnp.issubdtype(dtype, jnp.number) or jnp.issubdtype(dtype, jnp.bool_)):
            raise TypeError(f"{name}/{text} must be a numeric array, got {dtype or type(leaf).__name__}")
        if (narrow := jax.dtypes.canonicalize_dtype(dtype)) != dtype:  # digest and restored array would be of that
            raise TypeError(
                f"{name}/{text} is {dtype}, which JAX would cut to {narrow}: cast it, or set jax_enable_x64"
            )
        if text.split("/")[0] == PACKED:
            raise ValueError(f"{name}/{text}: the name {PACKED!r} is taken")
        # Orbax joins the parts by dots: {"a.b": x, "a": {"b": y}} would be one name.
        if text.replace("/", ".") in names:
            raise ValueError(f"two leaves of {name} have the path {text!r}")
        below = any(other in leaves for other in itertools.accumulate(text.split("/")[:-1], "{}/{}".format))
        if below or text in parents:
            raise ValueError(f"{name}/{text} lies below another leaf, or another one below it")
        parents.update(itertools.accumulate(text.split("/")[:-1], "{}/{}".format))
        names.add(text.replace("/", "."))
        leaves[text] = leaf
    return leaves


def nest(leaves):
    """The tree that Orbax sees: dictionaries only, whatever node types the caller's tree is made of."""
    nested: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *parents, last = path.split("/")
        node = nested
        for part in parents:
            node = node.setdefault(part, {})
        node[last] = leaf
    return nested


def pack(leaves):
    """What Orbax writes, and {path: first byte} of what is in its packed bytes.

    Orbax spends about 2 ms of Python on an array. Arrays of no elements, which it refuses, are left out: their shape
    and dtype in `meta` are all there is to them.
    """
    small, total = [], 0
    for path, leaf in leaves.items():
        if 0 < leaf.nbytes <= min(_SMALL, _PACKED - total) and _whole(leaf):
            small.append(path)
            total += leaf.nbytes
    packed = [array.tobytes() for array in jax.device_get([leaves[path] for path in small])]
    first = dict(zip(small, itertools.accumulate(map(len, packed), initial=0), strict=False))
    stored = nest({path: leaf for path, leaf in leaves.items() if leaf.size and path not in first})
    return stored | ({PACKED: np.frombuffer(b"".join(packed), np.uint8)} if small else {}), first


def unpack(packed, first, leaf):
    """The array of a leaf's shape and dtype that begins at a byte, which the caller knows to be there."""
    size = leaf.size * leaf.dtype.itemsize
    return np.frombuffer(packed[first : first + size].tobytes(), leaf.dtype).reshape(leaf.shape)


def _whole(leaf):
    """Whether every process has all of it, and means the same by it: Orbax refuses arrays of one process of several."""
    if not isinstance(leaf, jax.Array):
        return True
    return leaf.is_fully_replicated and not (jax.process_count() > 1 and leaf.is_fully_addressable)


def nest_order(leaves):
    """The paths, in the order of the leaves of `nest`."""
    return jax.tree.leaves(nest({path: path for path in leaves}))


def describe(leaves):
    """{path: shape, dtype and digest of the bits}."""
    found = digests(leaves)
    return {
        path: {"shape": list(leaf.shape), "dtype": str(leaf.dtype), "digest": found[path]}
        for path, leaf in leaves.items()
    }


def fields(prefix, value):
    """A JSON value as {path: text}, one entry a scalar, empty container or list."""
    if isinstance(value, dict) and value:
        return {path: text for name, part in value.items() for path, text in fields(f"{prefix}/{name}", part).items()}
    return {prefix: json.dumps(value)}


def part(sharding, item):
    """What is said of one item: its entry of a mapping, or what holds for all."""
    return sharding.get(item) if isinstance(sharding, Mapping) else sharding


def placements(tree, leaves, sharding):
    """{path: sharding or None}; raises where a shape cannot be split so."""
    if sharding is None:
        places = [own_place(leaf) for leaf in leaves.values()]
    else:
        spread = lambda place, part: jax.tree.map(lambda _: place, part)
        is_leaf = lambda node: isinstance(node, Sharding)
        if not all(map(is_leaf, jax.tree.leaves(sharding, is_leaf=is_leaf))):
            raise TypeError(f"sharding must be made of jax.sharding.Sharding, got {sharding!r}")
        try:
            places = jax.tree.leaves(jax.tree.map(spread, sharding, tree, is_leaf=is_leaf), is_leaf=is_leaf)
        except ValueError as error:
            raise ValueError(f"sharding must be a prefix of the item: {error}") from error
    for place, (path, leaf) in zip(places, leaves.items(), strict=True):
        if place is not None:
            try:
                place.shard_shape(tuple(leaf.shape))
            except ValueError as error:
                raise ValueError(f"sharding does not fit {path} of shape {tuple(leaf.shape)}: {error}") from error
    return dict(zip(leaves, places, strict=True))


def own_place(leaf):
    """Where a leaf is meant to be, or None for an array that is not committed anywhere."""
    committed = not isinstance(leaf, jax.Array) or leaf.committed
    return getattr(leaf, "sharding", None) if committed else None


def put(array, sharding):
    """A NumPy array as one of JAX: where it shall be, or uncommitted; what is one already stays."""
    if isinstance(array, jax.Array):
        return array
    if sharding is None:
        return jnp.array(array, copy=True)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def to_json(name, value):
    """What JSON gives back for a value; bytes travel as base64."""
    if isinstance(value, bytes):
        return {"base64": base64.b64encode(value).decode("ascii")}
    try:
        return {"json": json.loads(json.dumps(value))}
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} must be JSON or bytes: {error}") from error


def from_json(packed):
    """The value of which `to_json` made this."""
    if packed is None:
        return None
    return base64.b64decode(packed["base64"]) if "base64" in packed else packed["json"]


def sha256(value):
    """The digest of a JSON value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
