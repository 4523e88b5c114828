"""A damaged step is named, with its file and fault, and passed over for the one before."""

import json
import pathlib
import shutil
import types
import warnings

import jax
import numpy as np
import pytest
from checkpoint_cases import Input, like, restore, run, same, state_of
from jax.sharding import NamedSharding, PartitionSpec

from jdiff import checkpoint, parallel
from jdiff.checkpoint import _digests, _trees, store

pytestmark = pytest.mark.usefixtures("both_layouts", "orphaned_reads")


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


def spoil_at_random(step, rng):
    """Do to a file of a step, or to one of its folders, what disks do; return what was done."""
    paths = sorted(path for path in step.rglob("*") if path.is_file())
    path = paths[rng.integers(len(paths))]
    content = path.read_bytes()
    start = int(rng.integers(len(content) or 1))
    kind = rng.choice(["cut", "emptied", "deleted", "folder deleted", "bit", "span", "exchanged"])
    if kind == "cut":
        path.write_bytes(content[:start])
    elif kind == "emptied":
        path.write_bytes(b"")
    elif kind == "deleted":
        path.unlink()
    elif kind == "folder deleted":
        path = path if path.parent == step else path.parent
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    elif kind == "bit" and content:
        flipped = bytes([content[start] ^ 1 << int(rng.integers(8))])
        path.write_bytes(content[:start] + flipped + content[start + 1 :])
    elif kind == "span":
        noise = rng.bytes(min(int(rng.integers(1, 512)), len(content) - start))
        path.write_bytes(content[:start] + noise + content[start + len(noise) :])
    elif kind == "exchanged":
        other = paths[rng.integers(len(paths))]
        path.write_bytes(other.read_bytes())
        other.write_bytes(content)
    return f"{kind}: {path.relative_to(step)}, {start}"


@pytest.mark.slow
def test_random_damage_is_never_silent(original, tmp_path):
    """240 times: what comes back is the newest step as it was, or the one before with a warning; nothing third."""
    rng, seen = np.random.default_rng(0), 0
    for trial in range(240):
        steps = pathlib.Path(shutil.copytree(original[0], tmp_path / str(trial)))
        done = spoil_at_random(steps / "4", rng)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            restored = restore(steps, like())
        damaged = [str(w.message) for w in told if w.category is checkpoint.DamagedCheckpointWarning]
        step = 2 if damaged else 4
        assert restored["step"] == step, done
        assert all(f"step 4 is damaged: {steps / '4'}" in message for message in damaged), done
        same(state_of(restored), original[1][step])
        assert restored["data"] == {"next_index": step}, done
        seen += bool(damaged)
        shutil.rmtree(steps)
    assert seen > 80  # about half: Orbax keeps copies and remains that nothing reads


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


def test_a_run_goes_on_after_damage(steps, original):
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


def test_a_save_that_was_cut_short(steps, original):
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


def test_what_one_process_finds_wrong_is_damage_in_all(tmp_path, monkeypatch):
    """Of what each reads for itself: else one goes to an older step while the others wait for it."""
    like = {"params": {"a": np.arange(3, dtype=np.float32)}, "data": None}
    packed, first = _trees.pack(like["params"])
    leaf = _trees.describe(like["params"])["a"] | {"byte": first["a"]}
    items = {"params": {"leaves": {"a": leaf}}, "data": {"sha256": _trees.sha256({"json": 7})}}
    told = []

    def process_allgather(fault):
        told.append(bool(fault))
        return np.array([fault, len(told) == others])

    def restored(*, packed=packed, data=7, signed=True, **changes):
        told.clear()
        meta = {"format": 2, "step": 3, "meta": None, "items": items} | changes
        meta["sha256"] = _trees.sha256(meta if signed else {})
        read = {"meta": meta, "params": dict(packed), "data": {"json": data}}
        manager = types.SimpleNamespace(directory=tmp_path, restore=lambda step, args: read, trusted=set())
        return store._restore_step(manager, 3, like, None)

    for item in ("meta", "params", "data"):
        (tmp_path / "3" / item).mkdir(parents=True)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(store.multihost_utils, "process_allgather", process_allgather)
    others = 0
    assert restored()["data"] == 7 and told == [False] * 8
    for others in range(1, 9):  # what this process reads is good
        with pytest.raises(checkpoint.DamagedCheckpointError, match="failed in process 1, which says why"):
            restored()
        assert told == [False] * others
    others = 0
    nowhere = {"params": {"leaves": {"a": leaf | {"byte": -1}}}, "data": items["data"]}
    for turn, message, fault in (
        (2, "meta: its digest disagrees", {"signed": False}),
        (2, "meta: it was written for step 2", {"step": 2}),
        (3, "a begin at no byte", {"items": nowhere}),
        (5, "12 bytes of small arrays are 11", {"packed": {_trees.PACKED: packed[_trees.PACKED][1:]}}),
        (6, "the bits of params/a are not those", {"packed": {_trees.PACKED: packed[_trees.PACKED] + np.uint8(1)}}),
        (8, "data: its digest disagrees", {"data": 8}),
    ):
        with pytest.raises(checkpoint.DamagedCheckpointError, match=message):
            restored(**fault)
        assert told == [False] * (turn - 1) + [True], message
