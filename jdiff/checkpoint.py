"""Checkpoints that are what was saved, or an error: Orbax, with a digest of every array that is checked at restore."""

import base64
import contextlib
import hashlib
import json
import operator
import warnings
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import Sharding

from jdiff._digests import digests

PyTree = Any

_JSON_ITEMS = ("data", "meta")
_FORMAT = 1
_SHOWN = 20


class NoCheckpointError(FileNotFoundError):
    """There is no checkpoint, or none of the step asked for."""


class SaveError(OSError):
    """A checkpoint could not be written, now or in the background before; the message names its step and the fault."""


class DamagedCheckpointError(RuntimeError):
    """A checkpoint cannot be read, or is not what was saved; the message names step, file and fault."""


class DamagedCheckpointWarning(UserWarning):
    """A damaged checkpoint was passed over and an older one restored; the message names step, file and fault."""


class Manager(ocp.CheckpointManager):
    """An Orbax `CheckpointManager` that remembers what this process saved, restored and found damaged.

    From Orbax: `all_steps()`, `latest_step()`, `close()` (`wait_until_finished()`, then release threads; also at the
    end of `with open_manager(...) as manager`).
    """

    def __init__(self, directory: epath.Path, options: ocp.CheckpointManagerOptions):
        super().__init__(directory, options=options)
        self.every: int = options.save_interval_steps
        self.read_only: bool = options.read_only
        self.trusted: set[int] = set()
        self.damaged: set[int] = set()
        self._given, self._writing, self._left_over = options, None, False

    def write(self, step: int, args: ocp.args.Composite) -> None:
        """Begin to write a step; see `save`, which is the function to call."""
        if self._left_over:
            self.wait_until_finished()
            self._clear()
        try:
            self.save(step, args=args, force=True)
        except SaveError:
            raise
        except Exception as error:
            raise self._failed(step, error) from error
        self._writing = step

    def reached_preemption(self, step: int) -> bool:
        """Return False: when to stop is the caller's affair, and JAX's notice may be asked for by one of the two."""
        return False

    def wait_until_finished(self) -> None:
        """Block until the last save is on disk.

        Raises:
            SaveError: it could not be written. The next save may be tried as if nothing had happened.
        """
        try:
            super().wait_until_finished()
        except Exception as error:
            raise self._failed(self._writing, error) from error

    def _failed(self, step, error):
        """Forget a step that could not be written, and what was written of it."""
        self.trusted.discard(step)
        if jax.process_count() == 1:
            # Orbax raises the error of a background save at every later call: only a new manager writes again.
            with contextlib.suppress(Exception):
                self._checkpointer.close()
            with contextlib.suppress(OSError):  # a folder that cannot be read now may be at the next save
                super().__init__(self.directory, options=self._given)
            self._clear()
        text = " ".join(str(error).split()) or type(error).__name__
        return SaveError(f"step {step} could not be written to {self.directory}: {text[:400]}")

    def _clear(self):
        """Make room: remove what unfinished saves left; what their threads still write meanwhile, the next time."""
        self._left_over = False
        for left in self.directory.glob("*.orbax-checkpoint-tmp*"):
            with contextlib.suppress(OSError):
                left.rmtree(missing_ok=True)
            self._left_over = True  # looked at once more, however it went


