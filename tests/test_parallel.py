"""Three mappings, any number of devices, one or two processes: one result."""

import os
import pathlib
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from experiments.plan import collectives
from jdiff import parallel, training

BATCH, DIM, HIDDEN, STEPS = 16, 5, 8, 4
KEY = jax.random.key(3)
TRANSFORMS = {"sgd": (optax.sgd(0.1), 1e-6), "adam": (training.adam(1e-2, clip=1.0), 1e-5)}


def loss_fn(params, keys, batch):
    """A small denoising loss: noise, times and dropout come from the example's key, one offset from the batch's."""
    offset = jax.random.uniform(batch["key"])

    def one(key, x):
        draws = jax.random.normal(key, (DIM + 1 + HIDDEN,))  # one draw: compiling more of them is what costs
        eps, t, drop = draws[:DIM], jax.nn.sigmoid(draws[DIM] + offset), draws[DIM + 1 :] > 1
        hidden = jnp.where(drop, 0.0, jnp.tanh((x + t * eps) @ params["w1"] + params["b1"]))
        return jnp.mean((hidden @ params["w2"] - eps) ** 2), t

    loss, t = jax.vmap(one)(keys, batch["x"])
    return loss, {"t": t, "constant": jnp.float32(2.5)}


def start():
    rng = np.random.default_rng(1)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape).astype(np.float32) / 2)
    return {"w1": draw(DIM, HIDDEN), "b1": draw(HIDDEN), "w2": draw(HIDDEN, DIM)}


def batches():
    rng = np.random.default_rng(2)
    for _ in range(STEPS):
        yield {"x": rng.normal(size=(BATCH, DIM)).astype(np.float32), "index": np.arange(BATCH)}


@pytest.fixture(scope="module")
def reference():
    """The unmapped step on one device."""
    results = {}
    for name, (tx, _) in TRANSFORMS.items():
        step = jax.jit(training.make_train_step(loss_fn, tx, ema_decay=0.99))
        state, losses = training.init_state(start(), tx), []
        for batch in batches():
            state, metrics = step(state, KEY, batch)
            losses.append(metrics)
        results[name] = state, losses
    return results


@pytest.mark.slow_but("jit-8-sgd", "jit-4-adam", "shard_map-8-adam", "shard_map-2-sgd", "pmap-8-adam", "pmap-1-sgd")
@pytest.mark.parametrize(("devices", "name"), [(1, "sgd"), (2, "sgd"), (4, "adam"), (8, "sgd"), (8, "adam")])
@pytest.mark.parametrize("how", ["jit", "shard_map", "pmap"])
def test_one_result(how, devices, name, reference):
    tx, tolerance = TRANSFORMS[name]
    traces = []

    def counted(params, keys, batch):
        traces.append(keys.shape)
        return loss_fn(params, keys, batch)

    mesh = parallel.data_mesh(jax.devices()[:devices])
    step = parallel.data_parallel(counted, tx, mesh, how, ema_decay=0.99)
    state = parallel.replicate(training.init_state(start(), tx), mesh)
    expected, expected_metrics = reference[name]
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
@pytest.mark.parametrize(("devices", "fsdp", "accumulate"), [(1, 1, 2), (4, 1, 2), (8, 1, 1), (8, 4, 2)])
@pytest.mark.parametrize("how", ["jit", "shard_map", "pmap"])
def test_a_padded_batch_is_the_unpadded_one(how, devices, fsdp, accumulate):
    """11 examples of unequal weights and 5 of padding: the update of the 11 alone, wherever the padding lies."""
    if how == "pmap" and fsdp > 1:
        return
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


def test_the_old_state_can_be_kept(reference):
    tx = TRANSFORMS["sgd"][0]
    mesh = parallel.data_mesh(jax.devices()[:2])
    step = parallel.data_parallel(loss_fn, tx, mesh, ema_decay=0.99, donate=False)
    state = training.init_state(start(), tx)
    new, _ = step(state, KEY, next(batches()))  # NumPy batch, state on no particular device
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((state, new)))


def compiled_step(how, **options):
    tx = TRANSFORMS["sgd"][0]
    mesh = parallel.data_mesh(fsdp=options.pop("fsdp", 1))
    state, batch = training.init_state(start(), tx), next(batches())
    if "fsdp" in mesh.axis_names:
        options["sharding"] = parallel.state_sharding(state, mesh, min_size=1)
    step = parallel.data_parallel(loss_fn, tx, mesh, how, ema_decay=0.99, **options)
    return step.lower(state, KEY, batch).compile().as_text()


