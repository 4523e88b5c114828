"""What the configurations of Song et al. 2021 train: their objectives by formulas, and what does not fit them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jdiff
from experiments import build, checks, objectives, reproduce, song2021
from jdiff.transforms import DataTransform


def objective(row, **changes):
    """The configuration of a row without dropout and flips, its loss changed."""
    c = reproduce.config(row)
    c.network.options.dropout = 0.0
    c.data.flip = False
    c.loss.update(changes)
    checks.check(c)
    return c


ROWS = {"denoising": "vp/cifar10_ddpmpp_continuous", "ddpm": "vp/ddpm/cifar10", "smld": "ve/cifar10_ncsnpp"}


@pytest.mark.parametrize("reduce_mean", [True, False])
@pytest.mark.parametrize("name", ROWS)
def test_objective_of_a_configuration(name, reduce_mean, monkeypatch):
    """The objective by its formula in NumPy, at the times and with the noise that the field saw."""
    c = objective(ROWS[name], reduce_mean=reduce_mean)
    seen = {}

    def field(x, t):
        seen.update(x=np.float64(x), t=np.float64(t))
        return 0.3 * x

    monkeypatch.setattr(objectives, "field", lambda *args, **options: field)
    transform = DataTransform(256, centered=c.data.centered)
    images = np.random.default_rng(0).integers(0, 256, (64, 4, 4, 1), dtype=np.uint8)
    loss_fn = objectives.loss(c, None, {}, transform)
    keys = jax.random.split(jax.random.key(1), 64)
    batch = {"image": jnp.asarray(images), "index": jnp.arange(64), "key": jax.random.key(2)}
    found, _ = loss_fn(None, keys, batch)
    x0, x, t = np.float64(transform.forward(images / 255.0)), seen["x"], seen["t"]
    wide = lambda a: a.reshape(-1, 1, 1, 1)
    if name == "smld":
        label = np.round((1 - t) * 999)
        np.testing.assert_allclose(t, 1 - label / 999, atol=1e-6)
        sigma = np.exp(np.linspace(np.log(50), np.log(0.01), 1000))[label.astype(int)]
        error = wide(sigma) * (0.3 * x + (x - x0) / wide(sigma) ** 2)
        eps = (x - x0) / wide(sigma)
    else:
        if name == "ddpm":
            np.testing.assert_allclose(999 * t, np.round(999 * t), atol=1e-3)
            alpha2 = np.cumprod(1 - np.linspace(1e-4, 2e-2, 1000))[np.round(999 * t).astype(int)]
        else:
            alpha2 = np.exp(-t * (0.1 + 0.5 * t * 19.9))
        eps = (x - np.sqrt(wide(alpha2)) * x0) / np.sqrt(1 - wide(alpha2))
        error = 0.3 * x - eps
    # The noise is standard normal, the same however it is weighted, and the times spread over all of them.
    assert eps.std() == pytest.approx(1, abs=0.1) and t.std() == pytest.approx(12**-0.5, abs=0.06)
    expected = (error**2).mean((1, 2, 3)) if reduce_mean else 0.5 * (error**2).sum((1, 2, 3))
    np.testing.assert_allclose(found, expected, rtol=2e-2)
    # The smallest noise is a small difference of float32s; elsewhere the formula is met closely.
    assert np.median(np.abs(found / expected - 1)) < 1e-4


@pytest.mark.parametrize("name", ["ddpm", "smld"])
def test_labels_are_all_of_the_scales(name):
    """Also the first and the last: a table of three is drawn evenly, and the network's own label is the same number."""
    c = objective(ROWS[name])
    with c.unlocked():
        c.loss.scales = 3
        if name == "ddpm":
            c.process.options = {"beta_min": 0.1, "beta_max": 2.0}
    seen = []
    of = lambda x, t: seen.append(t) or x
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(objectives, "field", lambda *args, **options: of)
        images = jnp.zeros((300, 1, 1, 1), jnp.uint8)
        batch = {"image": images, "index": jnp.arange(300), "key": jax.random.key(2)}
        objectives.loss(c, None, {}, DataTransform())(None, jax.random.split(jax.random.key(1), 300), batch)
    values, counts = np.unique(seen[0], return_counts=True)
    np.testing.assert_array_equal(values, [0, 0.5, 1])
    assert counts.min() > 70
    if name == "smld":
        label, sigma = build.conditioning(c, "positional")
        np.testing.assert_array_equal(label(jnp.asarray(values)), [2, 1, 0])
        np.testing.assert_allclose(sigma(jnp.asarray(values)), song2021.sigmas(jdiff.VE(), 3), rtol=1e-5)


@pytest.mark.parametrize(
    "name,group,changes,message",
    [
        ("ddpm", "process", {"name": "SubVP"}, "loss.name = 'ddpm' needs process.name = 'VP', got 'SubVP'"),
        ("ddpm", "network", {"predict": "v"}, "needs network.predict = 'eps', got 'v'"),
        ("smld", "network", {"predict": "eps"}, "needs network.predict = 'score', got 'eps'"),
        ("smld", "loss", {"weight": {"name": "likelihood"}}, "needs loss.weight.name = 'sigma2', got 'likelihood'"),
        ("smld", "loss", {"times": {"name": "stratified"}}, "needs loss.times.name = 'uniform', got 'stratified'"),
        ("ddpm", "loss", {"scales": 20}, "needs more than beta_max"),
        ("smld", "loss", {"scales": 1}, "loss.scales must be 2 or more, got 1"),
        ("smld", "loss", {"name": "smdl"}, "loss.name = 'smdl' is unknown"),
    ],
)
def test_check_of_the_objective(name, group, changes, message):
    c = objective(ROWS[name])
    c[group].update(changes)
    with pytest.raises(ValueError, match=message):
        checks.check(c)
