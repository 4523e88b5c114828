"""Checkpoints that are what was saved, or an error: every array has a digest that is checked when it is read."""

import re
import warnings
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jax.sharding import Sharding

from jdiff._array import check_count
from jdiff.checkpoint import _trees
from jdiff.checkpoint._together import agreed
from jdiff.checkpoint.manager import (
    DamagedCheckpointError,
    DamagedCheckpointWarning,
    Manager,
    NoCheckpointError,
)

__all__ = ["restore", "save"]

_JSON_ITEMS = ("data", "meta")
_FORMAT = 2
"""1: each array is one of Orbax; 2: small ones are together (`_trees.pack`), and `meta` says where."""
_SHOWN = 20


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
            bury them); a name that is no word, `step` below 0; `data` or `meta` differ between processes.
        TypeError: a leaf that is no numeric array, or one of 64 bits without `jax_enable_x64`, `data` or `meta` that
            JSON cannot hold, a `meta` that is no object, a `step` that is no integer, `items` that are no mapping,
            another manager.
        SaveError: the files could not be written, of this step or, in the background, of the one before. It may be
            tried again.
    """
    _check_manager(manager)
    check_count(step, "step", 0)
    step = int(step)
    _check_items(items, "items", r"[A-Za-z]\w*")
    if manager.read_only:
        raise ValueError(f"{manager.directory} was opened read_only")
    if not force and step % manager.every:
        return False
    if manager.interrupted:
        manager.wait_until_finished()
    held = manager.all_steps()
    if step in held and step in manager.trusted:
        return False
    if "step" in items:
        check_count(items["step"], 'items["step"]', 0)
        if int(items["step"]) != step:
            raise ValueError(f'items["step"] is {int(items["step"])}, but the step to save is {step}')
    newer = [other for other in held if other >= step and other not in manager.damaged]
    if newer:
        raise ValueError(
            f"{manager.directory} already holds steps {newer}: "
            f"restore before saving step {step}, or use another directory"
        )

    manifest: dict[str, Any] = {}
    texts = {name: _trees.to_json(name, items[name]) for name in _JSON_ITEMS if items.get(name) is not None}
    trees = {name: _trees.flatten(name, tree) for name, tree in items.items() if name not in (*_JSON_ITEMS, "step")}
    _same_everywhere(texts)
    if "data" in texts:
        manifest["data"] = {"sha256": _trees.sha256(texts["data"])}
    args: dict[str, Any] = {}
    for name, leaves in trees.items():
        described = _trees.describe(leaves)
        stored, packed = _trees.pack(leaves)
        manifest[name] = {"leaves": {p: d | ({"byte": packed[p]} if p in packed else {}) for p, d in described.items()}}
        if stored:
            args[name] = ocp.args.StandardSave(stored)
    meta = {"format": _FORMAT, "step": step, "meta": texts.get("meta"), "items": manifest}
    meta["sha256"] = _trees.sha256(meta)

    # Found damaged by `restore`, and newer than what it fell back to: in the way of this branch of the run.
    for damaged in sorted(manager.damaged.intersection(held)):
        manager.delete(damaged)
    manager.damaged.clear()
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
        sharding: where arrays go: one sharding for all, or a mapping from items (those in `like` and perhaps others) to
            a sharding or to a tree of shardings that is a prefix of the item. Any number of devices, whatever it was
            at the save. None: where the leaf of `like` is, if it is a committed array or has a `sharding`; else an
            uncommitted array on the default device.
        step: which step; None for the newest good one.

    Returns:
        `{name: item}` for the names in `like`, and always `"step"`, () int32.

    Raises:
        NoCheckpointError: the directory holds no checkpoint, or not that step.
        DamagedCheckpointError: that step is damaged, or all are.
        ValueError: the checkpoint is whole but another: items, leaves, shapes, dtypes or `meta` differ (each is
            named), or a shape that the sharding does not divide.
        TypeError: `like` is no mapping, a leaf of it has no shape and dtype or has 64 bits without `jax_enable_x64`,
            `sharding` is none, `step` no integer, another manager.
    """
    _check_manager(manager)
    _check_items(like, "like")
    if step is not None:
        check_count(step, "step", 0)
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


