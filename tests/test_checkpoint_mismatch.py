"""What does not fit a sound checkpoint is an error that names it: other networks, formats, configurations, meshes."""

import warnings

import jax
import jax.numpy as jnp
import pytest
from checkpoint_cases import META, like, restore, start
from jax.sharding import NamedSharding, PartitionSpec

from jdiff import parallel
from jdiff.checkpoint import store

pytestmark = pytest.mark.usefixtures("both_layouts", "orphaned_reads")


def changed(**parts):
    state = jax.eval_shape(start)
    return {**state._asdict(), **parts}


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (
            changed(params={"dense/0": {"w": jnp.zeros((4, 2049)), "b": jnp.zeros(2048)}, "out": jnp.zeros((2048, 4))}),
            r"params/dense/0/w: saved float32\[4, 2048\], asked for float32\[4, 2049\]$",
        ),
        (
            changed(ema={"dense/0": {"w": jnp.zeros((4, 2048))}, "output": jnp.zeros((2048, 4))}),
            r"ema/output: saved nothing.*; ema/dense/0/b: saved float32\[2048\], asked for nothing; ema/out: saved",
        ),
        (changed(params=jnp.zeros((2048, 4), jnp.bfloat16)), r"params/: saved nothing, asked for bfloat16\[2048, 4\]"),
        (changed(opt_state=()), r"opt_state/1/count: saved int32\[\], asked for nothing"),
        ({"weights": ()}, "has no item weights; it has data, ema, opt_state, params"),
        ({"meta": {"config": {"rate": 2e-2, "widths": [4, 8]}}}, r"meta/config/rate: saved 0.01, asked for 0.02$"),
        ({"meta": {"config": {"rate": 1e-2}}}, r"meta/config/widths: saved \[4, 8\], asked for nothing$"),
        ({"meta": {"seed": 1}}, "meta/seed: saved nothing, asked for 1$"),
    ],
)
def test_another_network_or_configuration_is_named(original, wanted, message):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # not damage: nothing older is tried
        with pytest.raises(ValueError, match=message):
            restore(original[0], wanted)


def test_twenty_names_are_listed_and_the_rest_counted(original):
    for names, end in ((20, "x19; it has"), (21, "x19 and 1 more; it has")):
        with pytest.raises(ValueError, match=end):
            restore(original[0], {f"x{i:02}": () for i in range(names)})


def test_another_format_is_named_and_no_damage(original, monkeypatch):
    monkeypatch.setattr(store, "_FORMAT", 1)
    with pytest.raises(ValueError, match="has format 2, this version of jdiff reads formats up to 1"):
        restore(original[0], like())


def test_fields_of_meta_that_are_not_asked_for_are_not_compared(original):
    wanted = {"config": {"rate": 1e-2, "widths": (4, 8)}}  # a tuple is a list in JSON
    assert restore(original[0], {"meta": wanted})["meta"] == META
    assert restore(original[0], {"meta": None})["meta"] == META


def test_an_indivisible_sharding_is_no_damage(original):
    rows = NamedSharding(parallel.data_mesh(jax.devices()[:3]), PartitionSpec("data"))
    with pytest.raises(ValueError, match="evenly divide"):
        restore(original[0], {"params": jax.eval_shape(start).params}, sharding=rows)
