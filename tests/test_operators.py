"""Operators against their matrices, written out by NumPy and SciPy; inverses against dense solves."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage

from jdiff import operators

SHAPE = (4, 6, 3)
RNG = np.random.default_rng(0)
KNOWN = RNG.random((2, *SHAPE)) < 0.5
KERNEL = RNG.random((3, 5))
MATRIX = RNG.normal(size=(7, 72))


def made(name):
    if name == "mask":
        return operators.mask(jnp.asarray(KNOWN), SHAPE)
    if name == "grey":
        return operators.grey(SHAPE, (0.5, 0.3, 0.4))
    if name == "block_mean":
        return operators.block_mean(SHAPE, 2)
    if name == "user":
        return operators.linear(lambda x: x.reshape(len(x), -1) @ jnp.asarray(MATRIX, x.dtype).T, SHAPE)
    return operators.blur(SHAPE, jnp.asarray(KERNEL), boundary=name)


def independent(name, x):
    """What each measures, without JAX."""
    if name == "mask":
        return np.where(KNOWN, x, 0)
    if name == "grey":
        return 0.5 * x[..., :1] + 0.3 * x[..., 1:2] + 0.4 * x[..., 2:]
    if name == "block_mean":
        return sum(x[:, i::2, j::2] for i in (0, 1) for j in (0, 1)) / 4
    if name == "user":
        return np.stack([MATRIX @ one.ravel() for one in x])
    mode = {"reflect": "mirror", "edge": "nearest", "wrap": "wrap", "zero": "constant"}[name]
    blurred = [[scipy.ndimage.correlate(one[..., c], KERNEL, mode=mode) for c in range(3)] for one in x]
    return np.moveaxis(np.asarray(blurred), 1, -1)


def matrices(operator):
    """The matrices of the examples of a batch of two."""
    size = int(np.prod(operator.shape))
    basis = np.eye(size).reshape(size, 1, *operator.shape)
    of_basis = jax.jit(jax.vmap(lambda e: operator.forward(jnp.broadcast_to(e, (2, *operator.shape)))))(basis)
    return [np.asarray(of_basis[:, n]).reshape(size, -1).T for n in range(2)]


NAMES = ["mask", "grey", "block_mean", "user", "reflect", "edge", "wrap", "zero"]


@pytest.mark.parametrize("name", NAMES)
def test_forward_adjoint_and_inverse(x64, name):
    operator, rng = made(name), np.random.default_rng(0)
    x = rng.normal(size=(2, *SHAPE))
    y = jax.jit(operator.forward)(x)
    np.testing.assert_allclose(y, independent(name, x), rtol=1e-10, atol=1e-12)
    other = rng.normal(size=y.shape)
    back = jax.jit(operator.adjoint)(other)
    signal, noise = np.array([0.7, 1.3]), np.array([0.4, 0.1])
    u = jax.jit(functools.partial(operators.solve, operator, iterations=80))(other, signal, noise)
    of_both = matrices(operator)
    for n in range(2):
        a = of_both[n]
        gram = a @ a.T
        np.testing.assert_allclose(np.ravel(back[n]), a.T @ other[n].ravel(), rtol=1e-10, atol=1e-12)
        want = np.linalg.solve(signal[n] * gram + noise[n] * np.eye(len(a)), other[n].ravel())
        np.testing.assert_allclose(np.ravel(u[n]), want, rtol=1e-7, atol=1e-9)
        if operator.diagonal is not None:
            diagonal = np.broadcast_to(operators.diagonal(operator, y), y.shape)[n].ravel()
            np.testing.assert_allclose(gram, np.diag(diagonal), atol=1e-12)


def test_what_is_not_measured_has_no_weight(x64):
    operator = operators.mask(jnp.array([[True, False]]), (2,))
    u = operators.solve(operator, jnp.array([[3.0, 5.0]]), 2.0, 0.0)
    np.testing.assert_array_equal(u, [[1.5, 0.0]])


def test_conjugate_gradients_keep_examples_apart_and_stop(x64):
    rng = np.random.default_rng(0)
    root = rng.normal(size=(3, 6, 6))
    matrices = jnp.asarray(root @ root.swapaxes(1, 2) + np.eye(6)).at[2].multiply(-1.0)
    b = jnp.asarray(rng.normal(size=(3, 6))).at[1].set(0.0)
    u = operators.conjugate_gradients(lambda u: jnp.einsum("bij,bj->bi", matrices, u), b, 30)
    np.testing.assert_allclose(u[0], np.linalg.solve(matrices[0], b[0]), rtol=1e-9)
    np.testing.assert_array_equal(u[1:], 0)  # nothing to solve; a matrix that is not positive
    few = operators.conjugate_gradients(lambda u: jnp.einsum("bij,bj->bi", matrices, u), b, 2)[0]
    # Two steps minimise over the span of b and M b.
    basis = np.stack([b[0], matrices[0] @ b[0]], axis=1)
    want = basis @ np.linalg.solve(basis.T @ matrices[0] @ basis, basis.T @ b[0])
    np.testing.assert_allclose(few, want, rtol=1e-9)
    # float16 has neither the square of the largest right-hand side nor that of the smallest.
    half = jnp.asarray([[300.0, -600.0], [1e-4, 2e-4]], jnp.float16)
    np.testing.assert_array_equal(operators.conjugate_gradients(lambda u: 2 * u, half, 3), half / 2)


def test_adjoints_and_inverses_inside_shard_map():
    """An adjoint that did not vary over the devices as its argument does would be refused, or summed over them."""
    mesh = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    weights = jnp.arange(12.0).reshape(3, 4)

    def run(y, known):
        operator, hidden = operators.linear(lambda x: x @ weights.T, (4,)), operators.mask(known, (4,))
        return hidden.adjoint(operator.adjoint(y)), operators.solve(operator, y, 1.0, 2.0, iterations=5)

    y, known = jnp.arange(12.0).reshape(4, 3) + 1, jnp.arange(16).reshape(4, 4) % 3 > 0
    spec = jax.sharding.PartitionSpec("d")
    split = jax.jit(jax.shard_map(run, mesh=mesh, in_specs=(spec, spec), out_specs=spec))(y, known)
    for got, want in zip(split, run(y, known)):
        np.testing.assert_allclose(got, want, rtol=1e-5)


def test_gaussian_kernel(x64):
    kernel = operators.gaussian_kernel(1.5, 2)
    assert kernel.shape == (5, 5)
    assert float(kernel.sum()) == pytest.approx(1)
    assert float(kernel[2, 2] / kernel[0, 3]) == pytest.approx(np.exp((4 + 1) / (2 * 1.5**2)))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: operators.mask(jnp.ones((4, 6, 3)), SHAPE), "needs a batch axis"),
        (lambda: operators.mask(jnp.ones((1, 4, 5, 3)), SHAPE), "needs a batch axis"),
        (lambda: operators.grey(SHAPE, (1.0, 1.0)), "2 weights do not fit 3 channels"),
        (lambda: operators.block_mean(SHAPE, 4), "blocks of 4x4 do not tile images of shape"),
        (lambda: operators.block_mean((4,), 2), "that of images"),
        (lambda: operators.blur(SHAPE, jnp.ones((2, 3))), "two odd sides"),
        (lambda: operators.blur(SHAPE, jnp.ones((9, 3))), "two odd sides"),
        (lambda: operators.blur(SHAPE, jnp.ones((3, 3)), boundary="mirror"), "unknown boundary 'mirror'"),
        (lambda: operators.gaussian_kernel(0.0, 2), "std must be positive"),
        (lambda: operators.diagonal(operators.blur(SHAPE, jnp.ones((3, 3))), jnp.ones((1, 2))), "is diagonal"),
    ],
)
def test_mistakes_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
