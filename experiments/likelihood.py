"""Exact bits/dim of a trained model, with what the number is worth.

    python -m experiments.likelihood --workdir runs/digits [--split test] [--set likelihood.probes=4]
    python -m experiments.likelihood --workdir runs/digits --error 1e-3       # choose the tolerance first
    python -m experiments.likelihood --workdir runs/digits --shard 0/4        # a part, on this machine; or --merge
    python -m experiments.likelihood --workdir runs/digits --bounds           # evidence lower bounds beside it
    python -m experiments.likelihood --workdir runs/digits --against runs/other

Prints the mean over a split with its standard error by sources and the solver's error; writes likelihood_<split>.json,
per-image records (run again after a kill to go on), a histogram and the images with the fewest and the most bits.
"""

from __future__ import annotations

import json
import math

import jax
import numpy as np
from absl import flags
from ml_collections import ConfigDict

import jdiff
from experiments import build, cli, errors, methods, pictures
from experiments.artefacts import Run, read_json, read_jsonl
from experiments.evaluation import Evaluation, slug
from experiments.processes import primary
from jdiff import data

__all__ = ["against", "details", "likelihood", "per_image", "report"]

# What two evaluations must share to be compared at all, and to have the same noise and probes.
_SAME_IMAGES = ("data", "version", "split")
_SAME_NOISE = ("seed", "dequantisation", "importance_samples", "divergence", "probes")


def likelihood(
    config: ConfigDict,
    run: Run,
    *,
    split: str = "",
    step: int | None = None,
    shard: tuple[int, int] | None = None,
    merge: bool = False,
    error: float | None = None,
    bound: bool = False,
    write: bool = True,
) -> dict | None:
    """Evaluate a split (default: config.data.test) and return the summary that likelihood_<split>.json holds.

    Each image is dequantised config.likelihood.draws times, each time with its own probes; draw d of image i uses keys
    folded from (seed, d, i), so the numbers do not depend on the batch size or on how the work is split, and two
    models are compared with the same noise. Only what no record is there of is evaluated.

    Args:
      config: the configuration.
      run: the run folder.
      split: as TFDS spells it.
      step: of the checkpoint (default: the newest).
      shard: (k, n): evaluate the k-th of n parts only (default: those of JAX's processes).
      merge: evaluate nothing.
      error: bits/dim; choose the tolerance for it on config.likelihood.tolerance_images images, see
        `errors.choose_tolerance`, instead of config.likelihood.rtol and atol.
      bound: evaluate config.likelihood.bounds too, on the same images and draws.
      write: likelihood_<split>.json and .jsonl; the records that a restart goes on from are kept in any case.

    Returns:
      The summary, or None while other shards are not done.

    Raises:
      FileNotFoundError: nothing has been trained here.
      ValueError: a folder of another configuration, something unknown that the number depends on, a shard that is
        none, records that are damaged; merge without all records; error with shards; a target that is not reached.
    """
    c = config.likelihood
    if shard is not None and jax.process_count() > 1:
        raise ValueError(
            "--shard is for processes that do not know each other; these are joined and share by themselves"
        )
    shard = shard or (jax.process_index(), jax.process_count())
    if error is not None and shard[1] > 1:
        raise ValueError("--error needs one process: choose the tolerance first, with --set likelihood.images=128, say")
    bound_methods = [methods.bound(config, name.strip()) for name in c.bounds.split(",")] if bound else []
    if bound and config.protocol != "jdiff":
        raise ValueError(f"--bounds are of protocol jdiff, not of {config.protocol}")
    evaluation = Evaluation(config, run, split or config.data.test, step, shard, merge)
    ode = build.pick({"jdiff": methods.exact, "song2021": methods.published}, config.protocol, "protocol")
    few = evaluation.few(c.tolerance_images)
    rtol, atol, tried = c.rtol, c.atol, None
    if error is not None:
        solve = lambda t: errors.table(evaluation.records(few, ode(config, t, t)), "bits_per_dim")[:, 0]
        rtol, tried = errors.choose_tolerance(solve, error)
        atol = rtol

    method = ode(config, rtol, atol)
    singles = evaluation.records(evaluation.pairs(c.draws * c.importance_samples), method)
    tighter = evaluation.records(few, ode(config, rtol / 10, atol / 10)) if few else []
    bounded = {m.name: evaluation.records(evaluation.pairs(c.draws), m) for m in bound_methods}
    if None in (singles, tighter, *bounded.values()):
        if merge:
            raise ValueError(f"nothing to merge yet: {evaluation.missing} records of {evaluation.split} are missing")
        return None
    records = singles
    if c.importance_samples > 1:
        records = errors.importance_weighted(singles, c.importance_samples, evaluation.size)
    summary = {
        "settings": evaluation.settings(method) | {"images": len({r["index"] for r in records}), "draws": c.draws},
        **errors.summarise(records),
        "tolerance": _solver_error(singles, tighter, rtol),
        "tolerances_tried": tried,
        "bounds": _bounds_table(singles, records if c.importance_samples > 1 else None, bounded),
        "error_aimed_at": error,
        "probe_noise": _probe_noise(singles, c.probes),
        "device": ", ".join(sorted({r["device"] for r in records})),
        "seconds": round(sum(r["seconds"] for r in records), 1),
        "jdiff": jdiff.__version__,
    }
    name = f"likelihood_{slug(evaluation.split)}"
    if write and primary():
        run.write(f"{name}.jsonl", "".join(json.dumps(record) + "\n" for record in records))
        run.write_json(f"{name}.json", summary)
    return summary


