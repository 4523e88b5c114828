import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

import jdiff
from jdiff import coupling, losses

pair = jax.jit(coupling.optimal_transport, static_argnames="group")


def _sets(batch, event=(3, 2), seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(1.0, 2.0, (batch, *event)), rng.normal(size=(batch, *event))


def _scipy(x0, x1):
    """The best partner of each row of x0, and the cost, from squared distances themselves."""
    cost = ((x0[:, None] - x1[None]) ** 2).reshape(len(x0), len(x1), -1).sum(-1)
    rows, columns = linear_sum_assignment(cost)
    assert np.array_equal(rows, np.arange(len(x0)))
    return columns


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_assignment_is_scipys(x64, seed):
    x0, x1 = _sets(40, seed=seed)
    np.testing.assert_array_equal(pair(jnp.asarray(x0), jnp.asarray(x1)), _scipy(x0, x1))


def test_in_one_dimension_it_sorts():
    x0, x1 = (jnp.asarray(a, jnp.float32) for a in _sets(64, (1,)))
    partners = np.asarray(pair(x0, x1))
    assert partners.dtype == np.int32
    order = np.argsort(np.asarray(x0)[:, 0])
    assert np.all(np.diff(np.asarray(x1)[partners[order], 0]) > 0)


def test_groups_are_alike_on_their_own(x64):
    """Neighbours are exchanged inside their group, whatever else is in the batch: also where it lies on devices."""
    x0, x1 = (jnp.asarray(a) for a in _sets(32))
    whole = np.asarray(pair(x0, x1, group=8))
    for first in range(0, 32, 8):
        part = slice(first, first + 8)
        np.testing.assert_array_equal(whole[part], first + _scipy(np.asarray(x0[part]), np.asarray(x1[part])))
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:4])
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    spread = pair(jax.device_put(x0, rows), jax.device_put(x1, rows), group=8)
    np.testing.assert_array_equal(spread, whole)


def test_labels_keep_their_noise(x64):
    x0, x1 = _sets(30)
    x0 = x0 + 5 * np.arange(30)[:, None, None] / 30  # labels that would gain by an exchange
    labels = np.arange(30) % 3
    partners = np.asarray(pair(jnp.asarray(x0), jnp.asarray(x1), labels=jnp.asarray(labels, jnp.int32)))
    np.testing.assert_array_equal(labels[partners], labels)
    for label in range(3):
        (own,) = np.nonzero(labels == label)
        np.testing.assert_array_equal(partners[own], own[_scipy(x0[own], x1[own])])
    alone = pair(jnp.asarray(x0), jnp.asarray(x1), labels=jnp.arange(30, dtype=jnp.int32))
    np.testing.assert_array_equal(alone, np.arange(30))


def test_larger_groups_cost_less():
    x0, x1 = (jnp.asarray(a, jnp.float32) for a in _sets(128, (2,)))
    cost = lambda p: float(jnp.mean(jnp.sum((x0 - x1[p]) ** 2, axis=1)))
    costs = [cost(jnp.arange(128)), *(cost(pair(x0, x1, group=group)) for group in (4, 32, 128))]
    assert np.all(np.diff(costs) < -0.05 * costs[0]), costs
    # Between N(1, 4) and N(0, 1), in two dimensions, optimal transport costs 2 (1 + 1), independent noise 2 (1 + 5).
    assert abs(costs[-1] - 4) < 0.7 and abs(costs[0] - 12) < 2.5


def test_flow_matching_on_the_pairs_is_straight():
    """From N(0, 3^2) to N(0, 1): the straight flow's velocity solves the coupled regression and not the other one."""
    key, total = jax.random.key(0), 2048
    x0 = 3 * jax.random.normal(jax.random.fold_in(key, 0), (total, 1))
    eps = jax.random.normal(jax.random.fold_in(key, 1), (total, 1))
    partners = pair(x0, eps, group=128)
    straight = lambda x, t: -2 / (3 - 2 * t[:, None]) * x
    process = jdiff.Rectified()
    loss = lambda noise, t: float(
        jnp.mean(losses.denoising(None, straight, process, x0, t, predict="velocity", eps=noise))
    )
    for t in (0.1, 0.5, 0.9):
        # Independent noise leaves Var(eps - x_0 | x_t) = 9 / (9 (1 - t)^2 + t^2) at least.
        floor = 9 / (9 * (1 - t) ** 2 + t**2)
        assert loss(eps[partners], t) < 0.05 * floor < 0.06 * loss(eps, t)


def test_bad_input():
    x = jnp.zeros((6, 2))
    with pytest.raises(ValueError, match=r"x1 must have the shape of x0, \(6, 2\); got \(5, 2\)"):
        coupling.optimal_transport(x, x[:5])
    for group in (0, 4):
        with pytest.raises(ValueError, match="group must"):
            coupling.optimal_transport(x, x, group=group)
    with pytest.raises(ValueError, match=r"labels must have shape \(6,\), got \(5,\)"):
        coupling.optimal_transport(x, x, labels=jnp.zeros(5, jnp.int32))
    with pytest.raises(TypeError, match="floating point"):
        coupling.optimal_transport(x.astype(jnp.int32), x)
