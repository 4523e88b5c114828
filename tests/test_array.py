import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdiff import _array


def tree(batch=3):
    return {"a": jnp.arange(2.0 * batch).reshape(batch, 2), "b": jnp.arange(12.0 * batch).reshape(batch, 3, 4)}


def test_expand_multiplies_example_by_example():
    x = np.random.default_rng(0).normal(size=(3, 2, 4)).astype(np.float32)
    c = np.array([2.0, -1.0, 0.5], np.float32)
    want = np.stack([c[i] * x[i] for i in range(3)])
    np.testing.assert_array_equal(_array.expand(c, x) * x, want)
    np.testing.assert_array_equal(_array.expand(2.5, x) * x, np.float32(2.5) * x)
    # A square array: the batch axis must not be confused with the last one.
    square = np.ones((3, 3), np.float32)
    np.testing.assert_array_equal(_array.expand(c, square) * square, np.repeat(c[:, None], 3, axis=1))
    assert _array.expand(jnp.ones(3), jnp.ones((3, 2), jnp.bfloat16)).dtype == jnp.bfloat16


def test_lincomb_is_a_linear_combination_of_trees():
    x, y, c = tree(), jax.tree.map(jnp.sin, tree()), jnp.array([1.0, 2.0, 3.0])
    got = _array.lincomb((c, x), (-0.5, y))
    np.testing.assert_allclose(got["a"], c[:, None] * x["a"] - 0.5 * y["a"], rtol=1e-6)
    np.testing.assert_allclose(got["b"], c[:, None, None] * x["b"] - 0.5 * y["b"], rtol=1e-6)
    np.testing.assert_array_equal(_array.lincomb((2.0, x))["a"], 2 * x["a"])


@pytest.mark.parametrize("t", [0.25, 1, np.float64(0.25), np.array([0.1, 0.2, 0.3], np.float32)])
def test_batch_time_is_one_time_per_example(t):
    got = _array.batch_time(t, tree())
    assert got.shape == (3,) and got.dtype == jnp.float32
    np.testing.assert_array_equal(got, np.broadcast_to(np.asarray(t, np.float32), 3))


def test_times_of_half_precision_states_are_float32_but_fields_see_the_dtype_of_x():
    x = jnp.ones((3, 2), jnp.bfloat16)
    assert _array.batch_time(0.1, x).dtype == jnp.float32
    assert _array.full_like_batch(x, 0.5).dtype == jnp.float32
    seen = []
    _array.call(lambda x, t: seen.append((t.shape, t.dtype)) or x, x, 0.1)
    assert seen == [((3,), jnp.bfloat16)]


@pytest.mark.parametrize(
    ("t", "error", "match"),
    [
        (np.zeros(2, np.float32), ValueError, r"shape \(3,\).*got \(2,\)"),
        (np.zeros((3, 1), np.float32), ValueError, r"got \(3, 1\)"),
        (np.zeros(3, np.int32), TypeError, "floating point, got dtype int32"),
        (1j, TypeError, "real number"),
    ],
)
def test_bad_times(t, error, match):
    with pytest.raises(error, match=match):
        _array.batch_time(t, tree())


def test_check_state():
    assert _array.check_state(tree(5)) == 5
    assert _array.check_array(jnp.ones((4, 2))) == 4
    with pytest.raises(TypeError, match="x must be floating point, got dtype uint8"):
        _array.check_state({"a": jnp.ones((2, 2)), "b": jnp.ones((2, 2), jnp.uint8)})
    with pytest.raises(ValueError, match=r"one batch size in all its arrays, got \[2, 3\]"):
        _array.check_state({"a": jnp.ones((2, 2)), "b": jnp.ones((3, 2))})
    with pytest.raises(ValueError, match="leading batch axis, got a scalar"):
        _array.check_state(jnp.ones(()))
    with pytest.raises(TypeError, match=r"x0 must be one array .* got dict"):
        _array.check_array(tree(), "x0")
    with pytest.raises(ValueError, match="one batch size"):
        _array.check_state({})
    with pytest.raises(ValueError, match="no arrays"):
        _array.first_leaf({})


def test_a_field_must_return_a_state_like_x():
    """A result that only broadcasts against x, (batch, 1), is a mistake and not a coefficient."""
    x = jnp.ones((3, 2))
    for wrong in (lambda x, t: x[:, :1], lambda x, t: x[0], lambda x, t: (x, x), lambda x, t: t):
        with pytest.raises(ValueError, match="must return the shape of its x"):
            _array.call(wrong, x, 0.5)
    with pytest.raises(ValueError, match="must return the shape of its x"):
        _array.call(lambda x, t: {"a": x["a"]}, tree(), 0.5)
    assert _array.call(lambda x, t: x, tree(), 0.5).keys() == tree().keys()


def test_root_where_there_is_none():
    x = jnp.asarray([-1.0, 0.0, 4.0, jnp.nan])
    np.testing.assert_array_equal(_array.root(x), [0, 0, 2, np.nan])
    np.testing.assert_array_equal(jax.vmap(jax.grad(_array.root))(x), [0, 0, 0.25, np.nan])


def test_reductions_keep_the_batch():
    x = np.random.default_rng(1).normal(size=(3, 4, 5)).astype(np.float32)
    np.testing.assert_allclose(_array.sum_event(x), x.reshape(3, -1).sum(1), rtol=1e-5)
    np.testing.assert_allclose(_array.mean_event(x), x.reshape(3, -1).mean(1), rtol=1e-5)
    half = jnp.full((2, 8), 300, jnp.float16)  # of which neither sum of squares nor square fits in
    square, mean = _array.sum_event(_array.widened(half) ** 2), _array.mean_event(_array.widened(half) ** 2)
    assert square.dtype == mean.dtype == jnp.float32
    np.testing.assert_array_equal([square, mean], [[720_000] * 2, [90_000] * 2])
    np.testing.assert_array_equal(_array.sum_event(jnp.full((2, 400), 300, jnp.float16)), [120_000] * 2)
    assert _array.event_size(x) == 20 and _array.event_size(tree()) == 14
    np.testing.assert_array_equal(_array.full_like_batch(x, 0.25), np.full(3, 0.25))


