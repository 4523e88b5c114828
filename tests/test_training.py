"""The training step against formulas in NumPy float64: gradients, optimisers, averages, keys, flags."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jdiff import training

BATCH, DIM = 6, 3
KEY = jax.random.key(7)


def noise(key, step, index):
    """The contract written out with single keys, no vmap."""
    base = jax.random.fold_in(key, step)
    rows = [jax.random.normal(jax.random.fold_in(base, int(i)), (DIM,)) for i in index]
    return np.stack(rows).astype(np.float64)


def regression(params, keys, batch):
    """|x W + b - eps|^2 with eps from the keys: its gradient is elementary."""
    eps = jax.vmap(lambda key: jax.random.normal(key, (DIM,)))(keys)
    error = batch["x"] @ params["w"] + params["b"][None] - eps
    return jnp.sum(error**2, -1), {"abs": jnp.mean(jnp.abs(error), -1), "two": jnp.float32(2)}


def expected(w, b, x, eps):
    error = x @ w + b - eps
    return np.mean(np.sum(error**2, -1)), 2 * x.T @ error / len(x), 2 * error.mean(0), np.mean(np.abs(error))


@pytest.fixture(scope="module")
def problem():
    rng = np.random.default_rng(0)
    params = {"w": rng.normal(size=(DIM, DIM)).astype(np.float32), "b": rng.normal(size=DIM).astype(np.float32)}
    batch = {"x": rng.normal(size=(BATCH, DIM)).astype(np.float32), "index": np.array([4, 0, 9, 2, 11, 5])}
    return jax.tree.map(jnp.asarray, params), batch


@pytest.mark.parametrize(("decay", "warmup"), [(0.3, True), (0.999, True), (0.9, False)])
def test_sgd_equals_the_formula(problem, decay, warmup):
    params, batch = problem
    rate, tx = 0.05, optax.sgd(0.05)
    traces = []

    def traced(*args):
        traces.append(args)
        return regression(*args)

    step = jax.jit(training.make_train_step(traced, tx, ema_decay=decay, ema_warmup=warmup))
    state = training.init_state(params, tx)
    w, b = np.asarray(params["w"], np.float64), np.asarray(params["b"], np.float64)
    ema = w
    for n in range(4):
        state, metrics = step(state, KEY, batch)
        loss, dw, db, mean_abs = expected(w, b, batch["x"], noise(KEY, n, batch["index"]))
        w, b = w - rate * dw, b - rate * db
        d = min(decay, (1 + n) / (10 + n)) if warmup else decay
        ema = d * ema + (1 - d) * w
        np.testing.assert_allclose(metrics["loss"], loss, rtol=2e-6)
        np.testing.assert_allclose(metrics["abs"], mean_abs, rtol=2e-6)
        np.testing.assert_allclose(metrics["grad_norm"], np.sqrt((dw**2).sum() + (db**2).sum()), rtol=2e-6)
        assert metrics["two"] == 2
        assert metrics["finite"]
        assert state.step == n + 1
        assert state.step.dtype == jnp.int32
        np.testing.assert_allclose(state.params["w"], w, rtol=2e-6, atol=2e-6)
        np.testing.assert_allclose(state.params["b"], b, rtol=2e-6, atol=2e-6)
        np.testing.assert_allclose(state.ema["w"], ema, rtol=2e-6, atol=2e-6)
    assert len(traces) == 1


def test_adam_with_clipping_warmup_cosine_and_decay_equals_the_formula(problem):
    params, batch = problem
    peak, warmup, total, b1, b2, eps, clip, decay = 0.1, 2, 6, 0.8, 0.95, 1e-8, 0.5, 0.01
    schedule = training.learning_rate(peak, warmup=warmup, total=total)
    tx = training.adam(schedule, b1=b1, b2=b2, eps=eps, clip=clip, weight_decay=decay)
    step = jax.jit(training.make_train_step(regression, tx, ema_decay=0.0))
    state = training.init_state(params, tx)
    p = np.concatenate([np.asarray(params["w"], np.float64), np.asarray(params["b"], np.float64)[None]])
    m, v = np.zeros_like(p), np.zeros_like(p)
    for n in range(7):
        state, metrics = step(state, KEY, batch)
        _, dw, db, _ = expected(p[:DIM], p[DIM], batch["x"], noise(KEY, n, batch["index"]))
        g = np.concatenate([dw, db[None]])
        norm = np.sqrt((g**2).sum())
        np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-5)
        g *= min(1, clip / norm)
        assert norm > clip
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        rate = peak * n / warmup if n < warmup else peak * (1 + np.cos(np.pi * (n - warmup) / (total - warmup))) / 2
        direction = (m / (1 - b1 ** (n + 1))) / (np.sqrt(v / (1 - b2 ** (n + 1))) + eps)
        p = p - rate * (direction + decay * p)
        np.testing.assert_allclose(state.params["w"], p[:DIM], atol=1e-5)
        np.testing.assert_allclose(state.params["b"], p[DIM], atol=1e-5)


def test_adam_has_the_numbers_of_its_paper():
    """b1 = 0.9, b2 = 0.999, eps = 1e-8, seen on gradients as small as eps: two steps by hand."""
    tx, p = training.adam(1.0), jnp.zeros(2)
    step = jax.jit(tx.update)
    state, g = tx.init(p), np.array([1e-8, -3e-8])
    m, v = 0, 0
    for n, gradient in enumerate((g, 4 * g), 1):
        with jax.numpy_dtype_promotion("standard"):
            update, state = step(jnp.float32(gradient), state, p)
        m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
        want = -(m / (1 - 0.9**n)) / (np.sqrt(v / (1 - 0.999**n)) + 1e-8)
        np.testing.assert_allclose(update, want, rtol=1e-4)


def test_weights_decay_where_the_mask_is_true():
    params = {"w": jnp.full(2, 3.0), "b": jnp.full(2, 5.0)}
    kept = set()  # where a checkpoint has the leaves of the state
    for mask, rate_of_b in ((None, 0.1), (lambda params: {"w": True, "b": False}, 0.0)):
        tx = training.adam(0.5, weight_decay=0.1, decay_mask=mask)
        with jax.numpy_dtype_promotion("standard"):
            updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
        np.testing.assert_allclose(updates["w"], -0.5 * 0.1 * 3.0, rtol=1e-6)
        np.testing.assert_allclose(updates["b"], -0.5 * rate_of_b * 5.0, rtol=1e-6)
        leaves = jax.tree_util.tree_leaves_with_path(tx.init(params))
        kept.add(tuple(jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves))
    assert len(kept) == 1


def test_learning_rate_shapes():
    constant, warm = training.learning_rate(3.0), training.learning_rate(3.0, warmup=4)
    assert [float(constant(n)) for n in (0, 100)] == [3.0, 3.0]
    assert [float(warm(n)) for n in (0, 1, 4, 100)] == [0.0, 0.75, 3.0, 3.0]
    cosine = training.learning_rate(2.0, total=8)
    np.testing.assert_allclose([cosine(n) for n in (0, 4, 8, 20)], [2.0, 1.0, 0.0, 0.0], atol=1e-6)


def test_keys_belong_to_examples_not_to_places(problem):
    keys = training.example_keys(KEY, jnp.int32(3), jnp.array([5, 1, 5]))
    base = jax.random.fold_in(KEY, 3)
    expected_keys = [jax.random.key_data(jax.random.fold_in(base, i)) for i in (5, 1, 5)]
    np.testing.assert_array_equal(jax.random.key_data(keys), np.stack(expected_keys))

    params, batch = problem
    order = np.array([3, 1, 5, 0, 2, 4])
    tx = optax.sgd(0.1)
    step = jax.jit(training.make_train_step(regression, tx, ema_decay=0.5))
    one, _ = step(training.init_state(params, tx), KEY, batch)
    other, _ = step(training.init_state(params, tx), KEY, {name: leaf[order] for name, leaf in batch.items()})
    np.testing.assert_allclose(one.params["w"], other.params["w"], atol=1e-6)
    moved, _ = step(training.init_state(params, tx), KEY, {**batch, "index": batch["index"] + 1})
    assert np.abs(one.params["w"] - moved.params["w"]).max() > 1e-3


def test_one_key_of_the_batch_reaches_the_loss():
    """`batch["key"]` is the same for all examples, another at each step, and no example's own."""
    loss_fn = lambda p, keys, batch: (p * jnp.ones(2), {"u": jax.random.uniform(batch["key"])})
    step = jax.jit(training.make_train_step(loss_fn, optax.sgd(0.1), ema_decay=0.9))
    state, draws = training.init_state(jnp.float32(1), optax.sgd(0.1)), []
    for n in range(2):
        state, metrics = step(state, KEY, {"index": np.arange(2)})
        expected_key = jax.random.fold_in(jax.random.fold_in(KEY, n), jnp.uint32(0xFFFFFFFF))
        np.testing.assert_allclose(metrics["u"], jax.random.uniform(expected_key), rtol=1e-7)
        draws.append(float(metrics["u"]))
    assert draws[0] != draws[1]
    own = jax.random.key_data(training.example_keys(KEY, 0, jnp.arange(1000)))
    assert not (own == jax.random.key_data(training.shared_key(KEY, 0))[None]).all(-1).any()


