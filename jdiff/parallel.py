"""Data parallelism: a mesh, where arrays live on it, one training step under three mappings, and several processes."""

import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jdiff._typing import PyTree
from jdiff.training import LossFn, TrainState, apply_gradient, make_train_step, mean_gradient

__all__ = ["data_mesh", "data_parallel", "place", "replicate", "shard_batch", "start_processes", "state_sharding"]


def data_mesh(devices: Sequence[jax.Device] | None = None, *, fsdp: int = 1) -> Mesh:
    """A mesh over all devices of all processes, or over those given: one axis, `"data"`, or `"data"` and `"fsdp"`.

    Batches are split over all axes. A state placed by `state_sharding` is split over groups of `fsdp` neighbouring
    devices, each group holding one copy.

    Raises:
        ValueError: `devices` is empty, or `fsdp` does not divide their number.
    """
    devices = jax.devices() if devices is None else list(devices)
    if not devices:
        raise ValueError("devices must not be empty")
    if fsdp < 1 or len(devices) % fsdp:
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
        ValueError: an override that is no regular expression, names no leaf, or an axis that the devices do not divide.
    """
    size = mesh.shape.get("fsdp", 1)
    try:
        patterns = {re.compile(text): axis for text, axis in (overrides or {}).items()}
    except re.error as error:
        raise ValueError(f"overrides must be regular expressions: {error}") from error
    used = set()

    def axis_of(path, shape):
        for pattern, axis in patterns.items():
            if pattern.search(path):
                used.add(pattern)
                if axis is not None and not (0 <= axis < len(shape) and shape[axis] % size == 0):
                    raise ValueError(f"{path} of shape {shape} cannot be split along axis {axis} over {size} devices")
                return axis
        fitting = [axis for axis, length in enumerate(shape) if length % size == 0]
        if math.prod(shape) < min_size or not fitting:
            return None
        return max(fitting, key=lambda axis: (shape[axis], axis))

    def place(path, leaf):
        axis = axis_of(jax.tree_util.keystr(path, simple=True, separator="/"), tuple(leaf.shape))
        split = axis is not None and size > 1
        return NamedSharding(mesh, PartitionSpec(*(None,) * axis, "fsdp") if split else PartitionSpec())

    placed = jax.tree_util.tree_map_with_path(place, state)
    if idle := [pattern.pattern for pattern in patterns if pattern not in used]:
        raise ValueError(f"overrides {idle} are found in no path of the state, or only behind earlier ones")
    return placed


def replicate(tree: PyTree, mesh: Mesh) -> PyTree:
    """A copy of every leaf on every device of the mesh; see `place`."""
    return place(tree, NamedSharding(mesh, PartitionSpec()))


def place(tree: PyTree, sharding: PyTree) -> PyTree:
    """Put every leaf where its sharding says: one for all, or a tree of them. Every process passes the same values.

    The copies share no buffer with `tree`: donating them leaves it alone.
    """
    if isinstance(sharding, jax.sharding.Sharding):
        sharding = jax.tree.map(lambda _: sharding, tree)
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
    """
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


