"""Weak scaling by the compiler on simulated devices, and a paper model of scaling on real chips. No clock is read.

    python -m benchmarks.scaling --weak     # compiles a step of one digits block for 1, 2, 4, 8 devices; JSON
    python -m benchmarks.scaling --model    # arithmetic only: Markdown tables

docs/scaling.md has the formulas, both results and the sources of the hardware figures.
"""

from __future__ import annotations

import itertools
import math
import os
from typing import NamedTuple

# Devices are simulated on the CPU whatever the machine has, and JAX reads both when it is imported.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = " ".join(
    (
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        # Nothing is run: machine code need not be good, and it is most of the compilation.
        "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
    )
)

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from benchmarks import common
from experiments import build, cli, model, objectives, plan
from jdiff import data, parallel, training

IMAGES = 16  # a device, in --weak
FRACTION = 0.45  # of peak that the network's arithmetic is assumed to reach: the project's goal
CHIPS = (8, 64, 256, 1024)
GLOBAL_BATCH = 1024  # of strong scaling; the published DDPM++ was trained with 128, too few images for 1,024 chips
SCALAR = 4  # bytes of a float32
STATE = 4 * SCALAR  # bytes a parameter: parameters, average, two moments of Adam
UPDATE = 9 * SCALAR  # bytes a parameter that an update moves: reads these four and the gradient, writes the four


class Network(NamedTuple):
    """What the model must know of a network."""

    name: str
    parameters: float
    flops: float
    """A training step's, per image."""
    images: int
    """A chip, in weak scaling."""


class Chip(NamedTuple):
    """One accelerator; bandwidths in bytes a second, links in one direction."""

    name: str
    peak: float
    """FLOP/s in bfloat16, dense."""
    memory: float
    """Bytes."""
    memory_bandwidth: float
    link: float
    """Of one inner link (a switched chip has one), each way."""
    axes: int
    """Of the torus; 0: a switch."""
    ring_from: int
    """Chips from which every axis of the torus closes to a ring; below, it is a mesh."""
    inner: int
    """Chips that the inner network joins."""
    outer: float
    """A chip's share of the network between these groups, each way."""


# 420 GFLOP at batch 4: docs/results.md. The 118.64 "Gflops" forward of DiT-XL/2 are multiply-adds, two FLOPs each; a
# training step is taken as three forward passes.
NETWORKS = (
    Network("DDPM++ deep, 32x32", 106_632_579, 420e9 / 4, 64),
    Network("DiT-XL/2, 256x256", 675e6, 3 * 2 * 118.64e9, 16),
)

GB, TB = 1e9, 1e12
HARDWARE = (
    Chip("TPU v4", 275e12, 32 * 2**30, 1200 * GB, 45 * GB, 3, 64, 4096, 0.0),
    Chip("TPU v5e", 197e12, 16 * GB, 819 * GB, 45 * GB, 2, 256, 256, 3.125 * GB),
    Chip("TPU v5p", 459e12, 95 * GB, 2765 * GB, 90 * GB, 3, 64, 8960, 0.0),
    Chip("TPU v6e", 918e12, 32 * GB, 1600 * GB, 90 * GB, 2, 256, 256, 12.5 * GB),
    Chip("H100 SXM", 989.4e12, 80 * GB, 3.35 * TB, 450 * GB, 0, 0, 8, 50 * GB),
    Chip("A100 SXM", 312e12, 80 * GB, 2039 * GB, 300 * GB, 0, 0, 8, 25 * GB),
)


def main() -> None:
    """Do what was asked for."""
    parser = common.parser(__doc__)
    parser.add_argument("--weak", action="store_true", help="compile for simulated devices")
    parser.add_argument("--model", action="store_true", help="print the tables of the paper model")
    options = common.parse(parser)
    if not (options.weak or options.model):
        parser.error("one of --weak and --model is needed")
    if options.model:
        print("\n\n".join(tables()))
    if options.weak:
        weak(options)


