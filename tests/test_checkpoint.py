"""What was saved comes back bit for bit, on any number of devices, or an error says which step, file and fault."""

import json
import pathlib
import shutil
import sys
import time
import types
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jdiff import checkpoint, parallel, training
from jdiff.checkpoint import _digests, _together, _trees, store

KEY, WIDTH = jax.random.key(11), 2048  # arrays large enough to be files of their own, or to be packed
META = {"config": {"rate": 1e-2, "widths": [4, 8]}, "versions": {"jax": "any"}}


@pytest.fixture(scope="module", autouse=True)
def both_layouts():
    """The matrices are arrays of their own, vectors and numbers are packed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_trees, "_SMALL", 2**14)
        yield


@pytest.fixture(scope="module", autouse=True)
def orphaned_reads():
    """Where a read fails, Orbax closes its event loop under TensorStore's other reads, whose threads then complain."""
    hook = sys.unraisablehook
    sys.unraisablehook = lambda args: None if "Event loop is closed" in str(args.exc_value) else hook(args)
    yield
    time.sleep(0.5)
    sys.unraisablehook = hook


class Input:
    """A shuffled endless input whose whole state is one number, like Grain's."""

    def __init__(self):
        self.next_index = 0

    def get_state(self):
        return {"next_index": self.next_index}

    def set_state(self, state):
        self.next_index = state["next_index"]

    def __next__(self):
        epoch, start = divmod(self.next_index, 4)
        order = np.random.default_rng(epoch).permutation(32)[8 * start : 8 * start + 8]
        self.next_index += 1
        return {"x": np.sin(order[:, None] * np.arange(1, 5)).astype(np.float32), "index": np.arange(8)}


def loss_fn(params, keys, batch):
    eps = jax.vmap(lambda key: jax.random.normal(key, (4,)))(keys)
    hidden = jnp.tanh((batch["x"] + eps) @ params["dense/0"]["w"] + params["dense/0"]["b"][None])
    return jnp.mean((hidden @ params["out"] - eps) ** 2, -1), {}


TX = training.adam(training.learning_rate(1e-2, warmup=10, total=300), clip=1.0)


def start():
    rng = np.random.default_rng(5)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape).astype(np.float32))
    return training.init_state({"dense/0": {"w": draw(4, WIDTH), "b": draw(WIDTH)}, "out": draw(WIDTH, 4)}, TX)


def like():
    return {**jax.eval_shape(start)._asdict(), "data": None}


def items(state, source):
    return {**state._asdict(), "data": source.get_state(), "meta": META}


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y, strict=True), a, b)


def state_of(restored):
    return training.TrainState(**{name: restored[name] for name in training.TrainState._fields})


@pytest.fixture(scope="module")
def mesh():
    return parallel.data_mesh(jax.devices()[:2])


@pytest.fixture(scope="module")
def run(mesh):
    """Train from a state to a step, saving when due; the mapped step donates its state."""
    step = parallel.data_parallel(loss_fn, TX, mesh, ema_decay=0.99)

    def run(state, source, until, manager=None):
        state = parallel.replicate(state, mesh)
        while (n := int(state.step)) < until:
            state, _ = step(state, KEY, parallel.shard_batch(next(source), mesh))
            if manager is not None:
                checkpoint.save(manager, n + 1, items(state, source))
        return state

    return run


@pytest.fixture(scope="module")
def original(tmp_path_factory, run):
    """A directory with steps 2 and 4 (0, as it were, was deleted), and the states that belong to them."""
    path = tmp_path_factory.mktemp("original") / "steps"
    source, states = Input(), {}
    state = start()
    with checkpoint.open_manager(path, keep=2, every=2) as manager:
        for until in (1, 2, 3, 4):
            state = run(state, source, until, manager)
            states[until] = jax.tree.map(np.asarray, state)
    return path, states


@pytest.fixture
def steps(original, tmp_path):
    """A copy to be spoilt."""
    return pathlib.Path(shutil.copytree(original[0], tmp_path / "steps"))


def restore(path, wanted, **options):
    with checkpoint.open_manager(path, read_only=True) as manager:
        return checkpoint.restore(manager, wanted, **options)


def test_stopping_and_resuming_changes_no_bit(tmp_path, run, mesh):
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
        whole = NamedSharding(mesh, PartitionSpec())
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


