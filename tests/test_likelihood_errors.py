"""What the errors of a likelihood mean: their parts, the solver's, pairs, weights, and means of which some failed."""

import math

import numpy as np
import pytest

from experiments import errors, likelihood

IMAGE, DEQUANTISED, PROBE = 0.2, 0.06, 0.09


def _synthetic(rng, images, draws, probes):
    """Bits and probe errors of images whose three sources have the standard deviations above."""
    noise = rng.normal(0, DEQUANTISED, (images, draws, 1)) + rng.normal(0, PROBE, (images, draws, probes))
    estimates = 3 + rng.normal(0, IMAGE, (images, 1, 1)) + noise
    with np.errstate(invalid="ignore", divide="ignore"):
        error = estimates.std(axis=2, ddof=1) / math.sqrt(probes) if probes > 1 else np.full((images, draws), np.nan)
    return estimates.mean(axis=2), error


@pytest.mark.parametrize(
    "draws, probes, expected",
    [
        (3, 4, {("s",): IMAGE**2, ("d",): DEQUANTISED**2 / 3, ("p",): PROBE**2 / 12}),
        (3, 1, {("s",): IMAGE**2, ("d", "p"): (DEQUANTISED**2 + PROBE**2) / 3}),
        (1, 4, {("s", "d"): IMAGE**2 + DEQUANTISED**2, ("p",): PROBE**2 / 4}),
        (1, 1, {("s", "d", "p"): IMAGE**2 + DEQUANTISED**2 + PROBE**2}),
    ],
)
def test_the_parts_are_the_known_variances(draws, probes, expected):
    """Each part of 20,000 images is known to 2 %; the parts add up to the whole."""
    n = 20_000
    bits, probe_error = _synthetic(np.random.RandomState(0), n, draws, probes)
    total, noise, parts = errors.decompose(bits, probe_error)
    names = {"s": errors.SAMPLING, "d": errors.DEQUANTISATION, "p": errors.PROBES}
    assert [part["sources"] for part in parts] == [[names[k] for k in sources] for sources in expected]
    for part, variance in zip(parts, expected.values(), strict=True):
        assert part["error"] == pytest.approx(math.sqrt(variance / n), rel=0.02)
    assert total**2 == pytest.approx(sum(part["error"] ** 2 for part in parts), rel=1e-9)
    assert (noise is None) == (draws == 1)


def test_the_whole_is_the_spread_of_the_mean():
    """Over 4,000 evaluations of 6 images the mean squared estimates are the variance of what they are errors of."""
    rng = np.random.RandomState(1)
    totals, noises, means, within = [], [], [], []
    image = rng.normal(0, IMAGE, (6, 1))
    for _ in range(4000):
        bits, probe_error = _synthetic(rng, 6, 2, 3)
        total, noise, _ = errors.decompose(bits, probe_error)
        totals.append(total**2)
        noises.append(noise**2)
        means.append(bits.mean())
        fixed = image + rng.normal(0, DEQUANTISED, (6, 2)) + rng.normal(0, PROBE / math.sqrt(3), (6, 2))
        within.append(fixed.mean())
    assert np.mean(totals) == pytest.approx(np.var(means), rel=0.08)
    assert np.mean(noises) == pytest.approx(np.var(within), rel=0.08)


def test_images_with_different_numbers_of_draws():
    """Passes that each drop some images: over 3,000 evaluations the errors are still those of the mean."""
    rng = np.random.RandomState(2)
    squares, means = [], []
    for _ in range(3000):
        bits, probe_error = _synthetic(rng, 8, 3, 2)
        for draw, dropped in enumerate(rng.randint(8, size=3)):
            bits[dropped, draw] = np.nan
        total, noise, parts = errors.decompose(bits, probe_error)
        squares.append([total**2, noise**2, parts[-1]["error"] ** 2])
        means.append(np.nanmean(bits))
    total, noise, probes = np.mean(squares, axis=0)
    assert total == pytest.approx(np.var(means), rel=0.1)
    assert noise == pytest.approx((DEQUANTISED**2 + PROBE**2 / 2) / 21, rel=0.05)
    assert probes == pytest.approx(PROBE**2 / 2 / 21, rel=0.05)


