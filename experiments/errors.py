"""What a mean over images is worth: its standard error by sources, the solver's error, differences of two models."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

SAMPLING, DEQUANTISATION, PROBES = "test-set sampling", "dequantisation", "probes"
_LOOSEST, _TIGHTEST = -2, -6  # powers of ten; float32 solves stop improving below 1e-6


def summarise(records: list[dict]) -> dict:
    """Return mean, standard error and its parts, evaluations and failures of per-image, per-draw records.

    `standard_error` is that of the mean over images and contains every source; `noise_error` is the part of it that
    comes from probes and dequantisation (from the spread between the draws of an image; null for one draw): the error
    of the mean over just these images. `parts` is the whole by sources, see `decompose`.
    """
    bits = table(records, "bits_per_dim")
    failed = int(sum(r["failed"] or not _finite(r["bits_per_dim"]) for r in records))
    good = np.isfinite(bits)
    probes = table(records, "probe_error") if "probe_error" in records[0] else np.full_like(bits, np.nan)
    total, noise, parts = decompose(bits, probes) if good.any(axis=1).sum() > 1 else (None, None, [])
    return {
        "bits_per_dim": float(bits[good].mean()) if good.any() and not failed else None,
        "standard_error": total,
        "noise_error": noise,
        "parts": parts,
        "evaluations_mean": float(np.mean([r["evaluations"] for r in records])),
        "evaluations_max": int(max(r["evaluations"] for r in records)),
        "failed": failed,
    }


def decompose(bits: np.ndarray, probes: np.ndarray) -> tuple[float, float | None, list[dict]]:
    """Return the standard error of the mean over images, that of its noise, and its parts by sources.

    An image's value is mu + image + dequantisation + probes, the last two drawn anew each time. With n images and m
    draws of each, N = m n, total^2 = var(image means) / n; noise^2 = mean(var over draws) / N needs two draws;
    probes^2 = sum(probe_error^2) / N^2 needs two probes a draw (or the exact divergence, where it is 0). The others
    are what is left: sampling^2 = total^2 - noise^2, dequantisation^2 = noise^2 - probes^2, 0 where an estimate is
    negative. Sources that cannot be told apart stand together in one part. Where images have different numbers of
    draws, total^2 is the sandwich estimate for clusters and noise^2 pools, both the same for equal numbers.

    Args:
      bits: (images, draws), NaN where there is none.
      probes: standard error over probes of each, NaN where unknown.

    Returns:
      total; noise or None; parts [{"sources": [...], "error": ...}], whose squares add up to total^2 but for clipping.
    """
    there = np.isfinite(bits)
    draws, size = there.sum(axis=1), there.sum()
    images = (draws > 0).sum()
    residual = np.where(there, bits - bits[there].mean(), 0)
    total = images / (images - 1) * (residual.sum(axis=1) ** 2).sum() / size**2
    within = np.where(there, residual - residual.sum(axis=1, keepdims=True) / np.maximum(draws, 1)[:, None], 0)
    freedom = size - images
    noise = (within**2).sum() / freedom / size if freedom else None
    probe = (probes[there] ** 2).sum() / size**2 if np.isfinite(probes[there]).all() else None
    left, rest = [SAMPLING, DEQUANTISATION, PROBES], total
    parts = []
    if noise is not None:
        parts.append(([SAMPLING], total - noise))
        left, rest = left[1:], noise
    if probe is not None:
        parts.append((left[:-1], rest - probe))
        left, rest = left[-1:], probe
    parts.append((left, rest))
    root = lambda variance: math.sqrt(max(variance, 0.0))
    return (
        root(total),
        None if noise is None else root(noise),
        [{"sources": sources, "error": root(variance)} for sources, variance in parts],
    )


def importance_weighted(records: list[dict], samples: int, size: int) -> list[dict]:
    """Return records of the bound of `samples` dequantisations each, from records of one dequantisation each.

    log P(levels) >= E[log 1/K sum_k p(x_k) / q(x_k)] (Burda et al. 2016, arXiv 1509.00519), where -b_k D log 2 is
    log p / q of a single one: draws K g to K g + K - 1 become draw g. Their probes must be common (noise that they
    share leaves the weights alone); what is left of it makes the result optimistic, so that it is a bound for the exact
    divergence only, else an estimate of one. `probe_error` is taken as fully shared.

    Args:
      records: with draws 0 to K m - 1 for every image.
      samples: K.
      size: D, entries of an image.
    """
    nats = size * math.log(2)
    groups: dict[tuple[int, int], list[dict]] = {}
    for r in records:
        groups.setdefault((r["index"], r["draw"] // samples), []).append(r)
    combined = []
    for (index, draw), group in sorted(groups.items()):
        failed = any(r["failed"] or not _finite(r["bits_per_dim"]) for r in group)
        bits = error = None
        if not failed:
            log_weight = -nats * np.asarray([r["bits_per_dim"] for r in group])
            largest = log_weight.max()
            weight = np.exp(log_weight - largest)
            bits = -(largest + math.log(weight.mean())) / nats
            probes = [r["probe_error"] for r in group]
            error = None if None in probes else float(weight @ np.asarray(probes) / weight.sum())
        sums = {k: sum(r[k] for r in group) for k in ("evaluations", "seconds")}
        found = {"bits_per_dim": bits, "probe_error": error, "failed": failed, "device": group[0]["device"]}
        combined.append({"index": index, "draw": draw, **found, **sums})
    return combined


def difference(bits: np.ndarray, reference: np.ndarray) -> dict:
    """Return bias (with its standard error), mean and largest |bits - reference| over images; null if any is NaN."""
    d = bits - reference
    n = len(d)
    if not np.isfinite(d).all():
        return {"images": n, "bias": None, "bias_error": None, "mean": None, "largest": None}
    return {
        "images": n,
        "bias": float(d.mean()),
        "bias_error": float(d.std(ddof=1) / math.sqrt(n)) if n > 1 else None,
        "mean": float(np.abs(d).mean()),
        "largest": float(np.abs(d).max()),
    }


def choose_tolerance(solve: Callable[[float], np.ndarray], target: float) -> tuple[float, list[dict]]:
    """Return the loosest power of ten from 1e-2 to 1e-6 with mean |b(tolerance) - b(tolerance / 10)| <= target.

    Two solves a decade apart predict the mean absolute error within a factor of 2 or so (the solver's own estimate was
    12 to 18 times too small); an error that both share is not seen.

    Args:
      solve: tolerance -> bits/dim of the same images with the same noise and probes, (images,), NaN where it failed.
      target: bits/dim.

    Returns:
      The tolerance and the `difference` of every tolerance tried.

    Raises:
      ValueError: the target is not positive, or is not reached.
    """
    if not 0 < target < math.inf:
        raise ValueError(f"the error to aim at must be positive and finite, got {target}")
    tried = []
    bits = solve(10.0**_LOOSEST)
    for power in range(_LOOSEST, _TIGHTEST - 1, -1):
        tighter = solve(10.0 ** (power - 1))
        tried.append({"tolerance": 10.0**power, **difference(bits, tighter)})
        if tried[-1]["mean"] is not None and tried[-1]["mean"] <= target:
            return 10.0**power, tried
        bits = tighter
    found = ", ".join(f"{t['tolerance']:.0e}: {t['mean']}" for t in tried)
    raise ValueError(f"no tolerance has an estimated error of {target} bits/dim or less ({found}): aim higher")


def paired(ours: list[dict], others: list[dict]) -> dict:
    """Return by how much the first model's mean is above the second's on the images that both have, with errors.

    `error` is of the difference as it is, image by image, `unpaired` what two independent evaluations would give. Draws
    that both have are compared with each other: with common noise and probes most of theirs cancels too.

    Raises:
      ValueError: fewer than two images in common, or failed solves among them.
    """
    a, b = ({(r["index"], r["draw"]): r["bits_per_dim"] for r in records} for records in (ours, others))
    common = sorted(a.keys() & b.keys())
    images = sorted({index for index, _ in common})
    draws = sorted({draw for _, draw in common})
    common = [(index, draw) for index in images for draw in draws if (index, draw) in a and (index, draw) in b]
    if len(images) < 2 or len(common) != len(images) * len(draws):
        raise ValueError(f"the two evaluations have {len(images)} images in common, not all with the same draws")
    first, second = (
        np.asarray([math.nan if t[pair] is None else t[pair] for pair in common], float).reshape(len(images), -1)
        for t in (a, b)
    )
    if not np.isfinite(first + second).all():
        raise ValueError("there are failed solves among the images that the two evaluations have in common")
    error = lambda values: float(values.mean(axis=1).std(ddof=1) / math.sqrt(len(images)))
    d = first - second
    return {
        "images": len(images),
        "draws": len(draws),
        "difference": float(d.mean()),
        "error": error(d),
        "unpaired": math.hypot(error(first), error(second)),
    }


def table(records: list[dict], name: str) -> np.ndarray:
    """Return a quantity of records as an array (images, draws), in the order of their numbers, NaN where missing."""
    images = sorted({r["index"] for r in records})
    rows = {index: row for row, index in enumerate(images)}
    values = np.full((len(images), 1 + max(r["draw"] for r in records)), np.nan)
    for r in records:
        values[rows[r["index"]], r["draw"]] = np.nan if r[name] is None else r[name]
    return values


def _finite(value):
    return value is not None and math.isfinite(value)