PARAMETER_BYTES = 4 * (DIM * HIDDEN + HIDDEN + HIDDEN * DIM)
METRIC_BYTES = 4 * 3  # loss, t, constant


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("how", ["jit", "shard_map", "pmap"])
def test_gradients_are_what_devices_exchange(how, accumulate):
    """Data parallel: the gradient is reduced once, with the scalar metrics, and nothing else moves."""
    text = compiled_step(how, accumulate=accumulate)
    moved = collectives(text)
    assert moved.keys() == {"all-reduce"}
    # XLA reduces the gradient of each part; written out, it is reduced once.
    parts = accumulate if how == "jit" else 1
    assert PARAMETER_BYTES * parts <= moved["all-reduce"] <= (PARAMETER_BYTES + METRIC_BYTES) * parts
    assert 'custom_call_target="xla_' not in text


def test_weights_cost_one_scalar():
    for how in ("shard_map", "jit"):
        tx, mesh = TRANSFORMS["sgd"][0], parallel.data_mesh()
        step = parallel.data_parallel(loss_fn, tx, mesh, how, ema_decay=0.99)
        batch = next(batches()) | {"mask": np.ones(BATCH, bool)}
        moved = collectives(step.lower(training.init_state(start(), tx), KEY, batch).compile().as_text())
        assert moved.keys() == {"all-reduce"}
        assert moved["all-reduce"] <= PARAMETER_BYTES + METRIC_BYTES + 4


def test_fsdp_gathers_parameters_and_scatters_gradients():
    """Written out: parameters come once, gradients leave once, each device keeps its part."""
    moved = collectives(compiled_step("shard_map", fsdp=8))
    assert moved.keys() == {"all-gather", "reduce-scatter", "all-reduce"}
    assert moved["all-gather"] == PARAMETER_BYTES
    assert moved["reduce-scatter"] == PARAMETER_BYTES / 8
    # Metrics, and the norm of the gradient, one number a leaf.
    assert moved["all-reduce"] <= METRIC_BYTES + 4 * 3


def test_fsdp_by_xla():
    """XLA:CPU has no pass that makes an all-reduce and a slice one reduce-scatter: the gradient is reduced whole."""
    moved = collectives(compiled_step("jit", fsdp=8))
    assert moved.keys() <= {"all-gather", "reduce-scatter", "all-reduce"}
    assert moved["all-gather"] == PARAMETER_BYTES
    reduced = moved.get("reduce-scatter", 0) * 8 + moved["all-reduce"]
    assert PARAMETER_BYTES <= reduced <= PARAMETER_BYTES + METRIC_BYTES + 4 * 3


