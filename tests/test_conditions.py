"""Null conditions, dropping them, and what training on them learns, against the closed form for Gaussian data."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from nn_reference import quick_jit

import jdiff
from jdiff import conditions, guidance, losses, nn, training
from jdiff.processes import log_snr

KEYS = jax.random.split(jax.random.key(0), 2000)
COND = {"label": jnp.arange(2000) % 5, "vector": 1 + jnp.arange(6000.0).reshape(2000, 3)}


def test_dropped_examples_are_null_in_every_entry():
    cond, null = conditions.with_null(COND, 5)
    assert cond["present"].all() and not null["present"].any() and set(cond) == set(null) == {*COND, "present"}
    out = conditions.drop_condition(KEYS, cond, null, 0.3)
    gone = ~np.asarray(out["present"])
    np.testing.assert_array_equal(out["label"], np.where(gone, 5, COND["label"]))
    np.testing.assert_array_equal(out["vector"], np.where(gone[:, None], 0, COND["vector"]))
    assert abs(gone.mean() - 0.3) < 4 * np.sqrt(0.3 * 0.7 / 2000)
    order = np.asarray([7, 1999, 3])
    some = conditions.drop_condition(KEYS[order], *(jax.tree.map(lambda x: x[order], c) for c in (cond, null)), 0.3)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b[order]), some, out)
    for rate, want in ((0.0, cond), (1.0, null)):
        jax.tree.map(np.testing.assert_array_equal, conditions.drop_condition(KEYS, cond, null, rate), want)


def test_labels_alone_need_no_flag():
    cond, null = conditions.with_null(COND["label"], 5)
    np.testing.assert_array_equal(cond, COND["label"])
    np.testing.assert_array_equal(null, 5)
    assert set(conditions.with_null({"label": COND["label"]}, 5)[1]) == {"label"}
    with pytest.raises(ValueError, match="the null label is num_classes"):
        conditions.with_null(COND)
    label = jnp.asarray([0, 3], jnp.uint8)
    np.testing.assert_array_equal(conditions.with_null(label, 255)[1], 255)
    with pytest.raises(ValueError, match=r"labels of uint8 end at 255: .* num_classes = 256"):
        conditions.with_null({"label": label}, 256)


def test_what_is_wrong_is_named():
    cond, null = conditions.with_null(COND, 5)
    with pytest.raises(ValueError, match="one structure"):
        conditions.drop_condition(KEYS, COND, null, 0.1)
    with pytest.raises(ValueError, match="one per example"):
        conditions.drop_condition(KEYS[0], cond, null, 0.1)
    with pytest.raises(ValueError, match="one per example"):
        conditions.drop_condition(KEYS[:1], cond, null, 0.1)
    with pytest.raises(TypeError, match="typed"):
        conditions.drop_condition(jax.random.PRNGKey(0), cond, null, 0.1)


def test_training_on_vectors_learns_the_conditional_mean():
    """x0 ~ N(A v, s^2), v ~ N(0, 1): the x0-field is E[x0 | x_t, v], and E[x0 | x_t] where v was dropped.

    Given v the prior is N(A v, s^2); without, N(0, A A^T + s^2), and here A A^T = 1: both posteriors are one line each.
    """
    process, spread = jdiff.VP(), 0.3
    matrix = jnp.asarray([[0.8, -0.6], [0.6, 0.8]])
    network = nn.ResidualMLP(lambda t: log_snr(process, t), width=48, depth=1, vector_size=2, dropout=0.0)

    def draw(key, batch):
        v, eps = jax.random.normal(key, (2, batch, 2))
        return v, v @ matrix.T + spread * eps

    def loss_fn(params, keys, batch):
        cond, null = conditions.with_null({"vector": batch["v"]})
        fold = lambda n: jax.vmap(jax.random.fold_in, (0, None))(keys, n)
        cond = conditions.drop_condition(fold(0), cond, null, 0.3)
        t = jax.vmap(lambda key: jax.random.uniform(key, minval=0.05, maxval=0.95))(fold(1))
        field = nn.as_field(network, params, cond=cond)
        return losses.denoising(fold(2), field, process, batch["x"], t, predict="x0"), {}

    steps, batch = 750, 256
    tx = training.adam(training.learning_rate(1e-2, warmup=50, total=steps))
    step = training.make_train_step(loss_fn, tx, ema_decay=0.99)

    @jax.jit
    def train(params):
        def one(state, n):
            v, x = draw(jax.random.fold_in(jax.random.key(1), n), batch)
            state, metrics = step(state, jax.random.key(2), {"v": v, "x": x, "index": jnp.arange(batch)})
            return state, metrics["loss"]

        return jax.lax.scan(one, training.init_state(params, tx), jnp.arange(steps))[0].ema

    params = train(quick_jit(network.init)(jax.random.key(3), jnp.zeros((1, 2)), jnp.ones(1))["params"])
    count, t = 4000, np.full(4000, 0.4, np.float32)
    v, x0 = (np.asarray(value) for value in draw(jax.random.key(4), count))
    alpha, sigma = (float(c) for c in process.marginal(jnp.float32(0.4)))
    x = alpha * x0 + sigma * np.random.default_rng(5).normal(size=x0.shape).astype(np.float32)
    cond, null = conditions.with_null({"vector": v})
    mean = v @ np.asarray(matrix).T
    gain = lambda variance: alpha * variance / (alpha**2 * variance + sigma**2)
    given = mean + gain(spread**2) * (x - alpha * mean)
    without = gain(1 + spread**2) * x
    field = quick_jit(nn.as_field(network, params))
    error = lambda out, want: np.sqrt(np.mean((np.asarray(out) - want) ** 2))
    apart = error(given, without)
    assert apart > 0.5
    assert error(field(x, t, cond), given) < 0.08 and error(field(x, t, null), without) < 0.08
    guided = guidance.classifier_free(field, cond, null, 1.5)(x, t)
    assert error(guided, 1.5 * given - 0.5 * without) < 0.16