def weak(options) -> None:
    """Compile the step with so many images a device, print a table, write JSON."""
    # An executable from the cache need not know its costs.
    jax.config.update("jax_enable_compilation_cache", False)
    config = cli.load("configs/digits.py", "full")
    config.network.options.depth = 1  # blocks are alike, and each costs seconds of compilation
    source = data.load(config.data.name, config.data.train)
    described = model.describe(config, source)
    tx = build.optimiser(config)
    statistics = {n: np.zeros(s.shape, s.dtype) for n, s in model.statistics_shapes(config, described).items()}
    loss = objectives.loss(config, described.module, statistics, described.transform)
    like = jax.eval_shape(lambda params: training.init_state(params, tx), model.shapes(config, described))
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(like.params))

    rows = []
    for n in (1, 2, 4, 8):
        batch = plan.batch_shapes(source, IMAGES * n)
        for split, how in itertools.product((False, True) if n > 1 else (False,), ("jit", "shard_map")):
            mesh = parallel.data_mesh(jax.devices()[:n], fsdp=n if split else 1)
            found = _compiled(loss, tx, mesh, how, split, config.training.ema_decay, like, batch)
            rows.append({"state": "split" if split else "replicated", "how": how, "devices": n, **found})
            print(rows[-1], flush=True)
    rows.sort(key=lambda row: (row["state"], row["how"]))
    print(_weak_table(rows, SCALAR * count) + "\n")
    result = {"config": "configs/digits.py, one block", "images_per_device": IMAGES, "parameters": count, "rows": rows}
    common.write(options, "scaling_weak", result)


def _compiled(loss, tx, mesh, how, split, decay, like, batch):
    """Return what the compiler says of one device of the mesh."""
    whole = NamedSharding(mesh, PartitionSpec())
    places = parallel.state_sharding(like, mesh)
    # No compiler options: those of the scripts hand products and convolutions to kernels whose FLOPs are not counted.
    step = parallel.data_parallel(loss, tx, mesh, how, ema_decay=decay, sharding=places if split else None)
    put = lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)
    rows = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    compiled = step.lower(
        jax.tree.map(put, like, places if split else jax.tree.map(lambda _: whole, like)),
        jax.eval_shape(lambda: jax.random.key(0)),
        {name: put(leaf, rows) for name, leaf in batch.items()},
    ).compile()
    memory = compiled.memory_analysis()
    return {
        "flops": float(compiled.cost_analysis()["flops"]),
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "collective_bytes": plan.collectives(compiled.as_text()),
    }


def _weak_table(rows, gradient):
    lines = [
        f"Gradient: {gradient:,} bytes. Per device, {IMAGES} images each:",
        "",
        *_head(
            "state", "mapping", "devices", "MFLOP", "arguments, KiB", "temporaries, KiB", "collectives' results, bytes"
        ),
    ]
    for row in rows:
        moved = ", ".join(f"{kind} {size:,}" for kind, size in row["collective_bytes"].items()) or "none"
        sizes = [f"{row[name] / 2**10:,.0f}" for name in ("argument_bytes", "temporary_bytes")]
        lines.append(_row(row["state"], row["how"], row["devices"], f"{row['flops'] / 1e6:.2f}", *sizes, moved))
    return "\n".join(lines)


def egress(chip: Chip, n: int) -> float:
    """Return the bytes a second that a chip sends in one direction of the rings of n chips of one inner network."""
    if not chip.axes:
        return chip.link
    # In a ring a chip sends both ways along each axis; at the corner of a mesh it has one link an axis.
    return chip.link * (2 * chip.axes if n >= chip.ring_from else min(chip.axes, math.log2(n)))


def communication(chip: Chip, n: int, size: float) -> float:
    """Return the seconds of a ring all-reduce of so many bytes; an all-gather and a reduce-scatter take the same."""
    inner = min(n, chip.inner)
    groups = n // inner
    time = 2 * (inner - 1) / inner * size / egress(chip, inner) if inner > 1 else 0.0
    return time + (2 * (groups - 1) / groups * (size / inner) / chip.outer if groups > 1 else 0.0)


