"""How well a trained classifier tells the classes apart along the noise: accuracy and cross entropy against t.

    python -m experiments.classify --workdir RUN [--split SPLIT]

Every example of the split once at each of eleven times from t_min to t_max, with the noise of sampling.seed.
Writes classifier.json, classifier.png and the table on the screen. `log_prob` is what guidance needs of a classifier.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from absl import flags
from ml_collections import ConfigDict

from experiments import build, cli, model, objectives, pictures
from experiments.artefacts import Run
from experiments.processes import primary
from jdiff import data, losses, nn, training

TIMES = 11


def load(folder: str) -> tuple[ConfigDict, model.Trained]:
    """Return the configuration of a classifier's run folder, and the classifier, for another script.

    Raises:
      FileNotFoundError: nothing has been trained in this folder.
      ValueError: it holds no classifier.
    """
    run = Run(folder)
    config = cli.from_dict(run.config())
    return config, model.load(config, run, data.load(config.data.name, config.data.train), classifier=True)


def log_prob(module, params, label: jax.Array) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """Return (x, t) -> log p(label | x_t = x), both (batch,), for `jdiff.guidance.classifier`.

    Args:
      module: of a classifier, `load(folder)[1].model.module`.
      params: its parameters, an argument of the traced function in which this is called.
      label: integers (batch,).
    """
    logits = nn.as_field(module, params)
    return lambda x, t: losses.label_log_prob(logits(x, t), label)


def classify(config: ConfigDict, run: Run, split: str = "") -> list[dict]:
    """Return, and write into the run folder, the accuracy and the cross entropy in nats at each time.

    Raises:
      FileNotFoundError, ValueError: as `experiments.model.load`.
    """
    source = data.load(config.data.name, split or config.data.test)
    trained = model.load(config, run, source, classifier=True)
    process = build.process(config)
    key = jax.random.key(config.sampling.seed)

    @jax.jit
    def sums(params, batch, t):
        keys = training.example_keys(key, 0, batch["index"])
        x0 = objectives.model_space(config, trained.model.transform, keys, batch["image"])
        field = nn.as_field(trained.model.module, params)
        found = losses.classification(keys, field, process, x0, t.astype(x0.dtype), batch["label"])
        return [jnp.where(batch["mask"], value, 0).sum() for value in found]

    rows = []
    for t in jnp.linspace(process.t_min, process.t_max, TIMES):
        batches = data.evaluation_batches(source, min(500, len(source)))
        nats, correct = (
            sum(map(float, part)) / len(source) for part in zip(*(sums(trained.params, b, t) for b in batches))
        )
        error = math.sqrt(correct * (1 - correct) / len(source))
        rows.append({"t": float(t), "accuracy": correct, "accuracy_error": error, "cross_entropy": nats})
        if primary():
            print(f"t {float(t):.4g}   accuracy {correct:.4f} +- {error:.4f}   cross entropy {nats:.4f} nats")
    if primary():
        record = {"split": source.split, "images": len(source), "step": trained.step, "times": rows}
        run.write_json("classifier.json", record)
        pictures.accuracy(run / "classifier.png", rows, trained.model.classes, source.split)
    return rows


def main() -> None:
    """Run from the command line."""
    flags.DEFINE_string("split", "", "instead of data.test")
    cli.main(lambda config, run: classify(config, run, flags.FLAGS.split) and None, evaluation=True)


if __name__ == "__main__":
    main()
