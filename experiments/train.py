"""Train a score model.

    python -m experiments.train --config configs/digits.py --workdir runs/digits [--set a.b=c] [--dry-run]

Run again to resume, or to hear that it is complete. Ctrl-C finishes the step, writes a checkpoint and stops.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import signal
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from ml_collections import ConfigDict
from tqdm import tqdm

from experiments import build, cli, model, pictures
from experiments.artefacts import Metrics, Run, read_jsonl
from experiments.compilation import compiler_options
from jdiff import checkpoint, data, parallel, training

INTERRUPTED = 130
_IN_MEMORY_BYTES = 2**28


def train(config: ConfigDict, run: Run) -> int:
    """Train until config.training.steps, from the newest checkpoint of the run folder.

    Returns:
      0 when complete, 130 when interrupted.

    Raises:
      FloatingPointError: the loss or its gradient is not finite; the step is named, the last good checkpoint is kept.
      ValueError, OSError: a folder of another configuration, data that are not there.
    """
    c = config.training
    source = data.load(config.data.name, config.data.train)
    validation = data.load(config.data.name, config.data.validation) if config.data.validation else None
    described = model.describe(config, source)
    mesh = parallel.data_mesh()
    _check_batch(config, mesh, source)
    run.open(config)

    if len(source) * math.prod(source.shape) < _IN_MEMORY_BYTES:
        source = source.in_memory()
    # Shapes first, a checkpoint where there is one, arrays last.
    tx = build.optimiser(config)
    like = _state_shapes(config, described, tx)
    key = jax.random.key(config.seed)
    init_key, train_key, validation_key = (jax.random.fold_in(key, n) for n in range(3))
    batches = data.batches(
        source,
        c.batch_size,
        seed=config.seed,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    identity = {"data": config.data.name, "network": config.network.name}
    with checkpoint.open_manager(str(run / "checkpoints"), keep=c.keep, every=c.checkpoint_every) as manager:
        if manager.latest_step() is None:
            statistics = model.statistics(config, source, described.transform)
            state = training.init_state(model.initialise(config, described, init_key), tx)
        else:
            statistics = model.statistics_shapes(config, described)
            wanted = {**like._asdict(), "statistics": statistics, "data": None, "meta": identity}
            del wanted["step"]
            items = checkpoint.restore(manager, wanted)
            statistics = items["statistics"]
            state = training.TrainState(items["step"], items["params"], items["ema"], items["opt_state"])
            batches.set_state(items["data"])
        start = int(state.step)
        if start >= c.steps:
            print(f"{run.path}: complete, {start} steps of {c.steps} are done")
            return 0
        statistics = jax.tree.map(np.asarray, statistics)
        state = parallel.replicate(state, mesh)

        step_fn = parallel.data_parallel(
            build.loss(config, described.module, statistics, described.transform),
            tx,
            mesh,
            c.mapping,
            ema_decay=c.ema_decay,
            ema_warmup=c.ema_warmup,
            compiler_options=compiler_options(),
        )
        validate = _validation(config, described, statistics, validation, validation_key)

        def save(step, state, *, force=False):
            items = {**state._asdict(), "statistics": statistics, "data": batches.get_state(), "meta": identity}
            checkpoint.save(manager, step, items, force=force)

        metrics = Metrics(run, start)
        pending: list[tuple[int, dict]] = []
        clock, seen = time.perf_counter(), start
        with _stop_signal() as stop, contextlib.closing(metrics), _progress(start, c.steps) as bar:
            for step in range(start + 1, c.steps + 1):
                batch = parallel.shard_batch(next(batches), mesh)
                state, values = step_fn(state, train_key, batch)
                pending.append((step, values))
                done = step == c.steps or stop.is_set
                saving = step % c.checkpoint_every == 0 or done
                validating = validate is not None and (step % c.validate_every == 0 or step == c.steps)
                if step % c.log_every == 0 or saving or validating:
                    # One host sync for all steps since the last: the device never waits for the host in between.
                    losses = _finite(pending, run)
                    now = time.perf_counter()
                    line = {
                        "loss": float(np.mean(losses)),
                        "grad_norm": float(pending[-1][1]["grad_norm"]),
                        "images_per_second": (step - seen) * c.batch_size / (now - clock),
                    }
                    clock, seen, pending = now, step, []
                    if validating:
                        line["validation_loss"] = validate(state.ema)
                        clock = time.perf_counter()
                    metrics.write(step, line)
                    bar.update(step - bar.n)
                    bar.set_postfix_str(f"loss {line['loss']:.4g}, {line['images_per_second']:.0f} images/s")
                if saving:
                    save(step, state, force=done)
                if stop.is_set:
                    manager.wait_until_finished()
                    bar.write(f"interrupted: step {step} is saved in {run.path}; the same command resumes")
                    return INTERRUPTED
    pictures.loss_curve(run / "loss.png", read_jsonl(run / "metrics.jsonl"))
    return 0


def dry_run(config: ConfigDict) -> int:
    """Print what would be trained, with nothing compiled or written."""
    source = data.load(config.data.name, config.data.train)
    described = model.describe(config, source)
    _check_batch(config, parallel.data_mesh(), source)
    params = model.shapes(config, described)
    like = _state_shapes(config, described, build.optimiser(config))
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
    size = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(like))
    steps, batch = config.training.steps, config.training.batch_size
    print(f"data       {source.name}/{source.split}: {len(source):,} images {source.shape}, {source.levels} levels")
    print(f"process    {build.process(config)}")
    print(f"network    {config.network.name}: {count:,} parameters, predicts {config.network.predict}")
    print(f"state      {size / 2**20:,.1f} MiB (parameters, average, optimiser)")
    print(f"training   {steps:,} steps of {batch} = {steps * batch / len(source):,.1f} epochs")
    print(f"devices    {jax.device_count()} {jax.devices()[0].platform}, mapping {config.training.mapping}")
    print("dry run: nothing was compiled or written")
    return 0


def _state_shapes(config, described, tx):
    return jax.eval_shape(lambda params: training.init_state(params, tx), model.shapes(config, described))


def _check_batch(config, mesh, source):
    size = config.training.batch_size
    if size % mesh.size:
        raise ValueError(f"training.batch_size = {size} does not divide over {mesh.size} devices")
    if len(source) == 0:
        raise ValueError(f"{source.name}/{source.split} is empty")


def _finite(pending, run):
    """Return the losses of the steps since the last look; the first that is not finite stops training."""
    fetched = jax.device_get([(values["loss"], values["finite"]) for _, values in pending])
    for (step, _), (loss, finite) in zip(pending, fetched):
        if not finite:
            raise FloatingPointError(
                f"loss or gradient is not finite at step {step} (loss {loss}): stopped; the last good checkpoint "
                f"in {run / 'checkpoints'} is kept. Try a lower optimiser.learning_rate or optimiser.clip"
            )
    return [loss for loss, _ in fetched]


def _validation(config, described, statistics, source, key):
    """Return ema -> mean denoising loss over the validation split with the same noise and times each time."""
    if source is None:
        return None
    size = min(config.training.batch_size, len(source))
    loss_fn = build.loss(config, described.module, statistics, described.transform, train=False)
    batches = list(itertools.islice(data.evaluation_batches(source, size), 8))

    @jax.jit
    def mean_loss(params, batch):
        keys = training.example_keys(key, 0, batch["index"])
        batch = {**batch, "key": training.shared_key(key, 0)}
        loss, _ = loss_fn(params, keys, batch)
        return jnp.where(batch["mask"], loss, 0).sum(), batch["mask"].sum()

    def validate(params):
        sums = jax.device_get([mean_loss(params, batch) for batch in batches])
        return float(sum(s for s, _ in sums) / sum(n for _, n in sums))

    return validate


class _Stop:
    is_set = False


@contextlib.contextmanager
def _stop_signal():
    """Turn the first Ctrl-C or SIGTERM into a flag; the second one interrupts as usual."""
    stop = _Stop()

    def handle(number, frame):
        stop.is_set = True
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)

    numbers = (signal.SIGINT,) if jax.distributed.is_initialized() else (signal.SIGINT, signal.SIGTERM)
    before = {}
    try:
        for number in numbers:
            before[number] = signal.signal(number, handle)
    except ValueError:
        pass  # not the main thread: whoever runs us there keeps the signals
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _progress(start, steps):
    interval = 0.5 if sys.stderr.isatty() else 15
    return tqdm(
        total=steps, initial=start, desc="train", unit="step", mininterval=interval, disable=jax.process_index() > 0
    )


def main() -> None:
    """Run from the command line."""
    flags.DEFINE_bool("dry_run", False, "print what would be trained, and stop")

    def run(config, folder):
        try:
            return dry_run(config) if flags.FLAGS.dry_run else train(config, folder)
        except FloatingPointError as error:
            print(f"FloatingPointError: {error}", file=sys.stderr)
            return 3

    cli.main(run)


if __name__ == "__main__":
    main()