def open_manager(directory: str, *, keep: int = 3, every: int = 1, read_only: bool = False) -> Manager:
    """Open a directory of checkpoints, one folder a step, and create it unless `read_only`.

    A save that was cut short leaves a folder `<step>.orbax-checkpoint-tmp`, which no step is ever restored from.

    Args:
        directory: local path or a URL that `etils.epath` knows.
        keep: how many steps stay; older ones are deleted after a newer one is complete.
        every: `save` does something at multiples of it only.
        read_only: for evaluation, next to a run that is writing: creates nothing, deletes nothing.

    Raises:
        ValueError: `keep` or `every` below 1.
        NoCheckpointError: `read_only` and there is no such directory.
        OSError: the directory cannot be created.
    """
    for name, value in {"keep": keep, "every": every}.items():
        if operator.index(value) < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    path = epath.Path(directory).expanduser().absolute()
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(f"{path} is a file, not a directory of checkpoints")
    if read_only and not path.exists():
        raise NoCheckpointError(f"no checkpoints: {path} does not exist")
    options = ocp.CheckpointManagerOptions(
        max_to_keep=keep,
        save_interval_steps=every,
        create=not read_only,
        read_only=read_only,
        # Else threads wait for minutes for folders that could not be made, and the process at its end for them.
        async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
    )
    return Manager(path, options)


def save(manager: Manager, step: int, items: Mapping[str, Any], *, force: bool = False) -> bool:
    """Begin to save a step where it is due, and return while the files are being written.

    The arrays are copied out before this returns, so that the next step may donate their buffers. A step is due at
    the multiples of the manager's `every` and with `force`. In a run of several processes all of them call it, with
    the same arguments but for their parts of the arrays.

    Args:
        manager: from `open_manager`.
        step: number of finished updates.
        items: any of `params`, `ema`, `opt_state` and other names: trees of arrays, each restorable alone; `data`:
            where the input stands, as JSON or bytes (`iterator.get_state()` of a Grain iterator), the same in every
            process; `meta`: a JSON object, e.g. `{"config": ...}`; `step`: if given, the same number again, so that
            `{**state._asdict(), "data": ...}` is an `items`.
        force: save although the step is not due.

    Returns:
        Whether a save began; False too where this manager saved or restored that very step before.

    Raises:
        ValueError: `items["step"]` is another number; the directory holds this step or newer ones that this manager
            has neither saved nor found damaged (training from an older state into a directory of a longer run would
            bury them); `data` or `meta` differ between processes.
        TypeError: a leaf that is no numeric array, or `data` or `meta` that JSON cannot hold.
        SaveError: the files could not be written, of this step or, in the background, of the one before. It may be
            tried again.
    """
    step = operator.index(step)
    if manager.read_only:
        raise ValueError(f"{manager.directory} was opened read_only")
    if not force and step % manager.every:
        return False
    held = manager.all_steps()
    if step in held and step in manager.trusted:
        return False
    if "step" in items and int(items["step"]) != step:
        raise ValueError(f'items["step"] is {int(items["step"])}, but the step to save is {step}')
    newer = [other for other in held if other >= step and other not in manager.damaged]
    if newer:
        raise ValueError(
            f"{manager.directory} already holds steps {newer}: "
            f"restore before saving step {step}, or use another directory"
        )

    manifest: dict[str, Any] = {}
    texts = {name: _to_json(name, items[name]) for name in _JSON_ITEMS if items.get(name) is not None}
    trees = {name: _flatten(name, tree) for name, tree in items.items() if name not in (*_JSON_ITEMS, "step")}
    _same_everywhere(texts)
    if "data" in texts:
        manifest["data"] = {"sha256": _sha256(texts["data"])}
    for name, leaves in trees.items():
        manifest[name] = {"leaves": _describe(leaves)}
    meta = {"format": _FORMAT, "step": step, "meta": texts.get("meta"), "items": manifest}
    meta["sha256"] = _sha256(meta)

    # Found damaged by `restore`, and newer than what it fell back to: in the way of this branch of the run.
    for damaged in sorted(manager.damaged.intersection(held)):
        manager.delete(damaged)
    manager.damaged.clear()
    trees = {name: _stored(leaves) for name, leaves in trees.items()}
    args = {name: ocp.args.StandardSave(_nest(leaves)) for name, leaves in trees.items() if leaves}
    if "data" in texts:
        args["data"] = ocp.args.JsonSave(texts["data"])
    manager.write(step, ocp.args.Composite(**args, meta=ocp.args.JsonSave(meta)))
    manager.trusted.add(step)
    return True


