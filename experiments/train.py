"""Train a score model.

    python -m experiments.train --config configs/digits.py --workdir runs/digits [--set a.b=c] [--dry-run]

Run again to resume, or to hear that it is complete. Ctrl-C or SIGTERM finishes the step, writes a checkpoint and stops;
docs/reliability.md says what survives what. With several processes (docs/pods.md) each runs this same command.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from ml_collections import ConfigDict
from tqdm import tqdm

from experiments import build, cli, model, objectives, pairs, pictures, plan
from experiments.artefacts import Metrics, Run, read_jsonl, versions
from experiments.compilation import compiler_options
from experiments.lock import Lock
from experiments.processes import primary, together
from experiments.stopping import Stop
from jdiff import checkpoint, data, parallel, training

_IN_MEMORY_BYTES = 2**28


def train(config: ConfigDict, run: Run, *, strict: bool = False) -> int:
    """Train until config.training.steps, from the newest good checkpoint of the run folder.

    Args:
      config: the configuration.
      run: the run folder; with several processes one that all of them see.
      strict: refuse a damaged newest checkpoint, where otherwise the one before it is taken.

    Returns:
      0 when complete, 130 when interrupted by Ctrl-C, 143 by SIGTERM.

    Raises:
      FloatingPointError: the loss or its gradient is not finite; the step is named, the last good checkpoint is kept.
      checkpoint.DamagedCheckpointError: strict, and the newest checkpoint is damaged; or all are.
      LockedError: another process is training in this folder.
      ValueError, OSError: a folder of another configuration, data that are not there, a last checkpoint that could not
        be written.
    """
    c = config.training
    mesh = parallel.data_mesh(fsdp=c.sharding.fsdp)
    with together("the data"):
        source = data.load(config.data.name, config.data.train)
        validation = data.load(config.data.name, config.data.validation) if config.data.validation else None
        described = model.describe(config, source)
        examples = pairs.load(config, source)
        _check_batch(config, mesh, examples)
        if examples is source and len(source) * math.prod(source.shape) < _IN_MEMORY_BYTES:
            source = examples = source.in_memory()
    with contextlib.ExitStack() as stack:
        lock = Lock(run) if primary() else None
        with together("the run folder"):
            if lock is not None:
                run.prepare(config)
                stack.enter_context(lock)
                run.write_json("config.json", config.to_dict())
        manager = stack.enter_context(
            checkpoint.open_manager(str(run / "checkpoints"), keep=c.keep, every=c.checkpoint_every)
        )
        return _train(config, run, manager, lock, mesh, described, source, examples, validation, strict)


def _train(config, run, manager, lock, mesh, described, source, examples, validation, strict):
    c = config.training
    # Shapes first, a checkpoint where there is one, arrays last and where they stay.
    tx = build.optimiser(config)
    like = _state_shapes(config, described, tx)
    places = _places(config, like, mesh)
    key = jax.random.key(config.seed)
    init_key, train_key, validation_key = (jax.random.fold_in(key, n) for n in range(3))
    batches = data.batches(
        examples,
        c.batch_size,
        seed=config.seed,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    identity = {"data": config.data.name, "network": config.network.name}
    if manager.latest_step() is None:
        with together("the statistics of the data"):
            statistics = model.statistics(config, source, described.transform)
        initialise, begin = lambda key: model.initialise(config, described, key), init_key
        if c.initial:
            initialise, begin = lambda params: params, model.load_initial(config, described)
        state = jax.jit(lambda given: training.init_state(initialise(given), tx), out_shardings=places)(begin)
    else:
        statistics = model.statistics_shapes(config, described)
        wanted = {**like._asdict(), "statistics": statistics, "data": None, "meta": identity}
        del wanted["step"]
        step = manager.latest_step() if strict else None
        items = checkpoint.restore(manager, wanted, places._asdict(), step)
        statistics = items["statistics"]
        state = training.TrainState(**{name: items[name] for name in like._fields})
        batches.set_state(items["data"])
    start = int(state.step)
    if start >= c.steps:
        if primary():
            print(f"{run.path}: complete, {start} steps of {c.steps} are done")
        return 0
    statistics = jax.tree.map(np.asarray, statistics)

    loss = objectives.loss(config, described.module, statistics, described.transform)
    step_fn = _step_fn(config, loss, tx, mesh, places, steps=c.steps_per_call > 1)
    with together("the records of the run"):
        validate = _validation(config, described, statistics, validation, validation_key, mesh)
        metrics = Metrics(run, start) if primary() else None
        if primary():
            run.write_json("versions.json", versions())

    def save(step, state, *, force=False):
        with together("the run folder"):
            if lock is not None:
                lock.check()
        items = {**state._asdict(), "statistics": statistics, "data": batches.get_state(), "meta": identity}
        for begin in (manager.wait_until_finished, lambda: checkpoint.save(manager, step, items, force=force)):
            try:
                begin()
            except checkpoint.SaveError as error:
                bar.write(f"{error}; tried again at the next save", file=sys.stderr)
        if force:  # there is no next
            manager.wait_until_finished()
            checkpoint.save(manager, step, items, force=True)

    pending: list[tuple[int, dict]] = []
    clock, seen, step = time.perf_counter(), start, start
    closing = contextlib.closing(metrics) if metrics else contextlib.nullcontext()
    with Stop() as stop, closing, _progress(start, c.steps) as bar:
        while step < c.steps:
            first, step = step, min(step + c.steps_per_call, _next_pause(config, step))
            if c.steps_per_call > 1:
                stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *itertools.islice(batches, step - first))
                state, values = step_fn(state, train_key, parallel.shard_batch(stacked, mesh, axis=1))
            else:
                state, values = step_fn(state, train_key, parallel.shard_batch(next(batches), mesh))
            if jax.process_count() > 1 and jax.default_backend() == "cpu":
                jax.block_until_ready(state)  # hundreds of queued steps were seen to hang in CPU collectives
            pending.append((first + 1, values))
            stopping = stop.now()
            done = step == c.steps or stopping
            saving = step % c.checkpoint_every == 0 or done
            validating = validate is not None and (step % c.validate_every == 0 or step == c.steps)
            if step % c.log_every == 0 or saving or validating:
                # One host sync for all steps since the last: the device never waits for the host in between.
                losses, norms = _finite(pending, run)
                now = time.perf_counter()
                line = {
                    "loss": float(np.mean(losses)),
                    "grad_norm": float(norms[-1]),
                    "images_per_second": (step - seen) * c.batch_size / (now - clock),
                }
                clock, seen, pending = now, step, []
                if validating:
                    line |= {f"validation_{name}": value for name, value in validate(state.ema).items()}
                    clock = time.perf_counter()
                if metrics:
                    metrics.write(step, line)
                bar.update(step - bar.n)
                bar.set_postfix_str(f"loss {line['loss']:.4g}, {line['images_per_second']:.0f} images/s")
            if saving:
                save(step, state, force=done)
                clock = time.perf_counter()
            if stopping and step < c.steps:
                manager.wait_until_finished()
                if primary():
                    bar.write(f"interrupted: step {step} is saved in {run.path}; the same command resumes")
                return stop.exit_code
    manager.wait_until_finished()
    if primary():
        pictures.loss_curve(run / "loss.png", read_jsonl(run / "metrics.jsonl"))
    return 0


def dry_run(config: ConfigDict, memory: float | None = None) -> int:
    """Print what would be trained and what it needs; the step is compiled, nothing is allocated or written.

    Args:
      config: the configuration.
      memory: GiB of one device (default: what it has).

    Raises:
      ValueError: it does not fit; the largest terms are named.
    """
    source = data.load(config.data.name, config.data.train)
    described = model.describe(config, source)
    examples = pairs.load(config, source)
    c = config.training
    mesh = parallel.data_mesh(fsdp=c.sharding.fsdp)
    _check_batch(config, mesh, examples)
    tx = build.optimiser(config)
    like = _state_shapes(config, described, tx)
    places = _places(config, like, mesh)
    statistics = {name: np.zeros(s.shape, s.dtype) for name, s in model.statistics_shapes(config, described).items()}
    loss = objectives.loss(config, described.module, statistics, described.transform)
    plain = training.make_train_step(loss, tx, ema_decay=c.ema_decay, ema_warmup=c.ema_warmup)
    batch = plan.batch_shapes(examples, c.batch_size)
    found = plan.plan(_step_fn(config, loss, tx, mesh, places, steps=False), plain, like, batch, mesh, places)
    where = f"{examples.name}/{examples.split}"
    print(f"data       {where}: {len(examples):,} images {source.shape}, {source.levels} levels")
    print(f"process    {build.process(config)}")
    print(f"network    {config.network.name}: {found['parameters']:,} parameters, predicts {config.network.predict}")
    print(f"training   {c.steps:,} steps of {c.batch_size} = {c.steps * c.batch_size / len(examples):,.1f} epochs")
    shape = " x ".join(f"{size} {name}" for name, size in mesh.shape.items())
    print(f"devices    {mesh.size} {jax.devices()[0].platform} ({shape}), mapping {c.mapping}")
    print(plan.report(found, c.batch_size))
    plan.check_fits(found, plan.available_bytes() if memory is None else int(memory * 2**30))
    print("dry run: nothing was allocated, or written into the run folder")
    return 0


def _step_fn(config, loss, tx, mesh, places, *, steps):
    c = config.training
    return parallel.data_parallel(
        loss,
        tx,
        mesh,
        c.mapping,
        ema_decay=c.ema_decay,
        ema_warmup=c.ema_warmup,
        accumulate=c.accumulate,
        steps=steps,
        sharding=places if "fsdp" in mesh.axis_names else None,
        compiler_options=compiler_options(config.network.name),
    )


def _places(config, like, mesh):
    c = config.training.sharding
    return parallel.state_sharding(like, mesh, min_size=c.min_size, overrides=c.options.to_dict())


def _next_pause(config, step):
    """Return the next step at which the host has something to do."""
    c = config.training
    return min(c.steps, *((step // n + 1) * n for n in (c.log_every, c.checkpoint_every, c.validate_every)))


def _state_shapes(config, described, tx):
    return jax.eval_shape(lambda params: training.init_state(params, tx), model.shapes(config, described))


def _check_batch(config, mesh, source):
    size = config.training.batch_size
    if size % mesh.size:
        raise ValueError(f"training.batch_size = {size} does not divide over {mesh.size} devices")
    if size % (mesh.size * (parts := config.training.accumulate)):
        raise ValueError(
            f"training.batch_size = {size} does not divide over {mesh.size} devices and {parts} parts "
            "(training.accumulate)"
        )
    group = config.loss.coupling_group
    if config.loss.coupling != "independent" and size % (mesh.size * parts * group):
        raise ValueError(
            f"training.batch_size = {size} does not divide into groups of {group} (loss.coupling_group) on each of "
            f"{mesh.size} devices in {parts} parts"
        )
    if len(source) == 0:
        raise ValueError(f"{source.name}/{source.split} is empty")


def _finite(pending, run):
    """Return losses and gradient norms since the last look; the first that is not finite stops training."""
    fetched = jax.device_get([(v["loss"], v["grad_norm"], v["finite"]) for _, v in pending])
    losses, norms, finite = (np.concatenate([np.atleast_1d(part) for part in parts]) for parts in zip(*fetched))
    if not finite.all():
        first = int(np.argmin(finite))
        raise FloatingPointError(
            f"loss or gradient is not finite at step {pending[0][0] + first} (loss {losses[first]}): stopped; the last "
            f"good checkpoint in {run / 'checkpoints'} is kept. Try a lower optimiser.learning_rate or optimiser.clip"
        )
    return losses, norms


def _validation(config, described, statistics, source, key, mesh):
    """Return ema -> mean loss, and means of its metrics, over the first images of the validation split, 8 batches.

    Noise and times are the same each time; the strata of the times are those of all these images.
    """
    if source is None:
        return None
    size = min(config.training.batch_size, len(source))
    size = -(-size // mesh.size) * mesh.size
    total = min(8 * size, len(source))
    loss_fn = objectives.loss(config, described.module, statistics, described.transform, train=False, total=total)
    share = {"process_index": jax.process_index(), "process_count": jax.process_count()}
    batches = list(itertools.islice(data.evaluation_batches(source, size, **share), 8))

    @jax.jit
    def sums_of(params, batch):
        keys = training.example_keys(key, 0, batch["index"])
        batch = {**batch, "key": training.shared_key(key, 0)}
        loss, metrics = loss_fn(params, keys, batch)
        total = lambda value: jnp.where(batch["mask"], value, 0).sum()
        return jax.tree.map(total, {"loss": loss, **metrics}), batch["mask"].sum()

    def validate(params):
        parts = jax.device_get([sums_of(params, parallel.shard_batch(batch, mesh)) for batch in batches])
        count = sum(n for _, n in parts)
        return {name: float(sum(sums[name] for sums, _ in parts) / count) for name in parts[0][0]}

    return validate


def _progress(start, steps):
    interval = 0.5 if sys.stderr.isatty() else 15
    return tqdm(total=steps, initial=start, desc="train", unit="step", mininterval=interval, disable=not primary())


def main() -> None:
    """Run from the command line."""
    flags.DEFINE_bool("dry_run", False, "print what would be trained and what it needs, and stop")
    flags.DEFINE_float("memory_gib", None, "of --dry-run: memory of one device (default: what it has)")
    flags.DEFINE_enum("resume", "newest", ["newest", "strict"], "strict: refuse a damaged newest checkpoint")

    def run(config, folder):
        values = flags.FLAGS
        if values.dry_run:
            return dry_run(config, values.memory_gib)
        if values.memory_gib is not None:
            raise ValueError("--memory_gib: of --dry-run only, which is missing")
        return train(config, folder, strict=values.resume == "strict")

    cli.main(run)


if __name__ == "__main__":
    main()
