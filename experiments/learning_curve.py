"""Bits/dim against training time: every checkpoint that a run has kept, on the same images with the same noise.

    python -m experiments.learning_curve --workdir runs/mnist [--split 'test[:128]'] [--set likelihood.rtol=1e-3]

Writes learning_curve.json and learning_curve.png into the run folder. The time is that of the training steps alone,
from metrics.jsonl. Run again after a kill, or after more training, to evaluate what is missing.
"""

from __future__ import annotations

from absl import flags
from ml_collections import ConfigDict

from experiments import cli, pictures
from experiments.artefacts import Run, read_jsonl
from experiments.likelihood import likelihood, report
from experiments.processes import primary
from jdiff import checkpoint


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
        summary = likelihood(config, run, split=split, step=step, write=False)
        if primary():
            print(report(summary))
        row = {k: summary[k] for k in ("bits_per_dim", "standard_error")}
        rows.append({"step": step, "seconds": seconds(run, config.training.batch_size, step), **row})
    if primary():
        run.write_json("learning_curve.json", {"split": split, "points": rows})
        pictures.learning_curve(run / "learning_curve.png", rows, split)
    return rows


def seconds(run: Run, batch_size: int, step: int) -> float:
    """Return how long the training steps up to `step` took, validation and saving apart, from metrics.jsonl."""
    total, last = 0.0, 0
    for line in read_jsonl(run / "metrics.jsonl"):
        if line["step"] <= step:
            total += (line["step"] - last) * batch_size / line["images_per_second"]
            last = line["step"]
    return total


def main() -> None:
    """Run from the command line."""
    flags.DEFINE_string("split", "", "split to evaluate (default: the configuration's test split)")
    cli.main(
        lambda config, run: learning_curve(config, run, split=flags.FLAGS.split or config.data.test) and None,
        evaluation=True,
    )


if __name__ == "__main__":
    main()