def largest(folder):
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def flip(folder):
    """64 flipped bytes in the middle of every file of array data."""
    for path in (folder / "ocdbt.process_0" / "d").iterdir():
        content = bytearray(path.read_bytes())
        middle = len(content) // 2 - 32
        content[middle : middle + 64] = bytes(255 - byte for byte in content[middle : middle + 64])
        path.write_bytes(content)


def exchange(item):
    """Another step's arrays: files without a fault, that Orbax reads without a word."""
    shutil.rmtree(item)
    shutil.copytree(item.parents[1] / "2" / item.name, item)


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


DAMAGES = {
    "truncated": (lambda step: largest(step / "params" / "d").write_bytes(b"OCDB"), "params"),
    "deleted": (lambda step: largest(step / "opt_state" / "d").unlink(), "opt_state"),
    "flipped": (lambda step: flip(step / "ema"), "the bits of ema/.* are not those that were saved"),
    "exchanged": (lambda step: exchange(step / "ema"), "the bits of ema/dense/0/b, .* are not those that were saved"),
    "no manifest": (lambda step: (step / "params" / "manifest.ocdbt").unlink(), "params"),
    "no item": (lambda step: shutil.rmtree(step / "ema"), "ema: missing"),
    "data edited": (lambda step: edit(step / "data" / "metadata", "4", "5"), "data: its digest disagrees"),
    "meta edited": (lambda step: edit(step / "meta" / "metadata", "0.01", "0.02"), "meta: its digest disagrees"),
    "meta empty": (lambda step: (step / "meta" / "metadata").write_bytes(b""), "meta"),
    "hollow": (lambda step: (shutil.rmtree(step), step.mkdir()), "meta: missing"),
    "another step's": (
        lambda step: [exchange(step / item) for item in ("params", "meta")],
        "meta: it was written for step 2",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named_and_passed_over(damage, steps, original):
    spoil, where = DAMAGES[damage]
    spoil(steps / "4")
    message = f"step 4 is damaged: .*steps/4/.*{where}"
    with pytest.warns(checkpoint.DamagedCheckpointWarning, match=f"{message}.*restored step 2 instead"):
        restored = restore(steps, like())
    assert restored["step"] == 2
    same(state_of(restored), original[1][2])
    with pytest.raises(checkpoint.DamagedCheckpointError, match=message):
        restore(steps, like(), step=4)


def test_every_flipped_bit_of_a_leaf_is_seen(original):
    """The bits of a restored array, not of a file: one flip anywhere changes the digest, and so does an exchange."""
    leaf = np.asarray(original[1][4].params["out"])
    digest = _digests.digests({"": leaf})
    assert digest[""][:8] != digest[""][8:]  # two sums, not one twice
    digests = set(digest.values())
    words = leaf.view(np.uint32)
    for position in range(0, words.size, 500):
        for bit in range(0, 32, 3):
            changed = words.copy()
            changed.ravel()[position] ^= np.uint32(1 << bit)
            digests.update(_digests.digests({"": changed.view(np.float32)}).values())
    assert len(digests) == 1 + len(range(0, words.size, 500)) * len(range(0, 32, 3))
    exchanged = leaf[::-1].copy()
    assert _digests.digests({"": exchanged}) != digest
    assert _digests.digests({"": leaf.T.copy()}) != digest
    assert _digests.digests({"": -np.zeros(3, np.float32)}) != _digests.digests({"": np.zeros(3, np.float32)})
    for devices in (2, 4):  # whatever the sharding
        mesh = parallel.data_mesh(jax.devices()[:devices])
        for spec in (PartitionSpec("data"), PartitionSpec(None, "data"), PartitionSpec()):
            assert _digests.digests({"": jax.device_put(leaf, NamedSharding(mesh, spec))}) == digest


def test_a_run_goes_on_after_damage(steps, run, original):
    exchange(steps / "4" / "ema")
    source = Input()
    with checkpoint.open_manager(steps, keep=2, every=2) as manager:
        with pytest.warns(checkpoint.DamagedCheckpointWarning, match=r"the bits of ema/.*; restored step 2 instead"):
            restored = checkpoint.restore(manager, like())
        source.set_state(restored["data"])
        run(state_of(restored), source, 4, manager)
    same(state_of(restore(steps, like())), original[1][4])  # no warning: step 4 has been written again


def test_nothing_usable(steps, tmp_path):
    with checkpoint.open_manager(tmp_path / "new") as manager:
        with pytest.raises(checkpoint.NoCheckpointError, match=r"no checkpoints in .*new"):
            checkpoint.restore(manager, like())
    with pytest.raises(checkpoint.NoCheckpointError, match="absent does not exist"):
        checkpoint.open_manager(tmp_path / "absent", read_only=True)
    assert not (tmp_path / "absent").exists()
    for step in ("2", "4"):
        (steps / step / "meta" / "metadata").unlink()
    with pytest.raises(checkpoint.DamagedCheckpointError, match=r"every checkpoint is damaged: step 4 .*; step 2"):
        restore(steps, like())


def test_a_save_that_was_cut_short(steps, run, original):
    """What a kill leaves is a folder under a temporary name; it is no checkpoint, and in nobody's way."""
    unfinished = steps / "6.orbax-checkpoint-tmp"
    shutil.copytree(steps / "4", unfinished)
    (unfinished / "commit_success.txt").unlink(missing_ok=True)
    largest(unfinished / "params").unlink()
    source = Input()
    with checkpoint.open_manager(steps, keep=2, every=2) as manager:
        assert manager.all_steps() == [2, 4]
        restored = checkpoint.restore(manager, like())
        same(state_of(restored), original[1][4])
        source.set_state(restored["data"])
        final = run(state_of(restored), source, 6, manager)
    same(state_of(restore(steps, like())), jax.tree.map(np.asarray, final))


def changed(**parts):
    state = jax.eval_shape(start)
    return {**state._asdict(), **parts}


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (
            changed(params={"dense/0": {"w": jnp.zeros((4, 2049)), "b": jnp.zeros(2048)}, "out": jnp.zeros((2048, 4))}),
            r"params/dense/0/w: saved float32\[4, 2048\], asked for float32\[4, 2049\]$",
        ),
        (
            changed(ema={"dense/0": {"w": jnp.zeros((4, 2048))}, "output": jnp.zeros((2048, 4))}),
            r"ema/output: saved nothing.*; ema/dense/0/b: saved float32\[2048\], asked for nothing; ema/out: saved",
        ),
        (changed(params=jnp.zeros((2048, 4), jnp.bfloat16)), r"params/: saved nothing, asked for bfloat16\[2048, 4\]"),
        (changed(opt_state=()), r"opt_state/1/count: saved int32\[\], asked for nothing"),
        ({"weights": ()}, "has no item weights; it has data, ema, opt_state, params"),
        ({"meta": {"config": {"rate": 2e-2, "widths": [4, 8]}}}, r"meta/config/rate: saved 0.01, asked for 0.02$"),
        ({"meta": {"config": {"rate": 1e-2}}}, r"meta/config/widths: saved \[4, 8\], asked for nothing$"),
        ({"meta": {"seed": 1}}, "meta/seed: saved nothing, asked for 1$"),
    ],
)
def test_another_network_or_configuration_is_named(original, wanted, message):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # not damage: nothing older is tried
        with pytest.raises(ValueError, match=message):
            restore(original[0], wanted)


