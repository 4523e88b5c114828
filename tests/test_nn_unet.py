"""What every U-Net of ours owes its caller, on 8x8 images: conditioning, dropout, dtypes, derivatives, sizes."""

import jax
import jax.numpy as jnp
import nn_reference
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from nn_reference import quick_jit

from jdiff import nn
from jdiff.nn.conditioning import smooth_features
from jdiff.nn.normalisation import GroupNorm
from jdiff.nn.resampling import downsample, upsample


def log_snr(t):
    return 4 - 8 * t


def tiny(**changes):
    sizes = {"channels": 8, "multipliers": (1, 2), "blocks": 1, "attention": (4,), "dropout": 0.0}
    return nn.ddpmpp(log_snr, **(sizes | changes))


@pytest.fixture(scope="module")
def batch():
    rng = np.random.RandomState(0)
    x = jnp.asarray(rng.standard_normal((4, 8, 8, 2)), jnp.float32)
    return x, jnp.asarray([0.1, 0.4, 0.6, 0.9], jnp.float32), jnp.asarray([0, 1, 2, 1], jnp.int32)


@pytest.fixture(scope="module")
def labelled(batch):
    """A network with three labels, generic parameters, and its compiled field (params, x, t, cond)."""
    network = tiny(num_classes=3)
    params = nn_reference.filled_params(network, *batch[:2])
    return network, params, quick_jit(lambda params, x, t, cond: nn.as_field(network, params)(x, t, cond))


def test_a_label_adds_its_row_and_none_is_the_null_row(batch, labelled):
    x, t, cond = batch
    _, params, field = labelled
    plain = {**params, "conditioning": {k: v for k, v in params["conditioning"].items() if k != "label"}}
    table = params["conditioning"]["label"]["embedding"]
    assert table.shape == (4, 32)
    unlabelled = quick_jit(lambda params: nn.as_field(tiny(), params)(x, t))
    for label in range(4):
        # The row of a label is a bias of the last layer of the conditioning: fold it there by hand.
        bias = plain["conditioning"]["dense_1"]["bias"] + table[label]
        folded = {**plain, "conditioning": {**plain["conditioning"]}}
        folded["conditioning"]["dense_1"] = {**plain["conditioning"]["dense_1"], "bias": bias}
        np.testing.assert_allclose(
            field(params, x, t, jnp.full(4, label, jnp.int32)), unlabelled(folded), rtol=1e-4, atol=1e-5
        )
    null = field(params, x, t, jnp.full(4, 3, jnp.int32))
    np.testing.assert_array_equal(field(params, x, t, None), null)
    assert np.abs(field(params, x, t, cond) - null).max() > 1e-2
    for label in (4, -1, -2):  # a label out of range is loud
        assert np.isnan(field(params, x, t, cond.at[0].set(label))[0]).all()


def test_examples_do_not_see_one_another(batch, labelled):
    x, t, cond = batch
    _, params, field = labelled
    alone = field(params, x, t, cond)
    others = field(params, x.at[1:].multiply(-3), t.at[1:].set(0.2), cond.at[1:].set(0))
    np.testing.assert_array_equal(alone[0], others[0])
    assert np.abs(alone[1:] - others[1:]).max() > 1e-2
    order = jnp.asarray([2, 0, 3, 1])
    np.testing.assert_allclose(field(params, x[order], t[order], cond[order]), alone[order], rtol=1e-5, atol=1e-5)


def test_jvp_is_the_derivative(x64, batch):
    x, t = (a.astype(jnp.float64) for a in batch[:2])
    network = tiny(multipliers=(1,), attention=())
    params = nn_reference.filled_params(network, x, t)
    direction = jnp.asarray(np.random.RandomState(1).standard_normal(x.shape))
    field = nn.as_field(network, params)
    out, tangent = quick_jit(lambda x, t, v: jax.jvp(lambda x: field(x, t), (x,), (v,)))(x, t, direction)
    step, plain = 1e-5, quick_jit(field)
    slope = (plain(x + step * direction, t) - plain(x - step * direction, t)) / (2 * step)
    assert out.dtype == tangent.dtype == jnp.float64  # float64 in, float64 out, with float32 parameters
    np.testing.assert_allclose(tangent, slope, rtol=1e-6, atol=1e-7)


