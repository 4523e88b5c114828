"""What the tests of checkpoints share: a small training, what it saves, and the steps that are compared or spoilt."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdiff import checkpoint, parallel, training
from jdiff.checkpoint import _trees

KEY, WIDTH = jax.random.key(11), 2048  # arrays large enough to be files of their own, or to be packed
META = {"config": {"rate": 1e-2, "widths": [4, 8]}, "versions": {"jax": "any"}}


@contextlib.contextmanager
def both_layouts():
    """The matrices are arrays of their own, vectors and numbers are packed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_trees, "_SMALL", 2**14)
        yield


class Input:
    """A shuffled endless input whose whole state is one number, like Grain's."""

    def __init__(self):
        self.next_index = 0

    def get_state(self):
        return {"next_index": self.next_index}

    def set_state(self, state):
        self.next_index = state["next_index"]

    def __next__(self):
        epoch, start = divmod(self.next_index, 4)
        order = np.random.default_rng(epoch).permutation(32)[8 * start : 8 * start + 8]
        self.next_index += 1
        return {"x": np.sin(order[:, None] * np.arange(1, 5)).astype(np.float32), "index": np.arange(8)}


def loss_fn(params, keys, batch):
    eps = jax.vmap(lambda key: jax.random.normal(key, (4,)))(keys)
    hidden = jnp.tanh((batch["x"] + eps) @ params["dense/0"]["w"] + params["dense/0"]["b"][None])
    return jnp.mean((hidden @ params["out"] - eps) ** 2, -1), {}


TX = training.adam(training.learning_rate(1e-2, warmup=10, total=300), clip=1.0)


def start():
    rng = np.random.default_rng(5)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape).astype(np.float32))
    return training.init_state({"dense/0": {"w": draw(4, WIDTH), "b": draw(WIDTH)}, "out": draw(WIDTH, 4)}, TX)


def like():
    return {**jax.eval_shape(start)._asdict(), "data": None}


def items(state, source):
    return {**state._asdict(), "data": source.get_state(), "meta": META}


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y, strict=True), a, b)


def state_of(restored):
    return training.TrainState(**{name: restored[name] for name in training.TrainState._fields})


MESH = parallel.data_mesh(jax.devices()[:2])
STEP = parallel.data_parallel(loss_fn, TX, MESH, ema_decay=0.99)


def run(state, source, until, manager=None):
    """Train from a state to a step, saving when due; the mapped step donates its state."""
    state = parallel.replicate(state, MESH)
    while (n := int(state.step)) < until:
        state, _ = STEP(state, KEY, parallel.shard_batch(next(source), MESH))
        if manager is not None:
            checkpoint.save(manager, n + 1, items(state, source))
    return state


def save_original(path):
    """Save steps 2 and 4 (0, as it were, was deleted); return the states of all steps."""
    source, states = Input(), {}
    state = start()
    with both_layouts(), checkpoint.open_manager(path, keep=2, every=2) as manager:
        for until in (1, 2, 3, 4):
            state = run(state, source, until, manager)
            states[until] = jax.tree.map(np.asarray, state)
    return states


def restore(path, wanted, **options):
    with checkpoint.open_manager(path, read_only=True) as manager:
        return checkpoint.restore(manager, wanted, **options)