def data_parallel(
    loss_fn: LossFn,
    tx: optax.GradientTransformation,
    mesh: Mesh,
    how: Literal["jit", "shard_map", "pmap"] = "jit",
    *,
    ema_decay: float,
    ema_warmup: bool = True,
    accumulate: int = 1,
    steps: bool = False,
    sharding: TrainState | None = None,
    donate: bool = True,
    compiler_options: Mapping[str, Any] | None = None,
) -> Callable[[TrainState, jax.Array, Mapping[str, Any]], tuple[TrainState, dict[str, jax.Array]]]:
    """Compile `jdiff.training.make_train_step` over a mesh: batch split, gradients averaged, state placed as told.

    The three mappings compute the same update, on any number of devices: keys come from an example's position in the
    global batch, and its weights or mask (see `jdiff.training.mean_gradient`) are shares of their sum over it. `jit`
    leaves the collectives to XLA, `shard_map` writes those of the gradient out, `pmap` (in maintenance mode in JAX, one
    process only) is there for those who need it.

    With a `sharding` over `"fsdp"` a step gathers the parameters, and each device keeps the part of the gradient, of
    the optimiser's work and of the average that belongs to its part of the state.

    Args:
        loss_fn: (params, keys, batch) -> (per-example loss, metrics), see `make_train_step`.
        tx: an optax transformation.
        mesh: from `data_mesh`.
        how: the mapping.
        ema_decay: see `make_train_step`.
        ema_warmup: see `make_train_step`.
        accumulate: see `make_train_step`; every device's part of the batch is divided so. `shard_map` reduces the sum
            of the parts, `jit` and XLA each of them.
        steps: several steps a call: the batch has a leading axis, one entry a step, and so have the metrics. It spares
            the host's work between short steps; on a CPU the loop is unrolled, and compiles as long as it is.
        sharding: of the state, from `state_sharding`; None: a whole copy on every device.
        donate: reuse the old state's memory for the new one; the old state is gone after the call.
        compiler_options: as in `jax.jit`; the step can then not be called inside another `jit`.

    Returns:
        A jitted `(state, key, batch) -> (state, metrics)` (it has `.lower`), for a state from `place` (`replicate`
        without a sharding) or one that is on no particular device, and a batch from `shard_batch` or, with one process,
        of NumPy arrays.

    Raises:
        ValueError: unknown `how`; `pmap` with several processes, mesh axes or a sharding; what `make_train_step`
            raises.
    """
    if how not in ("jit", "shard_map", "pmap"):
        raise ValueError(f"how must be 'jit', 'shard_map' or 'pmap', got {how!r}")
    whole, split = PartitionSpec(), PartitionSpec(mesh.axis_names)
    everywhere = NamedSharding(mesh, whole)
    if how == "pmap":
        if sharding is not None:
            raise ValueError("how='pmap' keeps the whole state on every device; use 'jit' or 'shard_map'")
        options: dict[str, Any] = {"ema_decay": ema_decay, "ema_warmup": ema_warmup, "accumulate": accumulate}
        step = _pmap(make_train_step(loss_fn, tx, axis_name=mesh.axis_names, **options), mesh)
    else:
        axes = mesh.axis_names if how == "shard_map" else None
        gradient = mean_gradient(loss_fn, accumulate=accumulate, axis_name=axes)
        specs = whole if sharding is None else jax.tree.map(lambda place: place.spec, sharding.params)
        if how == "shard_map":
            gradient = jax.shard_map(
                _written_out(gradient, mesh, specs),
                mesh=mesh,
                in_specs=(specs, whole, whole, split),
                out_specs=(specs, whole),
            )
        elif sharding is not None:
            gradient = _left_to_xla(gradient, everywhere, sharding.params)
        apply = apply_gradient(tx, ema_decay=ema_decay, ema_warmup=ema_warmup)

        def step(state, key, batch):
            return apply(state, *gradient(state.params, state.step, key, batch))

    call, rows = step, split
    if steps:
        rows = PartitionSpec(None, mesh.axis_names)

        def call(state, key, batches):
            one = lambda state, batch: step(state, key, batch)
            # XLA:CPU runs backward convolutions inside a loop many times slower than outside.
            return jax.lax.scan(one, state, batches, unroll=jax.default_backend() == "cpu")

    state_place = everywhere if sharding is None else sharding
    return jax.jit(
        call,
        in_shardings=(state_place, everywhere, NamedSharding(mesh, rows)),
        out_shardings=(state_place, everywhere),
        donate_argnums=(0,) if donate else (),
        compiler_options=None if compiler_options is None else dict(compiler_options),
    )


def _written_out(gradient, mesh, specs):
    """The gradient inside `shard_map`: gather parameters, differentiate, keep this device's part of the mean."""
    names = mesh.axis_names
    where = lambda spec: spec.index("fsdp") if "fsdp" in spec else None

    others = tuple(name for name in names if name != "fsdp")

    def gather(leaf, spec):
        # shard_map would sum the gradient of a replicated value over the devices; that of a varying one stays local.
        if where(spec) is None:
            return jax.lax.pcast(leaf, names, to="varying")
        leaf = jax.lax.all_gather(leaf, "fsdp", axis=where(spec), tiled=True)
        return jax.lax.pcast(leaf, others, to="varying")

    def scatter(leaf, spec):
        if where(spec) is None:
            return jax.lax.pmean(leaf, names)
        part = jax.lax.psum_scatter(leaf, "fsdp", scatter_dimension=where(spec), tiled=True)
        return jax.lax.psum(part, others) / mesh.size

    def local(params, step, key, batch):
        spread = jax.tree.map(lambda _: specs, params) if isinstance(specs, PartitionSpec) else specs
        grads, metrics = gradient(jax.tree.map(gather, params, spread), step, key, batch)
        return jax.tree.map(scatter, grads, spread), jax.lax.pmean(metrics, names)

    return local


def _left_to_xla(gradient, everywhere, sharding):
    """The gradient under `jit`: parameters needed everywhere, gradients where the parameters live."""

    def constrained(params, step, key, batch):
        params = jax.tree.map(lambda leaf: jax.lax.with_sharding_constraint(leaf, everywhere), params)
        grads, metrics = gradient(params, step, key, batch)
        return jax.lax.with_sharding_constraint(grads, sharding), metrics

    return constrained


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
        shutdown_timeout_seconds=heartbeat,  # one that fails waits no longer for the others to end as well
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