def test_every_leaf_is_trained_but_the_key_bias(batch):
    x, t, cond = batch
    network = tiny(num_classes=3, embedding="fourier")
    params = nn_reference.filled_params(network, x, t)
    field = lambda params: jnp.mean(jnp.square(nn.as_field(network, params)(x, t, cond) - 1))
    gradient = quick_jit(jax.grad(field))(params)
    frozen, unused = [], []
    for path, leaf in jax.tree_util.tree_flatten_with_path(gradient)[0]:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        (frozen if np.abs(leaf).max() < 1e-7 else unused).append(name)
    assert [name for name in frozen if not name.endswith("key/bias")] == ["conditioning/fourier/frequencies"]
    assert sum(name.endswith("key/bias") for name in frozen) == 3  # down, middle, up: once per level on the way up
    assert (np.abs(gradient["conditioning"]["label"]["embedding"]).max(axis=1) > 1e-7).tolist() == [True] * 3 + [False]


def test_a_fresh_network_is_nearly_zero_but_not_dead(batch):
    x, t, _ = batch
    network = tiny(num_classes=3, multipliers=(2,))
    params = quick_jit(lambda key: network.init(key, x, t)["params"])(jax.random.key(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}
    out = quick_jit(nn.as_field(network, params))(x, t)
    assert 0 < np.abs(out).max() < 1e-3
    # Uniform on +-sqrt(3 / fan_avg) elsewhere: 9 * 8 in, 9 * 16 out.
    kernel = params["down_0_block_0"]["conv_0"]["kernel"]
    np.testing.assert_allclose(np.abs(kernel).max(), np.sqrt(3 / (9 * 12)), rtol=0.01)


def test_dropout_only_in_training(batch):
    x, t, _ = batch
    one_level = {"multipliers": (1,), "attention": ()}
    network = tiny(dropout=0.5, **one_level)
    params = nn_reference.filled_params(network, x, t)
    apply = quick_jit(lambda key: nn.as_field(network, params, train=True, rngs={"dropout": key})(x, t))
    plain = quick_jit(nn.as_field(tiny(**one_level), params))(x, t)
    np.testing.assert_allclose(quick_jit(nn.as_field(network, params))(x, t), plain, rtol=1e-6, atol=1e-6)
    one, other = apply(jax.random.key(0)), apply(jax.random.key(1))
    assert np.abs(one - plain).max() > 1e-2 and np.abs(one - other).max() > 1e-2


@pytest.mark.parametrize("x_dtype", [jnp.float32, jnp.bfloat16])
def test_bfloat16_compute_keeps_float32_parameters(batch, labelled, x_dtype):
    x, t, cond = batch
    params, field = labelled[1:]
    network = tiny(num_classes=3, dtype=jnp.bfloat16)
    like = jax.eval_shape(lambda: network.init(jax.random.key(0), x, t)["params"])
    assert {leaf.dtype for leaf in jax.tree.leaves(like)} == {jnp.dtype(jnp.float32)}
    half = quick_jit(nn.as_field(network, params))(x.astype(x_dtype), t.astype(x_dtype), cond)
    full = field(params, x, t, cond)
    assert half.dtype == x_dtype
    error = np.abs(np.float32(half) - full).max() / np.abs(full).max()
    assert 1e-4 < error < 0.1  # it did compute in bfloat16, and not worse than that


def test_times_are_embedded_in_float32_at_least():
    seen = []
    network = tiny(dtype=jnp.bfloat16)
    network = network.clone(noise_level=lambda t: seen.append(t.dtype) or t)
    x, t = jnp.zeros((1, 4, 4, 1), jnp.bfloat16), jnp.zeros((1,), jnp.bfloat16)
    jax.eval_shape(lambda: network.init(jax.random.key(0), x, t))
    assert seen == [jnp.float32]


@pytest.mark.parametrize("size", [(28, 28), (8, 8), (12, 20)])
def test_any_size_that_halves(size):
    network = nn.ddpmpp(log_snr, size="small")
    x, t = jnp.zeros((2, *size, 1), jnp.float32), jnp.zeros((2,), jnp.float32)
    shape = jax.eval_shape(lambda: network.init_with_output(jax.random.key(0), x, t)[0])
    assert (shape.shape, shape.dtype) == (x.shape, x.dtype)


def test_attributes_of_a_size_can_be_changed():
    network = nn.ddpmpp(log_snr, size="deep", blocks=2, num_classes=10)
    assert (network.blocks, network.channels, network.num_classes, network.dropout) == (2, 128, 10, 0.1)
    with pytest.raises(ValueError, match="small, full, deep, got 'large'"):
        nn.ddpmpp(log_snr, size="large")
    with pytest.raises(TypeError, match="chanels"):
        nn.ddpmpp(log_snr, chanels=8)


@pytest.mark.parametrize(
    "error,match,changes,inputs",
    [
        (ValueError, "multiples of 2", {}, {"x": (4, 7, 8, 2)}),
        (ValueError, "multiples of 4.*30x28", {"multipliers": (1, 2, 2)}, {"x": (4, 30, 28, 2)}),
        (ValueError, r"\(batch, height, width, channels\)", {}, {"x": (4, 8, 8)}),
        (ValueError, r"t must have shape \(4,\)", {}, {"t": ()}),
        (ValueError, r"t must have shape \(4,\)", {}, {"t": (1,)}),
        (TypeError, "x must be floating point, got dtype int32", {}, {"x_dtype": jnp.int32}),
        (TypeError, "floating", {}, {"t_dtype": jnp.int32}),
        (ValueError, "without labels", {}, {"cond": (4,)}),
        (ValueError, r"cond must have shape \(4,\)", {"num_classes": 3}, {"cond": (4, 1)}),
        (TypeError, "integer", {"num_classes": 3}, {"cond": (4,), "cond_dtype": jnp.float32}),
        (ValueError, "num_classes must be", {"num_classes": 0}, {}),
        (ValueError, "fourier, positional, smooth, got 'sinus'", {"embedding": "sinus"}, {}),
        (ValueError, "keep the shape", {"noise_level": lambda t: t[:, None]}, {}),
        (ValueError, "dim >= 4", {"embedding": "positional", "channels": 2}, {}),
    ],
)
def test_bad_input_is_named_before_compilation(error, match, changes, inputs):
    x = jnp.zeros(inputs.get("x", (4, 8, 8, 2)), inputs.get("x_dtype", jnp.float32))
    t = jnp.zeros(inputs.get("t", (4,)), inputs.get("t_dtype", jnp.float32))
    cond = jnp.zeros(inputs["cond"], inputs.get("cond_dtype", jnp.int32)) if "cond" in inputs else None
    network = tiny().clone(**changes)
    with pytest.raises(error, match=match):
        jax.eval_shape(lambda: network.init(jax.random.key(0), x, t, cond))


def test_it_passes_the_checks_of_shard_map(batch):
    x, t, _ = batch
    network = tiny(num_classes=3)
    params = nn_reference.filled_params(network, x, t)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:4])
    spec = P("data")
    mapped = jax.shard_map(
        lambda p, x, t: nn.as_field(network, p)(x, t), mesh=mesh, in_specs=(P(), spec, spec), out_specs=spec
    )
    assert jax.eval_shape(mapped, params, x, t).shape == x.shape


