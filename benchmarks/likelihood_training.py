"""Which choices of training help the likelihood: times, weighting and input features, each changed alone, same budget.

    python -m benchmarks.likelihood_training [--config configs/digits.py] [--steps 600] [--seeds 0 1]

Trains the configuration and its variants, evaluates them on the validation split with common noise, and prints
bits/dim and the paired difference from the first. A difference within its errors, or within that of two seeds, is none.
"""

from __future__ import annotations

import json
import pathlib
import tempfile

from benchmarks import common
from experiments import checks, cli, train
from experiments.artefacts import Run
from experiments.likelihood import against, likelihood

# Name -> fields that it changes; the first is what the others are compared with.
VARIANTS = {
    "as configured": (),
    "independent uniform times": ("loss.times.name=uniform", "loss.times.options={}"),
    "stratified uniform times": ("loss.times.name=stratified", "loss.times.options={}"),
    "importance-sampled times": ("loss.times.name=importance", "loss.times.options={}"),
    "unweighted, stratified times": (
        "loss.weight.name=unit",
        "loss.times.name=stratified",
        "loss.times.options={}",
    ),
    "input features, n = 3, 4": ("network.options.input_frequencies=[3, 4]",),
}


def main() -> None:
    """Train and evaluate all, write JSON."""
    parser = common.parser(__doc__)
    parser.add_argument("--config", default="configs/digits.py")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--set", action="append", default=[], help="of all variants")
    options = common.parse(parser)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in options.seeds:
            base = None
            for name, changes in VARIANTS.items():
                run = Run(str(pathlib.Path(folder) / f"{len(rows)}"))
                config = cli.load(options.config)
                shared = (f"training.steps={options.steps}", "likelihood.tolerance_images=0", *options.set)
                for text in (*shared, *changes):
                    cli.override(config, text)
                config.seed = seed
                checks.check(config)
                train.train(config, run)
                split = config.data.validation
                summary = likelihood(config, run, split=split)
                base = base or run
                difference = None if base is run else against(run, base, split)
                row = {"seed": seed, "variant": name, "bits_per_dim": summary["bits_per_dim"]}
                row |= {"standard_error": summary["standard_error"]}
                if difference:
                    row |= {"difference": difference["difference"], "difference_error": difference["error"]}
                print(json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}), flush=True)
                rows.append(row)
    common.write(options, "likelihood_training", {"config": options.config, "steps": options.steps, "rows": rows})


if __name__ == "__main__":
    main()