def restore(
    manager: Manager,
    like: Mapping[str, Any],
    sharding: Sharding | Mapping[str, Any] | None = None,
    step: int | None = None,
) -> dict[str, Any]:
    """Read back what was saved, bit for bit, or raise.

    Every array is compared with the digest of its bits taken before the save. Without `step` the newest checkpoint is
    taken; a damaged one is passed over with a `DamagedCheckpointWarning` for the next older, and the next `save` of
    this manager deletes it. With `step`, damage raises. Only the items named in `like` are read.

    Args:
        manager: from `open_manager`. A save under way is waited for.
        like: which items, and for trees of arrays their structure, shapes and dtypes: arrays or
            `jax.ShapeDtypeStruct`s, e.g. `{"ema": jax.eval_shape(init)}`. `like["data"]` is not looked at.
            `like["meta"]`: None, or a JSON object whose fields must equal the saved ones (fields of `meta` not in it
            are not compared).
        sharding: where arrays go: one sharding for all, or a mapping from items to a sharding or to a tree of
            shardings that is a prefix of the item. Any number of devices, whatever it was at the save. None: where
            the leaf of `like` is, if it is a committed array or has a `sharding`; else an uncommitted array on the
            default device.
        step: which step; None for the newest good one.

    Returns:
        `{name: item}` for the names in `like`, and always `"step"`, () int32.

    Raises:
        NoCheckpointError: the directory holds no checkpoint, or not that step.
        DamagedCheckpointError: that step is damaged, or all are.
        ValueError: the checkpoint is whole but another: items, leaves, shapes, dtypes or `meta` differ (each is
            named), or a shape that the sharding does not divide.
    """
    manager.wait_until_finished()
    manager.reload()
    steps = sorted(manager.all_steps(), reverse=True)
    if step is not None:
        if step not in steps:
            raise NoCheckpointError(f"no step {step} in {manager.directory}; there are {steps[::-1]}")
        return _restore_step(manager, step, like, sharding)
    if not steps:
        raise NoCheckpointError(f"no checkpoints in {manager.directory}")
    faults = []
    for candidate in steps:
        try:
            restored = _restore_step(manager, candidate, like, sharding)
        except DamagedCheckpointError as error:
            faults.append(str(error))
            manager.damaged.add(candidate)
            continue
        for fault in faults:
            warnings.warn(f"{fault}; restored step {candidate} instead", DamagedCheckpointWarning, stacklevel=2)
        return restored
    raise DamagedCheckpointError("every checkpoint is damaged: " + "; ".join(faults))


def _restore_step(manager, step, like, sharding):
    where = f"step {step} in {manager.directory}"
    meta = _read(manager, step, "meta", ocp.args.JsonRestore())
    if not isinstance(meta, dict) or meta.pop("sha256", None) != _sha256(meta):
        raise _damaged(manager, step, "meta", "its digest disagrees")
    if meta["step"] != step:
        raise _damaged(manager, step, "meta", f"it was written for step {meta['step']}")
    if meta["format"] != _FORMAT:
        raise ValueError(f"{where} has format {meta['format']}, this version of jdiff reads format {_FORMAT}")
    trees = {name: _flatten(name, tree) for name, tree in like.items() if name not in (*_JSON_ITEMS, "step")}
    _compare(where, meta, like, trees)
    placements = {name: _placements(like[name], leaves, _part(sharding, name)) for name, leaves in trees.items()}

    restored: dict[str, Any] = {}
    for name, leaves in trees.items():
        arrays = _read_arrays(manager, step, name, leaves, placements[name])
        saved, found = meta["items"][name]["leaves"], _describe(arrays)
        if wrong := [f"{name}/{path}" for path in found if found[path]["digest"] != saved[path]["digest"]]:
            raise _damaged(manager, step, name, f"the bits of {_some(wrong)} are not those that were saved")
        restored[name] = jax.tree.unflatten(jax.tree.structure(like[name]), arrays.values())
    if "data" in like:
        data = _read(manager, step, "data", ocp.args.JsonRestore())
        if _sha256(data) != meta["items"]["data"]["sha256"]:
            raise _damaged(manager, step, "data", "its digest disagrees")
        restored["data"] = _from_json(data)
    if "meta" in like:
        restored["meta"] = _from_json(meta["meta"])
    place = _part(sharding, "step") or _own_place(like.get("step"))
    restored["step"] = _put(np.asarray(step, np.int32), place)
    manager.trusted.add(step)
    return restored