@pytest.mark.slow_but("jit-8-adam", "jit-2-sgd", "shard_map-4-adam", "shard_map-8-sgd")
@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("fsdp", [2, 4, 8])
@pytest.mark.parametrize("how", ["jit", "shard_map"])
def test_fsdp_is_one_result(how, fsdp, name, reference):
    tx, tolerance = TRANSFORMS[name]
    mesh = parallel.data_mesh(fsdp=fsdp)
    state = training.init_state(start(), tx)
    sharding = parallel.state_sharding(state, mesh, min_size=1)
    step = parallel.data_parallel(loss_fn, tx, mesh, how, ema_decay=0.99, sharding=sharding)
    state = parallel.place(state, sharding)
    for batch, expected in zip(batches(), reference[name][1], strict=True):
        state, metrics = step(state, KEY, parallel.shard_batch(batch, mesh))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), metrics, expected)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), state, reference[name][0]
    )
    shards = {leaf.sharding.shard_shape(leaf.shape) for leaf in jax.tree.leaves((state.params, state.ema))}
    assert shards == {(DIM, HIDDEN // fsdp), (HIDDEN // fsdp,), (HIDDEN // fsdp, DIM)}
    if name == "adam":
        moments = state.opt_state[1].mu
        jax.tree.map(lambda a, b: np.testing.assert_equal(a.sharding, b.sharding), moments, state.params)


def test_what_is_sharded():
    mesh = parallel.data_mesh(fsdp=4)
    assert mesh.shape == {"data": 2, "fsdp": 4}
    shapes = {"big": (6, 16, 8), "equal": (8, 8), "small": (4, 2), "odd": (33, 35), "scalar": ()}
    state = {"params": {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}}
    spec = lambda **options: {
        name: tuple(place.spec) for name, place in parallel.state_sharding(state, mesh, **options)["params"].items()
    }
    assert spec(min_size=9) == {
        "big": (None, "fsdp"),
        "equal": (None, "fsdp"),
        "small": (),
        "odd": (),
        "scalar": (),
    }
    assert spec(min_size=64)["equal"] == (None, "fsdp") and spec(min_size=65)["equal"] == ()
    overridden = spec(min_size=9, overrides={"big": 2, "params/e": None, "small$": 0})
    assert overridden["big"] == (None, None, "fsdp") and overridden["equal"] == () and overridden["small"] == ("fsdp",)
    whole = parallel.state_sharding(state, parallel.data_mesh(), min_size=1)
    assert all(place.is_fully_replicated for place in jax.tree.leaves(whole))
    with pytest.raises(ValueError, match=r"params/odd of shape \(33, 35\) cannot be split along axis 0 over 4 devices"):
        spec(overrides={"odd": 0})
    with pytest.raises(ValueError, match=r"overrides \['bih'\] are found in no path"):
        spec(overrides={"bih": 0})
    with pytest.raises(ValueError, match="regular expressions"):
        spec(overrides={"(": 0})
    with pytest.raises(ValueError, match="fsdp must divide the 8 devices, got 3"):
        parallel.data_mesh(fsdp=3)
    with pytest.raises(ValueError, match="whole state on every device"):
        parallel.data_parallel(loss_fn, optax.sgd(1.0), mesh, "pmap", ema_decay=0.9, sharding=state)


@pytest.mark.parametrize(
    ("how", "devices", "parts"), [("jit", 1, 2), ("jit", 4, 4), ("shard_map", 4, 2), ("pmap", 2, 4)]
)
def test_accumulated_gradients_are_the_batch_s(how, devices, parts, reference):
    tx, tolerance = TRANSFORMS["sgd"]
    mesh = parallel.data_mesh(jax.devices()[:devices])
    seen = []

    def counted(params, keys, batch):
        seen.append(len(keys))
        return loss_fn(params, keys, batch)

    step = parallel.data_parallel(counted, tx, mesh, how, ema_decay=0.99, accumulate=parts)
    state = parallel.replicate(training.init_state(start(), tx), mesh)
    for batch, expected in zip(batches(), reference["sgd"][1], strict=True):
        state, metrics = step(state, KEY, parallel.shard_batch(batch, mesh))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), metrics, expected)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=tolerance), state, reference["sgd"][0])
    assert set(seen) == {BATCH // parts if how == "jit" else BATCH // parts // devices}


@pytest.mark.parametrize("how", ["jit", "shard_map", "pmap"])
def test_several_steps_a_call(how, reference):
    tx, tolerance = TRANSFORMS["adam"]
    mesh = parallel.data_mesh(jax.devices()[:4])
    step = parallel.data_parallel(loss_fn, tx, mesh, how, ema_decay=0.99, steps=True)
    state = parallel.replicate(training.init_state(start(), tx), mesh)
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *batches())
    state, metrics = step(state, KEY, parallel.shard_batch(stacked, mesh, axis=1))
    expected = jax.tree.map(lambda *leaves: np.stack(leaves), *reference["adam"][1])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), metrics, expected)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=tolerance), state, reference["adam"][0])


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
def test_a_batch_may_be_split_over_two_axes(how, reference):
    tx, tolerance = TRANSFORMS["sgd"]
    mesh = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    step = parallel.data_parallel(loss_fn, tx, mesh, how, ema_decay=0.99)
    state = parallel.replicate(training.init_state(start(), tx), mesh)
    for batch in batches():
        state, _ = step(state, KEY, parallel.shard_batch(batch, mesh))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=tolerance), state, reference["sgd"][0])


SLURM = {"SLURM_STEP_NODELIST": "n[1-2]", "SLURM_PROCID": "1", "SLURM_NTASKS": "2"}
FLAGS = {"JAX_COORDINATOR_ADDRESS": "h:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"}


