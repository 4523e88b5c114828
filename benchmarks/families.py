"""Bits/dim across model families: one row of Markdown for each run folder that has been evaluated.

    python -m benchmarks.families runs/digits runs/digits_coupling runs/digits_cnf runs/digits_flow [--split test]

Training time is that of `metrics.jsonl`, without compilation before its first line.
"""

from __future__ import annotations

import math

import jax

from benchmarks import common
from experiments import cli, model
from experiments.artefacts import Run, read_json, read_jsonl
from jdiff import data


def main() -> None:
    """Print the table, write JSON."""
    parser = common.parser(__doc__)
    parser.add_argument("workdirs", nargs="+")
    parser.add_argument("--split", default="test")
    options = common.parse(parser)
    rows = [row(workdir, options.split) for workdir in options.workdirs]
    print("| run | bits/dim | images | parameters | evaluations mean / max | steps | training |\n" + "| --- " * 7 + "|")
    for r in rows:
        print(
            f"| `{r['run']}` | {r['bits_per_dim']:.3f} +- {r['standard_error']:.3f} | {r['images']} | "
            f"{r['parameters']:,} | {r['evaluations_mean']:.0f} / {r['evaluations_max']} | {r['steps']:,} | "
            f"{r['training_seconds'] / 60:.1f} min |"
        )
    common.write(options, "families", {"split": options.split, "rows": rows})


def row(workdir: str, split: str) -> dict:
    """Return what the table says of one run folder."""
    run = Run(workdir)
    config = cli.from_dict(run.config())
    slug = "".join(c if c.isalnum() else "_" for c in split)
    summary = read_json(run / f"likelihood_{slug}.json")
    described = model.describe(config, data.load(config.data.name, config.data.train))
    steps, seconds = 0, 0.0
    for line in read_jsonl(run / "metrics.jsonl"):
        seconds += (line["step"] - steps) * config.training.batch_size / line["images_per_second"]
        steps = line["step"]
    return {
        "run": run.path.name,
        "images": summary["settings"]["images"],
        "parameters": sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(model.shapes(config, described))),
        "steps": steps,
        "training_seconds": seconds,
        **{k: summary[k] for k in ("bits_per_dim", "standard_error", "evaluations_mean", "evaluations_max")},
    }


if __name__ == "__main__":
    main()