@pytest.mark.parametrize("draw", [_array.normal_like, _array.rademacher_like])
def test_noise_of_an_example_depends_on_its_key_alone(draw):
    keys = jax.random.split(jax.random.key(0), 6)
    x = jnp.zeros((6, 4, 8))
    whole = draw(keys, x)
    assert len(np.unique(np.asarray(whole).reshape(6, -1), axis=0)) == 6
    for i in (0, 4):
        np.testing.assert_allclose(draw(keys[i : i + 1], x[:1])[0], whole[i], rtol=1e-6)
    order = np.array([3, 0, 5, 1, 4, 2])
    np.testing.assert_array_equal(draw(keys[order], x), whole[order])


def test_normal_like_is_what_a_user_would_draw():
    keys = jax.random.split(jax.random.key(1), 2)
    got = _array.normal_like(keys, jnp.zeros((2, 3, 4)))
    want = jnp.stack([jax.random.normal(k, (3, 4)) for k in keys])
    np.testing.assert_allclose(got, want, rtol=1e-6)


def test_moments_of_the_noise():
    keys = jax.random.split(jax.random.key(2), 200)
    noise = np.asarray(_array.normal_like(keys, jnp.zeros((200, 500))))
    assert abs(noise.mean()) < 4 / np.sqrt(1e5) and abs((noise**2).mean() - 1) < 4 * np.sqrt(2 / 1e5)
    assert abs((noise**4).mean() - 3) < 4 * np.sqrt(96 / 1e5)
    signs = np.asarray(_array.rademacher_like(keys, jnp.zeros((200, 500))))
    assert set(np.unique(signs)) == {-1.0, 1.0} and abs(signs.mean()) < 4 / np.sqrt(1e5)


def test_leaves_of_a_tree_have_independent_noise():
    noise = _array.normal_like(
        jax.random.split(jax.random.key(3), 2), {"a": jnp.zeros((2, 50)), "b": jnp.zeros((2, 50))}
    )
    assert abs(np.corrcoef(np.ravel(noise["a"]), np.ravel(noise["b"]))[0, 1]) < 0.4
    assert not np.any(np.isclose(noise["a"], noise["b"]))


def test_per_example_keys():
    key = jax.random.key(4)
    np.testing.assert_array_equal(
        jax.random.key_data(_array.per_example_keys(key, 3)), jax.random.key_data(jax.random.split(key, 3))
    )
    keys = jax.random.split(key, 3)
    assert _array.per_example_keys(keys, 3) is keys
    folded = _array.fold_in(keys, 7)
    np.testing.assert_array_equal(jax.random.key_data(folded[1]), jax.random.key_data(jax.random.fold_in(keys[1], 7)))
    assert jax.jit(lambda k: _array.per_example_keys(k, 3))(key).shape == (3,)


@pytest.mark.parametrize(
    ("key", "error", "match"),
    [
        (lambda: jax.random.PRNGKey(0), TypeError, "typed key made by jax.random.key, got uint32"),
        (lambda: jax.random.key(0, impl="rbg"), TypeError, "threefry"),
        (lambda: 0, TypeError, "got int"),
        (lambda: np.zeros(2, np.uint32), TypeError, "got uint32"),
        (lambda: jax.random.split(jax.random.key(0), 2), ValueError, r"shape \(3,\); got shape \(2,\)"),
        (lambda: jax.random.split(jax.random.key(0), (3, 1)), ValueError, r"got shape \(3, 1\)"),
    ],
)
def test_bad_keys(key, error, match):
    with pytest.raises(error, match=match):
        _array.per_example_keys(key(), 3)


@pytest.mark.parametrize(
    ("ts", "error", "match"),
    [
        ([1.0], ValueError, "at least two times"),
        ([[1.0, 0.5]], ValueError, "at least two times"),
        ([1.0, 0.5, 0.5], ValueError, "strictly monotone"),
        ([1.0, 0.5, 0.7], ValueError, "strictly monotone"),
        ([1.0, np.nan, 0.0], ValueError, "strictly monotone"),
        ([0.0, 0.5, 1.0], ValueError, "must decrease here, but it increases: from 0 to 1"),
    ],
)
def test_bad_grids(ts, error, match):
    with pytest.raises(error, match=match):
        _array.check_grid(np.array(ts, np.float32), decreasing=True)


def test_grids():
    _array.check_grid(jnp.array([1.0, 0.5, 0.0]), decreasing=True)
    _array.check_grid(jnp.array([0.0, 0.5, 1.0]), decreasing=False)
    _array.check_grid(jnp.array([0.0, 0.5, 1.0]))
    with pytest.raises(ValueError, match="must increase"):
        _array.check_grid(jnp.array([1.0, 0.5]), decreasing=False)
    with pytest.raises(ValueError, match="finite"):
        _array.check_grid(jnp.array([np.inf, 0.5]))
    with pytest.raises(TypeError, match="int32"):
        _array.check_grid(jnp.array([2, 1]))
    # Under jit the values cannot be seen, the shape can.
    jax.jit(lambda ts: _array.check_grid(ts, decreasing=True))(jnp.array([0.0, 1.0]))
    with pytest.raises(ValueError, match="two times"):
        jax.jit(_array.check_grid)(jnp.ones(1))