def test_twenty_names_are_listed_and_the_rest_counted(original):
    for names, end in ((20, "x19; it has"), (21, "x19 and 1 more; it has")):
        with pytest.raises(ValueError, match=end):
            restore(original[0], {f"x{i:02}": () for i in range(names)})


def test_another_format_is_named_and_no_damage(original, monkeypatch):
    monkeypatch.setattr(store, "_FORMAT", 1)
    with pytest.raises(ValueError, match="has format 2, this version of jdiff reads formats up to 1"):
        restore(original[0], like())


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


@pytest.mark.parametrize("byte", [-1, 1.5, "0", 10**9])
def test_small_arrays_that_begin_at_no_byte_are_damage(byte, steps, original):
    """Also where someone has made its digest right: never an error that is no damage, as older steps are good."""
    path = steps / "4" / "meta" / "metadata"
    meta = json.loads(path.read_text())
    meta.pop("sha256")
    meta["items"]["params"]["leaves"]["dense/0/b"]["byte"] = byte
    path.write_text(json.dumps(meta | {"sha256": _trees.sha256(meta)}))
    with pytest.warns(checkpoint.DamagedCheckpointWarning, match="step 4 is damaged: .*params"):
        same(state_of(restore(steps, like())), original[1][2])


def test_packed_bytes_have_a_limit(monkeypatch):
    monkeypatch.setattr(_trees, "_PACKED", 100)
    stored, first = _trees.pack({name: np.full(10, n, np.float32) for n, name in enumerate("abc")})
    assert first == {"a": 0, "b": 40} and set(stored) == {"c", _trees.PACKED} and stored[_trees.PACKED].nbytes == 80