def per_image(run: Run, split: str) -> np.ndarray:
    """Return the bits/dim of each evaluated image of a split, averaged over draws, in the order of the split."""
    bits = errors.table(read_jsonl(run / f"likelihood_{slug(split)}.jsonl"), "bits_per_dim")
    return np.ma.masked_invalid(bits).mean(axis=1).filled(np.nan)


def against(run: Run, other: Run, split: str) -> dict:
    """Return `errors.paired` of two evaluated models on the same images.

    Raises:
      FileNotFoundError: one of them is not evaluated.
      ValueError: other data; see `errors.paired`.
    """
    name = f"likelihood_{slug(split)}"
    for folder in (run, other):
        if not (folder / f"{name}.json").exists():
            raise FileNotFoundError(f"{folder.path} has no {name}.json: evaluate it first")
    ours, theirs = (read_json(folder / f"{name}.json")["settings"] for folder in (run, other))
    for field in _SAME_IMAGES:
        if ours.get(field) != theirs.get(field):
            raise ValueError(f"other data: {field} is {ours.get(field)!r} here, {theirs.get(field)!r} in {other.path}")
    result = errors.paired(*(read_jsonl(folder / f"{name}.jsonl") for folder in (run, other)))
    return result | {"common_noise": all(ours.get(field) == theirs.get(field) for field in _SAME_NOISE)}


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
        f"{_count(s['draws'], 'draw')}; {summary['evaluations_mean']:.0f} evaluations on average, at most "
        f"{summary['evaluations_max']}, tolerance {s['rtol']:g}, step {s['step']}, {summary['seconds']} s"
    )


def details(summary: dict) -> str:
    """Return the lines under `report`: the error by sources, the solver's error and what the number depends on."""
    s = summary["settings"]
    lines = []
    if summary["parts"]:
        text = "; ".join(f"{_together(part['sources'])} {part['error']:.4f}" for part in summary["parts"])
        joined = any(len(part["sources"]) > 1 for part in summary["parts"])
        hint = " (likelihood.draws and likelihood.probes of 2 or more tell them apart)" if joined else ""
        lines.append(f"standard error: {text}{hint}")
    if summary["probe_noise"] is not None:
        lines.append(f"noise of one probe: {summary['probe_noise']:.4f} bits/dim an image")
    if summary["tolerance"] is None:
        lines.append("solver's error: not estimated (likelihood.tolerance_images = 0)")
    else:
        lines.append(f"solver's error: {_difference(summary['tolerance'], s['rtol'])}")
    if summary["tolerances_tried"]:
        tried = ", ".join(f"{t['tolerance']:g} gave {_number(t['mean'])}" for t in summary["tolerances_tried"])
        lines.append(f"tolerance chosen for an error of {summary['error_aimed_at']:g}: {tried}")
    weighted = f", weighted over {s['importance_samples']}" if s["importance_samples"] > 1 else ""
    if weighted and s["divergence"] != "exact":
        weighted += " (with random probes an estimate, no bound)"
    lines.append(
        f"data {s['data']} {s['version']}, split {s['split']}; dequantisation {s['dequantisation']}{weighted}; "
        f"{s['divergence']} divergence, {_count(s['probes'], 'probe')}; {s['process']} to t_min = {s['t_min']:g}, "
        f"stepping in {s['variable']}"
    )
    for row in summary["bounds"]:
        value, error, gap, gap_error = (
            "-" if row[k] is None else f"{row[k]:.4f}" for k in ("bits_per_dim", "standard_error", "gap", "gap_error")
        )
        above = "" if row["name"] == "ODE" else f", above the ODE by {gap} +- {gap_error} (paired)"
        lines.append(f"{row['name']:25s} {value} +- {error}, {row['evaluations']:.0f} evaluations{above}")
    lines.append(
        f"protocol {s['protocol']}; matmul precision {s['matmul_precision']}; {summary['device']}; "
        f"jdiff {summary['jdiff']}, step {s['step']}, parameters {s['parameters']}"
    )
    return "\n".join(f"  {line}" for line in lines)


