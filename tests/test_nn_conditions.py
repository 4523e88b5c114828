"""The door of conditions: what each network sees of labels, vectors, images and tokens, and what it refuses."""

import jax
import jax.numpy as jnp
import nn_reference
import numpy as np
import pytest
from nn_reference import quick_jit

from jdiff import conditions, guidance, nn
from jdiff.nn.cross_attention import CrossAttention

LEVEL = lambda t: 4 - 8 * t
RNG = np.random.default_rng(0)
BATCH = 4
X = jnp.asarray(RNG.normal(size=(BATCH, 4, 4, 2)), jnp.float32)
T = jnp.linspace(0.1, 0.9, BATCH, dtype=jnp.float32)
COND = {
    "label": jnp.asarray([0, 2, 1, 2]),
    "vector": jnp.asarray(RNG.normal(size=(BATCH, 3)), jnp.float32),
    "image": jnp.asarray(RNG.normal(size=(BATCH, 4, 4, 1)), jnp.float32),
    "tokens": jnp.asarray(RNG.normal(size=(BATCH, 5, 6)), jnp.float32),
}
MLP = nn.ResidualMLP(LEVEL, width=8, depth=1, num_classes=3, vector_size=3, dropout=0.0)
UNET = nn.UNet(
    LEVEL,
    channels=8,
    multipliers=(1,),
    blocks=1,
    attention=(),
    num_classes=3,
    vector_size=3,
    image_channels=1,
    dropout=0.0,
)
TRANSFORMER = nn.PatchTransformer(
    LEVEL, width=8, depth=1, heads=2, num_classes=3, vector_size=3, image_channels=1, token_size=6
)
NETWORKS = {"mlp": MLP, "unet": UNET, "transformer": TRANSFORMER}
KINDS = {"mlp": ("label", "vector"), "unet": ("label", "vector", "image"), "transformer": tuple(COND)}


@pytest.fixture(scope="module")
def fields():
    """name -> (condition, field(x, t, cond)) of each network, its weights filled, compiled once."""
    found = {}
    for name, network in NETWORKS.items():
        params = nn_reference.filled_params(network, X, T)
        field = quick_jit(lambda x, t, cond, network=network, params=params: nn.as_field(network, params)(x, t, cond))
        found[name] = {kind: COND[kind] for kind in KINDS[name]}, field
    return found


def close(a, b, **options):
    np.testing.assert_allclose(a, b, **({"rtol": 1e-4, "atol": 1e-5} | options))


@pytest.mark.parametrize("name", NETWORKS)
def test_the_null_condition_hides_every_kind(name, fields):
    """None, the null tree and a flag that is down are one; an example that is absent does not see its entries."""
    plain, field = fields[name]
    cond, null = conditions.with_null(plain, 3)
    full, nothing = field(X, T, cond), field(X, T, null)
    close(field(X, T, None), nothing)
    present = jnp.asarray([True, False, True, False])
    mixed = field(X, T, cond | {"present": present})
    close(mixed, jnp.where(present[:, None, None, None], full, nothing))
    for kind in plain:  # and every kind is seen where it is there: example 0 alone changes with its entry
        other = cond | {kind: (cond[kind] + 1) % 3 if kind == "label" else cond[kind].at[0].multiply(-2.0)}
        if kind == "label":
            other["label"] = other["label"].at[1:].set(cond["label"][1:])
        moved = np.abs(field(X, T, other) - full).max(axis=(1, 2, 3))
        assert moved[0] > 1e-3 and moved[1:].max() < 1e-5, kind
    zeros = {kind: jnp.zeros_like(value) for kind, value in cond.items() if kind not in ("label", "present")}
    assert np.abs(field(X, T, null | zeros | {"present": cond["present"]}) - nothing).max() > 1e-3  # zeros are known


@pytest.mark.parametrize("name", ["unet", "transformer"])
def test_a_known_image_stands_beside_x(name):
    """The network with an image is the one without, of the same weights, on [x, image, 1], or [x, 0, 0]."""
    network = NETWORKS[name].copy(
        num_classes=None, vector_size=None, **({"token_size": None} if name != "unet" else {})
    )
    plain = network.copy(image_channels=None, out_channels=2)
    params = nn_reference.filled_params(network, X, T)
    ones = jnp.ones((BATCH, 4, 4, 1), jnp.float32)
    apply = quick_jit(lambda cond: network.apply({"params": params}, X, T, cond))
    beside = quick_jit(lambda x: plain.apply({"params": params}, x, T))
    close(apply({"image": COND["image"]}), beside(jnp.concatenate([X, COND["image"], ones], axis=-1)))
    close(apply(None), beside(jnp.concatenate([X, 0 * ones, 0 * ones], axis=-1)))