def test_smooth_features():
    values = jnp.asarray([-3.0, 0.0, 11.0], jnp.float32)
    expected = [[f(w * v) for f in (np.sin, np.cos) for w in (0.5, 1.0)] for v in (-3.0, 0.0, 11.0)]
    np.testing.assert_allclose(smooth_features(values, (0.5, 1.0)), expected, atol=1e-6)
    ends = smooth_features(jnp.asarray([-jnp.inf, -20, 20, jnp.inf], jnp.float32))
    assert np.isfinite(ends).all() and ends.shape == (4, 12)
    np.testing.assert_array_equal(ends[0], ends[1])
    np.testing.assert_array_equal(ends[3], ends[2])


@pytest.mark.parametrize("channels,groups", [(8, 2), (48, 12), (384, 32), (200, 25), (2, 1)])
def test_group_norm(channels, groups):
    x = np.random.RandomState(0).standard_normal((2, 3, 3, channels)).astype(np.float32) + 1
    module = GroupNorm()
    ours = jax.jit(lambda x: module.apply(module.init(jax.random.key(0), x), x))(x)
    grouped = x.astype(np.float64).reshape(2, 9, groups, channels // groups)
    mean, var = (f(grouped, axis=(1, 3), keepdims=True) for f in (np.mean, np.var))
    np.testing.assert_allclose(ours, ((grouped - mean) / np.sqrt(var + 1e-6)).reshape(x.shape), atol=2e-5)


def test_resampling_by_two():
    x = np.random.RandomState(0).standard_normal((2, 4, 6, 3)).astype(np.float32)
    np.testing.assert_array_equal(upsample(jnp.asarray(x)), x.repeat(2, axis=1).repeat(2, axis=2))
    means = (x[:, ::2, ::2] + x[:, 1::2, ::2] + x[:, ::2, 1::2] + x[:, 1::2, 1::2]) / 4
    np.testing.assert_allclose(downsample(jnp.asarray(x)), means, atol=1e-6)
