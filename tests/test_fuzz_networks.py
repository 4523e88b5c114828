"""Networks fuzzed, their inputs and their sizes: an error that names the argument.

`tests/fuzzing.py` is the machinery; what it found is in tests/test_fuzz_found.py.
"""

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
from fuzz_roles import (
    BATCH,
    IMAGE,
    ODD,
    X,
    arrays,
    batch_of,
    count,
    integers,
    is_array,
    keys,
    number,
    of_x,
    one_of,
    optional,
    positive,
    times,
    word,
)
from fuzzing import Entry, Role, fast_and_slow
from hypothesis import strategies as st

from jdiff import nn

KEY = jax.random.key(0)
EACH = jax.random.split(KEY, BATCH)
level = lambda t: t


def images(multiple=1, least=4, most=4):
    """Floating images whose sides a number divides; vectors too."""

    def fits(v, _):
        sides = v.shape[1:3] if is_array(v) and v.ndim == 4 else ()
        fine = is_array(v) and least <= v.ndim <= most and 0 not in v.shape[1:]
        return fine and (least < 4 or all(n % multiple == 0 for n in sides))

    return Role(fits, arrays([IMAGE.shape]), IMAGE)


one_time = Role(lambda v, a: is_array(v) and v.shape == batch_of(a["x"]), times("x").values, jnp.full(BATCH, 0.5))
labels = integers(jnp.arange(BATCH), like="x")
conditions = st.sampled_from([{"label": X}, {"vector": X}, {}, {"label": None}, {3: X}, {"label": "x"}, "x", object()])
label = optional(Role(labels.fits, labels.values | conditions, labels.usual))
rate = number(0.0, lambda v: 0 <= v < 1)


def network(make, *, x=None, out=None, cond=label, fixed=None, **roles):
    """An entry of a network: its inputs, and attributes with a role."""
    call = lambda x, t, cond=None, **a: make(**(fixed or {}), **a).init_with_output(KEY, x, t, cond)[0]
    inputs = {"x": x or images(), "t": one_time} | ({"cond": cond} if cond else {})
    return Entry(make, inputs | roles, out or of_x("x"), call)


class _Plain(flax.linen.Module):
    """Dropout alone."""

    @flax.linen.compact
    def __call__(self, x, t, cond=None, *, train=False):
        return flax.linen.Dropout(0.5, deterministic=not train)(x)


def fits_rngs(value, a):
    key = value["dropout"]
    return keys("x").fits(key, {"x": X})


