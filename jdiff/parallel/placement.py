"""A mesh of devices, and where arrays live on it."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from jdiff._array import check_count
from jdiff._typing import PyTree

__all__ = ["data_mesh", "place", "replicate", "shard_batch", "state_sharding"]


def data_mesh(devices: Sequence[jax.Device] | None = None, *, fsdp: int = 1) -> Mesh:
    """A mesh over all devices of all processes, or over those given: one axis, `"data"`, or `"data"` and `"fsdp"`.

    Batches are split over all axes. A state placed by `state_sharding` is split over groups of `fsdp` neighbouring
    devices, each group holding one copy.

    Raises:
        ValueError: `devices` is empty, or `fsdp` does not divide their number.
        TypeError: `devices` are none, `fsdp` is no integer.
    """
    if not isinstance(devices, Iterable | None):
        raise TypeError(f"devices must be a sequence of devices, got {devices!r}")
    devices = jax.devices() if devices is None else list(devices)
    if not devices:
        raise ValueError("devices must not be empty")
    if wrong := [device for device in devices if not isinstance(device, jax.Device)]:
        raise TypeError(f"devices must be a sequence of devices, got {wrong[0]!r} in it")
    check_count(fsdp, "fsdp")
    if len(devices) % fsdp:
        raise ValueError(f"fsdp must divide the {len(devices)} devices, got {fsdp}")
    shape = {"data": len(devices) // fsdp} | ({"fsdp": fsdp} if fsdp > 1 else {})
    # make_mesh's own default, Explicit axes, puts shardings into types and refuses unplaced arrays.
    return jax.make_mesh(tuple(shape.values()), tuple(shape), axis_types=(AxisType.Auto,) * len(shape), devices=devices)


def state_sharding(
    state: PyTree, mesh: Mesh, *, min_size: int = 2**14, overrides: Mapping[str, int | None] | None = None
) -> PyTree:
    """Where each leaf of a training state lives: large ones split over the mesh's `"fsdp"` axis, the others everywhere.

    A leaf of at least `min_size` elements is split along its longest axis that the number of devices divides (the last
    of equal ones). Parameters, their average and Adam's moments have one shape and so one place. What is stored is
    sharded as in ZeRO's third stage (Rajbhandari et al. 2020, arXiv 1910.02054); a step gathers the parameters.

    Args:
        state: tree of arrays or `jax.ShapeDtypeStruct`s, such as a `TrainState`.
        mesh: from `data_mesh`. Without an axis `"fsdp"` every leaf is everywhere.
        min_size: elements below which a leaf stays whole.
        overrides: regular expressions, searched in a leaf's path (`"up_0/conv/kernel"`), to the axis along which
            it is split or None for none; the first that is found wins. Without `params/` they hold for average and
            optimiser as well.

    Returns:
        A tree of `NamedSharding`s like `state`.

    Raises:
        ValueError: an override that is no regular expression, names no leaf, or an axis that the devices do not divide;
            `min_size` below 0.
        TypeError: leaves without a shape, another mesh, overrides that are no mapping of expressions to axes,
            `min_size` no integer.
    """
    if not isinstance(mesh, AbstractMesh):  # a plan needs no devices
        check_mesh(mesh)
    check_count(min_size, "min_size", 0)
    if not isinstance(overrides, Mapping | None):
        raise TypeError(f"overrides must map regular expressions to axes, got {type(overrides).__name__}")
    size = mesh.shape.get("fsdp", 1)
    try:
        patterns = {re.compile(text): axis for text, axis in (overrides or {}).items()}
    except (re.error, TypeError) as error:
        raise ValueError(f"overrides must be regular expressions: {error}") from error
    for axis in patterns.values():
        if axis is not None:
            check_count(axis, "an axis of overrides", 0)
    used = set()

    def axis_of(path, shape):
        for pattern, axis in patterns.items():
            if pattern.search(path):
                used.add(pattern)
                if axis is not None and not (axis < len(shape) and shape[axis] % size == 0):
                    raise ValueError(
                        f"overrides: {path} of shape {shape} cannot be split along axis {axis} over {size} devices"
                    )
                return axis
        fitting = [axis for axis, length in enumerate(shape) if length % size == 0]
        if math.prod(shape) < min_size or not fitting:
            return None
        return max(fitting, key=lambda axis: (shape[axis], axis))

    def place(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if not hasattr(leaf, "shape"):
            raise TypeError(f"state must be made of arrays or their shapes, got {type(leaf).__name__} at {name!r}")
        axis = axis_of(name, tuple(leaf.shape))
        split = axis is not None and size > 1
        return NamedSharding(mesh, PartitionSpec(*(None,) * axis, "fsdp") if split else PartitionSpec())

    placed = jax.tree_util.tree_map_with_path(place, state)
    if idle := [pattern.pattern for pattern in patterns if pattern not in used]:
        raise ValueError(f"overrides {idle} are found in no path of the state, or only behind earlier ones")
    return placed


def replicate(tree: PyTree, mesh: Mesh) -> PyTree:
    """A copy of every leaf on every device of the mesh; see `place`.

    Raises:
        TypeError: another mesh, what `place` raises.
    """
    check_mesh(mesh)
    return place(tree, NamedSharding(mesh, PartitionSpec()))


def place(tree: PyTree, sharding: PyTree) -> PyTree:
    """Put every leaf where its sharding says: one for all, or a tree of them. Every process passes the same values.

    The copies share no buffer with `tree`: donating them leaves it alone.

    Raises:
        ValueError: shardings of another structure than the tree, or that do not fit a shape.
        TypeError: leaves that are no arrays or numbers, or no shardings.
    """
    if isinstance(sharding, jax.sharding.Sharding):
        sharding = jax.tree.map(lambda _: sharding, tree)
    got, want = ([jax.tree.structure(part)] for part in (sharding, tree))
    if got != want:
        raise ValueError(f"sharding must have the structure of tree, {want[0]}, got {got[0]}")
    for (path, leaf), where in zip(jax.tree_util.tree_leaves_with_path(tree), jax.tree.leaves(sharding), strict=True):
        name = jax.tree_util.keystr(path)
        if not isinstance(where, jax.sharding.Sharding):
            raise TypeError(f"sharding must be made of jax.sharding.Sharding, got {type(where).__name__} at {name!r}")
        if not hasattr(leaf, "dtype") and not isinstance(leaf, int | float | complex):
            raise TypeError(f"tree must be made of arrays, got {type(leaf).__name__} at {name!r}")
        try:
            where.shard_shape(np.shape(leaf))
        except ValueError as error:
            raise ValueError(f"sharding does not fit {np.shape(leaf)} at {name!r}: {error}") from error
    if jax.process_count() == 1:
        # device_put alone hands the source's own buffer to its device, and donating the result would delete the source.
        return jax.tree.map(lambda leaf, where: jax.device_put(jnp.array(leaf, copy=True), where), tree, sharding)

    def put(leaf, where):
        if jax.dtypes.issubdtype(getattr(leaf, "dtype", None), jax.dtypes.prng_key):
            return jax.random.wrap_key_data(put(jax.random.key_data(leaf), where), impl=jax.random.key_impl(leaf))
        # No process sees another's devices, and the values are equal by contract: each fills its own.
        leaf = np.asarray(leaf)
        return jax.make_array_from_callback(leaf.shape, where, lambda index: leaf[index])

    return jax.tree.map(put, tree, sharding)


def shard_batch(batch: PyTree, mesh: Mesh, *, axis: int = 0) -> PyTree:
    """Put a batch on the mesh, its leading axis (or `axis`, of several stacked batches) split over all devices.

    With one process the batch is the global batch. With several, each passes the rows its own devices shall hold, as
    many as every other, and the result is the global array with the processes' rows one after the other. Examples
    carry their `index` in the global batch with them, so that this order changes no noise.

    Args:
        batch: tree of arrays (rows, ...), rows divisible by the process's number of devices.
        mesh: from `data_mesh`.
        axis: where the rows are: 1 for the stacked batches of `data_parallel(steps=True)`.

    Returns:
        The tree of global arrays, (rows * processes, ...).

    Raises:
        ValueError: a leaf without that axis, leaves of different lengths, or a length that the devices do not divide.
        TypeError: another mesh, an axis that is no integer.
    """
    check_mesh(mesh)
    check_count(axis, "axis", 0)
    sharding = NamedSharding(mesh, PartitionSpec(*(None,) * axis, mesh.axis_names))
    local = len(mesh.local_devices)
    leaves = jax.tree_util.tree_leaves_with_path(batch)
    rows = {jax.tree_util.keystr(path): np.shape(leaf)[axis : axis + 1] for path, leaf in leaves}
    if len(set(rows.values())) > 1 or () in rows.values():
        raise ValueError(f"every leaf of a batch must have the same leading axis, got {rows}")
    for (length,) in set(rows.values()):
        if length == 0 or length % local:
            raise ValueError(f"a batch of {length} rows does not split over {local} devices of this process")
    if jax.process_count() == 1:
        return jax.device_put(batch, sharding)
    return jax.tree.map(lambda leaf: jax.make_array_from_process_local_data(sharding, np.asarray(leaf)), batch)


def check_mesh(mesh: Mesh) -> None:
    """Raise TypeError unless it is a mesh."""
    if not isinstance(mesh, Mesh):
        raise TypeError(f"mesh must be a jax.sharding.Mesh, as data_mesh makes it, got {type(mesh).__name__}")
