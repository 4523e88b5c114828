"""What a training step costs: images/s, FLOP/s over a measured matmul rate, memory; by dtype, remat, steps a call.

    TFDS_DATA_DIR=... python -m benchmarks.step_cost [--config configs/mnist.py] [--batch 128] [--repeats 5]

Runs alike on a CPU and on a GPU. Each variant is timed in turn with the plain float32 step. FLOPs are those of the step
without rematerialisation, counted by the compiler before it optimises; the rate of products of square matrices is
measured on the same device, for both dtypes, before the steps and after. Memory is the compiler's, for one device.
"""

from __future__ import annotations

import argparse
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import common
from experiments import build, cli, model, objectives, plan
from experiments.compilation import compiler_options
from jdiff import data, parallel, training

DTYPES = ("float32", "bfloat16")
# (dtype, remat, steps a call): each choice alone, and what an accelerator would run with.
VARIANTS = [("float32", "none", 1), ("float32", "dots", 1), ("float32", "none", 5), ("bfloat16", "none", 1)]
ACCELERATOR = [("bfloat16", "dots", 1), ("bfloat16", "none", 5)]
_PRODUCTS = 8


def main() -> None:
    """Measure every variant, write JSON."""
    parser = common.parser(__doc__)
    parser.add_argument("--config", default="configs/mnist.py")
    parser.add_argument("--mode", choices=["full", "smoke"], default="full")
    parser.add_argument("--batch", type=int, help="images a step (default: training.batch_size)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--matrix", type=int, default=2048 if jax.default_backend() == "cpu" else 8192)
    options = common.parse(parser)
    variants = VARIANTS + (ACCELERATOR if jax.default_backend() != "cpu" else [])
    rates = [{dtype: _matmul_rate(options.matrix, dtype) for dtype in DTYPES}]
    flops, plain = _flops(options), None
    rows = []
    for dtype, remat, steps in variants:
        call, memory, images, _ = step(options, dtype, remat, steps)
        plain = plain or call
        timed = common.ratio(call, plain, repeats=options.repeats)
        seconds = timed["ours_seconds"] / steps
        rows.append({
            "dtype": dtype,
            "remat": remat,
            "steps_per_call": steps,
            "seconds_a_step": seconds,
            "over_plain_float32": timed["ratio"] / steps,
            "over_plain_float32_min_max": [timed["ratio_min"] / steps, timed["ratio_max"] / steps],
            "images_per_second": images / seconds,
            "flops_per_second": flops / seconds,
            **memory,
        })  # fmt: skip
        print(rows[-1], flush=True)
    rates.append({dtype: _matmul_rate(options.matrix, dtype) for dtype in DTYPES})
    peak = {dtype: max(rate[dtype] for rate in rates) for dtype in DTYPES}
    devices = jax.device_count()
    for row in rows:
        row |= {f"over_{dtype}_matmul": row["flops_per_second"] / (peak[dtype] * devices) for dtype in DTYPES}
    result = {"config": options.config, "mode": options.mode, "batch": images, "flops_a_step": flops}
    common.write(options, "step_cost", result | {"matmul_flops_per_second": rates, "rows": rows})


def _matmul_rate(n, dtype):
    """FLOP/s of one device: the best of three calls of eight products, each of the result of the one before."""
    a = jax.random.normal(jax.random.key(0), (n, n)).astype(dtype)
    b = (jax.random.normal(jax.random.key(1), (n, n)) / math.sqrt(n)).astype(dtype)

    @jax.jit
    def products(a, b):
        for _ in range(_PRODUCTS):
            a = jnp.matmul(a, b, preferred_element_type=dtype)
        return a

    best = min(common.seconds(lambda: products(a, b), repeats=1, warm=n > 0) for n in range(4))
    return 2 * n**3 * _PRODUCTS / best


def _prepare(options, dtype, remat):
    config = cli.load(options.config, options.mode)
    with config.network.options.unlocked():
        config.network.options.dtype = dtype
    config.training.remat = remat
    config.training.batch_size = options.batch or config.training.batch_size
    source = data.load(config.data.name, config.data.train)
    described = model.describe(config, source)
    measured = model.statistics(config, source, described.transform)
    loss = objectives.loss(config, described.module, measured, described.transform)
    return config, source, described, loss, build.optimiser(config)


def _flops(options):
    config, source, described, loss, tx = _prepare(options, "float32", "none")
    step = training.make_train_step(loss, tx, ema_decay=config.training.ema_decay)
    state = jax.eval_shape(lambda params: training.init_state(params, tx), model.shapes(config, described))
    batch = plan.batch_shapes(source, config.training.batch_size)
    return float(jax.jit(step).lower(state, jax.random.key(0), batch).cost_analysis()["flops"])


def step(options: argparse.Namespace, dtype: str, remat: str, steps: int):
    """Return (a call that updates a state of its own, bytes by the compiler, images a step, its compiled program)."""
    config, source, described, loss, tx = _prepare(options, dtype, remat)
    images, mesh, key = config.training.batch_size, parallel.data_mesh(), jax.random.key(1)
    mapped = parallel.data_parallel(
        loss,
        tx,
        mesh,
        ema_decay=config.training.ema_decay,
        steps=steps > 1,
        compiler_options=compiler_options(config.network.name),
    )
    batches = list(itertools.islice(data.batches(source, images, seed=0, process_index=0, process_count=1), steps))
    batch = jax.tree.map(lambda *leaves: np.stack(leaves), *batches) if steps > 1 else batches[0]
    batch = parallel.shard_batch(batch, mesh, axis=int(steps > 1))
    params = model.initialise(config, described, jax.random.key(0))
    state = parallel.replicate(training.init_state(params, tx), mesh)
    compiled = mapped.lower(state, key, batch).compile()
    analysis = compiled.memory_analysis()
    memory = {"temporary_bytes": analysis.temp_size_in_bytes, "argument_bytes": analysis.argument_size_in_bytes}

    def call():
        nonlocal state
        state, metrics = compiled(state, key, batch)
        return metrics

    return call, memory, images, compiled.as_text()


if __name__ == "__main__":
    main()