def test_finite_sees_the_loss_and_the_gradient():
    tx = optax.sgd(1.0)
    batch = {"index": np.arange(2)}

    def run(value, loss):
        step = training.make_train_step(lambda p, keys, batch: (loss(p), {}), tx, ema_decay=0.9)
        return jax.jit(step)(training.init_state(jnp.float32(value), tx), KEY, batch)[1]

    root = lambda p: jnp.broadcast_to(jnp.sqrt(p), (2,))
    good, steep, bad = run(1.0, root), run(0.0, root), run(-1.0, root)
    assert good["finite"]
    assert np.isfinite(steep["loss"])  # the gradient is what is infinite
    assert not steep["finite"]
    assert not bad["finite"]
    blown = run(1.0, lambda p: jnp.array([1.0, jnp.inf]) + 0 * p)
    assert not blown["finite"]


def test_bfloat16_compute_keeps_float32_state_and_means():
    params = {"w": jnp.eye(DIM), "b": jnp.zeros(DIM)}
    batch = {"x": np.full((512, DIM), 1.01, np.float32), "index": np.arange(512)}

    def loss_fn(params, keys, batch):
        low = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
        y = batch["x"].astype(jnp.bfloat16) @ low["w"] + low["b"][None]
        return jnp.sum(y - 1, -1) * 0 + (batch["index"] < 257).astype(jnp.bfloat16), {"y": jnp.mean(y)}

    tx = training.adam(1e-3, clip=1.0)
    state, metrics = jax.jit(training.make_train_step(loss_fn, tx, ema_decay=0.9))(
        training.init_state(params, tx), KEY, batch
    )
    dtypes = {leaf.dtype for leaf in jax.tree.leaves((state.params, state.ema, state.opt_state[1].mu))}
    assert dtypes == {jnp.dtype(jnp.float32)}
    assert metrics["loss"].dtype == jnp.float32
    assert metrics["loss"] == 257 / 512  # nine bits: no bfloat16 number

    # A decay of 0.9999 does not move a bfloat16 average at all; ours is wider.
    half = training.init_state({"w": jnp.ones(2, jnp.bfloat16)}, optax.sgd(1.0))
    assert half.params["w"].dtype == jnp.bfloat16
    assert half.ema["w"].dtype == jnp.float32