def _read(manager, step, item, args):
    """One item by Orbax. Whatever that raises is damage, and all processes of the run agree on it."""
    fault, value = None, None
    try:
        if not (manager.directory / str(step) / item).exists():
            raise FileNotFoundError("missing")
        value = manager.restore(step, args=ocp.args.Composite(**{item: args}))[item]
    except Exception as error:
        fault = error
    if jax.process_count() > 1:
        failed = np.flatnonzero(multihost_utils.process_allgather(np.asarray(fault is not None)))
        if failed.size and fault is None:
            fault = OSError(f"unreadable in processes {failed.tolist()}")
    if isinstance(fault, MemoryError) or "RESOURCE_EXHAUSTED" in str(fault):
        raise fault  # too large for this machine, which is no damage
    if fault is not None:
        text = " ".join(str(fault).split()) or type(fault).__name__
        raise _damaged(manager, step, item, text[:600]) from fault
    return value


def _read_arrays(manager, step, item, leaves, places):
    def target(path, leaf):
        if places[path] is None:
            # A NumPy target makes Orbax read to the host; a broadcast one takes no memory itself.
            return np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=places[path])

    values = {path: np.zeros(leaf.shape, leaf.dtype) if not leaf.size else None for path, leaf in leaves.items()}
    if targets := {path: target(path, leaf) for path, leaf in _stored(leaves).items()}:
        read = _read(manager, step, item, ocp.args.StandardRestore(_nest(targets)))
        values |= zip(_nest_order(targets), jax.tree.leaves(read), strict=True)
    return {path: _put(value, places[path]) for path, value in values.items()}


def _compare(where, meta, like, trees):
    """Raise ValueError where an undamaged checkpoint is not one of `like`."""
    items = meta["items"]
    if missing := [name for name in like if name not in ("meta", "step") and name not in items]:
        raise ValueError(f"{where} has no item {_some(missing)}; it has {', '.join(sorted(items))}")
    asked, found = {}, {}
    for name, leaves in trees.items():
        asked |= {f"{name}/{path}": f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in leaves.items()}
        saved = items[name]["leaves"]
        found |= {f"{name}/{path}": f"{leaf['dtype']}{leaf['shape']}" for path, leaf in saved.items()}
    if like.get("meta") is not None:
        fields = _from_json(_to_json("meta", like["meta"]))
        stored = _from_json(meta["meta"]) or {}
        for name in fields:
            asked |= _fields(f"meta/{name}", fields[name])
            found |= _fields(f"meta/{name}", stored[name]) if name in stored else {}
    differences = [
        f"{path}: saved {found.get(path, 'nothing')}, asked for {asked.get(path, 'nothing')}"
        for path in [*asked, *(path for path in found if path not in asked)]
        if asked.get(path) != found.get(path)
    ]
    if differences:
        raise ValueError(f"{where} is of another network, optimiser or configuration: {_some(differences, '; ')}")


def _fields(prefix, value):
    """A JSON value as {path: text}, one entry a scalar, empty container or list."""
    if isinstance(value, dict) and value:
        return {path: text for name, part in value.items() for path, text in _fields(f"{prefix}/{name}", part).items()}
    return {prefix: json.dumps(value)}


