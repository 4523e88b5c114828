"""The data transform against hand computations, and against what it must undo exactly."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdiff.transforms import DataTransform, _noise_bits, bits_per_dim, random_flip

EVENT = (3, 2, 1)
D = 6


@pytest.mark.parametrize(
    ("levels", "centered", "volume", "bits"),
    [(256, True, 2.0, 8.0), (256, False, 1.0, 8.0), (17, True, 2.0, math.log2(17)), (17, False, 1.0, math.log2(17))],
)
def test_uniform_density_costs_log2_levels(levels, centered, volume, bits):
    # By hand: the uniform density on the model space is 1 / volume per dimension, and L levels are equally likely.
    log_prob = jnp.full((4,), -D * math.log(volume))
    got = bits_per_dim(log_prob, DataTransform(levels, centered), EVENT)
    np.testing.assert_allclose(got, np.full(4, bits), rtol=1e-6)


@pytest.mark.parametrize(("centered", "offset"), [(True, 7.0), (False, 8.0)])
def test_published_offsets_follow(centered, offset):
    # Song et al.'s code: bits/dim = -log_prob / (D log 2) + 7 (or + 8 without centring).
    log_prob = jnp.asarray([-3.0, 0.0, 11.5])
    got = bits_per_dim(log_prob, DataTransform(256, centered), EVENT)
    np.testing.assert_allclose(got, -np.asarray(log_prob) / (D * math.log(2)) + offset, rtol=1e-6)


@pytest.mark.parametrize("centered", [True, False])
def test_gaussian_matches_probability_of_a_level(centered, x64):
    # One wide Gaussian pixel: log P(level k) is the mass of its cell, in closed form; the cell is narrow, so that the
    # bound is tight to second order, and E_u is taken by the midpoint rule.
    levels, transform = 256, DataTransform(256, centered)
    mean, std = 0.1, 0.8
    cdf = lambda z: 0.5 * math.erfc(-(z - mean) / (std * math.sqrt(2)))
    k = 77
    edge = lambda y: float(transform.forward(jnp.asarray(y / levels)))
    exact = math.log(cdf(edge(k + 1)) - cdf(edge(k)))
    y = (k + (np.arange(64) + 0.5) / 64) / levels
    z = (np.asarray(transform.forward(jnp.asarray(y))) - mean) / std
    log_prob = np.mean(-0.5 * z**2 - math.log(std) - 0.5 * math.log(2 * math.pi))
    assert log_prob + transform.log_det((1,)) == pytest.approx(exact, abs=1e-5)


@pytest.mark.parametrize("levels", [2, 3, 17, 100, 255, 256, 1000, 65536])
@pytest.mark.parametrize("centered", [True, False])
def test_inverse_is_exact_at_the_ends_of_every_cell(levels, centered):
    transform = DataTransform(levels, centered)
    x = jnp.arange(levels)[None]
    cells = 2 ** _noise_bits(levels, jnp.float32)
    for cell in (0, cells // 2, cells - 1):
        u = jnp.full(x.shape, (cell + 0.5) / cells, jnp.float32)
        model = transform.forward(transform._dequantised(x, u))
        np.testing.assert_array_equal(transform.inverse(model), x)
        assert float(model.min()) > (-1 if centered else 0) and float(model.max()) < 1
    if levels <= 1000:
        np.testing.assert_array_equal(transform.inverse(transform.forward(transform.rescale(x))), x)


def test_inverse_clips_and_types():
    got = DataTransform(17).inverse(jnp.asarray([[-1.5, -1.0, 0.0, 1.0, 7.0]]))
    assert got.dtype == jnp.uint8
    np.testing.assert_array_equal(got, [[0, 0, 8, 16, 16]])
    assert DataTransform(1024).inverse(jnp.ones((1, 1))).dtype == jnp.uint16
    # 0.9 is 0.8984375 in bfloat16, and 256 (1 + 0.8984375) / 2 = 243.0: not computed in bfloat16.
    assert DataTransform(256).inverse(jnp.asarray([[0.9]], jnp.bfloat16)) == 243


def test_half_precision_holds_the_middles_of_few_levels():
    # Exactly, or to a sixteenth of a cell; bfloat16's 130 stands for 129.5 and for 130.5.
    for levels, dtype in ((256, jnp.float16), (32, jnp.bfloat16), (17, jnp.bfloat16)):
        transform, x = DataTransform(levels), jnp.arange(levels)[None]
        half = transform.center(x, dtype=dtype)
        assert half.dtype == dtype
        error = np.abs(np.asarray(half, np.float64) - np.asarray(transform.center(x), np.float64))
        assert error.max() <= (transform.width / 16 if levels == 17 else 0)
    with pytest.raises(ValueError, match="bfloat16 is too coarse for 33 levels"):
        DataTransform(33).center(jnp.zeros((1, 2), jnp.uint8), dtype=jnp.bfloat16)


def test_rescale_reaches_both_ends():
    transform = DataTransform(17)
    x = jnp.asarray([[0, 8, 16]], jnp.uint8)
    np.testing.assert_array_equal(transform.forward(transform.rescale(x)), [[-1.0, 0.0, 1.0]])


def test_noise_is_uniform_and_per_example():
    transform = DataTransform(17)
    keys = jax.random.split(jax.random.key(3), 64)
    x = jax.random.randint(jax.random.key(1), (64, 8, 8, 1), 0, 17).astype(jnp.uint8)
    unit = transform.dequantise(keys, x)
    u = np.asarray(unit, np.float64) * 17 - np.asarray(x)
    # 4096 draws: standard errors 0.0045 (mean), 0.0012 (variance); Kolmogorov's statistic below 0.03 (p = 0.001).
    assert abs(u.mean() - 0.5) < 0.02 and abs(u.var() - 1 / 12) < 0.005
    assert np.abs(np.sort(u.ravel()) - (np.arange(u.size) + 0.5) / u.size).max() < 0.03
    np.testing.assert_array_equal(transform.inverse(transform.forward(unit)), x)
    order = np.asarray([5, 3, 60])
    np.testing.assert_array_equal(transform.dequantise(keys[order], x[order]), unit[order])
    # One key is split once into those of the examples.
    np.testing.assert_array_equal(transform.dequantise(jax.random.key(3), x), unit)


def test_noise_sits_at_the_midpoints_of_its_cells():
    # With 256 levels everything is a power of two and exact, so that the draw can be recovered to the last bit.
    x = jnp.full((4, 32, 32, 3), 255, jnp.uint8)
    unit = DataTransform(256).dequantise(jax.random.key(0), x)
    cells = 2 ** _noise_bits(256, jnp.float32)
    position = (np.asarray(unit, np.float64) * 256 - 255) * cells
    np.testing.assert_array_equal(position % 1, 0.5)
    assert 0 < position.min() < cells * 0.01 and cells * 0.99 < position.max() < cells


def test_transform_is_static_under_jit():
    traces = []

    @jax.jit
    def f(transform, key, x):
        traces.append(transform.levels)
        return transform.forward(transform.dequantise(key, x))

    x = jnp.zeros((2, 3), jnp.uint8)
    f(DataTransform(17), jax.random.key(0), x)
    f(DataTransform(17), jax.random.key(1), x)
    f(DataTransform(256), jax.random.key(1), x)
    assert traces == [17, 256]
    assert jax.tree.leaves(DataTransform(17)) == []


def test_random_flip_mirrors_the_width_of_half_of_the_images():
    x = jnp.arange(256 * 2 * 3 * 2).reshape(256, 2, 3, 2).astype(jnp.int32)
    keys = jax.random.split(jax.random.key(0), 256)
    got = np.asarray(random_flip(keys, x))
    mirrored = np.asarray([np.array_equal(a, np.flip(b, 1)) for a, b in zip(got, np.asarray(x))])
    kept = np.asarray([np.array_equal(a, b) for a, b in zip(got, np.asarray(x))])
    assert np.all(mirrored ^ kept)
    assert 96 < mirrored.sum() < 160  # four standard deviations around 128
    np.testing.assert_array_equal(random_flip(keys[7:9], x[7:9]), got[7:9])


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: DataTransform(1).log_det((2,)), ValueError, "at least 2"),
        (lambda: DataTransform(256.0).rescale(jnp.zeros((1, 2), jnp.uint8)), ValueError, "at least 2"),
        (lambda: DataTransform().rescale(jnp.zeros((1, 2))), TypeError, "integer levels"),
        (lambda: DataTransform().rescale(jnp.asarray(3)), ValueError, "batch axis"),
        (lambda: DataTransform().inverse(jnp.zeros((1, 2), jnp.uint8)), TypeError, "floating point"),
        (lambda: DataTransform().log_det((3, 0)), ValueError, "positive sizes"),
        (lambda: DataTransform().log_det(5), ValueError, "positive sizes"),
        (lambda: DataTransform().dequantise(jax.random.key(0), jnp.zeros((1, 2))), TypeError, "integer levels"),
        (
            lambda: DataTransform().dequantise(jax.random.key(0), jnp.zeros((1, 2), jnp.uint8), dtype=jnp.bfloat16),
            ValueError,
            "too coarse",
        ),
        (lambda: DataTransform().center(jnp.zeros((1, 2), jnp.uint8), dtype=jnp.bfloat16), ValueError, "too coarse"),
        (
            lambda: DataTransform().dequantise(jax.random.split(jax.random.key(0), 3), jnp.zeros((2, 2), jnp.uint8)),
            ValueError,
            "one key per example",
        ),
        (lambda: DataTransform().dequantise(jnp.zeros(2, jnp.uint32), jnp.zeros((2, 2), jnp.uint8)), TypeError, "key"),
        (lambda: random_flip(jax.random.key(0), jnp.zeros((2, 2))), ValueError, "height, width"),
    ],
)
def test_bad_input(call, error, match):
    with pytest.raises(error, match=match):
        call()


def test_the_logit_has_its_log_determinant_and_is_undone(x64):
    transform = DataTransform(17, logit=True)
    unit = jnp.asarray(np.random.default_rng(0).uniform(size=(3, *EVENT)))
    x = transform.forward(unit)
    slope = jax.vmap(jax.vmap(jax.grad(transform.forward)))(
        unit.reshape(3, -1),
    )
    np.testing.assert_allclose(transform.log_det_at(x), jnp.log(slope / 17).sum(axis=1), rtol=1e-10)
    levels = jnp.broadcast_to(jnp.arange(17)[:, None], (17, 4))
    draw = transform.forward(transform.dequantise(jax.random.key(0), levels, dtype=jnp.float64))
    np.testing.assert_array_equal(transform.inverse(draw), levels)
    with pytest.raises(ValueError, match="log_det_at"):
        transform.log_det(EVENT)
    affine = DataTransform(17)
    np.testing.assert_allclose(affine.log_det_at(x), np.full(3, affine.log_det(EVENT)), rtol=1e-10)