def test_float64_is_kept(x64, problem):
    params = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf, np.float64)), problem[0])
    tx = optax.sgd(0.1)
    loss_fn = lambda p, keys, batch: (jnp.sum((batch["x"] @ p["w"] + p["b"][None]) ** 2, -1), {})
    batch = {"x": problem[1]["x"].astype(np.float64), "index": problem[1]["index"]}
    state, metrics = training.make_train_step(loss_fn, tx, ema_decay=0.9)(training.init_state(params, tx), KEY, batch)
    loss, dw, _, _ = expected(np.asarray(params["w"]), np.asarray(params["b"]), batch["x"], 0.0)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-14)
    np.testing.assert_allclose(state.params["w"], np.asarray(params["w"]) - 0.1 * dw, rtol=1e-12)
    # The weight of the average is a float32 number.
    np.testing.assert_allclose(
        state.ema["w"], 0.1 * np.asarray(params["w"]) + 0.9 * np.asarray(state.params["w"]), rtol=1e-6
    )


def test_state_is_fresh_arrays_only_and_can_be_donated(problem):
    params, batch = problem
    tx = training.adam(1e-3)
    state = training.init_state(params, tx)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(state))
    step = jax.jit(training.make_train_step(regression, tx, ema_decay=0.9), donate_argnums=0)
    new, _ = step(state, KEY, batch)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((params, new)))
    planned = jax.eval_shape(lambda p: training.init_state(p, tx), params)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), planned) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), new
    )