def step(chip: Chip, network: Network, n: int, images: float, *, split: bool) -> dict[str, float]:
    """Return seconds of one step: its parts, without overlap ("low" efficiency) and with ("high")."""
    compute = images * network.flops / (FRACTION * chip.peak)
    update = UPDATE * network.parameters / chip.memory_bandwidth / (n if split else 1)
    moved = communication(chip, n, SCALAR * network.parameters)
    slow, fast = compute + moved + update, max(compute, moved) + update
    return {
        "compute": compute,
        "communication": moved,
        "update": update,
        "slow": slow,
        "fast": fast,
        "low": compute / slow,
        "high": compute / fast,
    }


def tables() -> list[str]:
    """Return the Markdown tables of the model."""
    made = [_memory()]
    for network in NETWORKS:
        made += [_parts(network), _steps(network, strong=False), _steps(network, strong=True)]
    return [*made, _limits()]


def _memory():
    lines = ["State and gathered copies, GB a chip (parameters, average, two moments: 16 bytes a parameter):", ""]
    lines += _head("network", "replicated", *(f"split over {n}" for n in CHIPS), "gathered parameters", "gradient")
    for network in NETWORKS:
        state, whole = STATE * network.parameters / GB, SCALAR * network.parameters / GB
        values = [state, *(state / n for n in CHIPS), whole, whole]
        lines.append(_row(network.name, *(f"{value:.2f}" for value in values)))
    return "\n".join(lines)


def _parts(network):
    lines = [f"{network.name}, parts of a step in ms:", ""]
    names = [f"R, {n} chips" for n in CHIPS]
    lines += _head("chip", "C, one image", f"C, {network.images} images", "U, replicated", *names)
    for chip in HARDWARE:
        one = step(chip, network, 1, 1, split=False)
        moved = [communication(chip, n, SCALAR * network.parameters) for n in CHIPS]
        values = [one["compute"], network.images * one["compute"], one["update"], *moved]
        lines.append(_row(chip.name, *(f"{1e3 * value:.2f}" for value in values)))
    return "\n".join(lines)


def _steps(network, *, strong):
    title = (
        f"strong scaling, {GLOBAL_BATCH:,} images in all" if strong else f"weak scaling, {network.images} images a chip"
    )
    lines = [f"{network.name}, {title}: ms a step with to without overlap; efficiency without to with:", ""]
    lines += _head("chip", "state", *(f"{n} chips" for n in CHIPS))
    for chip in HARDWARE:
        for split in (False, True):
            found = [step(chip, network, n, GLOBAL_BATCH / n if strong else network.images, split=split) for n in CHIPS]
            cells = [f"{_ms(s['fast'])} to {_ms(s['slow'])}; {s['low']:.2f} to {s['high']:.2f}" for s in found]
            lines.append(_row(chip.name, "split" if split else "replicated", *cells))
    return "\n".join(lines)


def _limits():
    lines = [
        f"Strong scaling, {GLOBAL_BATCH:,} images: first power of two of chips at which the lower bound is under 0.9:",
        "",
    ]
    cases = [(network, split) for network in NETWORKS for split in (False, True)]
    lines += _head("chip", *(f"{network.name}, {'split' if split else 'replicated'}" for network, split in cases))
    for chip in HARDWARE:
        lines.append(_row(chip.name, *(_limit(chip, network, split) for network, split in cases)))
    return "\n".join(lines)


def _limit(chip, network, split):
    for n in (2**k for k in range(11)):
        if step(chip, network, n, GLOBAL_BATCH / n, split=split)["low"] < 0.9:
            return n
    return "over 1024"


def _ms(seconds):
    return f"{1e3 * seconds:,.0f}" if seconds >= 0.1 else f"{1e3 * seconds:.3g}"


def _head(*names):
    return [_row(*names), "|" + " --- |" * len(names)]


def _row(*cells):
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


if __name__ == "__main__":
    main()
