"""What a training run needs, from shapes alone: bytes a device, arithmetic, traffic. Nothing is allocated."""

from __future__ import annotations

import math
import os
import re
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jdiff import data

_BYTES = {
    "pred": 1,
    "s8": 1,
    "u8": 1,
    "s16": 2,
    "u16": 2,
    "f16": 2,
    "bf16": 2,
    "s64": 8,
    "u64": 8,
    "f64": 8,
    "c64": 8,
    "c128": 16,
}
_COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "collective-broadcast",
)
# A collective may be split into a start and a done. The results of some starts also hold their operands.
_COLLECTIVE = re.compile(rf"= (.*?) ({'|'.join(_COLLECTIVES)})(-start)?\(")
_ALONE = re.compile(r"replica_groups=(\{\{\d+\}(,\{\d+\})*\}|\[\d+,1\])")
_SHAPE = re.compile(r"\b([a-z]+\d\w*|pred)\[([\d,]*)\]")


def collectives(text: str) -> dict[str, int]:
    """Return {kind: bytes of its results on one device} of the collectives in a compiled program's text.

    Collectives over one device alone are left out; those in a loop are counted once.
    """
    found: dict[str, int] = {}
    for line in text.splitlines():
        match = _COLLECTIVE.search(line)
        if match is None or _ALONE.search(line):
            continue
        shapes = [
            (1 if dtype.startswith("f8") else _BYTES.get(dtype, 4)) * math.prod(int(n) for n in dims.split(",") if n)
            for dtype, dims in _SHAPE.findall(match[1])
        ]
        if match[3] and match[2] in ("all-gather", "collective-permute"):
            shapes = shapes[len(shapes) // 2 :] if match[2] == "all-gather" else shapes[1:2]
        size = sum(shapes)
        found[match[2]] = found.get(match[2], 0) + size
    return found


def bytes_per_device(tree: Any, sharding: Any) -> int:
    """Return the bytes of a tree of shapes on one device; sharding: one for all leaves, or a tree of them."""
    if isinstance(sharding, jax.sharding.Sharding):
        sharding = jax.tree.map(lambda _: sharding, tree)
    sizes = jax.tree.map(
        lambda leaf, place: math.prod(place.shard_shape(leaf.shape)) * leaf.dtype.itemsize, tree, sharding
    )
    return sum(jax.tree.leaves(sizes))


def batch_shapes(source: data.Source, size: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Return what `jdiff.data.batches` yields, as shapes."""
    one = source.read(np.arange(1)) | {"index": np.zeros(1, np.int32)}
    return {name: jax.ShapeDtypeStruct((size, *array.shape[1:]), array.dtype) for name, array in one.items()}


def plan(step: Any, plain_step: Any, state: Any, batch: dict, mesh: Any, sharding: Any = None) -> dict:
    """Compile a training step for shapes and return what it needs.

    Args:
      step: jitted (state, key, batch) -> (state, metrics), of one step a call.
      plain_step: the same unmapped, to count arithmetic where no loop hides any.
      state: the state as shapes.
      batch: the global batch as shapes.
      mesh: the devices.
      sharding: of the state; None: a whole copy on every device.

    Returns:
      Bytes on one device (parameters, average, optimiser, batch, temporaries, by the compiler), FLOPs of a step of all
      devices (by the compiler, before it optimises), bytes of the collectives' results on one device.
    """
    everywhere = NamedSharding(mesh, PartitionSpec())
    rows = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    places = jax.tree.map(lambda _: everywhere, state) if sharding is None else sharding
    put = lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)
    arguments = (
        jax.tree.map(put, state, places),
        jax.eval_shape(lambda: jax.random.key(0)),
        {name: put(leaf, rows) for name, leaf in batch.items()},
    )
    compiled = step.lower(*arguments).compile()
    count = jax.jit(plain_step).lower(state, arguments[1], batch).cost_analysis()
    return {
        "parameters": sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(state.params)),
        "bytes": {
            "parameters": bytes_per_device(state.params, places.params),
            "average": bytes_per_device(state.ema, places.ema),
            "optimiser": bytes_per_device(state.opt_state, places.opt_state),
            "batch": bytes_per_device(batch, rows),
            "activations and temporaries": compiled.memory_analysis().temp_size_in_bytes,
        },
        "flops": float(count["flops"]),
        "collectives": collectives(compiled.as_text()),
    }


def available_bytes() -> int | None:
    """Return the memory of one device: what it reports, or a CPU device's share of the machine's; None: unknown."""
    device = jax.local_devices()[0]
    if (stats := device.memory_stats()) and "bytes_limit" in stats:
        return stats["bytes_limit"]
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // jax.local_device_count()
    except (ValueError, OSError):
        return None


def report(found: dict, images: int) -> str:
    """Return the lines about a plan for a step of so many images."""
    lines = [f"{name:28s}{_mib(size)} a device" for name, size in found["bytes"].items()]
    lines.append(f"{'together':28s}{_mib(sum(found['bytes'].values()))} a device")
    lines.append(
        f"arithmetic                  {found['flops']:.3g} FLOP a step, {found['flops'] / images:.3g} an image"
    )
    moved = ", ".join(f"{kind} {_mib(size)}" for kind, size in found["collectives"].items()) or "none"
    lines.append(f"collectives a step          {moved}")
    return "\n".join(lines)


def check_fits(found: dict, limit: int | None) -> None:
    """Raise ValueError where a plan needs more than limit bytes a device; the largest terms are named."""
    need = sum(found["bytes"].values())
    if limit is not None and need > limit:
        largest = sorted(found["bytes"].items(), key=lambda item: -item[1])[:3]
        terms = ", ".join(f"{name} {_mib(size)}" for name, size in largest)
        raise ValueError(
            f"the step needs {_mib(need)} a device and there are {_mib(limit)}; the largest: {terms}. More devices "
            "share the state with training.sharding.fsdp; training.accumulate and training.remat spare activations"
        )


def _mib(size):
    return f"{size / 2**20:,.1f} MiB"