def _bounds_table(singles, weighted, bounded):
    """Return [{"name", "bits_per_dim", "standard_error", "gap", "gap_error", "evaluations"}], the ODE's value first.

    The gap is above the ODE's value on the same images, with the error of that paired difference.
    """
    found = {"ODE": singles} | ({"ODE, importance-weighted": weighted} if weighted else {}) | bounded
    images = {name: errors.table(records, "bits_per_dim").mean(axis=1) for name, records in found.items()}
    rows = []
    for name, records in found.items() if bounded else ():
        summary, gap = errors.summarise(records), errors.difference(images[name], images["ODE"])
        row = {k: summary[k] for k in ("bits_per_dim", "standard_error")} | {"evaluations": summary["evaluations_mean"]}
        rows.append({"name": name, **row, "gap": gap["bias"], "gap_error": gap["bias_error"]})
    return rows


def _solver_error(records, tighter, rtol):
    """Return `errors.difference` of the same images, noise and probes at the tolerance and at a tenth of it."""
    if not tighter:
        return None
    known = {(r["index"], r["draw"]): r["bits_per_dim"] for r in records}
    bits = np.asarray([[known[r["index"], r["draw"]], r["bits_per_dim"]] for r in tighter], float)
    return {"tighter": rtol / 10, **errors.difference(*bits.T)}


def _probe_noise(records, probes):
    """Return the standard deviation of a single probe's estimate around an image's mean, or None."""
    found = [r["probe_error"] for r in records]
    return math.sqrt(probes * np.mean(np.square(found))) if None not in found else None


def _difference(t, rtol):
    where = f"tolerance {rtol:g} against {t['tighter']:g} on {t['images']} images"
    if t["bias"] is None:
        return f"unknown, a solve failed ({where})"
    spread = "" if t["bias_error"] is None else f" +- {t['bias_error']:.1e}"
    return f"bias {t['bias']:+.1e}{spread}, mean {t['mean']:.1e}, largest {t['largest']:.1e} ({where})"


def _together(sources):
    *first, last = sources
    return f"{', '.join(first)} and {last} together" if first else last


def _count(number, noun):
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _number(value):
    return "a failure" if value is None else f"{value:.1e}"


def _shard(text):
    k, slash, n = text.partition("/")
    if not (slash and k.isdecimal() and n.isdecimal() and int(k) < int(n)):
        raise ValueError(f"--shard is k/n with 0 <= k < n, such as 0/4; got {text!r}")
    return int(k), int(n)


def _show(folder, config, split, summary):
    """Print a finished evaluation and write its pictures."""
    print(report(summary))
    if summary["bits_per_dim"] is None:
        return
    print(details(summary))
    name, bits = f"likelihood_{slug(split)}", per_image(folder, split)
    pictures.bits_histogram(folder / f"{name}.png", bits, {})
    source = data.load(config.data.name, split)
    numbers = np.unique([record["index"] for record in read_jsonl(folder / f"{name}.jsonl")])
    read = lambda numbers: source.read(numbers)["image"]
    if len(bits) > 1:
        pictures.extremes(folder / f"{name}_extremes.png", read, numbers, bits, source.levels)


def main() -> None:
    """Run from the command line."""
    flags.DEFINE_string("split", "", "split to evaluate (default: the configuration's test split)")
    flags.DEFINE_integer("step", None, "checkpoint to evaluate (default: the newest)")
    flags.DEFINE_string("shard", None, "k/n: evaluate the k-th of n parts only (k from 0)")
    flags.DEFINE_bool("merge", False, "evaluate nothing: merge the records of all shards")
    flags.DEFINE_float("error", None, "choose the tolerance for this mean error in bits/dim")
    flags.DEFINE_bool("bounds", False, "the bounds of likelihood.bounds too, in one table")
    flags.DEFINE_string("against", None, "another evaluated run folder: print the paired difference")

    def run(config, folder):
        f = flags.FLAGS
        split = f.split or config.data.test
        shard = _shard(f.shard) if f.shard else None
        summary = likelihood(
            config, folder, split=split, step=f.step, shard=shard, merge=f.merge, error=f.error, bound=f.bounds
        )
        if not primary():
            return 0
        if summary is None:
            print("this part is done; the last shard to finish merges all (or run again with --merge)")
            return 0
        _show(folder, config, split, summary)
        if f.against:
            d = against(folder, Run(f.against), split)
            noise = "common noise" if d["common_noise"] else "noise not in common"
            print(
                f"{d['difference']:+.4f} +- {d['error']:.4f} bits/dim against {f.against} (negative: better here; "
                f"paired on {d['images']} images, {noise}; unpaired {d['unpaired']:.4f})"
            )
        return 0 if summary["failed"] == 0 else 4

    cli.main(run, evaluation=True)


if __name__ == "__main__":
    main()