def test_tokens_have_no_order_and_masked_ones_are_not_there(fields):
    plain, field = fields["transformer"]
    mask = jnp.arange(5)[None] < jnp.asarray([5, 3, 1, 0])[:, None]
    cond = plain | {"tokens_mask": mask}
    seen = field(X, T, cond)
    order = jnp.asarray([3, 1, 4, 0, 2])
    close(field(X, T, cond | {"tokens": plain["tokens"][:, order], "tokens_mask": mask[:, order]}), seen)
    hidden = jnp.where(mask[..., None], plain["tokens"], jnp.nan)
    close(field(X, T, cond | {"tokens": hidden}), seen)
    assert np.abs(field(X, T, plain | {"tokens_mask": jnp.ones_like(mask)}) - seen).max(axis=(1, 2, 3))[1:].min() > 1e-3
    longer = jnp.concatenate([plain["tokens"], jnp.ones((BATCH, 2, 6))], axis=1)
    close(
        field(
            X,
            T,
            plain
            | {"tokens": longer, "tokens_mask": jnp.arange(7)[None].repeat(BATCH, 0) < mask.sum(1, keepdims=True)},
        ),
        seen,
    )


def test_what_is_absent_or_masked_has_no_part_in_the_gradient():
    """The gradient of the parameters is the same whether it is NaN or a number, of every kind of condition."""
    params = nn_reference.filled_params(TRANSFORMER, X, T)
    present, mask = jnp.asarray([True, False, True, True]), jnp.arange(5)[None] < jnp.asarray([5, 5, 3, 0])[:, None]
    loss = lambda params, cond: jnp.square(nn.as_field(TRANSFORMER, params)(X, T, cond)).sum()
    gradient = quick_jit(lambda cond: jax.grad(loss)(params, cond))
    seen = {
        "vector": present[:, None],
        "image": present[:, None, None, None],
        "tokens": (present[:, None] & mask)[..., None],
    }

    def filled(value):
        hidden = {kind: jnp.where(where, COND[kind], value) for kind, where in seen.items()}
        return gradient(hidden | {"label": COND["label"], "present": present, "tokens_mask": mask})

    want = filled(0.5)
    assert min(np.abs(want[kind]["kernel"]).max() for kind in ("stem", "head")) > 1e-3
    assert np.abs(want["conditioning"]["vector"]["kernel"]).max() > 1e-3
    jax.tree.map(np.testing.assert_array_equal, filled(jnp.nan), want)


def test_cross_attention_is_its_formula():
    layer, h = CrossAttention(heads=2), np.asarray(RNG.normal(size=(1, 3, 4)), np.float32)
    tokens, mask = np.asarray(RNG.normal(size=(1, 5, 6)), np.float32), np.asarray([[True, True, False, True, False]])
    params = layer.init(jax.random.key(0), h, tokens, mask)["params"]
    ours = layer.apply({"params": params}, h, tokens, mask)
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    dense = lambda x, name: x @ p[name]["kernel"] + p[name]["bias"]
    pairs = np.concatenate([dense(tokens[0][mask[0]], "key_value"), p["null"][None]])
    query, outputs = dense(h[0], "query"), []
    for head in range(2):
        part = slice(2 * head, 2 * head + 2)
        scores = query[:, part] @ pairs[:, :4][:, part].T / np.sqrt(2)
        weights = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
        outputs.append(weights @ pairs[:, 4:][:, part])
    close(ours[0], dense(np.concatenate(outputs, axis=1), "out"))


def test_an_image_as_tokens():
    image = jnp.arange(32.0).reshape(1, 4, 4, 2)
    tokens = nn.image_tokens(image, 2)
    assert tokens.shape == (1, 4, 10)
    np.testing.assert_array_equal(tokens[0, 1, :8], image[0, :2, 2:].ravel())
    np.testing.assert_array_equal(tokens[0, :, 8:], [[-1, -1], [-1, 1], [1, -1], [1, 1]])
    with pytest.raises(ValueError, match="multiples of patch = 3"):
        nn.image_tokens(image, 3)


def test_an_example_is_independent_of_its_batch(fields):
    cond, field = fields["transformer"]
    together = field(X, T, cond)
    order = jnp.asarray([2, 0, 3, 1])
    take = lambda tree: jax.tree.map(lambda leaf: leaf[order], tree)
    close(field(take(X), take(T), take(cond)), together[order])


