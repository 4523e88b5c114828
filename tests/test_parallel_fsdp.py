"""A state in parts on several devices: which leaves are split, and one result."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from parallel_cases import DIM, HIDDEN, KEY, TRANSFORMS, batches, loss_fn, reference, start

from jdiff import parallel, training


@pytest.mark.slow_but("jit-8-adam", "jit-2-sgd", "shard_map-4-adam", "shard_map-8-sgd")
@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("fsdp", [2, 4, 8])
@pytest.mark.parametrize("how", ["jit", "shard_map"])
def test_fsdp_is_one_result(how, fsdp, name):
    tx, tolerance = TRANSFORMS[name]
    mesh = parallel.data_mesh(fsdp=fsdp)
    state = training.init_state(start(), tx)
    sharding = parallel.state_sharding(state, mesh, min_size=1)
    step = parallel.data_parallel(loss_fn, tx, mesh, how, ema_decay=0.99, sharding=sharding)
    state = parallel.place(state, sharding)
    for batch, expected in zip(batches(), reference(name)[1], strict=True):
        state, metrics = step(state, KEY, parallel.shard_batch(batch, mesh))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), metrics, expected)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), state, reference(name)[0]
    )
    shards = {leaf.sharding.shard_shape(leaf.shape) for leaf in jax.tree.leaves((state.params, state.ema))}
    assert shards == {(DIM, HIDDEN // fsdp), (HIDDEN // fsdp,), (HIDDEN // fsdp, DIM)}
    if name == "adam":
        moments = state.opt_state[1].mu
        jax.tree.map(lambda a, b: np.testing.assert_equal(a.sharding, b.sharding), moments, state.params)


def test_what_is_sharded():
    mesh = parallel.data_mesh(fsdp=4)
    assert mesh.shape == {"data": 2, "fsdp": 4}
    shapes = {"big": (6, 16, 8), "equal": (8, 8), "small": (4, 2), "odd": (33, 35), "scalar": ()}
    state = {"params": {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}}
    spec = lambda **options: {
        name: tuple(place.spec) for name, place in parallel.state_sharding(state, mesh, **options)["params"].items()
    }
    assert spec(min_size=9) == {
        "big": (None, "fsdp"),
        "equal": (None, "fsdp"),
        "small": (),
        "odd": (),
        "scalar": (),
    }
    assert spec(min_size=64)["equal"] == (None, "fsdp") and spec(min_size=65)["equal"] == ()
    overridden = spec(min_size=9, overrides={"big": 2, "params/e": None, "small$": 0})
    assert overridden["big"] == (None, None, "fsdp") and overridden["equal"] == () and overridden["small"] == ("fsdp",)
    whole = parallel.state_sharding(state, parallel.data_mesh(), min_size=1)
    assert all(place.is_fully_replicated for place in jax.tree.leaves(whole))
    with pytest.raises(ValueError, match=r"params/odd of shape \(33, 35\) cannot be split along axis 0 over 4 devices"):
        spec(overrides={"odd": 0})
    with pytest.raises(ValueError, match=r"overrides \['bih'\] are found in no path"):
        spec(overrides={"bih": 0})
    with pytest.raises(ValueError, match="regular expressions"):
        spec(overrides={"(": 0})
    with pytest.raises(ValueError, match="fsdp must divide the 8 devices, got 3"):
        parallel.data_mesh(fsdp=3)
    with pytest.raises(ValueError, match="whole state on every device"):
        parallel.data_parallel(loss_fn, optax.sgd(1.0), mesh, "pmap", ema_decay=0.9, sharding=state)