def _check_manager(manager):
    if not isinstance(manager, Manager):
        raise TypeError(f"manager must be what open_manager returns, got {type(manager).__name__}")


def _check_items(items, what, names=r"[^/\\]*[^./\\][^/\\]*"):
    """Items are folders; what is saved now has words for names."""
    if not isinstance(items, Mapping):
        raise TypeError(f"{what} must map names to items, got {type(items).__name__}")
    for name in items:
        if not isinstance(name, str) or not re.fullmatch(names, name, re.ASCII):
            raise ValueError(f"{what} must have words for names, got {name!r}")
    if not isinstance(items.get("meta"), Mapping | None):
        raise TypeError(f"meta must be a JSON object, got {type(items['meta']).__name__}")


def _restore_step(manager, step, like, sharding):
    where = f"step {step} in {manager.directory}"
    meta = _read(manager, step, "meta", ocp.args.JsonRestore())
    same = isinstance(meta, dict) and meta.pop("sha256", None) == _trees.sha256(meta)
    other = f"it was written for step {meta['step']}" if same and meta["step"] != step else ""
    _sound(manager, step, "meta", other if same else "its digest disagrees")
    if meta["format"] > _FORMAT:
        raise ValueError(f"{where} has format {meta['format']}, this version of jdiff reads formats up to {_FORMAT}")
    trees = {name: _trees.flatten(name, tree) for name, tree in like.items() if name not in (*_JSON_ITEMS, "step")}
    _compare(where, meta, like, trees)
    placements = {
        name: _trees.placements(like[name], leaves, _trees.part(sharding, name)) for name, leaves in trees.items()
    }

    restored: dict[str, Any] = {}
    for name, leaves in trees.items():
        saved = meta["items"][name]["leaves"]
        arrays = _read_arrays(manager, step, name, leaves, saved, placements[name])
        found = _trees.describe(arrays)
        wrong = [f"{name}/{path}" for path in found if found[path]["digest"] != saved[path]["digest"]]
        _sound(manager, step, name, f"the bits of {_some(wrong)} are not those that were saved" if wrong else "")
        restored[name] = jax.tree.unflatten(jax.tree.structure(like[name]), arrays.values())
    if "data" in like:
        data = _read(manager, step, "data", ocp.args.JsonRestore())
        same = _trees.sha256(data) == meta["items"]["data"]["sha256"]
        _sound(manager, step, "data", "" if same else "its digest disagrees")
        restored["data"] = _trees.from_json(data)
    if "meta" in like:
        restored["meta"] = _trees.from_json(meta["meta"])
    place = _trees.part(sharding, "step") or _trees.own_place(like.get("step"))
    restored["step"] = _trees.put(np.asarray(step, np.int32), place)
    manager.trusted.add(step)
    return restored


def _read(manager, step, item, args):
    """One item by Orbax. Whatever that raises is damage, and all processes of the run agree on it."""
    fault: Exception | None = None
    value = None
    try:
        if not (manager.directory / str(step) / item).exists():
            raise FileNotFoundError("missing")
        value = manager.restore(step, args=ocp.args.Composite(**{item: args}))[item]
    except Exception as error:
        fault = error
    fault = agreed(fault)
    if fault is not None and (isinstance(fault, MemoryError) or "RESOURCE_EXHAUSTED" in str(fault)):
        raise fault  # too large for this machine, which is no damage
    if fault is not None:
        text = " ".join(str(fault).split()) or type(fault).__name__
        raise _damaged(manager, step, item, text[:600]) from fault
    return value


