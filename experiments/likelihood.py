"""Exact bits/dim of a trained model.

    python -m experiments.likelihood --workdir runs/digits [--split test] [--set likelihood.probes=4]

Prints the mean over a split with its standard error; writes likelihood_<split>.json, per-image records and a histogram.
"""

from __future__ import annotations

import itertools
import json
import math
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from ml_collections import ConfigDict
from tqdm import tqdm

from experiments import build, cli, model, pictures
from experiments.artefacts import Run, read_json, read_jsonl
from jdiff import data, log_likelihood, parallel
from jdiff.transforms import bits_per_dim

PRECISION = "highest"


def likelihood(config: ConfigDict, run: Run, *, split: str = "") -> dict:
    """Evaluate a split (default: config.data.test) and return the summary that likelihood_<split>.json holds.

    Each image is dequantised config.likelihood.draws times, each time with its own probes; draw d of image i uses keys
    folded from (seed, d, i), so the numbers do not depend on the batch size. Run again with the same settings and
    checkpoint, it returns what is there.

    Raises:
      FileNotFoundError: nothing has been trained here.
      ValueError: a folder of another configuration.
    """
    c = config.likelihood
    split = split or config.data.test
    source = data.load(config.data.name, split)
    trained = model.load(config, run, source)
    count = min(c.images or len(source), len(source))
    settings = {
        "data": config.data.name,
        "split": split,
        "images": count,
        "step": trained.step,
        "seed": config.seed,
        "dequantisation": "uniform",
        "t_min": c.t_min or build.process(config).t_min,
        "matmul_precision": PRECISION,
        **{k: c[k] for k in ("divergence", "probes", "draws", "variable", "rtol", "atol")},
    }
    name = f"likelihood_{_slug(split)}"
    if (run / f"{name}.json").exists():
        before = read_json(run / f"{name}.json")
        if before.get("settings") == settings:
            return before

    start = time.perf_counter()
    mesh = parallel.data_mesh()
    batch_size = -(-min(c.batch_size, count) // mesh.size) * mesh.size
    evaluate = _evaluator(config, trained, source.shape)
    params, statistics = parallel.replicate((trained.params, trained.statistics), mesh)
    records = []
    total = -(-count // batch_size)
    interval = 0.5 if sys.stderr.isatty() else 15
    with tqdm(total=total * c.draws, desc=f"bits/dim {split}", unit="batch", mininterval=interval) as bar:
        for batch in itertools.islice(data.evaluation_batches(source, batch_size), total):
            keep = batch["mask"] & (batch["index"] < count)
            placed = parallel.shard_batch({k: batch[k] for k in ("image", "index")}, mesh)
            for draw in range(c.draws):
                key = jax.random.fold_in(jax.random.key(config.seed), draw)
                out = jax.device_get(evaluate(params, statistics, key, placed))
                for row in np.flatnonzero(keep):
                    values = {k: v[row].item() for k, v in out.items()}
                    records.append({"index": int(batch["index"][row]), "draw": draw, **values})
                bar.update()
                bar.set_postfix_str(f"{np.nanmean([r['bits_per_dim'] for r in records]):.3f} bits/dim")
    summary = {
        "settings": settings,
        **summarise(records),
        "device": f"{jax.device_count()} {jax.devices()[0].device_kind}",
        "seconds": round(time.perf_counter() - start, 1),
    }
    lines = (json.dumps({k: None if v != v else v for k, v in record.items()}) + "\n" for record in records)
    run.write(f"{name}.jsonl", "".join(lines))
    run.write_json(f"{name}.json", summary)
    return summary


def per_image(run: Run, split: str) -> np.ndarray:
    """Return the bits/dim of each image of an evaluated split, averaged over draws, in the order of the split."""
    records = read_jsonl(run / f"likelihood_{_slug(split)}.jsonl")
    images = max(r["index"] for r in records) + 1
    table = np.full((images, max(r["draw"] for r in records) + 1), np.nan)
    for r in records:
        table[r["index"], r["draw"]] = np.nan if r["bits_per_dim"] is None else r["bits_per_dim"]
    return table.mean(axis=1)


def summarise(records: list[dict]) -> dict:
    """Return mean, standard error and its parts, evaluations and failures of per-image, per-draw records.

    `standard_error` is that of the mean over images and contains every source; `noise_error` is the part of it that
    comes from probes and dequantisation (from the spread between the draws of an image; null for one draw).
    """
    images = sorted({r["index"] for r in records})
    draws = 1 + max(r["draw"] for r in records)
    where = {index: row for row, index in enumerate(images)}
    bits = np.full((len(images), draws), np.nan)
    for r in records:
        bits[where[r["index"]], r["draw"]] = r["bits_per_dim"]
    failed = int(sum(r["failed"] for r in records))
    good = bits[np.isfinite(bits).all(axis=1)]
    mean, n = good.mean(axis=1), len(good)
    noise = math.sqrt(good.var(axis=1, ddof=1).mean() / draws / n) if draws > 1 and n else None
    return {
        "bits_per_dim": float(mean.mean()) if n and not failed else None,
        "standard_error": float(mean.std(ddof=1) / math.sqrt(n)) if n > 1 else None,
        "noise_error": noise,
        "evaluations_mean": float(np.mean([r["evaluations"] for r in records])),
        "evaluations_max": int(max(r["evaluations"] for r in records)),
        "failed": failed,
    }


def report(summary: dict) -> str:
    """Return the one line that is printed; a mean over images of which some failed is not printed as a number."""
    s = summary["settings"]
    if summary["bits_per_dim"] is None:
        return (
            f"no bits/dim: {summary['failed']} of {s['images'] * s['draws']} solves failed ({s['data']}/{s['split']})"
        )
    noise = "" if summary["noise_error"] is None else f", {summary['noise_error']:.4f} of it probes and dequantisation"
    error = "" if summary["standard_error"] is None else f" +- {summary['standard_error']:.4f} (standard error{noise})"
    return (
        f"{summary['bits_per_dim']:.4f}{error} bits/dim on {s['images']} images of {s['data']}/{s['split']}, "
        f"{s['draws']} draws; {summary['evaluations_mean']:.0f} evaluations on average, at most "
        f"{summary['evaluations_max']}, tolerance {s['rtol']:g}, step {s['step']}, {summary['seconds']} s"
    )


def _evaluator(config, trained, shape):
    c = config.likelihood
    forward_process = build.process(config)
    described = trained.model

    @jax.jit
    def evaluate(params, statistics, key, batch):
        keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(batch["index"])
        noise, probe = (jax.vmap(lambda k, n=n: jax.random.fold_in(k, n))(keys) for n in range(2))
        x = described.transform.forward(described.transform.dequantise(noise, batch["image"]))
        field = build.field(config, described.module, params, statistics)
        with jax.default_matmul_precision(PRECISION):
            result = log_likelihood(
                None if c.divergence == "exact" else probe,
                forward_process,
                field,
                x,
                predict=config.network.predict,
                divergence=c.divergence,
                probes=c.probes,
                variable=c.variable,
                rtol=c.rtol,
                atol=c.atol,
                t_min=c.t_min or None,
            )
        return {
            "bits_per_dim": bits_per_dim(result.log_prob, described.transform, shape),
            "probe_error": result.probe_error / jnp.asarray(math.prod(shape) * math.log(2), x.dtype),
            "evaluations": result.evaluations,
            "failed": result.failed,
        }

    return evaluate


def _slug(split):
    return "".join(c if c.isalnum() else "_" for c in split)


def main() -> None:
    """Run from the command line."""
    flags.DEFINE_string("split", "", "split to evaluate (default: the configuration's test split)")

    def run(config, folder):
        split = flags.FLAGS.split or config.data.test
        summary = likelihood(config, folder, split=split)
        print(report(summary))
        bits = per_image(folder, split)
        pictures.bits_histogram(folder / f"likelihood_{_slug(split)}.png", bits, {})
        return 0 if summary["failed"] == 0 else 4

    cli.main(run, evaluation=True)


if __name__ == "__main__":
    main()