def test_arrays_of_one_process_of_several_are_not_packed(monkeypatch):
    """Process 0 alone writes packed bytes: what the others mean by a name would be lost. Orbax refuses them."""
    assert _trees.pack({"a": jnp.ones(3)})[1] == {"a": 0}
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert not _trees.pack({"a": jnp.ones(3)})[1]


def test_a_barrier_after_a_failure_lets_nobody_through(monkeypatch):
    """Neither where the names differ nor afterwards: what comes behind it is that a step is made complete."""
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    barrier, names = _together.Barrier("here"), [{"written"}, {"written", "begun"}]
    monkeypatch.setattr(barrier, "_names", lambda key, timeout: names.pop(0))
    barrier(key="written", timeout_ms=1)
    for _ in range(2):
        with pytest.raises(_together.OtherProcessError):
            barrier(key="written", timeout_ms=1)
    assert not names


def test_a_step_is_whole_though_older_ones_cannot_be_deleted(tmp_path):
    def refuse(steps):
        raise OSError("in use")

    with checkpoint.open_manager(str(tmp_path), keep=1) as manager:
        checkpoint.save(manager, 1, {"a": jnp.ones(3)})
        manager.wait_until_finished()
        manager._checkpoint_deleter.delete_steps = refuse
        checkpoint.save(manager, 2, {"a": jnp.zeros(3)})
        with pytest.raises(checkpoint.SaveError, match=r"step 2 was written to .*, but not what follows it: .*in use"):
            manager.wait_until_finished()
        assert not checkpoint.save(manager, 2, {"a": jnp.zeros(3)}, force=True)
        np.testing.assert_array_equal(checkpoint.restore(manager, {"a": jnp.ones(3)})["a"], 0)


def test_an_interrupted_wait_does_not_write_again_what_is_there(tmp_path, monkeypatch):
    """Ctrl-C while a save is waited for: Orbax forgets the step, and would delete it to write it again."""

    def interrupt():
        thread.join(60)
        raise KeyboardInterrupt

    with checkpoint.open_manager(str(tmp_path)) as manager:
        checkpoint.save(manager, 1, {"a": jnp.ones(3)})
        thread = manager._finalize_thread.get_not_none()
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(
                manager._finalize_thread,
                "get_not_none",
                lambda: types.SimpleNamespace(step=thread.step, name=thread.name, join=interrupt),
            )
            manager.wait_until_finished()
        assert not checkpoint.save(manager, 1, {"a": jnp.ones(3)}, force=True)
        assert manager.all_steps() == [1]


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


def test_what_one_process_cannot_read_is_damage_in_all(tmp_path, monkeypatch):
    """Each says whether it has read the item; what the others say is what `process_allgather` gives back."""
    told = []

    def process_allgather(fault):
        told.append(bool(fault))
        return np.array([fault, others])

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(store.multihost_utils, "process_allgather", process_allgather)
    manager = types.SimpleNamespace(directory=tmp_path, restore=lambda step, args: {"meta": "read"})
    (tmp_path / "3" / "meta").mkdir(parents=True)
    others = False
    assert store._read(manager, 3, "meta", None) == "read"
    with pytest.raises(checkpoint.DamagedCheckpointError, match="missing"):
        store._read(manager, 3, "data", None)
    others = True
    with pytest.raises(checkpoint.DamagedCheckpointError, match="failed in process 1, which says why"):
        store._read(manager, 3, "meta", None)
    assert told == [False, True, False]


def test_processes_with_different_data_are_told(tmp_path, monkeypatch):
    with checkpoint.open_manager(tmp_path) as manager, monkeypatch.context() as patched:
        patched.setattr(jax, "process_count", lambda: 2)
        patched.setattr(store.multihost_utils, "process_allgather", lambda digest: np.stack([digest, digest[::-1]]))
        with pytest.raises(ValueError, match="data and meta must be the same in every process"):
            checkpoint.save(manager, 1, {"data": {"position": 3}})


