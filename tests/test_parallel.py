"""Three mappings, any number of devices: one result."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from parallel_cases import BATCH, KEY, TRANSFORMS, batches, loss_fn, reference, start

from jdiff import parallel, training


@pytest.mark.slow_but("jit-8-sgd", "jit-4-adam", "shard_map-8-adam", "shard_map-2-sgd", "pmap-8-adam", "pmap-1-sgd")
@pytest.mark.parametrize(("devices", "name"), [(1, "sgd"), (2, "sgd"), (4, "adam"), (8, "sgd"), (8, "adam")])
@pytest.mark.parametrize("how", ["jit", "shard_map", "pmap"])
def test_one_result(how, devices, name):
    tx, tolerance = TRANSFORMS[name]
    traces = []

    def counted(params, keys, batch):
        traces.append(keys.shape)
        return loss_fn(params, keys, batch)

    mesh = parallel.data_mesh(jax.devices()[:devices])
    step = parallel.data_parallel(counted, tx, mesh, how, ema_decay=0.99)
    state = parallel.replicate(training.init_state(start(), tx), mesh)
    expected, expected_metrics = reference(name)
    for batch, expected_metric in zip(batches(), expected_metrics, strict=True):
        old = state
        state, metrics = step(state, KEY, parallel.shard_batch(batch, mesh))
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old))
        assert metrics.keys() == expected_metric.keys()
        for metric in metrics:
            np.testing.assert_allclose(metrics[metric], expected_metric[metric], rtol=tolerance, atol=tolerance)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), state, expected)
    assert state.params["w1"].sharding.is_equivalent_to(NamedSharding(mesh, PartitionSpec()), 2)
    assert traces == [(BATCH if how == "jit" else BATCH // devices,)]


@pytest.mark.slow_but("jit-1-1-2", "jit-8-4-2", "shard_map-8-4-2", "pmap-8-1-1")
@pytest.mark.parametrize(
    ("how", "devices", "fsdp", "accumulate"),
    [
        (how, *rest)
        for how in ("jit", "shard_map", "pmap")
        for rest in ((1, 1, 2), (4, 1, 2), (8, 1, 1), (8, 4, 2))
        if how != "pmap" or rest[1] == 1
    ],
)
def test_a_padded_batch_is_the_unpadded_one(how, devices, fsdp, accumulate):
    """11 examples of unequal weights and 5 of padding: the update of the 11 alone, wherever the padding lies."""
    tx, rng = TRANSFORMS["sgd"][0], np.random.default_rng(5)
    full = next(batches()) | {"weight": rng.uniform(0.2, 3, BATCH).astype(np.float32)}
    rows = {name: value[:11] for name, value in full.items()}
    expected, expected_metrics = training.make_train_step(loss_fn, tx, ema_decay=0.99)(
        training.init_state(start(), tx), KEY, rows
    )
    mesh = parallel.data_mesh(jax.devices()[:devices], fsdp=fsdp)
    state = training.init_state(start(), tx)
    sharding = parallel.state_sharding(state, mesh, min_size=1) if fsdp > 1 else None
    step = parallel.data_parallel(loss_fn, tx, mesh, how, ema_decay=0.99, accumulate=accumulate, sharding=sharding)
    state = parallel.replicate(state, mesh) if sharding is None else parallel.place(state, sharding)
    padded = full | {"mask": np.arange(BATCH) < 11}  # on 8 devices the last two hold nothing but padding
    state, metrics = step(state, KEY, parallel.shard_batch(padded, mesh))
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-6)
    jax.tree.map(close, (state, metrics), (expected, expected_metrics))


def test_the_old_state_can_be_kept():
    tx = TRANSFORMS["sgd"][0]
    mesh = parallel.data_mesh(jax.devices()[:2])
    step = parallel.data_parallel(loss_fn, tx, mesh, ema_decay=0.99, donate=False)
    state = training.init_state(start(), tx)
    new, _ = step(state, KEY, next(batches()))  # NumPy batch, state on no particular device
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((state, new)))


@pytest.mark.parametrize(
    ("how", "devices", "parts"), [("jit", 1, 2), ("jit", 4, 4), ("shard_map", 4, 2), ("pmap", 2, 4)]
)
def test_accumulated_gradients_are_the_batch_s(how, devices, parts):
    tx, tolerance = TRANSFORMS["sgd"]
    mesh = parallel.data_mesh(jax.devices()[:devices])
    seen = []

    def counted(params, keys, batch):
        seen.append(len(keys))
        return loss_fn(params, keys, batch)

    step = parallel.data_parallel(counted, tx, mesh, how, ema_decay=0.99, accumulate=parts)
    state = parallel.replicate(training.init_state(start(), tx), mesh)
    for batch, expected in zip(batches(), reference("sgd")[1], strict=True):
        state, metrics = step(state, KEY, parallel.shard_batch(batch, mesh))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), metrics, expected)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=tolerance), state, reference("sgd")[0])
    assert set(seen) == {BATCH // parts if how == "jit" else BATCH // parts // devices}


@pytest.mark.parametrize("how", ["jit", "shard_map", "pmap"])
def test_several_steps_a_call(how):
    tx, tolerance = TRANSFORMS["adam"]
    mesh = parallel.data_mesh(jax.devices()[:4])
    step = parallel.data_parallel(loss_fn, tx, mesh, how, ema_decay=0.99, steps=True)
    state = parallel.replicate(training.init_state(start(), tx), mesh)
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *batches())
    state, metrics = step(state, KEY, parallel.shard_batch(stacked, mesh, axis=1))
    expected = jax.tree.map(lambda *leaves: np.stack(leaves), *reference("adam")[1])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), metrics, expected)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=tolerance), state, reference("adam")[0])


def test_a_step_does_not_touch_the_host():
    tx = TRANSFORMS["adam"][0]
    mesh = parallel.data_mesh()
    step = parallel.data_parallel(loss_fn, tx, mesh, ema_decay=0.99)
    state, key = parallel.replicate((training.init_state(start(), tx), KEY), mesh)
    placed = [parallel.shard_batch(batch, mesh) for batch in batches()]
    state, _ = step(state, key, placed[0])
    with jax.transfer_guard("disallow"):
        for batch in placed[1:]:
            state, _ = step(state, key, batch)
        with pytest.raises(jax.errors.JaxRuntimeError, match="transfer"):
            step(state, key, next(batches()))  # the guard guards


def test_placing():
    mesh = parallel.data_mesh(jax.devices()[:4])
    assert mesh.shape == {"data": 4}
    assert parallel.data_mesh().size == 8
    source = {"a": jnp.arange(3.0), "key": KEY}
    placed = parallel.replicate(source, mesh)
    assert len(placed["a"].addressable_shards) == 4
    assert all(shard.data.shape == (3,) for shard in placed["a"].addressable_shards)
    jax.tree.map(lambda leaf: leaf.delete(), placed)
    np.testing.assert_array_equal(source["a"], [0, 1, 2])  # donating the copies would leave the source alone
    host = np.arange(64.0, dtype=np.float32)
    step = jax.jit(lambda x: x + 1, donate_argnums=0)
    step(parallel.replicate(host, mesh)).block_until_ready()
    np.testing.assert_array_equal(host, np.arange(64.0))

    batch = parallel.shard_batch({"x": np.arange(16.0).reshape(8, 2), "index": np.arange(8)}, mesh)
    for n, shard in enumerate(batch["index"].addressable_shards):
        np.testing.assert_array_equal(shard.data, [2 * n, 2 * n + 1])
    assert batch["x"].shape == (8, 2)


def test_bad_input_is_named():
    mesh = parallel.data_mesh(jax.devices()[:4])
    with pytest.raises(ValueError, match="6 rows does not split over 4"):
        parallel.shard_batch({"x": np.zeros((6, 2)), "index": np.arange(6)}, mesh)
    with pytest.raises(ValueError, match=r"same leading axis, got .*'x'.*: \(8,\)"):
        parallel.shard_batch({"x": np.zeros((8, 2)), "index": np.arange(4)}, mesh)
    with pytest.raises(ValueError, match="same leading axis"):
        parallel.shard_batch({"x": np.float32(1)}, mesh)
    with pytest.raises(ValueError, match="0 rows"):
        parallel.shard_batch({"x": np.zeros((0, 2))}, mesh)
    with pytest.raises(ValueError, match="'jit', 'shard_map' or 'pmap', got 'vmap'"):
        parallel.data_parallel(loss_fn, optax.sgd(1.0), mesh, "vmap", ema_decay=0.9)
    with pytest.raises(ValueError, match="must not be empty"):
        parallel.data_mesh([])
    square = jax.make_mesh((2, 2), ("data", "fsdp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    with pytest.raises(ValueError, match="one mesh axis"):
        parallel.data_parallel(loss_fn, optax.sgd(1.0), square, "pmap", ema_decay=0.9)
    with pytest.raises(ValueError, match="accumulate must be at least 1, got 0"):
        parallel.data_parallel(loss_fn, optax.sgd(1.0), mesh, ema_decay=0.9, accumulate=0)
    step = parallel.data_parallel(loss_fn, optax.sgd(1.0), mesh, ema_decay=0.9, accumulate=3)
    with pytest.raises(ValueError, match="batch of 16 does not divide into accumulate = 3"):
        step(training.init_state(start(), optax.sgd(1.0)), KEY, next(batches()))


@pytest.mark.parametrize("how", ["jit", "shard_map"])
def test_a_batch_may_be_split_over_two_axes(how):
    tx, tolerance = TRANSFORMS["sgd"]
    mesh = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    step = parallel.data_parallel(loss_fn, tx, mesh, how, ema_decay=0.99)
    state = parallel.replicate(training.init_state(start(), tx), mesh)
    for batch in batches():
        state, _ = step(state, KEY, parallel.shard_batch(batch, mesh))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=tolerance), state, reference("sgd")[0])
