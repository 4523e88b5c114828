"""What the benchmarks share: the trained demo model, paired timing, JSON out."""

from __future__ import annotations

import argparse
import json
import pathlib
import platform
import statistics
import time
from collections.abc import Callable

import jax
from absl import logging

from experiments import build, cli, model
from experiments.artefacts import Run
from jdiff import data


def arguments(description: str) -> argparse.Namespace:
    """Parse the flags of a benchmark: the run folder of the demo, and where the JSON goes."""
    made = parser(description)
    made.add_argument("--workdir", default="runs/digits", help="run folder of a trained model (make demo)")
    return parse(made)


def parser(description: str) -> argparse.ArgumentParser:
    """Return the parser of the flag that all benchmarks have: where the JSON goes."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--out", default="benchmarks/out", help="folder for JSON and pictures")
    return made


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parse the flags and make the folder of the results."""
    options = parser.parse_args()
    logging.set_verbosity(logging.ERROR)
    pathlib.Path(options.out).mkdir(parents=True, exist_ok=True)
    return options


def trained_model(workdir: str):
    """Return (config, process, field factory params -> field, params, test split) of a run folder."""
    run = Run(workdir)
    config = cli.from_dict(run.config())
    source = data.load(config.data.name, config.data.test)
    trained = model.load(config, run, source)

    def field(params):
        return build.field(config, trained.model.module, params, trained.statistics)

    return config, build.process(config), field, trained, source


def seconds(function: Callable[[], object], *, repeats: int = 5, warm: bool = False) -> float:
    """Return the median wall time of a call, its result waited for, after one call to warm up unless it is warm."""
    if not warm:
        jax.block_until_ready(function())
    return statistics.median(_once(function) for _ in range(repeats))


def ratio(ours: Callable[[], object], baseline: Callable[[], object], *, repeats: int = 15) -> dict[str, float]:
    """Return median seconds of both and the median ratio ours / baseline over pairs timed one after the other."""
    jax.block_until_ready((ours(), baseline()))
    pairs = [(_once(ours), _once(baseline)) for _ in range(repeats)]
    return {
        "ours_seconds": statistics.median(a for a, _ in pairs),
        "baseline_seconds": statistics.median(b for _, b in pairs),
        "ratio": statistics.median(a / b for a, b in pairs),
        "ratio_min": min(a / b for a, b in pairs),
        "ratio_max": max(a / b for a, b in pairs),
    }


def write(options: argparse.Namespace, name: str, result: dict) -> None:
    """Write the result with the machine's description as JSON, and print it."""
    result = {
        "benchmark": name,
        "device": f"{jax.device_count()} {jax.devices()[0].device_kind}",
        "platform": platform.platform(),
        "jax": jax.__version__,
        **result,
    }
    text = json.dumps(result, indent=2)
    (pathlib.Path(options.out) / f"{name}.json").write_text(text + "\n")
    print(text)


def _once(function):
    start = time.perf_counter()
    jax.block_until_ready(function())
    return time.perf_counter() - start
