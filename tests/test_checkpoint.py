"""What was saved comes back bit for bit, on any number of devices, whatever the tree and the layout."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_cases import MESH, META, Input, items, like, restore, run, same, start, state_of
from jax.sharding import NamedSharding, PartitionSpec

from jdiff import checkpoint, parallel, training
from jdiff.checkpoint import _trees, store

pytestmark = pytest.mark.usefixtures("both_layouts")


def test_stopping_and_resuming_changes_no_bit(tmp_path):
    straight_source = Input()
    straight = run(start(), straight_source, 200)

    source = Input()
    with checkpoint.open_manager(tmp_path / "a", keep=2, every=50) as manager:
        # The steps after 100 reuse the memory of the state of step 100 while it is being written; they are lost then.
        run(start(), source, 103, manager)
        assert manager.all_steps() == [50, 100]
    del source

    source = Input()
    with checkpoint.open_manager(tmp_path / "a", keep=2, every=50) as manager:
        whole = NamedSharding(MESH, PartitionSpec())
        restored = checkpoint.restore(manager, {**like(), "meta": META}, whole)
        assert restored["meta"] == META
        assert restored["step"] == 100
        source.set_state(restored["data"])
        resumed = run(state_of(restored), source, 200, manager)
        assert not checkpoint.save(manager, 200, items(resumed, source), force=True)  # it has been saved
        manager.wait_until_finished()
        assert manager.all_steps() == [150, 200]
    same(resumed, straight)
    assert source.get_state() == straight_source.get_state()
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), straight.params, straight.ema)
    assert min(jax.tree.leaves(moved)) > 0


@pytest.mark.parametrize("devices", [1, 4, 8])
def test_any_number_of_devices(original, devices):
    path, states = original
    mesh = parallel.data_mesh(jax.devices()[:devices])
    whole, rows = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("data"))
    restored = restore(path, like(), sharding=whole)
    same(state_of(restored), states[4])
    assert {leaf.sharding for leaf in jax.tree.leaves(state_of(restored))} == {whole}

    # Each item its own: a tree of shardings, one sharding, and uncommitted arrays for what is not named.
    split = {"params": {"dense/0": {"w": whole, "b": rows}, "out": rows}, "ema": whole}
    restored = restore(path, like(), sharding=split)
    same(state_of(restored), states[4])
    assert restored["params"]["out"].sharding == rows
    assert restored["params"]["dense/0"]["w"].sharding == whole
    assert not restored["opt_state"][1].count.committed
    assert restored["step"].dtype == jnp.int32


def test_places_come_from_the_likeness(original):
    path, states = original
    here = jax.sharding.SingleDeviceSharding(jax.devices()[3])
    wanted = {
        "ema": jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), start().ema)
    }
    restored = restore(path, wanted)
    same(restored["ema"], states[4].ema)
    assert {leaf.sharding for leaf in jax.tree.leaves(restored["ema"])} == {here}
    restored = restore(path, {"params": start().params})  # uncommitted arrays: so are the restored
    assert not any(leaf.committed for leaf in jax.tree.leaves(restored["params"]))


def test_the_average_alone(steps, original):
    for item in ("params", "opt_state", "data"):
        shutil.rmtree(steps / "4" / item)
    restored = restore(steps, {"ema": jax.eval_shape(start).ema})
    assert restored.keys() == {"ema", "step"}
    same(restored["ema"], original[1][4].ema)


def test_a_step_by_its_number(original):
    path, states = original
    restored = restore(path, like(), step=2)
    same(state_of(restored), states[2])
    assert restored["data"] == {"next_index": 2}
    with pytest.raises(checkpoint.NoCheckpointError, match=r"no step 3 in .*; there are \[2, 4\]"):
        restore(path, like(), step=3)


def test_the_first_format_is_read(tmp_path, monkeypatch):
    """Every array by itself, and no word of where."""
    state = start()
    with monkeypatch.context() as patched, checkpoint.open_manager(tmp_path) as manager:
        patched.setattr(store, "_FORMAT", 1)
        patched.setattr(_trees, "_SMALL", -1)
        checkpoint.save(manager, 3, items(state._replace(step=jnp.int32(3)), Input()))
    meta = json.loads((tmp_path / "3" / "meta" / "metadata").read_text())
    assert meta["format"] == 1 and "byte" not in meta["items"]["params"]["leaves"]["out"]
    restored = restore(tmp_path, like())
    same(state_of(restored), jax.tree.map(np.asarray, state._replace(step=jnp.int32(3))))


def test_packed_bytes_have_a_limit(monkeypatch):
    monkeypatch.setattr(_trees, "_PACKED", 100)
    stored, first = _trees.pack({name: np.full(10, n, np.float32) for n, name in enumerate("abc")})
    assert first == {"a": 0, "b": 40} and set(stored) == {"c", _trees.PACKED} and stored[_trees.PACKED].nbytes == 80


def test_arrays_of_one_process_of_several_are_not_packed(monkeypatch):
    """Process 0 alone writes packed bytes: what the others mean by a name would be lost. Orbax refuses them."""
    assert _trees.pack({"a": jnp.ones(3)})[1] == {"a": 0}
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert not _trees.pack({"a": jnp.ones(3)})[1]


def test_small_arrays_are_one_of_orbax(tmp_path):
    """Of every dtype and shape, bit for bit; what is split over devices, or large, stays by itself."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.integers(0, 200, shape)
    dtypes = ("bool", "int8", "uint32", "float16", "bfloat16", "float8_e4m3fn", "float32", "complex64")
    small = {name: jnp.asarray(draw(3, 5)).astype(name) for name in dtypes} | {"number": jnp.int32(7)}
    small |= {
        "nan": jnp.asarray([np.nan, -0.0], jnp.float32),
        "none": jnp.zeros((0, 4)),
        "host": np.arange(3, dtype=np.float32),
    }
    split = NamedSharding(parallel.data_mesh(jax.devices()[:2]), PartitionSpec("data"))
    tree = {"small": small, "split": jax.device_put(jnp.arange(8.0), split), "large": jnp.zeros(2**14)}
    with checkpoint.open_manager(tmp_path) as manager:
        checkpoint.save(manager, 1, {"tree": tree})
    stored = json.loads((tmp_path / "1" / "tree" / "_METADATA").read_text())["tree_metadata"]
    assert len(stored) == 3
    back = restore(tmp_path, {"tree": jax.eval_shape(lambda: tree)})["tree"]
    bits = lambda leaf: (leaf.shape, leaf.dtype, np.asarray(leaf).tobytes())
    assert jax.tree.map(bits, back) == jax.tree.map(bits, tree)
    with checkpoint.open_manager(tmp_path) as manager, pytest.raises(ValueError, match="'packed bytes' is taken"):
        checkpoint.save(manager, 2, {"tree": {"packed bytes": {"a": jnp.zeros(3)}}})


