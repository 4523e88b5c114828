"""Training and its mappings over devices fuzzed: an error that names the argument.

`tests/fuzzing.py` is the machinery; what it found is in tests/test_fuzz_found.py.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from fuzz_roles import BATCH, ODD, arrays, count, each, integers, is_array, keys, number, of_x, one_of, positive, word
from fuzzing import Entry, Role, fast_and_slow
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from jdiff import parallel, training

DEVICES = jax.devices()
MESH = parallel.data_mesh(DEVICES[:1])
TWO = parallel.data_mesh(DEVICES[:2], fsdp=2)
STATE = {"a": jnp.ones((BATCH, 4)), "b": jnp.ones(2)}
ROWS = jnp.arange(BATCH)
SGD = optax.sgd(0.1)
HERE = SingleDeviceSharding(DEVICES[0])

one_key = keys(batch=lambda a: ())
index = Role(lambda v, a: is_array(v, jnp.integer) and v.ndim == 1, integers(ROWS).values, jnp.arange(BATCH))
WRONG_BATCHES = ({}, {"index": ROWS, "mask": jnp.ones(BATCH)}, {"index": ROWS, "key": ROWS}, {"index": None})
parts = Role(lambda v, a: type(v) is int and v in (1, 3), count(1).values, 1)
decay = number(0.9, lambda v: 0 <= v < 1)
mesh = one_of(MESH, wrong=(DEVICES, *ODD))


def real_rows(value, _):
    kinds = (jnp.floating, jnp.integer, jnp.bool_)
    return any(is_array(value, kind) for kind in kinds) and value.shape == (BATCH,)


def loss(params, keys, batch):
    """A loss of no network."""
    return params * jnp.ones(len(keys)), {}


ENTRIES = [
    Entry(
        training.example_keys,
        {"key": one_key, "index": index},
        each("index"),
        lambda key, index: training.example_keys(key, 0, index),
    ),
    Entry(training.shared_key, {"key": one_key}, lambda a: (), lambda key: training.shared_key(key, 0)),
    Entry(
        training.init_state,
        {"params": one_of(STATE, wrong=({"a": 1.5}, {"a": "x"}, [None, 2], ["x"]))},
        lambda a: [(), (BATCH, 4), (2,), (BATCH, 4), (2,)],
        lambda params: training.init_state(params, SGD),
    ),
    Entry(
        training.learning_rate,
        {
            "peak": number(1.0, positive),
            "warmup": number(1, lambda v: 0 <= v < 10),
            "total": number(10, lambda v: v > 1),
        },
        lambda a: (),
        lambda **a: training.learning_rate(**a)(jnp.zeros((), jnp.int32)),
    ),
    Entry(
        training.adam,
        {
            "b1": number(0.9, lambda v: 0 <= v < 1),
            "b2": number(0.9, lambda v: 0 <= v < 1),
            "eps": number(1e-8, lambda v: v > 0),
            "clip": number(1.0, lambda v: v > 0),
            "weight_decay": number(0.1, lambda v: v >= 0),
        },
        lambda a: [],
        lambda **a: [] if training.adam(1e-3, **a) else None,
    ),
    Entry(
        training.make_train_step,
        {
            "ema_decay": decay,
            "accumulate": parts,
            "weight": Role(real_rows, arrays([(BATCH,)]), jnp.ones(BATCH)),
            "index": Role(
                lambda v, a: is_array(v, jnp.integer) and v.shape == (BATCH,), integers(ROWS).values, jnp.arange(BATCH)
            ),
            "key": one_key,
        },
        lambda a: [()] * 6,
        lambda key, weight, index, **a: training.make_train_step(loss, SGD, **a)(
            training.init_state(jnp.ones(()), SGD), key, {"index": index, "weight": weight}
        ),
    ),
    Entry(
        training.mean_gradient,
        {
            "batch": one_of(
                {"index": ROWS},
                {"index": ROWS, "mask": jnp.ones(BATCH, bool)},
                wrong=(
                    {},
                    {"index": ROWS, "mask": jnp.ones(BATCH)},
                    {"index": ROWS, "key": ROWS},
                    {"index": None},
                    *ODD,
                ),
            ),
            "accumulate": parts,
        },
        lambda a: [(), ()],
        lambda batch, accumulate: training.mean_gradient(loss, accumulate=accumulate)(
            jnp.ones(()), jnp.zeros((), jnp.int32), jax.random.key(0), batch
        ),
    ),
    Entry(
        training.apply_gradient,
        {"ema_decay": decay},
        lambda a: [],
        lambda ema_decay: [] if training.apply_gradient(SGD, ema_decay=ema_decay) else None,
    ),
    Entry(
        parallel.data_mesh,
        {
            "devices": one_of(DEVICES[:2], None, wrong=([], ["cpu"], *ODD)),
            "fsdp": Role(lambda v, a: type(v) is int and v in (1, 2), count(1).values, 1),
        },
        lambda a: [],
        lambda **a: [] if parallel.data_mesh(**a) else None,
        host=True,
    ),
    Entry(
        parallel.state_sharding,
        {
            "state": one_of(STATE, jax.eval_shape(lambda: STATE), wrong=({"a": 1.5}, {"a": "x"}, {"a": object()})),
            "mesh": one_of(TWO, MESH, wrong=(DEVICES, *ODD)),
            "min_size": count(4, 0),
            "overrides": one_of(
                None,
                {"a": 1},
                {"a": None},
                wrong=({"a": 0}, {"a": 7}, {"c": 0}, {"(": 0}, {3: 0}, {"a": "x"}, {"a": 1.5}, {"a": -1}, 3, "x"),
            ),
        },
        lambda a: [],
        lambda **a: [] if parallel.state_sharding(**a) else None,
        host=True,
    ),
    Entry(
        parallel.place,
        {
            "tree": one_of(STATE, {"a": 1.5, "b": 2}, wrong=({"a": "x", "b": 2}, {"a": STATE["a"]}, *ODD[4:])),
            "sharding": one_of(
                {"a": HERE, "b": HERE},
                HERE,
                NamedSharding(MESH, PartitionSpec()),
                wrong=({"a": HERE}, NamedSharding(TWO, PartitionSpec("fsdp")), {"a": 1, "b": "x"}, *ODD),
            ),
        },
        lambda a: [np.shape(leaf) for leaf in jax.tree.leaves(a["tree"])],
        host=True,
    ),
    Entry(
        parallel.replicate,
        {"tree": one_of(STATE, wrong=("x", {"a": object()})), "mesh": mesh},
        lambda a: [(BATCH, 4), (2,)],
        host=True,
    ),
    Entry(
        parallel.shard_batch,
        {
            "batch": Role(
                lambda v, a: np.ndim(v) >= 1 and np.shape(v)[0] > 0,
                st.integers(0, 3).map(np.zeros) | st.just(0.5),
                jnp.zeros(BATCH),
            ),
            "mesh": mesh,
            "axis": count(0, 0, 0),
        },
        of_x("batch"),
        host=True,
    ),
    Entry(
        parallel.data_parallel,
        {
            "mesh": mesh,
            "how": word("jit", "jit", "shard_map", "pmap"),
            "ema_decay": decay,
            "accumulate": count(1),
        },
        lambda a: [],
        lambda **a: [] if parallel.data_parallel(loss, SGD, **a) else None,
        host=True,
    ),
    Entry(
        # Of one process: what is drawn starts no other.
        parallel.start_processes,
        {
            "coordinator": one_of(None, "host:1", wrong=(3, b"x", 1.5)),
            "processes": one_of(1, wrong=(0, -1, 1.5, "1", True, np.ones(2))),
            "index": one_of(None, 0, wrong=(-1, 1, 1.5, "0", True)),
            "timeout": count(9),
            "heartbeat": count(9),
        },
        lambda a: [],
        lambda **a: [] if parallel.start_processes(**a) is None else None,
        host=True,
    ),
]


test_arguments_that_do_not_fit_are_named, test_many_arguments_that_do_not_fit_are_named = fast_and_slow(ENTRIES)