def test_keys_per_example_go_with_any_condition():
    network = MLP.copy(dropout=0.5)
    params, keys = nn_reference.filled_params(MLP, X, T), jax.random.split(jax.random.key(0), BATCH)
    cond = {kind: COND[kind] for kind in KINDS["mlp"]}

    @quick_jit
    def apply(keys, x, t, cond):
        return nn.as_field(network, params, cond=cond, train=True, rngs={"dropout": keys})(x, t)

    together = apply(keys, X, T, cond)
    order = jnp.asarray([3, 1, 0, 2])
    take = lambda tree: jax.tree.map(lambda leaf: leaf[order], tree)
    close(apply(keys[order], take(X), take(T), take(cond)), together[order])
    assert np.abs(apply(keys[order], X, T, cond) - together).max() > 1e-2


def test_classifier_free_guidance_takes_any_tree(fields):
    plain, field = fields["transformer"]
    cond, null = conditions.with_null(plain, 3)
    guided = guidance.classifier_free(field, cond, null, 2.5)(X, T)
    close(guided, 2.5 * field(X, T, cond) - 1.5 * field(X, T, null), rtol=1e-3, atol=1e-4)


def _without(name):
    return {kind: value for kind, value in COND.items() if kind != name}


@pytest.mark.parametrize(
    ("network", "cond", "error", "match"),
    [
        (TRANSFORMER, _without("tokens"), ValueError, "cond lacks tokens; the network was built for label, vector"),
        (TRANSFORMER, COND["label"], ValueError, "cond must be a dict of label, vector, image, tokens, got an array"),
        (UNET, COND, ValueError, "cond has tokens; the network takes label, vector, image: build it with token_size"),
        (MLP, _without("tokens"), ValueError, "cond has image; .*build it with image_channels"),
        (TRANSFORMER, COND | {"caption": 1}, ValueError, "cond has caption; the network takes"),
        (TRANSFORMER, COND | {"label": COND["vector"][:, 0]}, TypeError, "integer class labels, got float32"),
        (TRANSFORMER, COND | {"label": COND["label"][:2]}, ValueError, r"cond\['label'\] must have shape \(4,\)"),
        (
            TRANSFORMER,
            COND | {"vector": COND["vector"][:, :2]},
            ValueError,
            r"cond\['vector'\] must have shape \(4, 3\)",
        ),
        (TRANSFORMER, COND | {"vector": jnp.zeros((4, 3), jnp.int32)}, TypeError, r"cond\['vector'\] must be floating"),
        (
            TRANSFORMER,
            COND | {"image": COND["image"][:, :2]},
            ValueError,
            r"cond\['image'\] must have shape \(4, 4, 4, 1",
        ),
        (
            TRANSFORMER,
            COND | {"tokens": COND["tokens"][..., 0]},
            ValueError,
            r"cond\['tokens'\] must have shape \(4, 5, 6",
        ),
        (
            TRANSFORMER,
            COND | {"tokens_mask": jnp.ones((4, 3), bool)},
            ValueError,
            r"'tokens_mask'\] must be .*\(4, 5\)",
        ),
        (TRANSFORMER, COND | {"present": jnp.ones(4)}, TypeError, r"cond\['present'\] must be bool of shape \(4,\)"),
        (nn.WideResNet(LEVEL, 3), {"vector": COND["vector"]}, ValueError, "cond has vector; the network takes nothing"),
        (UNET.copy(vector_size=0), None, ValueError, "vector_size must be at least 1, got 0"),
        (UNET.copy(timed=False, num_classes=None), None, ValueError, "sees no vectors: drop vector_size"),
    ],
)
def test_what_is_wrong_is_named(network, cond, error, match):
    with pytest.raises(error, match=match):
        jax.eval_shape(lambda: network.init(jax.random.key(0), X, T, cond))


def test_labels_alone_are_what_they_were():
    """{"label": y} is y, and a network without the other kinds has no parameter of theirs."""
    network = MLP.copy(vector_size=None)
    params = nn_reference.filled_params(network, X, T)
    assert "vector" not in params["conditioning"]
    field = quick_jit(nn.as_field(network, params))
    close(field(X, T, {"label": COND["label"]}), field(X, T, COND["label"]), rtol=0, atol=0)


def test_labels_are_read_in_any_integer_dtype():
    """256 classes as uint8 have a null label, and a negative label is out of range, not one from the end."""
    label, present = jnp.asarray([0, 255, 7, 1], jnp.uint8), jnp.asarray([True, True, False, True])
    seen = nn.read_condition({"label": label, "present": present}, X, num_classes=256)
    np.testing.assert_array_equal(seen["label"], [0, 255, 256, 1])
    seen = nn.read_condition(jnp.asarray([-1, -128, 7, 127], jnp.int8), X, num_classes=200)
    np.testing.assert_array_equal(seen["label"], [201, 201, 7, 127])
