"""The noise-conditional WideResNet: its published size, and its values against a restatement in NumPy and SciPy."""

import jax
import jax.numpy as jnp
import nn_reference
import numpy as np
import pytest
from scipy import signal

from jdiff import nn
from jdiff.nn import wide_resnet
from jdiff.nn.conditions import space_to_depth

NETWORK = nn.WideResNet(jnp.log, 3, depth=16, widen=1, features=4, fourier_scale=1.0)
X = jnp.asarray(np.random.default_rng(0).normal(size=(2, 8, 8, 2)), jnp.float32)
T = jnp.asarray([0.1, 0.7], jnp.float32)


@pytest.fixture(scope="module")
def params():
    return nn_reference.filled_params(NETWORK, X, T)


@pytest.fixture(scope="module")
def logits():
    return nn_reference.quick_jit(lambda params, x, t: nn.as_field(NETWORK, params)(x, t))


def test_published_size():
    network = nn.WideResNet(jnp.log, 10)
    x, t = jnp.zeros((1, 32, 32, 3), jnp.float32), jnp.ones(1, jnp.float32)
    like = jax.eval_shape(lambda: network.init(jax.random.key(0), x, t)["params"])
    leaves = jax.tree.leaves(like)
    # tests/data has no shapes of it; 38,913,242 and 106 leaves are those of the reference (yang-song/score_sde).
    assert (sum(leaf.size for leaf in leaves), len(leaves)) == (38_913_242, 106)
    assert like["group_2_block_3_conv_1"]["kernel"].shape == (3, 3, 640, 640)
    assert like["group_1_block_0_embed"]["kernel"].shape == (512, 320)


def test_patches_and_odd_sides():
    """Squares of 2x2 pixels as channels; a side of 7 is halved to 4, with zeros beyond its end."""
    x = jnp.arange(48.0).reshape(1, 4, 6, 2)
    patches = space_to_depth(x, 2)
    assert patches.shape == (1, 2, 3, 8)
    np.testing.assert_array_equal(patches[0, 1, 2], x[0, 2:, 4:].ravel())
    odd = jnp.ones((1, 3, 3, 1))
    want = np.asarray([[1, 0.5], [0.5, 0.25]])
    np.testing.assert_array_equal(wide_resnet._shortcut(odd, 2, 2)[0], np.stack([want, np.zeros((2, 2))], axis=-1))
    like = jax.eval_shape(lambda: NETWORK.copy(patch=2).init_with_output(jax.random.key(0), X[:, :6], T)[0])
    assert like.shape == (2, 3)
    none = jax.eval_shape(lambda: NETWORK.init_with_output(jax.random.key(0), X[:0], T[:0])[0])
    assert none.shape == (0, 3)


def _norm(h, p):
    channels = h.shape[-1]
    groups = h.reshape(-1, max(min(channels // 4, 32), 1), channels // max(min(channels // 4, 32), 1))
    groups = (groups - groups.mean((0, 2), keepdims=True)) / np.sqrt(groups.var((0, 2), keepdims=True) + 1e-6)
    return np.maximum(groups.reshape(h.shape) * p["scale"] + p["bias"], 0)


def _conv(h, kernel, stride):
    # SAME of an even size with stride 2 pads one zero, at the end.
    before = 1 if stride == 1 else 0
    h = np.pad(h, ((before, 1), (before, 1), (0, 0)))
    outputs = [
        sum(signal.correlate2d(h[..., i], kernel[..., i, o], mode="valid") for i in range(h.shape[-1]))
        for o in range(kernel.shape[-1])
    ]
    return np.stack(outputs, axis=-1)[::stride, ::stride]


def _by_hand(p, x, t, depth):
    """Logits of one example in float64, after Zagoruyko & Komodakis 2016 and Song et al. 2021, appendix I.1."""
    swish = lambda v: v / (1 + np.exp(-v))
    dense = lambda v, p: v @ p["kernel"] + p["bias"]
    angle = 2 * np.pi * np.log(t) * p["conditioning"]["fourier"]["frequencies"]
    emb = dense(np.concatenate([np.sin(angle), np.cos(angle)]), p["conditioning"]["dense_0"])
    emb = swish(dense(swish(emb), p["conditioning"]["dense_1"]))
    h = _conv((x - x.mean()) / x.std(), p["stem"]["kernel"], 1)
    for group in range(3):
        for i in range((depth - 4) // 6):
            norm_0, conv_0, embed, norm_1, conv_1 = (
                p[f"group_{group}_block_{i}_{part}"] for part in ("norm_0", "conv_0", "embed", "norm_1", "conv_1")
            )
            stride = 2 if group > 0 and i == 0 else 1
            y = _norm(h, norm_0)
            if group == 0 and i == 0:
                h = y
            y = _conv(y, conv_0["kernel"], stride) + dense(emb, embed)
            y = _conv(_norm(y, norm_1), conv_1["kernel"], 1)
            if stride == 2:
                h = (h[::2, ::2] + h[1::2, ::2] + h[::2, 1::2] + h[1::2, 1::2]) / 4
            h = np.concatenate([h, np.zeros((*h.shape[:2], y.shape[-1] - h.shape[-1]))], axis=-1) + y
    return dense(_norm(h, p["head_norm"]).mean((0, 1)), p["head"])


def test_logits_are_those_of_the_restatement(params, logits):
    wide = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    want = np.stack([_by_hand(wide, np.asarray(x, np.float64), float(t), NETWORK.depth) for x, t in zip(X, T)])
    np.testing.assert_allclose(logits(params, X, T), want, rtol=2e-4, atol=2e-4 * np.abs(want).max())
    assert np.abs(want[0] - want[1]).max() > 0.05


def test_images_are_standardised(params, logits):
    x = np.asarray(wide_resnet._standardise(3 * X - 2))
    np.testing.assert_allclose(x.mean((1, 2, 3)), 0, atol=1e-6)
    np.testing.assert_allclose(x.std((1, 2, 3)), 1, rtol=1e-5)
    np.testing.assert_allclose(logits(params, 3 * X - 2, T), logits(params, X, T), rtol=1e-3, atol=1e-4)
    assert np.abs(wide_resnet._standardise(jnp.full((1, 4, 4, 1), 0.5))).max() == 0
    faint = jnp.where(jnp.arange(16).reshape(1, 4, 4, 1) % 2 == 0, 0.01, -0.01)  # over 1/sqrt(16), not over its 0.01
    np.testing.assert_allclose(
        wide_resnet._standardise(jnp.repeat(faint, 2, axis=0)), 4 * faint.repeat(2, 0), rtol=1e-6
    )
    gradient = jax.grad(lambda x: wide_resnet._standardise(x)[0, 0, 0, 0])(jnp.full((1, 4, 4, 1), 0.5))
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize(
    ("changes", "x", "cond", "match"),
    [
        ({"patch": 2}, X[:, :7], None, "multiples of 2"),
        ({}, X[..., 0], None, "height, width, channels"),
        ({"depth": 12}, X, None, r"depth must be 10, 16, 22, 28, \.\.\., got 12"),
        ({}, X, jnp.zeros(2, jnp.int32), "labels"),
    ],
)
def test_mistakes_are_named(changes, x, cond, match):
    with pytest.raises(ValueError, match=match):
        NETWORK.copy(**changes).init(jax.random.key(0), x, T, cond)