@pytest.mark.parametrize(("text", "told"), [("No space\n  left", "No space left"), ("", "OSError")])
def test_a_save_that_fails_is_told_with_its_reason(tmp_path, monkeypatch, text, told):
    tree = {"params": jnp.zeros(1)}
    with checkpoint.open_manager(tmp_path / "new") as manager:
        assert (tmp_path / "new").is_dir()
        with monkeypatch.context() as patched:

            def save(*args, **kwargs):
                raise OSError(text)

            patched.setattr(checkpoint.Manager, "save", save)
            with pytest.raises(checkpoint.SaveError, match=f"step 3 could not be written to .*new: {told}$"):
                checkpoint.save(manager, 3, tree)
        assert checkpoint.save(manager, 3, tree)


def test_fields_of_meta_that_are_not_asked_for_are_not_compared(original):
    wanted = {"config": {"rate": 1e-2, "widths": (4, 8)}}  # a tuple is a list in JSON
    assert restore(original[0], {"meta": wanted})["meta"] == META
    assert restore(original[0], {"meta": None})["meta"] == META


def test_an_indivisible_sharding_is_no_damage(original):
    rows = NamedSharding(parallel.data_mesh(jax.devices()[:3]), PartitionSpec("data"))
    with pytest.raises(ValueError, match="evenly divide"):
        restore(original[0], {"params": jax.eval_shape(start).params}, sharding=rows)


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


def test_when_a_save_is_due(tmp_path):
    tree = {"params": jnp.zeros(1)}
    with checkpoint.open_manager(tmp_path, keep=1, every=3) as manager:
        assert [checkpoint.save(manager, n, tree) for n in range(1, 5)] == [False, False, True, False]
        assert checkpoint.save(manager, 4, tree, force=True)
        assert not checkpoint.save(manager, 4, tree, force=True)
        manager.wait_until_finished()
        assert manager.all_steps() == [4]
        with pytest.raises(ValueError, match=r"already holds steps \[4\]: restore before saving step 3"):
            checkpoint.save(manager, 3, tree)
        with pytest.raises(ValueError, match=r'items\["step"\] is 5, but the step to save is 6'):
            checkpoint.save(manager, 6, {**tree, "step": 5})
    # A fresh run must not bury an older one.
    with checkpoint.open_manager(tmp_path, keep=1, every=3) as manager:
        with pytest.raises(ValueError, match="restore before saving step 3"):
            checkpoint.save(manager, 3, tree)
    with checkpoint.open_manager(tmp_path, read_only=True) as manager:
        with pytest.raises(ValueError, match="read_only"):
            checkpoint.save(manager, 6, tree)


def test_bad_settings_and_items_are_named(tmp_path):
    with pytest.raises(ValueError, match="keep must be at least 1, got 0"):
        checkpoint.open_manager(tmp_path, keep=0, every=1)
    with pytest.raises(ValueError, match="every must be at least 1"):
        checkpoint.open_manager(tmp_path, keep=1, every=0)
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="is a file"):
        checkpoint.open_manager(tmp_path / "file", keep=1, every=1)
    with checkpoint.open_manager(tmp_path / "new", keep=1, every=1) as manager:
        for bad, match in {
            "params/a must be a numeric array, got float": {"params": {"a": 1.0}},
            "params/a must be a numeric array, got key<fry>": {"params": {"a": KEY}},
            "meta must be JSON or bytes": {"meta": {"process": object()}},
            "data must be JSON or bytes": {"data": np.arange(3)},
        }.items():
            with pytest.raises(TypeError, match=bad):
                checkpoint.save(manager, 1, match)
        with pytest.raises(ValueError, match=r"two leaves of params have the path 'a\.b'"):
            checkpoint.save(manager, 1, {"params": {"a": {"b": jnp.ones(1)}, "a.b": jnp.zeros(1)}})
        assert manager.all_steps() == []


def test_nothing_on_disk_is_code(original):
    for path in original[0].rglob("*"):
        if path.is_file():
            assert not path.read_bytes().startswith(b"\x80")  # the first byte of every binary pickle
    assert json.loads((original[0] / "4" / "meta" / "metadata").read_text())["step"] == 4
