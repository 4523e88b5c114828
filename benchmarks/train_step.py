"""One training step of a small U-Net, compiled whole, over the same step in four compiled pieces; images a second.

    TFDS_DATA_DIR=... python -m benchmarks.train_step [--config configs/mnist_unet.py]

The baseline computes the same update with plain optax: gradient, optimiser, addition and moving average are each a
`jit` of their own, and the state is not donated. Both see the same batch and compiler options; float32 and bfloat16.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import optax

from benchmarks import common
from experiments import build, cli, model, objectives
from experiments.compilation import compiler_options
from jdiff import data, parallel, training


def main() -> None:
    """Measure both for each dtype, write JSON."""
    parser = common.parser(__doc__)
    parser.add_argument("--config", default="configs/mnist_unet.py")
    parser.add_argument("--repeats", type=int, default=9)
    options = common.parse(parser)
    rows = {dtype: _measure(options, dtype) for dtype in ("float32", "bfloat16")}
    common.write(options, "train_step", {"config": options.config, "rows": rows})


def _measure(options, dtype):
    config = cli.load(options.config, "full")
    with config.network.options.unlocked():
        config.network.options.dtype = dtype
    source = data.load(config.data.name, config.data.train)
    described = model.describe(config, source)
    statistics = model.statistics(config, source, described.transform)
    tx = build.optimiser(config)
    loss_fn = objectives.loss(config, described.module, statistics, described.transform)
    decay, key, mesh = config.training.ema_decay, jax.random.key(1), parallel.data_mesh()
    params = model.initialise(config, described, jax.random.key(0))
    batch = next(data.batches(source, config.training.batch_size, seed=0, process_index=0, process_count=1))
    batch = jax.tree.map(jnp.asarray, parallel.shard_batch(batch, mesh))

    compiler = compiler_options()
    compiled = functools.partial(jax.jit, compiler_options=compiler)
    whole = parallel.data_parallel(loss_fn, tx, mesh, ema_decay=decay, compiler_options=compiler)
    state = {"ours": parallel.replicate(training.init_state(params, tx), mesh)}

    def ours():
        state["ours"], metrics = whole(state["ours"], key, batch)
        return metrics

    @compiled
    def gradient(params, step, batch):
        keys = training.example_keys(key, step, batch["index"])
        whole_batch = batch | {"key": training.shared_key(key, step)}
        return jax.value_and_grad(lambda p: jnp.mean(loss_fn(p, keys, whole_batch)[0]))(params)

    # optax's Adam is traced under standard promotion, here as in jdiff.training.
    update, apply = compiled(tx.update), compiled(optax.apply_updates)
    average = compiled(lambda ema, params: optax.incremental_update(params, ema, 1 - decay))
    state["baseline"] = (jnp.zeros((), jnp.int32), params, params, tx.init(params))

    def baseline():
        step, params, ema, moments = state["baseline"]
        value, grads = gradient(params, step, batch)
        updates, moments = update(grads, moments, params)
        params = apply(params, updates)
        state["baseline"] = (step + 1, params, average(ema, params), moments)
        return value, state["baseline"]

    baseline()  # once more than `ratio` does: placements settle in the first call
    result = common.ratio(ours, baseline, repeats=options.repeats)
    images = config.training.batch_size
    result["images_per_second"] = images / result["ours_seconds"]
    result["baseline_images_per_second"] = images / result["baseline_seconds"]
    print(dtype, result, flush=True)
    return result


if __name__ == "__main__":
    main()