def test_odd_trees_and_dtypes(tmp_path):
    bits = np.array([0x7FC00001, 0xFFC12345, 0x80000000, 0x00000001], np.uint32).view(np.float32)  # NaNs, -0, denormal
    tree = {
        "bfloat16": jnp.arange(5, dtype=jnp.bfloat16),
        "bool": jnp.array([True, False]),
        "int8": jnp.array([[-1], [7]], jnp.int8),
        "uint32": jnp.array(2**32 - 1, jnp.uint32),
        "complex": jnp.array([1 + 2j], jnp.complex64),
        "empty": jnp.zeros((0, 3)),
        "nested": [(jnp.float32(1),), training.TrainState(jnp.int32(1), {}, None, ())],
        "a.b": jnp.ones(2),
        "bits": jnp.asarray(bits),
    }
    with checkpoint.open_manager(tmp_path, keep=1) as manager:
        saved = {"odd": tree, "bare": jnp.arange(3), "none": {}, "data": b"\x00\xff"}
        assert checkpoint.save(manager, 1, saved)
        restored = checkpoint.restore(manager, saved)
        assert restored.pop("step") == 1
        assert restored.pop("data") == b"\x00\xff"
        same(restored, {name: saved[name] for name in restored})
        np.testing.assert_array_equal(np.asarray(restored["odd"]["bits"]).view(np.uint32), bits.view(np.uint32))


def test_leaves_of_64_bits_are_refused_or_kept(tmp_path):
    """JAX cuts them to 32 where it is not told otherwise, before the digest is taken and after the file is read."""
    tree = {"tree": {"n": np.array([2**40 + 1], np.int64)}, "other": {"x": np.array([1 + 2**-40, -1j])}}
    with checkpoint.open_manager(tmp_path) as manager:
        for name, kinds in (("tree", "n is int64, .* to int32"), ("other", "x is complex128, .* to complex64")):
            with pytest.raises(TypeError, match=f"{name}/{kinds}"):
                checkpoint.save(manager, 1, {name: tree[name]})
        with jax.enable_x64(True):
            checkpoint.save(manager, 1, tree)
            same(jax.tree.map(np.asarray, checkpoint.restore(manager, tree)), tree | {"step": np.array(1, np.int32)})
        with pytest.raises(TypeError, match="tree/n is int64"):
            checkpoint.restore(manager, {"tree": tree["tree"]})


def test_grain_iterator_state(tmp_path):
    grain = pytest.importorskip("grain")
    dataset = grain.MapDataset.range(40).seed(3).shuffle().repeat().batch(8)
    one = iter(dataset.to_iter_dataset())
    for _ in range(7):
        next(one)
    with checkpoint.open_manager(tmp_path, keep=1) as manager:
        checkpoint.save(manager, 7, {"data": one.get_state()})
        other = iter(dataset.to_iter_dataset())
        other.set_state(checkpoint.restore(manager, {"data": None})["data"])
    np.testing.assert_array_equal(next(one), next(other))


def test_nothing_on_disk_is_code(original):
    for path in original[0].rglob("*"):
        if path.is_file():
            assert not path.read_bytes().startswith(b"\x80")  # the first byte of every binary pickle
    assert json.loads((original[0] / "4" / "meta" / "metadata").read_text())["step"] == 4