@pytest.mark.parametrize(
    ("env", "arguments", "expected"),
    [
        ({}, {}, None),
        ({}, {"processes": 1}, None),
        ({**SLURM, "SLURM_NTASKS": "1"}, {}, None),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, {}, None),
        ({}, {"coordinator": "h:1", "processes": 2, "index": 1}, ("h:1", 2, 1, "deactivate")),
        (FLAGS, {}, ("h:1", 2, 0, "deactivate")),
        (FLAGS, {"index": 1}, ("h:1", 2, 1, "deactivate")),
        (SLURM, {}, (None, None, None, None)),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, {}, (None, None, None, None)),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, {}, (None, None, None, None)),
        ({}, {"detect": True}, (None, None, None, None)),
        ({}, {"coordinator": "h:1"}, "processes, index missing"),
        ({}, {"coordinator": "h:1", "processes": 2, "index": 2}, r"index must lie in \[0, processes\)"),
        ({}, {"processes": 0}, "at least 1"),
        ({**FLAGS, "JAX_PROCESS_ID": "x"}, {}, "JAX_PROCESS_ID must be an integer, got 'x'"),
    ],
)
def test_start_processes(monkeypatch, env, arguments, expected):
    for name in (*SLURM, *FLAGS, "OMPI_COMM_WORLD_SIZE", "TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **options: calls.append(options))
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=expected):
            parallel.start_processes(**arguments)
        assert calls == []
        return
    parallel.start_processes(**arguments, timeout=9, heartbeat=8)
    names = ("coordinator_address", "num_processes", "process_id", "cluster_detection_method")
    assert [tuple(call[name] for name in names) for call in calls] == ([] if expected is None else [expected])
    assert all((call["initialization_timeout"], call["heartbeat_timeout_seconds"]) == (9, 8) for call in calls)


PROCESS = """
import sys
import jax
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 2)
from jdiff import checkpoint, parallel, training
parallel.start_processes(sys.argv[1], 2, int(sys.argv[2]), timeout=60)
import numpy as np
sys.path.insert(0, sys.argv[4])
import test_parallel as this

tx = this.TRANSFORMS["sgd"][0]
mesh = parallel.data_mesh()
assert mesh.size == 4 and jax.process_count() == 2
state = parallel.replicate(training.init_state(this.start(), tx), mesh)
step = parallel.data_parallel(this.loss_fn, tx, mesh, sys.argv[5], ema_decay=0.99)
manager = checkpoint.open_manager(sys.argv[3], keep=2, every=1)
mine = slice(jax.process_index(), None, 2)  # every other example of the global batch, as a sharded input pipeline reads
for n, batch in enumerate(this.batches()):
    batch = parallel.shard_batch({name: leaf[mine] for name, leaf in batch.items()}, mesh)
    state, metrics = jax.block_until_ready(step(state, this.KEY, batch))
    if n == 1:
        checkpoint.save(manager, n + 1, {**state._asdict(), "data": {"next": n + 1}})
        whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        restored = checkpoint.restore(manager, {**state._asdict(), "data": None}, whole)
        assert restored.pop("data") == {"next": 2}
        jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b), training.TrainState(**restored), state)
        state = training.TrainState(**restored)
try:
    checkpoint.save(manager, 9, {"data": jax.process_index()})
    raise SystemExit("different data in two processes were accepted")
except ValueError as error:
    assert "same in every process" in str(error), error
checkpoint.save(manager, n + 1, state._asdict())
manager.close()
print("loss", float(metrics["loss"]))
jax.distributed.shutdown()
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["jit", "shard_map"])
def test_two_processes(tmp_path, reference, how):
    """Two processes of two devices train, save, restore and save; this process restores on its own eight."""
    from jdiff import checkpoint

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    here = pathlib.Path(__file__).parent
    env = {**os.environ, "PYTHONPATH": str(here.parent), "XLA_FLAGS": ""}
    command = [sys.executable, "-c", PROCESS, address]
    arguments = [str(tmp_path / "steps"), str(here), how]
    processes = [
        subprocess.Popen(
            [*command, str(n), *arguments], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for n in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=180) for process in processes]
    finally:
        for process in processes:
            process.kill()  # SIGTERM is a notice of pre-emption to jax.distributed
    assert [process.returncode for process in processes] == [0, 0], outputs
    state, metrics = reference["sgd"]
    for out, _ in outputs:
        np.testing.assert_allclose(float(out.split("loss ")[1].split()[0]), metrics[-1]["loss"], rtol=1e-6)
    with checkpoint.open_manager(tmp_path / "steps", read_only=True) as manager:
        restored = training.TrainState(**checkpoint.restore(manager, state._asdict()))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), restored, state)
