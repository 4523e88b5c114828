"""What surrounds the training steps: the way to the first one, saves, and input.

    TFDS_DATA_DIR=... python -m benchmarks.running [--config configs/digits.py]

Prints seconds from the start of `experiments.train` to its first step, with an empty and with a filled cache of
compiled programs; images/s of the same run with a save every 50 steps and with none; bytes and seconds of a save; and
images/s of the input at 32x32x3 and 256x256x3, by one process.
"""

from __future__ import annotations

import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import jax
import numpy as np

from benchmarks import common
from experiments import build, checks, cli, model, train
from experiments.artefacts import Run, read_jsonl
from jdiff import checkpoint, data
from jdiff.data import from_arrays

SAVES = 50


def main() -> None:
    """Measure, write JSON."""
    parser = common.parser(__doc__)
    parser.add_argument("--config", default="configs/digits.py")
    parser.add_argument("--steps", type=int, default=600)
    options = common.parse(parser)
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        first = {name: _first_step(options.config, folder, name) for name in ("empty cache", "filled cache")}
        print(first, flush=True)
        # Turn about, so that a machine that slows down slows both.
        rates = {name: [] for name in ("with saves", "without")}
        for n in range(3):
            for name, every in (("with saves", SAVES), ("without", 10 * options.steps)):
                rates[name].append(_images_per_second(options, folder / f"{name}{n}", every))
        result = {
            "seconds_to_first_step": first,
            "images_per_second": rates,
            "saves_over_none": statistics.median(a / b for a, b in zip(*rates.values(), strict=True)),
            "save": _save(options.config, folder / "save"),
            "input_images_per_second": {f"{side}x{side}x3": _input(side) for side in (32, 256)},
        }
    common.write(options, "running", result)


def _config(path, *changes):
    config = cli.load(path)
    for text in changes:
        cli.override(config, text)
    checks.check(config)
    return config


def _first_step(path, folder, name):
    run = Run(str(folder / name))
    command = [sys.executable, "-m", "experiments.train", "--config", path, "--workdir", str(run.path)]
    command += ["--set=training.log_every=1"]
    start = time.perf_counter()
    env = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(folder / "compiled")}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=env)
    while not read_jsonl(run / "metrics.jsonl"):
        if process.poll() is not None:
            raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}")
        time.sleep(0.01)
    seconds = time.perf_counter() - start
    process.kill()
    process.wait()
    return seconds


def _images_per_second(options, folder, every):
    """Between the first and the last line of the metrics: neither compilation nor the last save is in it."""
    sets = (f"training.steps={options.steps}", f"training.checkpoint_every={every}", f"training.log_every={SAVES}")
    config = _config(options.config, *sets, 'data.validation=""', f"training.validate_every={10 * options.steps}")
    run = Run(str(folder))
    train.train(config, run)
    lines = read_jsonl(run / "metrics.jsonl")[1:]
    return len(lines) / sum(1 / line["images_per_second"] for line in lines)


def _save(path, folder):
    config = _config(path)
    described = model.describe(config, data.load(config.data.name, config.data.train))
    like = train._state_shapes(config, described, build.optimiser(config))
    state = jax.tree.map(lambda s: jax.random.normal(jax.random.key(0), s.shape).astype(s.dtype), like)
    blocked, whole = [], []
    with checkpoint.open_manager(str(folder), keep=10) as manager:
        for step in range(1, 6):
            start = time.perf_counter()
            checkpoint.save(manager, step, state._replace(step=jax.numpy.int32(step))._asdict())
            blocked.append(time.perf_counter() - start)
            manager.wait_until_finished()
            whole.append(time.perf_counter() - start)
    size = sum(file.stat().st_size for file in (folder / "5").rglob("*") if file.is_file())
    arrays = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    medians = {"seconds_blocked": statistics.median(blocked[1:]), "seconds_until_on_disk": statistics.median(whole[1:])}
    return medians | {"bytes_of_arrays": arrays, "bytes_on_disk": size}


def _input(side, batch=128):
    images = np.random.default_rng(0).integers(0, 256, (512, side, side, 3), np.uint8)
    batches = data.batches(from_arrays(images), batch, seed=0)
    for _ in range(10):
        next(batches)
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < 3:
        next(batches)
        count += batch
    return count / (time.perf_counter() - start)


if __name__ == "__main__":
    main()