ENTRIES = [
    network(
        nn.ResidualMLP,
        x=images(least=2, most=9),
        fixed={"noise_level": level, "num_classes": 4},
        width=count(8),
        depth=count(1, 0),
        dropout=rate,
        embedding=word("smooth", "smooth", "positional", "fourier"),
        out_channels=optional(count(1)),
        out=lambda a: (*np.shape(a["x"])[:-1], a.get("out_channels") or np.shape(a["x"])[-1]),
    ),
    network(
        nn.UNet,
        fixed={"noise_level": level, "num_classes": 4, "attention": ()},
        channels=count(4),
        multipliers=one_of((1,), wrong=((), (0, 1), (1, 1.5), ("x",))),
        blocks=count(0, 0, 5),
        dropout=rate,
        groups=optional(count(2)),
        out_channels=optional(count(1)),
        progressive=word("none", "none", "output_skip", "residual"),
        out=lambda a: (*np.shape(a["x"])[:-1], a.get("out_channels") or np.shape(a["x"])[-1]),
    ),
    network(
        nn.NCSNv2,
        fixed={"sigma": None, "stages": ((1, 2),)},
        cond=one_of(None, wrong=(jnp.arange(BATCH), {"label": jnp.arange(BATCH)}, *ODD)),
        channels=count(4),
        refinements=one_of((1, 1), wrong=((1,), (1, 1, 1))),
        activation=word("elu", "swish", "elu", "relu", "lrelu"),
        interpolation=word("bilinear", "bilinear", "nearest_neighbor"),
    ),
    network(
        nn.PatchTransformer,
        x=images(2),
        fixed={"noise_level": level, "num_classes": 4},
        width=Role(
            lambda v, _: type(v) is int and v > 0 and v % 2 == 0, st.sampled_from([0, 3, -2, 1.5, 8, True, "x"]), 8
        ),
        depth=count(1, 0),
        heads=Role(lambda v, _: type(v) is int and v in (1, 2, 4, 8), count(2).values, 2),
        patch=Role(lambda v, _: type(v) is int and v in (1, 2, 4), count(2).values, 2),
        expansion=count(1),
        dropout=rate,
    ),
    network(
        nn.WideResNet,
        x=images(2),
        cond=one_of(None, wrong=(jnp.arange(BATCH), *ODD)),
        out=lambda a: (*batch_of(a["x"]), a["num_classes"]),
        fixed={"noise_level": level},
        num_classes=count(5),
        depth=Role(lambda v, _: type(v) is int and v == 10, st.sampled_from([0, 4, 10, 12, -2, 10.0, True]), 10),
        widen=count(1),
        patch=Role(lambda v, _: type(v) is int and v in (1, 2, 4), count(2).values, 2),
        features=count(4),
        dropout=rate,
    ),
    network(
        nn.Conditioning,
        x=images(least=1, most=9),
        out=lambda a: (*batch_of(a["x"]), a["width"]),
        fixed={"noise_level": level, "num_classes": 4},
        width=count(8),
        embedding=word("smooth", "smooth", "positional", "fourier"),
    ),
    Entry(
        nn.CouplingFlow,
        {
            "x": Role(lambda v, _: is_array(v) and v.ndim >= 2 and np.prod(v.shape[1:]) >= 2, arrays([(BATCH, 2)]), X),
            "depth": count(2, 0),
            "width": count(4),
            "blocks": count(1, 0),
            "bound": number(2.0, positive),
            "dropout": rate,
        },
        lambda a: [np.shape(a["x"]), batch_of(a["x"])],
        lambda x, **a: nn.CouplingFlow(**a).init_with_output(KEY, x)[0],
    ),
    *(
        Entry(
            make, {"size": word("full", "small", "full", "deep")}, lambda a: [], lambda make=make, **a: _made(make, a)
        )
        for make in (nn.ddpmpp, nn.ncsnpp)
    ),
    Entry(
        nn.ncsnv2,
        {"size": Role(lambda v, _: v in (64, 128, 256), st.sampled_from([64, 128, 256, 0, -1, None, "64"]), 64)},
        lambda a: [],
        lambda **a: _made(nn.ncsnv2, a),
    ),
    Entry(
        nn.as_field,
        {
            "module": one_of(_Plain()),
            "rngs": Role(fits_rngs, keys("x").values.map(lambda key: {"dropout": key}), {"dropout": EACH}),
            "cond": one_of(None, jnp.arange(BATCH), wrong=(jnp.arange(2),)),
        },
        lambda a: X.shape,
        lambda rngs, **a: nn.as_field(params={}, train=True, rngs=rngs, **a)(X, jnp.full(BATCH, 0.5)),
    ),
    Entry(
        nn.image_tokens,
        {
            "image": images(2),
            "patch": Role(lambda v, _: type(v) is int and v in (1, 2, 4), count(2).values, 2),
        },
        lambda a: (
            np.shape(a["image"])[0],
            np.shape(a["image"])[1] * np.shape(a["image"])[2] // a["patch"] ** 2,
            a["patch"] ** 2 * np.shape(a["image"])[3] + 2,
        ),
    ),
    Entry(
        nn.read_condition,
        {"cond": label, "x": images(least=1, most=9), "num_classes": count(4)},
        lambda a: [batch_of(a["x"])] * 2,
    ),
]


def _made(make, a):
    return [] if isinstance(make(level, **a), flax.linen.Module) else None


test_arguments_that_do_not_fit_are_named, test_many_arguments_that_do_not_fit_are_named = fast_and_slow(ENTRIES)