def test_an_exact_divergence_has_no_probe_error_and_negative_parts_are_zero():
    bits = np.asarray([[1.0, 3.0], [3.0, 1.0], [2.0, 2.0]])  # images alike, draws not
    total, noise, parts = errors.decompose(bits, np.zeros((3, 2)))
    assert total == 0 and noise == pytest.approx(math.sqrt(4 / 3 / 6))
    assert [part["error"] for part in parts] == [0, pytest.approx(noise), 0]


def test_the_solvers_error_by_hand():
    d = errors.difference(np.asarray([1.0, 2.0, 4.0]), np.asarray([1.5, 2.0, 3.0]))
    assert (d["images"], d["mean"], d["largest"]) == (3, 0.5, 1.0)
    assert d["bias"] == pytest.approx(1 / 6)
    assert d["bias_error"] == pytest.approx(np.std([-0.5, 0, 1], ddof=1) / math.sqrt(3))
    assert errors.difference(np.asarray([math.nan, 1.0]), np.ones(2))["mean"] is None


def test_the_tolerance_is_the_loosest_that_meets_the_target():
    rng, solved = np.random.RandomState(0), []
    spread = rng.normal(size=64)

    def solve(tolerance):
        solved.append(tolerance)
        return 3 + np.where(tolerance > 5e-3, math.nan, 0) + spread * 0.3 * tolerance**0.5

    found, tried = errors.choose_tolerance(solve, 2e-3)
    mean = lambda t: np.abs(spread).mean() * 0.3 * (t**0.5 - (t / 10) ** 0.5)
    assert mean(1e-3) > 2e-3 > mean(1e-4) and found == pytest.approx(1e-4)
    assert [t["tolerance"] for t in tried] == pytest.approx([1e-2, 1e-3, 1e-4])
    assert tried[0]["mean"] is None  # a failed solve never meets a target
    assert tried[2]["mean"] == pytest.approx(mean(1e-4))
    assert solved == pytest.approx([1e-2, 1e-3, 1e-4, 1e-5])  # each tolerance once
    with pytest.raises(ValueError, match=r"no tolerance has an estimated error of 1e-09 .*1e-06: "):
        errors.choose_tolerance(solve, 1e-9)
    for target in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="must be positive and finite"):
            errors.choose_tolerance(solve, target)


def test_a_paired_difference_is_known_better_than_either_mean():
    rng = np.random.RandomState(0)
    image, noise = rng.normal(3, 0.5, (200, 1)), rng.normal(0, 0.1, (200, 2))
    first, second = image + noise, image + noise + 0.02 + rng.normal(0, 0.03, (200, 2))
    rows = lambda bits: [{"index": i, "draw": d, "bits_per_dim": bits[i, d]} for i in range(200) for d in range(2)]
    result = errors.paired(rows(first), rows(second)[:300])  # the other has 150 of the images
    d = (first - second)[:150].mean(axis=1)
    assert result["images"] == 150 and result["draws"] == 2
    assert result["difference"] == pytest.approx(d.mean()) and d.mean() < 0
    assert result["error"] == pytest.approx(d.std(ddof=1) / math.sqrt(150))
    assert result["unpaired"] > 20 * result["error"]
    with pytest.raises(ValueError, match="0 images in common"):
        errors.paired(rows(first), [])
    with pytest.raises(ValueError, match="150 images in common, not all with the same draws"):
        errors.paired(rows(first), rows(second)[:299])
    with pytest.raises(ValueError, match="failed solves"):
        errors.paired(rows(first), [{**row, "bits_per_dim": None} for row in rows(second)])


