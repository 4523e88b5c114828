"""What devices exchange in a step: the gradient once and scalars; of a sharded state also its parameters."""

import numpy as np
import pytest
from parallel_cases import BATCH, DIM, HIDDEN, KEY, TRANSFORMS, batches, loss_fn, start

from experiments.plan import collectives
from jdiff import parallel, training


def compiled_step(how, **options):
    tx = TRANSFORMS["sgd"][0]
    mesh = parallel.data_mesh(fsdp=options.pop("fsdp", 1))
    state, batch = training.init_state(start(), tx), next(batches())
    if "fsdp" in mesh.axis_names:
        options["sharding"] = parallel.state_sharding(state, mesh, min_size=1)
    step = parallel.data_parallel(loss_fn, tx, mesh, how, ema_decay=0.99, **options)
    return step.lower(state, KEY, batch).compile().as_text()


PARAMETER_BYTES = 4 * (DIM * HIDDEN + HIDDEN + HIDDEN * DIM)
METRIC_BYTES = 4 * 3  # loss, t, constant


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("how", ["jit", "shard_map", "pmap"])
def test_gradients_are_what_devices_exchange(how, accumulate):
    """Data parallel: the gradient is reduced once, with the scalar metrics, and nothing else moves."""
    text = compiled_step(how, accumulate=accumulate)
    moved = collectives(text)
    assert moved.keys() == {"all-reduce"}
    # XLA reduces the gradient of each part; written out, it is reduced once.
    parts = accumulate if how == "jit" else 1
    assert PARAMETER_BYTES * parts <= moved["all-reduce"] <= (PARAMETER_BYTES + METRIC_BYTES) * parts
    assert 'custom_call_target="xla_' not in text


def test_weights_cost_one_scalar():
    for how in ("shard_map", "jit"):
        tx, mesh = TRANSFORMS["sgd"][0], parallel.data_mesh()
        step = parallel.data_parallel(loss_fn, tx, mesh, how, ema_decay=0.99)
        batch = next(batches()) | {"mask": np.ones(BATCH, bool)}
        moved = collectives(step.lower(training.init_state(start(), tx), KEY, batch).compile().as_text())
        assert moved.keys() == {"all-reduce"}
        assert moved["all-reduce"] <= PARAMETER_BYTES + METRIC_BYTES + 4


def test_fsdp_gathers_parameters_and_scatters_gradients():
    """Written out: parameters come once, gradients leave once, each device keeps its part."""
    moved = collectives(compiled_step("shard_map", fsdp=8))
    assert moved.keys() == {"all-gather", "reduce-scatter", "all-reduce"}
    assert moved["all-gather"] == PARAMETER_BYTES
    assert moved["reduce-scatter"] == PARAMETER_BYTES / 8
    # Metrics, and the norm of the gradient, one number a leaf.
    assert moved["all-reduce"] <= METRIC_BYTES + 4 * 3


def test_fsdp_by_xla():
    """XLA:CPU has no pass that makes an all-reduce and a slice one reduce-scatter: the gradient is reduced whole."""
    moved = collectives(compiled_step("jit", fsdp=8))
    assert moved.keys() <= {"all-gather", "reduce-scatter", "all-reduce"}
    assert moved["all-gather"] == PARAMETER_BYTES
    reduced = moved.get("reduce-scatter", 0) * 8 + moved["all-reduce"]
    assert PARAMETER_BYTES <= reduced <= PARAMETER_BYTES + METRIC_BYTES + 4 * 3
