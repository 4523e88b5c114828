"""Bits/dim against training time: every checkpoint that a run has kept, on the same images with the same noise.

    python -m experiments.learning_curve --workdir runs/mnist [--split 'test[:128]'] [--set likelihood.rtol=1e-3]

Writes learning_curve.json and learning_curve.png into the run folder. The time is that of the training steps alone,
from metrics.jsonl. Run again after a kill, or after more training, to evaluate what is missing.
"""

from __future__ import annotations

import pathlib

import matplotlib
from absl import flags
from ml_collections import ConfigDict

from experiments import cli
from experiments.artefacts import Run, read_jsonl
from experiments.likelihood import likelihood, report
from jdiff import checkpoint

matplotlib.use("Agg")
from matplotlib import pyplot as plt


def learning_curve(config: ConfigDict, run: Run, *, split: str) -> list[dict]:
    """Evaluate the kept checkpoints on a split; return [{"step", "seconds", "bits_per_dim", "standard_error"}].

    Raises:
      FileNotFoundError: nothing has been trained here.
      ValueError: see `experiments.likelihood.likelihood`.
    """
    run.match(config)
    with checkpoint.open_manager(str(run / "checkpoints"), read_only=True) as manager:
        steps = sorted(manager.all_steps())
    if not steps:
        raise FileNotFoundError(f"no checkpoint in {run / 'checkpoints'}: train first")
    rows = []
    for step in steps:
        summary = likelihood(config, run, split=split, step=step)
        print(report(summary))
        row = {k: summary[k] for k in ("bits_per_dim", "standard_error")}
        rows.append({"step": step, "seconds": seconds(run, config.training.batch_size, step), **row})
    run.write_json("learning_curve.json", {"split": split, "points": rows})
    picture(run / "learning_curve.png", rows, split)
    return rows


def seconds(run: Run, batch_size: int, step: int) -> float:
    """Return how long the training steps up to `step` took, validation and saving apart, from metrics.jsonl."""
    total, last = 0.0, 0
    for line in read_jsonl(run / "metrics.jsonl"):
        if line["step"] <= step:
            total += (line["step"] - last) * batch_size / line["images_per_second"]
            last = line["step"]
    return total


def picture(file: pathlib.Path, rows: list[dict], split: str) -> None:
    """Write bits/dim over minutes, with standard errors over the images (which all points share)."""
    rows = [row for row in rows if row["bits_per_dim"] is not None]
    figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
    minutes, bits = [row["seconds"] / 60 for row in rows], [row["bits_per_dim"] for row in rows]
    axes.errorbar(minutes, bits, [row["standard_error"] or 0.0 for row in rows], fmt="o-", markersize=3, capsize=2)
    for row, x, y in zip(rows, minutes, bits):
        axes.annotate(f"step {row['step']}", (x, y), textcoords="offset points", xytext=(4, 4), fontsize=7)
    axes.set(xlabel="minutes of training", ylabel="bits/dim", title=split)
    axes.grid(alpha=0.3)
    figure.savefig(file, dpi=120)
    plt.close(figure)


def main() -> None:
    """Run from the command line."""
    flags.DEFINE_string("split", "", "split to evaluate (default: the configuration's test split)")
    cli.main(
        lambda config, run: learning_curve(config, run, split=flags.FLAGS.split or config.data.test) and None,
        evaluation=True,
    )


if __name__ == "__main__":
    main()