def test_importance_weights_average_probabilities():
    """Three dequantisations of one image of 2 entries: P = mean of p_k; many of them approach the log of the mean."""
    row = {"index": 0, "failed": False, "evaluations": 10, "seconds": 1.0, "device": "x"}
    p = np.asarray([0.5, 0.125, 0.25, 1.0])
    records = [{**row, "draw": d, "bits_per_dim": -math.log2(p[d]) / 2, "probe_error": 0.1 * d} for d in range(4)]
    first, second = errors.importance_weighted(records, 2, size=2)
    assert (first["draw"], second["draw"]) == (0, 1) and first["evaluations"] == 20
    assert first["bits_per_dim"] == pytest.approx(-math.log2((0.5 + 0.125) / 2) / 2)
    assert second["bits_per_dim"] == pytest.approx(-math.log2((0.25 + 1.0) / 2) / 2)
    assert first["probe_error"] == pytest.approx(0.1 * 0.125 / 0.625)
    records[2] |= {"failed": True, "bits_per_dim": None}
    bad = errors.importance_weighted(records, 2, size=2)[1]
    assert bad["failed"] and bad["bits_per_dim"] is None
    # log p ~ N(-30, 1): E[p] = exp(-29.5), and the bound of one is 30 nats.
    nats = np.random.RandomState(0).normal(30, 1, 20_000)
    many = [{**row, "draw": d, "bits_per_dim": b / math.log(2) / 7, "probe_error": None} for d, b in enumerate(nats)]
    (bound,) = errors.importance_weighted(many, 20_000, size=7)
    assert bound["bits_per_dim"] * 7 * math.log(2) == pytest.approx(29.5, abs=0.03)
    few = [r["bits_per_dim"] for r in errors.importance_weighted(many, 10, size=7)]
    assert 29.5 < np.mean(few) * 7 * math.log(2) < 29.65 and bound["probe_error"] is None


def _record(index, draw, bits, evaluations=10, failed=False):
    return {"index": index, "draw": draw, "bits_per_dim": bits, "evaluations": evaluations, "failed": failed}


def test_the_summary_by_hand():
    records = [_record(0, 0, 1.0, 10), _record(1, 0, 3.0, 20), _record(0, 1, 2.0, 30), _record(1, 1, 6.0, 40)]
    summary = errors.summarise(records)
    # Images: 1.5 and 4.5, so 3 +- sqrt(4.5 / 2) = 1.5. Draws: variances 0.5 and 4.5, sqrt(2.5 / 2 / 2).
    assert summary["bits_per_dim"] == 3.0 and summary["standard_error"] == pytest.approx(1.5)
    assert summary["noise_error"] == pytest.approx(math.sqrt(0.625))
    assert summary["evaluations_mean"] == 25 and summary["evaluations_max"] == 40 and summary["failed"] == 0

    one = errors.summarise(records[:2])
    assert one["bits_per_dim"] == 2.0 and one["standard_error"] == pytest.approx(1.0) and one["noise_error"] is None
    single = errors.summarise(records[:1])
    assert single["bits_per_dim"] == 1.0 and single["standard_error"] is None


def test_a_mean_of_which_some_failed_is_not_a_number():
    settings = {"images": 2, "draws": 1, "data": "digits", "split": "test", "rtol": 1e-5, "step": 10}
    good = errors.summarise([_record(0, 0, 1.0), _record(1, 0, 3.0)])
    text = likelihood.report({"settings": settings, "seconds": 1.0, **good})
    assert text.startswith("2.0000 +- 1.0000 (standard error) bits/dim on 2 images of digits/test")
    bad = errors.summarise([_record(0, 0, 1.0), _record(1, 0, math.nan, failed=True)])
    assert bad["bits_per_dim"] is None and bad["failed"] == 1
    text = likelihood.report({"settings": settings, "seconds": 1.0, **bad})
    assert text == "no bits/dim: 1 of 2 solves failed (digits/test)"
    none = errors.summarise([_record(0, 0, math.nan, failed=True)])
    assert none["bits_per_dim"] is None and none["standard_error"] is None
