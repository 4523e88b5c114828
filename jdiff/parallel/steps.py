"""One training step under three mappings over a mesh."""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jdiff.parallel.placement import check_mesh
from jdiff.training import LossFn, TrainState, apply_gradient, make_train_step, mean_gradient

__all__ = ["data_parallel"]


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
        TypeError: another mesh, what `make_train_step` raises.
    """
    check_mesh(mesh)
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
