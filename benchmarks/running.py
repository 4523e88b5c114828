"""What surrounds the training steps: the way to the first one, saves, and input.

    TFDS_DATA_DIR=... python -m benchmarks.running [--config configs/digits.py] [--parts start saves save input]

start: seconds from the start of `experiments.train` to its first step, with an empty and with a filled cache of
compiled programs. saves: images/s of the same run with a save every 50 steps and with none. save: bytes and seconds of
a save, and of one with each array by itself, as checkpoints were written at first. input: images/s of the input in
one process, from memory at 32x32x3 and 256x256x3, and from files: 256x256 crops of scikit-learn's two photographs as
PNG and as JPEG (quality 95), which are decoded.
"""

from __future__ import annotations

import io
import itertools
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from unittest import mock

import jax
import numpy as np

from benchmarks import common
from experiments import build, checks, cli, model, train
from experiments.artefacts import Metrics, Run, read_jsonl
from jdiff import checkpoint, data
from jdiff.checkpoint import _trees
from jdiff.data import from_arrays

SAVES = 50


def main() -> None:
    """Measure, write JSON."""
    parser = common.parser(__doc__)
    parser.add_argument("--config", default="configs/digits.py")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--parts", nargs="+", choices=[*PARTS], default=[*PARTS])
    options = common.parse(parser)
    result = {}
    for name in options.parts:
        with tempfile.TemporaryDirectory() as folder:
            result |= PARTS[name](options, pathlib.Path(folder))
        print(result, flush=True)
    common.write(options, "_".join(["running", *(options.parts if options.parts != [*PARTS] else [])]), result)


def _config(path, *changes):
    config = cli.load(path)
    for text in changes:
        cli.override(config, text)
    checks.check(config)
    return config


def _start(options, folder):
    names = ("empty cache", "filled cache")
    return {"seconds_to_first_step": {name: _first_step(options.config, folder, name) for name in names}}


def _saves(options, folder):
    # Turn about, so that a machine that slows down slows both.
    rates = {name: [] for name in ("with saves", "without")}
    for n in range(3):
        for name, every in (("with saves", SAVES), ("without", 10 * options.steps)):
            rates[name].append(_images_per_second(options, folder / f"{name}{n}", every))
    ratio = statistics.median(a / b for a, b in zip(*rates.values(), strict=True))
    return {"images_per_second": rates, "saves_over_none": ratio}


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
    """Between the first and the last line of the metrics: neither compilation nor the last save is in it.

    By the clock: what the lines themselves say leaves saves out.
    """
    sets = (f"training.steps={options.steps}", f"training.checkpoint_every={every}", f"training.log_every={SAVES}")
    config = _config(options.config, *sets, 'data.validation=""', f"training.validate_every={10 * options.steps}")
    times = []

    class Timed(Metrics):
        def write(self, step, values):
            times.append(time.perf_counter())
            super().write(step, values)

    with mock.patch.object(train, "Metrics", Timed):
        train.train(config, Run(str(folder)))
    return (len(times) - 1) * SAVES * config.training.batch_size / (times[-1] - times[0])


def _save(options, folder):
    config = _config(options.config)
    described = model.describe(config, data.load(config.data.name, config.data.train))
    like = train._state_shapes(config, described, build.optimiser(config))
    keys = map(jax.random.key, itertools.count())  # arrays that are not alike, which would compress too well
    state = jax.tree.map(lambda s: jax.random.normal(next(keys), s.shape).astype(s.dtype), like)
    layouts = {"small arrays as one": _trees._SMALL, "each array by itself": -1}
    return {"save": {name: _saves_of(state, folder / name, small) for name, small in layouts.items()}}


def _saves_of(state, folder, small):
    """Medians of ten saves, with arrays of up to so many bytes written as one."""
    times = {"seconds_blocked": [], "seconds_until_on_disk": [], "cpu_seconds": []}
    with mock.patch.object(_trees, "_SMALL", small), checkpoint.open_manager(str(folder), keep=3) as manager:
        for step in range(1, 16):
            start, cpu = time.perf_counter(), time.process_time()
            checkpoint.save(manager, step, state._replace(step=jax.numpy.int32(step))._asdict())
            times["seconds_blocked"].append(time.perf_counter() - start)
            manager.wait_until_finished()
            times["seconds_until_on_disk"].append(time.perf_counter() - start)
            times["cpu_seconds"].append(time.process_time() - cpu)
    size = sum(file.stat().st_size for file in (folder / "15").rglob("*") if file.is_file())
    leaves = jax.tree.leaves(state)
    found = {name: statistics.median(values[5:]) for name, values in times.items()}
    found |= {"arrays": len(leaves), "bytes_of_arrays": sum(leaf.nbytes for leaf in leaves), "bytes_on_disk": size}
    return found


def _input(options, folder):
    images = lambda side: np.random.default_rng(0).integers(0, 256, (512, side, side, 3), np.uint8)
    found = {f"{side}x{side}x3 from memory": _throughput(from_arrays(images(side))) for side in (32, 256)}
    for kind, source in _photographs(folder):
        for threads in (1, 2):
            found[f"256x256x3 {kind}, {threads} reading"] = _throughput(source, threads=threads)
    return {"input": found}


def _photographs(folder, count=512, side=256):
    """Yield (kind of file, data set of crops of two photographs as such files in array records)."""
    import tensorflow_datasets as tfds
    from PIL import Image
    from sklearn.datasets import load_sample_images

    class Photographs(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")
        BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=kind) for kind in ("png", "jpeg")]  # noqa: RUF012

        def _info(self):
            image = tfds.features.Image(shape=(side, side, 3), encoding_format=self.builder_config.name)
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict({"image": image}))

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            rng, photographs = np.random.default_rng(0), load_sample_images().images
            for n in range(count):
                photograph = photographs[n % 2]
                top, left = (int(rng.integers(size - side + 1)) for size in photograph.shape[:2])
                packed = io.BytesIO()
                crop = Image.fromarray(photograph[top : top + side, left : left + side])
                crop.save(packed, self.builder_config.name, quality=95)
                yield n, {"image": io.BytesIO(packed.getvalue())}

    for config in Photographs.BUILDER_CONFIGS:
        Photographs(config=config, data_dir=str(folder), file_format="array_record").download_and_prepare()
        yield config.name, data.load(f"photographs/{config.name}", "train", data_dir=folder)


def _throughput(source, batch=128, **options):
    batches = data.batches(source, batch, seed=0, **options)
    for _ in range(10):
        next(batches)
    start, cpu, count = time.perf_counter(), time.process_time(), 0
    while time.perf_counter() - start < 5:
        next(batches)
        count += batch
    return {
        "images_per_second": count / (time.perf_counter() - start),
        "images_per_cpu_second": count / (time.process_time() - cpu),
    }


PARTS = {"start": _start, "saves": _saves, "save": _save, "input": _input}

if __name__ == "__main__":
    main()