def _read_arrays(manager, step, item, leaves, saved, places):
    def target(path, leaf):
        if places[path] is None:
            return _on_host(leaf.shape, leaf.dtype)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=places[path])

    packed = {path: saved[path]["byte"] for path in leaves if "byte" in saved[path]}
    wrong = [path for path, first in packed.items() if type(first) is not int or first < 0]
    _sound(manager, step, item, f"{_some(wrong)} begin at no byte" if wrong else "")
    alone = {path: target(path, leaf) for path, leaf in leaves.items() if leaf.size and path not in packed}
    targets = _trees.nest(alone)
    if packed:
        size = max(first + leaves[path].size * leaves[path].dtype.itemsize for path, first in packed.items())
        targets[_trees.PACKED] = _on_host((size,), np.uint8)
    read = _read(manager, step, item, ocp.args.StandardRestore(targets)) if targets else {}
    content = read.pop(_trees.PACKED, None)
    short = packed and content.shape[0] < size
    _sound(manager, step, item, f"{size} bytes of small arrays are {content.shape[0]}" if short else "")
    values = {path: np.zeros(leaf.shape, leaf.dtype) for path, leaf in leaves.items() if not leaf.size}
    values |= zip(_trees.nest_order(alone), jax.tree.leaves(read), strict=True)
    values |= {path: _trees.unpack(content, first, leaves[path]) for path, first in packed.items()}
    return {path: _trees.put(values[path], places[path]) for path in leaves}


def _on_host(shape, dtype):
    """A NumPy target makes Orbax read to the host; a broadcast one takes no memory itself."""
    return np.broadcast_to(np.zeros((), dtype), shape)


def _compare(where, meta, like, trees):
    """Raise ValueError where an undamaged checkpoint is not one of `like`."""
    items = meta["items"]
    if missing := [name for name in like if name not in ("meta", "step") and name not in items]:
        raise ValueError(f"{where} has no item {_some(missing)}; it has {', '.join(sorted(items))}")
    asked: dict[str, str] = {}
    found: dict[str, str] = {}
    for name, leaves in trees.items():
        asked |= {f"{name}/{path}": f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in leaves.items()}
        saved = items[name]["leaves"]
        found |= {f"{name}/{path}": f"{leaf['dtype']}{leaf['shape']}" for path, leaf in saved.items()}
    if like.get("meta") is not None:
        fields = _trees.from_json(_trees.to_json("meta", like["meta"]))
        stored = _trees.from_json(meta["meta"]) or {}
        for name in fields:
            asked |= _trees.fields(f"meta/{name}", fields[name])
            found |= _trees.fields(f"meta/{name}", stored[name]) if name in stored else {}
    differences = [
        f"{path}: saved {found.get(path, 'nothing')}, asked for {asked.get(path, 'nothing')}"
        for path in [*asked, *(path for path in found if path not in asked)]
        if asked.get(path) != found.get(path)
    ]
    if differences:
        raise ValueError(f"{where} is of another network, optimiser or configuration: {_some(differences, '; ')}")


def _same_everywhere(texts):
    """Process 0 writes the JSON items for all: refuse to lose another process's."""
    if jax.process_count() > 1:
        digest = np.frombuffer(bytes.fromhex(_trees.sha256(texts)), np.uint8)
        if len(np.unique(multihost_utils.process_allgather(digest), axis=0)) > 1:
            raise ValueError("data and meta must be the same in every process")


def _sound(manager, step, item, fault):
    """Raise DamagedCheckpointError where this process has found a fault, or another has: each reads for itself."""
    if found := agreed(OSError(fault) if fault else None):
        raise _damaged(manager, step, item, str(found))


def _damaged(manager, step, item, fault):
    return DamagedCheckpointError(f"step {step} is damaged: {manager.directory / str(step) / item}: {fault}")


def _some(texts, separator=", "):
    rest = len(texts) - _SHOWN
    return separator.join(texts[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "")