def _flatten(name, tree):
    """A tree as {"path/of/leaf": leaf}, in the order of its leaves."""
    leaves, names = {}, set()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        text = jax.tree_util.keystr(path, simple=True, separator="/")
        dtype = getattr(leaf, "dtype", None)
        if dtype is None or not (jnp.issubdtype(dtype, jnp.number) or jnp.issubdtype(dtype, jnp.bool_)):
            raise TypeError(f"{name}/{text} must be a numeric array, got {dtype or type(leaf).__name__}")
        # Orbax joins the parts by dots: {"a.b": x, "a": {"b": y}} would be one name.
        if text.replace("/", ".") in names:
            raise ValueError(f"two leaves of {name} have the path {text!r}")
        names.add(text.replace("/", "."))
        leaves[text] = leaf
    return leaves


def _nest(leaves):
    """The tree that Orbax sees: dictionaries only, whatever node types the caller's tree is made of."""
    nested: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *parents, last = path.split("/")
        node = nested
        for part in parents:
            node = node.setdefault(part, {})
        node[last] = leaf
    return nested


def _stored(leaves):
    """Without arrays of no elements, which Orbax refuses: their shape and dtype in `meta` are all there is to them."""
    return {path: leaf for path, leaf in leaves.items() if leaf.size}


def _nest_order(leaves):
    return jax.tree.leaves(_nest({path: path for path in leaves}))


def _describe(leaves):
    """{path: shape, dtype and digest of the bits}."""
    found = digests(leaves)
    return {
        path: {"shape": list(leaf.shape), "dtype": str(leaf.dtype), "digest": found[path]}
        for path, leaf in leaves.items()
    }


def _part(sharding, item):
    return sharding.get(item) if isinstance(sharding, Mapping) else sharding


def _placements(tree, leaves, sharding):
    """{path: sharding or None}; raises where a shape cannot be split so."""
    if sharding is None:
        places = [_own_place(leaf) for leaf in leaves.values()]
    else:
        spread = lambda place, part: jax.tree.map(lambda _: place, part)
        is_leaf = lambda node: isinstance(node, Sharding)
        places = jax.tree.leaves(jax.tree.map(spread, sharding, tree, is_leaf=is_leaf), is_leaf=is_leaf)
    for place, leaf in zip(places, leaves.values(), strict=True):
        if place is not None:
            place.shard_shape(tuple(leaf.shape))
    return dict(zip(leaves, places, strict=True))


def _own_place(leaf):
    committed = not isinstance(leaf, jax.Array) or leaf.committed
    return getattr(leaf, "sharding", None) if committed else None


def _put(array, sharding):
    """A NumPy array as one of JAX: where it shall be, or uncommitted; what is one already stays."""
    if isinstance(array, jax.Array):
        return array
    if sharding is None:
        return jnp.array(array, copy=True)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def _to_json(name, value):
    """What JSON gives back for a value; bytes travel as base64."""
    if isinstance(value, bytes):
        return {"base64": base64.b64encode(value).decode("ascii")}
    try:
        return {"json": json.loads(json.dumps(value))}
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} must be JSON or bytes: {error}") from error


def _from_json(packed):
    if packed is None:
        return None
    return base64.b64decode(packed["base64"]) if "base64" in packed else packed["json"]


def _sha256(value):
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _same_everywhere(texts):
    """Process 0 writes the JSON items for all: refuse to lose another process's."""
    if jax.process_count() > 1:
        digest = np.frombuffer(bytes.fromhex(_sha256(texts)), np.uint8)
        if len(np.unique(multihost_utils.process_allgather(digest), axis=0)) > 1:
            raise ValueError("data and meta must be the same in every process")


def _damaged(manager, step, item, fault):
    return DamagedCheckpointError(f"step {step} is damaged: {manager.directory / str(step) / item}: {fault}")


def _some(texts, separator=", "):
    rest = len(texts) - _SHOWN
    return separator.join(texts[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "")
