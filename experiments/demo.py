"""The main job, end to end: train on real digits, exact bits/dim on held-out ones, samples, a report to look at.

    python -m experiments.demo [--workdir runs/digits] [--smoke]

Run again to resume what is missing, or to hear that it is complete.
"""

from __future__ import annotations

import argparse
import math
import pathlib
import time

import numpy as np
from absl import logging
from ml_collections import ConfigDict

from experiments import checks, cli, likelihood, pictures, report, sample, train, yardsticks
from experiments.artefacts import Run

# Samples by the probability-flow ODE and by the reverse SDE with Langevin corrections.
_SAMPLERS = (
    {"solver": "heun", "grid": "uniform_log_snr", "steps": 40},
    {"solver": "predictor_corrector", "grid": "uniform_log_snr", "steps": 200},
)


def demo(config: ConfigDict, run: Run, *, name: str) -> int:
    """Train, evaluate, sample and write report.html; return an exit code."""
    begin = time.perf_counter()
    code = train.train(config, run)
    if code:
        return code
    trained = time.perf_counter()
    split = config.data.test
    summary = likelihood.likelihood(config, run, split=split)
    bits = likelihood.per_image(run, split)
    table = compare(bits, yardsticks.evaluate(config.data.name, split, train=config.data.train))
    run.write_json("yardsticks.json", table)
    pictures.bits_histogram(
        run / "likelihood_test.png", bits, {k: v["bits_per_dim"] for k, v in table.items() if k != "uniform"}
    )
    evaluated = time.perf_counter()
    for changes in _SAMPLERS:
        chosen = config.copy_and_resolve_references()
        chosen.sampling.update(changes if name != "smoke" else changes | {"steps": 5})
        if not (run / f"samples_{chosen.sampling.solver}.npz").exists():
            sample.sample(chosen, run)
    sampled = time.perf_counter()
    report.write(run, config, summary, table, [c["solver"] for c in _SAMPLERS])
    print(likelihood.report(summary))
    for label, row in table.items():
        gain = f"{row['gain']:+.3f} +- {row['gain_error']:.3f}"
        print(f"  {label:18s} {row['bits_per_dim']:.3f}   the model is better by {gain} (paired)")
    print(
        f"training {trained - begin:.0f} s, likelihood and yardsticks {evaluated - trained:.0f} s, "
        f"samples {sampled - evaluated:.0f} s, all {time.perf_counter() - begin:.0f} s"
    )
    print(f"look at {(run / 'report.html').resolve()}")
    return 0


def compare(bits: np.ndarray, others: dict[str, np.ndarray]) -> dict[str, dict[str, float]]:
    """Return, per yardstick, its mean bits/dim and by how much the model is better on the same images, with error."""
    table = {}
    for name, other in others.items():
        other = other[: len(bits)]
        gain = other - bits
        table[name] = {
            "bits_per_dim": float(other.mean()),
            "gain": float(gain.mean()),
            "gain_error": float(gain.std(ddof=1) / math.sqrt(len(gain))),
        }
    return table


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", default=None, help="run folder (default: runs/digits, or runs/smoke)")
    parser.add_argument("--smoke", action="store_true", help="every part in seconds, on a tiny model")
    options = parser.parse_args()
    logging.set_verbosity(logging.ERROR)
    name = "smoke" if options.smoke else "digits"

    def run():
        config = cli.load(str(pathlib.Path(__file__).parents[1] / "configs" / f"{name}.py"))
        checks.check(config)
        return demo(config, Run(options.workdir or f"runs/{name}"), name=name)

    return cli.exit_code(run)


if __name__ == "__main__":
    raise SystemExit(main())
