"""Tableaus against the order conditions, Runge-Kutta steps against their formulas in NumPy."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from solver_cases import (
    PROCESSES,
    close,
    denoise,
    drift,
    one_step,
    state,
)

from jdiff import sde, solvers
from jdiff.solvers import tableaus


def trees(order):
    """All rooted trees with so many nodes, a tree being the sorted tuple of its children."""
    if order == 1:
        return [()]
    found = set()
    for parts in partitions(order - 1, order - 1):
        for children in itertools.product(*(trees(size) for size in parts)):
            found.add(tuple(sorted(children)))
    return sorted(found)


def partitions(total, largest):
    if total == 0:
        yield ()
    for part in range(min(total, largest), 0, -1):
        for rest in partitions(total - part, part):
            yield (part, *rest)


def nodes(tree):
    return 1 + sum(nodes(child) for child in tree)


def density(tree):
    return nodes(tree) * np.prod([density(child) for child in tree])


def weight(tree, a):
    """Elementary weights of the stages, one per stage: the product over the children of a @ weight(child)."""
    return np.prod([np.ones(len(a)), *(a @ weight(child, a) for child in tree)], axis=0)


def defect(b, a, order):
    """Largest violation of the order conditions b . weight = 1/density over the trees of one order (Butcher 1963)."""
    return max(abs(b @ weight(tree, a) - 1 / density(tree)) for tree in trees(order))


TABLEAUS = {name: getattr(tableaus, name) for name in tableaus.__all__ if name.isupper()}


def test_the_trees_are_all_there():
    assert [len(trees(order)) for order in range(1, 7)] == [1, 1, 2, 4, 9, 20]


@pytest.mark.parametrize("name", TABLEAUS)
def test_tableau(name):
    tableau = TABLEAUS[name]
    stages = len(tableau.b)
    a = np.zeros((stages, stages))
    for i, row in enumerate(tableau.a, start=1):
        assert len(row) == i
        a[i, :i] = row
    np.testing.assert_array_equal(tableau.matrix, a)
    b = np.array(tableau.b)
    np.testing.assert_allclose(a.sum(axis=1), tableau.c, atol=1e-14)
    for order in range(1, tableau.order + 1):
        assert defect(b, a, order) < 5e-14, order
    # What is left shrinks with the order: 8e-6 for order 8.
    assert defect(b, a, tableau.order + 1) > (1e-4 if tableau.order < 8 else 1e-6)
    if tableau.error is not None:
        embedded = b - np.array(tableau.error)
        for order in range(1, tableau.order):
            assert defect(embedded, a, order) < 5e-14, order
        # If the embedded weights had the full order, the difference would estimate nothing.
        assert defect(embedded, a, tableau.order) > (1e-4 if tableau.order < 8 else 1e-6)
    assert tableau.fsal == (stages > 1 and np.array_equal(a[-1], b) and b[-1] == 0)


@pytest.mark.parametrize("direction", [1, -1])
def test_runge_kutta_steps_are_the_textbook_formulas(direction, x64):
    x, t, h = np.asarray(state()), 0.4, 0.3 * direction
    f = lambda x, t: np.sin(x) * t - x**2 / 3
    k1 = f(x, t)
    k2 = f(x + h / 2 * k1, t + h / 2)
    k3 = f(x + h / 2 * k2, t + h / 2)
    k4 = f(x + h * k3, t + h)
    want = {
        "euler": x + h * k1,
        "midpoint": x + h * k2,
        "heun": x + h / 2 * (k1 + f(x + h * k1, t + h)),
        "rk4": x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4),
    }
    for name, value in want.items():
        close(one_step(getattr(solvers, name)(sde.SDE(drift)), jnp.array(x), t, t + h), value, 1e-14)


def test_the_last_stage_is_at_the_very_end_of_the_step():
    """0.05 + (1e-9 - 0.05) is 0 in float32, where sigma is 0 too."""
    seen = []

    def slope(x, t):
        seen.append(t)
        return x

    for solver, last in ((solvers.heun, 1), (solvers.rk4, 3)):
        seen.clear()
        one_step(solver(sde.SDE(slope)), jnp.ones((1, 2)), 0.05, 1e-9)
        assert seen[last] == np.float32(1e-9)
    np.testing.assert_allclose(seen[1], 0.025)  # and the inner ones stay inside


def test_heun_is_karras_second_order_sampler(x64):
    """Karras et al. 2022 (arXiv 2206.00364), alg. 1, on EDM, its last step to sigma = 0 apart."""
    process, x = PROCESSES["EDM"], 3 * np.asarray(state())
    network = lambda x, t: np.asarray(denoise(jnp.array(x), jnp.full(len(x), t)))
    sigmas = np.array([7.0, 3.0, 1.0, 0.2])
    want = x
    for t, s in itertools.pairwise(sigmas):
        d = (want - network(want, t)) / t
        euler = want + (s - t) * d
        want = want + (s - t) * (d + (euler - network(euler, s)) / s) / 2
    solver = solvers.heun(sde.probability_flow(process, denoise, predict="x0"))
    close(solvers.integrate(None, solver, jnp.array(x), jnp.array(sigmas))[0], want)