def test_the_step_leaves_the_host_alone(problem):
    params, batch = problem
    tx = training.adam(training.learning_rate(1e-3, warmup=3), clip=1.0)
    step = jax.jit(training.make_train_step(regression, tx, ema_decay=0.9))
    state, batch = training.init_state(params, tx), jax.device_put(batch)
    state, _ = step(state, KEY, batch)
    with jax.transfer_guard("disallow"):
        state, _ = step(state, KEY, batch)
    assert "callback" not in step.lower(state, KEY, batch).as_text()


@pytest.mark.parametrize(
    ("key", "batch", "loss", "error", "match"),
    [
        (jax.random.PRNGKey(0), {}, None, TypeError, "typed key"),
        (jax.random.key(0, impl="rbg"), {}, None, TypeError, "threefry key"),
        (jax.random.split(KEY, 2), {}, None, ValueError, r"one key for the whole batch, got shape \(2,\)"),
        (KEY, {"index": np.arange(2.0)}, None, TypeError, "integers, got float32"),
        (KEY, {"index": np.zeros((2, 1), int)}, None, ValueError, r"shape \(batch,\), got \(2, 1\)"),
        (KEY, {"index": None}, None, ValueError, r"got \['x'\]"),
        (KEY, {"key": np.zeros(2)}, None, ValueError, 'entry "key"'),
        (KEY, {}, lambda p, k, b: (jnp.sum(p), {}), ValueError, r"one loss per example, shape \(2,\), got \(\)"),
        (KEY, {}, lambda p, k, b: (b["x"] * p, {"loss": 1.0}), ValueError, r"names \['loss'\]"),
        (KEY, {}, lambda p, k, b: (b["x"] * p, {"a": jnp.ones(3)}), ValueError, r"metric 'a' must have shape"),
    ],
)
def test_bad_input_is_named(key, batch, loss, error, match):
    tx = optax.sgd(0.1)
    batch = {"x": np.ones(2, np.float32), "index": np.arange(2), **batch}
    batch = {name: leaf for name, leaf in batch.items() if leaf is not None}
    step = training.make_train_step(loss or (lambda p, k, b: (b["x"] * p, {})), tx, ema_decay=0.9)
    with pytest.raises(error, match=match):
        jax.jit(step)(training.init_state(jnp.float32(1), tx), key, batch)


