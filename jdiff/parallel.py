"""Data parallelism: a mesh, where arrays live on it, one training step under three mappings, and several processes."""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jdiff.training import LossFn, TrainState, make_train_step

PyTree = Any


def data_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with one axis, `"data"`, over all devices of all processes, or over those given.

    Raises:
        ValueError: `devices` is empty.
    """
    devices = jax.devices() if devices is None else list(devices)
    if not devices:
        raise ValueError("devices must not be empty")
    # make_mesh's own default, Explicit axes, puts shardings into types and refuses unplaced arrays.
    return jax.make_mesh((len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices)


def replicate(tree: PyTree, mesh: Mesh) -> PyTree:
    """A copy of every leaf on every device of the mesh; every process passes the same values.

    The copies share no buffer with `tree`: donating them leaves it alone.
    """
    sharding = NamedSharding(mesh, PartitionSpec())
    if jax.process_count() == 1:
        # device_put alone hands the source's own buffer to its device, and donating the result would delete the source.
        return jax.tree.map(lambda leaf: jax.device_put(jnp.array(leaf, copy=True), sharding), tree)

    def put(leaf):
        if jax.dtypes.issubdtype(getattr(leaf, "dtype", None), jax.dtypes.prng_key):
            return jax.random.wrap_key_data(put(jax.random.key_data(leaf)), impl=jax.random.key_impl(leaf))
        # No process sees another's devices, and the values are equal by contract: each fills its own.
        leaf = np.asarray(leaf)
        return jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index])

    return jax.tree.map(put, tree)


def shard_batch(batch: PyTree, mesh: Mesh) -> PyTree:
    """Put a batch on the mesh, its leading axis split over all devices.

    With one process the batch is the global batch. With several, each passes the rows its own devices shall hold, as
    many as every other, and the result is the global array with the processes' rows one after the other. Examples
    carry their `index` in the global batch with them, so that this order changes no noise.

    Args:
        batch: tree of arrays (rows, ...), rows divisible by the process's number of devices.
        mesh: from `data_mesh`.

    Returns:
        The tree of global arrays, (rows * processes, ...).

    Raises:
        ValueError: a leaf without leading axis, leaves of different lengths, or a length that the devices do not
            divide.
    """
    sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    local = len(mesh.local_devices)
    rows = {jax.tree_util.keystr(path): np.shape(leaf)[:1] for path, leaf in jax.tree_util.tree_leaves_with_path(batch)}
    if len(set(rows.values())) > 1 or () in rows.values():
        raise ValueError(f"every leaf of a batch must have the same leading axis, got {rows}")
    for (length,) in set(rows.values()):
        if length == 0 or length % local:
            raise ValueError(f"a batch of {length} rows does not split over {local} devices of this process")
    if jax.process_count() == 1:
        return jax.device_put(batch, sharding)
    return jax.tree.map(lambda leaf: jax.make_array_from_process_local_data(sharding, np.asarray(leaf)), batch)


def data_parallel(
    loss_fn: LossFn,
    tx: optax.GradientTransformation,
    mesh: Mesh,
    how: Literal["jit", "shard_map", "pmap"] = "jit",
    *,
    ema_decay: float,
    ema_warmup: bool = True,
    donate: bool = True,
    compiler_options: Mapping[str, Any] | None = None,
) -> Callable[[TrainState, jax.Array, Mapping[str, Any]], tuple[TrainState, dict[str, jax.Array]]]:
    """Compile `jdiff.training.make_train_step` over a mesh: state replicated, batch split, gradients averaged.

    The three mappings compute the same update, on any number of devices: keys come from an example's position in the
    global batch. `jit` leaves the collectives to XLA, `shard_map` writes them out, `pmap` (in maintenance mode in
    JAX, one process only) is there for those who need it.

    Args:
        loss_fn: (params, keys, batch) -> (per-example loss, metrics), see `make_train_step`.
        tx: an optax transformation.
        mesh: from `data_mesh`.
        how: the mapping.
        ema_decay: see `make_train_step`.
        ema_warmup: see `make_train_step`.
        donate: reuse the old state's memory for the new one; the old state is gone after the call.
        compiler_options: as in `jax.jit`; the step can then not be called inside another `jit`.

    Returns:
        A jitted `(state, key, batch) -> (state, metrics)` (it has `.lower`), for a state from `replicate` or one that
        is on no particular device, and a batch from `shard_batch` or, with one process, of NumPy arrays.

    Raises:
        ValueError: unknown `how`; `pmap` with several processes or mesh axes; what `make_train_step` raises.
    """
    if how not in ("jit", "shard_map", "pmap"):
        raise ValueError(f"how must be 'jit', 'shard_map' or 'pmap', got {how!r}")
    whole, split = PartitionSpec(), PartitionSpec(mesh.axis_names)
    axis_name = None if how == "jit" else mesh.axis_names
    step = make_train_step(loss_fn, tx, ema_decay=ema_decay, ema_warmup=ema_warmup, axis_name=axis_name)
    if how == "shard_map":
        step = jax.shard_map(step, mesh=mesh, in_specs=(whole, whole, split), out_specs=(whole, whole))
    elif how == "pmap":
        step = _pmap(step, mesh)
    whole, split = NamedSharding(mesh, whole), NamedSharding(mesh, split)
    return jax.jit(
        step,
        in_shardings=(whole, whole, split),
        out_shardings=(whole, whole),
        donate_argnums=(0,) if donate else (),
        compiler_options=compiler_options,
    )


def start_processes(
    coordinator: str | None = None,
    processes: int | None = None,
    index: int | None = None,
    *,
    detect: bool = False,
    timeout: int = 300,
    heartbeat: int = 100,
) -> None:
    """Join this process to the others of the run; with one process, do nothing. Call it before anything else of JAX.

    The flags win. A flag not given is taken from JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID; failing
    these, where SLURM (inside `srun`), Open MPI or a TPU worker list announces several processes,
    `jax.distributed.initialize` finds out the rest. A Cloud TPU VM announces itself by its metadata server only: pass
    `detect=True` there.

    From then on JAX catches SIGTERM as a notice of pre-emption: it does not end the process any more.

    Args:
        coordinator: "host:port" of process 0, the same for all.
        processes: how many there are.
        index: which of them this is, 0 <= index < processes.
        detect: always ask JAX's cluster detection for what is missing.
        timeout: seconds to wait for the others.
        heartbeat: seconds of silence after which a process counts as dead, and the others abort.

    Raises:
        ValueError: flags that are incomplete or contradict each other.
        RuntimeError: JAX has been used already.
    """
    if jax.distributed.is_initialized():
        return
    env = os.environ
    coordinator = coordinator or env.get("JAX_COORDINATOR_ADDRESS")
    processes = _integer("JAX_NUM_PROCESSES") if processes is None else processes
    index = _integer("JAX_PROCESS_ID") if index is None else index
    detect = detect or _announced() > 1
    given = {"coordinator": coordinator, "processes": processes, "index": index}
    if processes is not None and processes < 1:
        raise ValueError(f"processes must be at least 1, got {processes}")
    if index is not None and (index < 0 or (processes is not None and index >= processes)):
        raise ValueError(f"index must lie in [0, processes), got index={index}, processes={processes}")
    if processes == 1 or (not detect and all(value is None for value in given.values())):
        return
    if not detect and (missing := [name for name, value in given.items() if value is None]):
        raise ValueError(f"{', '.join(missing)} missing: {given}, and no SLURM, Open MPI or TPU environment to ask")
    jax.distributed.initialize(
        coordinator_address=coordinator,
        num_processes=processes,
        process_id=index,
        cluster_detection_method=None if detect else "deactivate",
        initialization_timeout=timeout,
        heartbeat_timeout_seconds=heartbeat,
    )


def _pmap(step, mesh):
    if jax.process_count() > 1 or len(mesh.axis_names) != 1:
        raise ValueError(
            "how='pmap' drives one process and one mesh axis; use 'jit' or 'shard_map' "
            f"(processes: {jax.process_count()}, axes: {mesh.axis_names})"
        )
    (axis,) = mesh.axis_names
    mapped = jax.pmap(
        step, axis_name=axis, in_axes=(None, None, 0), out_axes=(None, None), devices=tuple(mesh.devices.flat)
    )

    def call(state, key, batch):
        split = lambda leaf: leaf.reshape(mesh.size, leaf.shape[0] // mesh.size, *leaf.shape[1:])
        return mapped(state, key, jax.tree.map(split, batch))

    return call


def _integer(name):
    value = os.environ.get(name)
    if value is not None and not value.isdecimal():
        raise ValueError(f"{name} must be an integer, got {value!r}")
    return None if value is None else int(value)


def _announced():
    """How many processes the launcher's environment speaks of; 1 where it speaks of none."""
    env = os.environ
    if "SLURM_STEP_NODELIST" in env and "SLURM_PROCID" in env:
        return _integer("SLURM_NTASKS") or 1
    if "OMPI_COMM_WORLD_SIZE" in env:
        return _integer("OMPI_COMM_WORLD_SIZE")
    workers = env.get("TPU_PROCESS_ADDRESSES") or env.get("TPU_WORKER_HOSTNAMES") or ""
    return len(workers.split(","))
