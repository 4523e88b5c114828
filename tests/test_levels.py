"""Fields over levels against quadrature, and against the exact statistics and likelihood of independent entries."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from nn_reference import quick_jit

import jdiff
from jdiff import losses, processes
from jdiff.levels import level_field, merged_levels
from jdiff.transforms import DataTransform, bits_per_dim

LEVELS, EVENT = 17, (2, 1)
LOG_PRIOR = np.log(np.random.RandomState(0).dirichlet(np.ones(LEVELS), size=EVENT)).astype(np.float32)
LOGITS = np.random.RandomState(1).normal(size=(*EVENT, LEVELS)).astype(np.float32)
TIMES = {
    "VP": (1e-5, 1e-4, 1e-3, 0.01, 0.05, 0.2, 0.5, 0.9, 1.0),
    "Rectified": (1e-5, 1e-3, 0.01, 0.05, 0.2, 0.5, 0.75, 0.9, 1.0),
    "EDM": (0.002, 0.01, 0.05, 0.2, 1.0, 2.4, 5.0, 20.0, 80.0),
}
NARROW = {"VP": 3, "Rectified": 3, "EDM": 4}  # of the times above, those of cells below 0.05 sigma
PROCESSES = {"VP": jdiff.VP(), "Rectified": jdiff.Rectified(), "EDM": jdiff.EDM()}


def _net(logits):
    return lambda features, t: jnp.broadcast_to(logits[None].astype(features.dtype), (len(t), *logits.shape))


def _at(process, x, t, log_prior, logits, predict, low=-1.0):
    return level_field(process, _net(logits), log_prior, low=low, predict=predict)(x, t)


_evaluate = quick_jit(_at, static_argnames=("predict", "low"))


def _posterior(alpha, sigma, x, log_weights, low=-1.0, high=1.0, edges=None):
    """E[x_0 | x], E[eps | x] of one entry in float64: Gauss-Legendre in 40 panels over where each cell has mass."""
    nodes, weights = np.polynomial.legendre.leggauss(16)
    edges = np.linspace(low, high, len(log_weights) + 1) if edges is None else edges
    low, high = edges[0], edges[-1]
    log_weights = log_weights - np.log(np.diff(edges))
    if alpha > 0:
        nearest = min(max(x / alpha, low), high)
        reach = abs(x - alpha * nearest) / sigma + 12
        window = ((x - reach * sigma) / alpha, (x + reach * sigma) / alpha)
    else:
        window = (low, high)
    points, masses = [], []
    for log_weight, a, b in zip(log_weights, edges[:-1], edges[1:]):
        a, b = max(a, window[0]), min(b, window[1])
        if a < b:
            panels = np.linspace(a, b, 41)
            half = 0.5 * np.diff(panels)[:, None]
            points.append((0.5 * (panels[:-1] + panels[1:])[:, None] + half * nodes).ravel())
            masses.append(log_weight + np.log(half * weights).ravel())
    points, masses = np.concatenate(points), np.concatenate(masses)
    eps = (x - alpha * points) / sigma
    q = masses - 0.5 * eps**2
    q = np.exp(q - q.max())
    q /= q.sum()
    return (q * points).sum(), (q * eps).sum()


def _batch(name, dtype=np.float32, far=False):
    """x (T, 2, 1), t (T,) and float64 alpha, sigma: one example a time."""
    process = PROCESSES[name]
    t = np.asarray(TIMES[name], dtype)
    with jax.enable_x64(True):
        alpha, sigma = (np.asarray(c, np.float64) for c in process.marginal(jnp.asarray(t, jnp.float64)))
    x0 = np.asarray([1.0, -1.0]) if far else np.asarray([0.3, -0.97])
    u = np.asarray([10.0, -10.0]) if far else np.asarray([0.7, -1.3])
    x = (alpha[:, None] * x0 + sigma[:, None] * u)[..., None].astype(dtype)
    return process, x, t, alpha, sigma


def _expected(x, alpha, sigma, log_weights):
    rows = [
        [_posterior(alpha[i], sigma[i], float(x[i, j, 0]), log_weights[j, 0]) for j in range(2)] for i in range(len(x))
    ]
    return np.asarray(rows).transpose(2, 0, 1)[..., None]


@pytest.mark.parametrize("name", list(PROCESSES))
@pytest.mark.parametrize("far", [False, True], ids=["near", "far"])
def test_against_quadrature(name, far):
    process, x, t, alpha, sigma = _batch(name, far=far)
    assert (alpha * 2 / LEVELS / sigma < 0.05).sum() == NARROW[name]
    for logits in (0 * LOGITS, LOGITS):
        x0, eps = _expected(x, alpha, sigma, LOG_PRIOR.astype(np.float64) + logits)
        ours = {kind: np.asarray(_evaluate(process, x, t, LOG_PRIOR, logits, kind)) for kind in ("x0", "eps")}
        # Far away, exponents of 50 and their rounding decide between cells.
        np.testing.assert_allclose(ours["x0"], x0, atol=4e-5 if far else 3e-6)
        # x itself has six digits: eps = (x - alpha x0)/sigma of a float32 x is as uncertain as x/sigma.
        digits = 3e-7 * (1 + np.abs(x)) / sigma[:, None, None]
        assert (np.abs(ours["eps"] - eps) < (1e-4 if far else 2e-5) + digits).all()


@pytest.mark.parametrize("name", list(PROCESSES))
def test_float64_in_both_branches(name, x64):
    process, x, t, alpha, sigma = _batch(name, np.float64)
    x0, eps = _expected(x, alpha, sigma, LOG_PRIOR.astype(np.float64) + LOGITS)
    args = (jnp.asarray(x), jnp.asarray(t), jnp.asarray(LOG_PRIOR), jnp.asarray(LOGITS))
    # The series stops at the second power of a cell's width h < 0.05; its next term is below 0.02 h^3 of the width.
    h = (alpha * 2 / LEVELS / sigma)[:, None, None]
    left = np.where(h < 0.05, 0.02 * h**3, 0)
    assert (np.abs(_evaluate(process, *args, "x0") - x0) < 1e-10 + left * 2 / LEVELS).all()
    assert (np.abs(_evaluate(process, *args, "eps") - eps) < 1e-9 + left * h).all()


def test_other_ends_of_the_levels():
    process, x, t, alpha, sigma = _batch("VP")
    row = [
        _posterior(a, s, float(v), LOG_PRIOR[0, 0].astype(np.float64), low=0.0)[0]
        for a, s, v in zip(alpha, sigma, x[:, 0, 0])
    ]
    ours = _evaluate(process, x, t, LOG_PRIOR, 0 * LOGITS, "x0", low=0.0)[:, 0, 0]
    np.testing.assert_allclose(ours, row, atol=3e-6)


@pytest.mark.parametrize("name", list(PROCESSES))
def test_unequal_cells(name):
    """Cells of 1 to 6 levels: uniform inside, so that a wide one is no likelier than its weight says."""
    process, x, t, alpha, sigma = _batch(name)
    edges = np.asarray([0, 1, 7, 8, 10, 15, 16, 17])
    edges = 2 * edges.astype(np.float64) / LEVELS - 1
    log_prior, logits = LOG_PRIOR[..., : len(edges) - 1], LOGITS[..., : len(edges) - 1]

    @quick_jit
    def evaluate(x, t):
        fields = (
            level_field(process, _net(jnp.asarray(logits)), jnp.asarray(log_prior), edges=jnp.asarray(edges), predict=k)
            for k in ("x0", "eps")
        )
        return tuple(field(x, t) for field in fields)

    rows = [
        [
            _posterior(alpha[i], sigma[i], float(x[i, j, 0]), log_prior[j, 0].astype(float) + logits[j, 0], edges=edges)
            for j in range(2)
        ]
        for i in range(len(x))
    ]
    x0, eps = np.asarray(rows).transpose(2, 0, 1)[..., None]
    ours_x0, ours_eps = evaluate(x, t)
    np.testing.assert_allclose(ours_x0, x0, atol=1e-5)  # the series leaves 0.02 h^3 of a width of up to 0.7
    assert (np.abs(ours_eps - eps) < 2e-5 + 3e-7 * (1 + np.abs(x)) / sigma[:, None, None]).all()


def test_merged_levels_are_the_best_of_all_cuts():
    rng = np.random.RandomState(0)
    for levels in (1, 4, 7):
        counts = rng.randint(0, 5, levels) ** 3

        def log_likelihood(edges, counts=counts):
            inside = np.asarray([counts[a:b].sum() for a, b in itertools.pairwise(edges)])
            return sum(n * math.log(n / w) for n, w in zip(inside, np.diff(edges)) if n)

        for cells in range(1, levels + 1):
            cuts = [(0, *inner, levels) for inner in itertools.combinations(range(1, levels), cells - 1)]
            best = merged_levels(counts, cells)
            assert len(best) == cells + 1 and tuple(best) in cuts
            assert log_likelihood(best) == pytest.approx(max(log_likelihood(cut) for cut in cuts))


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_half_precision_is_rounded_at_the_ends_only(dtype):
    seen = []

    def net(features, t):
        seen.append((features.dtype, t.dtype))
        return jnp.broadcast_to(LOGITS.astype(dtype)[None], (len(t), *LOGITS.shape))

    x, t = jnp.asarray([[0.5, -0.25], [1.5, 0.0]], dtype)[..., None], jnp.asarray([0.03125, 0.5])
    field = level_field(PROCESSES["VP"], net, LOG_PRIOR, predict="eps")
    out, wide = field(x, t), field(x.astype(jnp.float32), t)
    assert out.dtype == dtype and seen[0] == (dtype, dtype)
    np.testing.assert_array_equal(out, wide.astype(dtype))


@pytest.mark.parametrize("name", list(PROCESSES))
def test_all_kinds_are_one_field(name, x64):
    process, x, t, alpha, sigma = _batch(name, np.float64)
    keep = (alpha > 0.05) & (sigma > 1e-3)  # converting needs signal, and digits of x0 that are left beside the noise
    x, t = jnp.asarray(x[keep]), jnp.asarray(t[keep])
    args = (x, t, jnp.asarray(LOG_PRIOR), jnp.asarray(LOGITS))
    x0 = _evaluate(process, *args, "x0")
    for kind in ("eps", "v", "score", "velocity"):
        expected = jax.jit(lambda kind=kind: jdiff.convert(process, x0, x, t, "x0", kind))()
        np.testing.assert_allclose(_evaluate(process, *args, kind), expected, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("name", list(PROCESSES))
def test_derivatives_are_finite_and_right(name):
    process, x, t, alpha, sigma = _batch(name)
    weights = jnp.asarray(LOG_PRIOR)

    @quick_jit
    def slopes(x):
        x0 = lambda x: _at(process, x, t, weights, jnp.asarray(LOGITS), "x0")
        return jax.jvp(x0, (x,), (jnp.ones_like(x),))[1]

    # d E[x0 | x] / dx = alpha Var(x0 | x) / sigma^2 > 0, entry by entry.
    slope = slopes(jnp.asarray(x))
    assert np.isfinite(slope).all() and (np.asarray(slope) >= -1e-5).all()
    step = 1e-4 * sigma[:, None, None]
    log_weights = LOG_PRIOR.astype(np.float64) + LOGITS
    up, down = (_expected(x + s * step, alpha, sigma, log_weights)[0] for s in (1, -1))
    expected = (up - down) / (2 * step)
    np.testing.assert_allclose(slope, expected, rtol=5e-3, atol=1e-3 * np.abs(expected).max(initial=1e-2))
    gradients = {
        kind: quick_jit(
            jax.grad(lambda x, logits, k=kind: _at(process, x, t, weights, logits, k).sum(), argnums=(0, 1))
        )
        for kind in ("x0", "eps")
    }
    for kind in ("x0", "eps"):
        for far in (False, True):
            y = jnp.asarray(_batch(name, far=far)[1])
            for gradient in gradients[kind](y, jnp.asarray(LOGITS)):
                assert np.isfinite(gradient).all()
                assert np.abs(gradient).max() > 0


def test_no_logits_are_the_best_for_independent_entries():
    """The denoising loss of i.i.d. levels has its minimum over constant logits at zero."""
    process, count = jdiff.VP(), 8192
    levels = 5
    prior = np.log(np.random.RandomState(3).dirichlet(np.ones(levels), size=EVENT)).astype(np.float32)
    direction = np.random.RandomState(4).choice([-1.0, 1.0], size=prior.shape).astype(np.float32)
    key = jax.random.key(0)
    k = jax.random.categorical(jax.random.fold_in(key, 1), prior[None], shape=(count, *EVENT))
    transform = DataTransform(levels=levels)
    x0 = transform.forward(transform.dequantise(jax.random.fold_in(key, 2), k))
    t = jnp.linspace(0.02, 0.6, count)
    keys = jax.random.split(jax.random.fold_in(key, 3), count)

    @quick_jit
    def loss(scale):
        field = level_field(process, _net(scale * direction), jnp.asarray(prior), predict="eps")
        return losses.denoising(keys, field, process, x0, t, predict="eps")

    best, up, down = (np.asarray(loss(jnp.float32(s)), np.float64) for s in (0, 0.4, -0.4))
    for worse in (up, down):
        gain = worse - best
        assert gain.mean() > 5 * gain.std() / math.sqrt(count)
    _, slope = jax.jvp(lambda s: loss(s), (jnp.float32(0),), (jnp.float32(1),))
    slope = np.asarray(slope, np.float64)
    assert abs(slope.mean()) < 4 * slope.std() / math.sqrt(count)


@pytest.mark.parametrize("name, predict, tolerance", [("VP", "eps", 4e-3), ("Rectified", "velocity", 4e-5)])
def test_the_exact_likelihood_is_the_probability_of_the_levels(name, predict, tolerance):
    """Levels, transform, flow and divergence end to end: -log2 of the prior of each level, but for cell borders.

    VP's tolerance is the mismatch of N(0, I) with the true end, where alpha = 0.0066; Rectified has none.
    """
    process, transform, event, count, t_min = PROCESSES[name], DataTransform(levels=3), (2, 2, 1), 8, 1e-4
    prior = np.log(np.random.RandomState(5).dirichlet(2 * np.ones(3), size=event)).astype(np.float32)
    images = np.random.RandomState(6).randint(0, 3, (count, *event)).astype(np.uint8)

    @quick_jit
    def log_prob(key):
        x = transform.forward(transform.dequantise(key, images))
        field = level_field(process, _net(jnp.zeros_like(prior)), jnp.asarray(prior), predict=predict)
        out = jdiff.log_likelihood(
            None, process, field, x, predict=predict, divergence="exact", rtol=1e-6, atol=1e-6, t_min=t_min
        )
        return x, out.log_prob, out.failed

    x, log_p, failed = log_prob(jax.random.key(0))
    assert not failed.any()
    alpha, sigma = (float(c) for c in process.marginal(jnp.float32(t_min)))
    at = np.take_along_axis(np.broadcast_to(prior, (count, *prior.shape)), images[..., None].astype(int), axis=-1)
    # In bits; at t_min the density of the images is stretched by alpha.
    expected = (-at.reshape(count, -1).mean(axis=1) + math.log(alpha)) / math.log(2)
    ours = np.asarray(bits_per_dim(log_p, transform, event))
    # Entries next to a border see the neighbour's density through the noise at t_min.
    borders = np.abs(np.asarray(x, np.float64)[..., None] - np.linspace(-1, 1, 4)).min(axis=-1).reshape(count, -1)
    inside = borders.min(axis=1) > 6 * sigma
    assert inside.sum() >= 5 and np.ptp(expected[inside]) > 0.2
    np.testing.assert_allclose(ours[inside], expected[inside], rtol=0, atol=tolerance)


def test_features_have_unit_variance_and_the_prior_s_guess():
    """x_t standardised; E[x_0 | x_t] under the prior, standardised: what the network sees, from samples."""
    process, count = jdiff.VP(), 10_000
    k = jax.random.categorical(jax.random.key(0), LOG_PRIOR[None], shape=(count, *EVENT))
    transform = DataTransform(levels=LEVELS)
    x0 = transform.forward(transform.dequantise(jax.random.key(1), k))
    t = jnp.full(count, 0.2)
    x = processes.perturb(process, x0, jax.random.normal(jax.random.key(2), x0.shape), t)

    @quick_jit
    def evaluate(x):
        seen = []

        def net(features, t):
            seen.append(features)
            return jnp.zeros((count, *EVENT, LEVELS))

        return level_field(process, net, jnp.asarray(LOG_PRIOR))(x, t), seen[0]

    guess, features = (np.asarray(a, np.float64) for a in evaluate(x))
    assert features.shape == (count, 2, 2)
    np.testing.assert_allclose(features[..., 0].mean(axis=0), 0, atol=0.05)
    np.testing.assert_allclose(features[..., 0].std(axis=0), 1, atol=0.03)
    edges = np.linspace(-1, 1, LEVELS + 1)
    prior = np.exp(LOG_PRIOR.astype(np.float64))
    mean = (prior * 0.5 * (edges[:-1] + edges[1:])).sum(axis=-1)
    second = (prior * (edges[1:] ** 3 - edges[:-1] ** 3) / (3 * np.diff(edges))).sum(axis=-1)
    expected = (guess - mean) / np.sqrt(second - mean**2)
    np.testing.assert_allclose(features[..., 1], expected[..., 0], atol=2e-5)


def test_bad_input():
    process, x, t = jdiff.VP(), jnp.zeros((3, *EVENT)), jnp.full(3, 0.5)
    prior, net = jnp.asarray(LOG_PRIOR), _net(jnp.asarray(LOGITS))
    with pytest.raises(ValueError, match="unknown"):
        level_field(process, net, prior, predict="noise")
    with pytest.raises(ValueError, match=r"low must be below high, both finite; got 1.0 and 1.0"):
        level_field(process, net, prior, low=1.0)
    with pytest.raises(ValueError, match=r"edges must have shape \(18,\), one more than levels, got \(17,\)"):
        level_field(process, net, prior, edges=jnp.linspace(-1, 1, 17))
    with pytest.raises(ValueError, match=r"cells must be in 1 ... 3, the number of levels; got 4"):
        merged_levels(np.ones(3), 4)
    with pytest.raises(ValueError, match=r"counts must be finite, not negative and of shape \(levels,\)"):
        merged_levels(np.asarray([1.0, -1.0]), 1)
    with pytest.raises(ValueError, match=r"log_prior must have shape \(3, 1, 17\)"):
        jax.eval_shape(level_field(process, net, prior), jnp.zeros((2, 3, 1)), jnp.full(2, 0.5))
    with pytest.raises(ValueError, match=r"17 logits per entry of x \(3, 2, 1\), got \(3, 2, 1, 16\)"):
        jax.eval_shape(level_field(process, _net(jnp.asarray(LOGITS[..., 1:])), prior), x, t)
    with pytest.raises(TypeError, match="float"):
        jax.eval_shape(level_field(process, net, prior), jnp.zeros((3, *EVENT), jnp.int32), t)
    with pytest.raises(ValueError, match="t "):
        jax.eval_shape(level_field(process, net, prior), x, jnp.full(2, 0.5))
    field = level_field(process, net, prior)
    alone, each = quick_jit(lambda x: (field(x, jnp.float32(0.5)), field(x, t)))(x)
    np.testing.assert_array_equal(alone, each)