@pytest.mark.parametrize(
    ("build", "match"),
    [
        (lambda: training.make_train_step(regression, optax.sgd(1.0), ema_decay=1.0), "ema_decay"),
        (lambda: training.mean_gradient(regression, accumulate=0), "accumulate must be at least 1"),
        (lambda: training.learning_rate(0.0), "peak"),
        (lambda: training.learning_rate(1.0, warmup=-1), "warmup"),
        (lambda: training.learning_rate(1.0, warmup=5, total=5), "total"),
        (lambda: training.adam(1.0, b2=1.0), "b2"),
        (lambda: training.adam(1.0, eps=0.0), "eps"),
        (lambda: training.adam(1.0, clip=0.0), "clip"),
        (lambda: training.adam(1.0, weight_decay=-1.0), "weight_decay"),
    ],
)
def test_bad_settings_are_named(build, match):
    with pytest.raises(ValueError, match=match):
        build()


def test_weights_and_masks_are_shares_of_the_batch(problem):
    """sum(w l) / sum(w), its gradient and the metrics; padding of weight zero is as if it were not there."""
    params, batch = problem
    weight, mask = np.asarray([0.5, 3.0, 0.0, 1.0, 2.0, 7.0], np.float32), np.asarray([1, 1, 1, 1, 1, 0], bool)
    gradient = jax.jit(training.mean_gradient(regression))
    grads, metrics = gradient(params, 3, KEY, batch | {"weight": weight, "mask": mask})
    w, b, x = (np.asarray(a, np.float64) for a in (params["w"], params["b"], batch["x"]))
    error = x @ w + b - noise(KEY, 3, batch["index"])
    share = (weight * mask / (weight * mask).sum())[:, None]
    np.testing.assert_allclose(metrics["loss"], (share * error**2).sum(), rtol=2e-6)
    np.testing.assert_allclose(metrics["abs"], (share * np.abs(error)).sum() / DIM, rtol=2e-6)
    assert metrics["two"] == 2
    np.testing.assert_allclose(grads["w"], 2 * x.T @ (share * error), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(grads["b"], 2 * (share * error).sum(0), rtol=1e-5, atol=1e-6)

    padded, _ = gradient(params, 3, KEY, batch | {"mask": np.arange(BATCH) < 4})
    rows = {name: value[:4] for name, value in batch.items()}
    plain, _ = jax.jit(training.mean_gradient(regression))(params, 3, KEY, rows)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), padded, plain)


def test_parts_of_a_batch_add_up_to_it(problem):
    params, batch = problem
    batch = batch | {"weight": np.asarray([0.5, 3.0, 0.0, 1.0, 2.0, 7.0], np.float32)}
    want = jax.jit(training.mean_gradient(regression))(params, 3, KEY, batch)
    got = jax.jit(training.mean_gradient(regression, accumulate=3))(params, 3, KEY, batch)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, want)


def test_a_batch_in_which_nothing_counts_has_gradient_zero(problem):
    params, batch = problem
    grads, metrics = training.mean_gradient(regression)(params, 0, KEY, batch | {"mask": np.zeros(BATCH, bool)})
    assert metrics["loss"] == 0 and all(not leaf.any() for leaf in jax.tree.leaves(grads))


@pytest.mark.parametrize(
    ("entry", "error", "match"),
    [
        ({"weight": np.ones(3, np.float32)}, ValueError, r"batch\['weight'\] must have shape \(6,\).*got \(3,\)"),
        ({"mask": np.ones((6, 1), bool)}, ValueError, r"batch\['mask'\] must have shape"),
        ({"mask": np.ones(6, np.float32)}, TypeError, r"must be bool, got float32"),
    ],
)
def test_wrong_weights_are_named(problem, entry, error, match):
    params, batch = problem
    with pytest.raises(error, match=match):
        jax.eval_shape(training.mean_gradient(regression), params, 0, KEY, batch | entry)


def test_parts_of_unequal_size_are_refused(problem):
    params, batch = problem
    with pytest.raises(ValueError, match="6 does not divide into accumulate = 4"):
        jax.eval_shape(training.mean_gradient(regression, accumulate=4), params, 0, KEY, batch)
