"""Checkpoints, data sets and importers fuzzed: an error that names the argument, or the file.

`tests/fuzzing.py` is the machinery; what it found is in tests/test_fuzz_found.py.
"""

import atexit
import functools
import pathlib
import shutil
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
from fuzz_roles import BATCH, ODD, X, arrays, batch_of, count, is_array, one_of, optional
from fuzzing import Entry, Role, fast_and_slow
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from jdiff import checkpoint, data, nn, parallel
from jdiff.data import prepared
from jdiff.importers import flax_msgpack, score_sde, score_sde_pytorch

ERRORS = (ValueError, TypeError, OSError)
HERE = SingleDeviceSharding(jax.devices()[0])
TWO = NamedSharding(parallel.data_mesh(jax.devices()[:2]), PartitionSpec("data"))
EXAMPLE = str(pathlib.Path(__file__).parent / "data" / "nn_flax031.msgpack")


@functools.cache
def folder():
    """One folder for all: with a checkpoint, with what is none, empty, and a file."""
    path = pathlib.Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    for name in ("foreign/notes", "foreign/12 monkeys", "foreign/7.orbax-checkpoint-tmp", "empty"):
        (path / name).mkdir(parents=True)
    (path / "foreign" / "5").write_text("a file that is named as a step")
    (path / "file").write_text("no folder")
    with checkpoint.open_manager(path / "saved") as manager:
        checkpoint.save(manager, 1, {"params": {"a": X}, "meta": {"c": 1}, "data": b"x"})
    return path


def opened(directory, **options):
    """Open one of them, by name; what is no name is handed on."""
    known = ("foreign", "empty", "file", "file/in it", "saved", "not there")
    with checkpoint.open_manager(folder() / directory if directory in known else directory, **options) as manager:
        return [] if manager.latest_step() in (None, 1, 5) else None


def saved(manager, **a):
    """Save into a new folder."""
    with tempfile.TemporaryDirectory() as path, checkpoint.open_manager(path) as ours:
        return [] if checkpoint.save(ours if manager == "ours" else manager, **a) else None


def restored(manager, **a):
    """What is restored of the saved one."""
    with checkpoint.open_manager(folder() / "saved", read_only=True) as ours:
        found = checkpoint.restore(ours if manager == "ours" else manager, **a)
    return [leaf for name, leaf in found.items() if name in ("params", "step")]


def fits_directory(value, a):
    there = ("foreign", "empty", "saved") + (() if a["read_only"] else ("not there",))
    return isinstance(value, str) and value in there


LIKE = {"params": {"a": X}}
manager = one_of("ours", wrong=ODD[:5] + ODD[6:])
good_items = [
    {"params": {"a": jnp.full(2, jnp.nan)}},
    {"params": {"a": jnp.zeros((0, 3))}},
    {"params": X},
    {"params": {"a": {"b.c": X}, "d": None}, "step": 2},
    {"data": b"x", "meta": {"c": [1, None, float("nan")]}},
    {},
]
wrong_items = [
    *({"params": {"a": value}} for value in (1.5, "x", object(), jax.random.key(0), np.array(["x"]))),
    *({name: LIKE} for name in ("a/b", "", "..", ".", 3, "a b", "\0")),
    *({"params": tree} for tree in ({"a": X, "a/b": X}, {"a.b": X, "a": {"b": X}})),
    *({"meta": value} for value in ([1], "x", 3, {"a": object()}, {"a": X})),
    *({"data": object()}, {"data": X}),
    *({"step": value} for value in (None, 7, 1.5, "x", -1)),
]


def levels(value, a):
    array = np.asarray(value) if not isinstance(value, (list, type(None))) else np.zeros(0)
    integer = array.dtype != object and np.issubdtype(array.dtype, np.integer)
    fine = integer and type(a["levels"]) is int and array.ndim == 4 and array.size > 0
    return fine and 0 <= array.min() and array.max() < a["levels"]


def classes(value, a):
    return value is None or (type(value) is int and value > (0 if a["label"] is None else 1))


IMAGES = np.ones((BATCH, 2, 2, 1), np.uint8)
SOURCE = data.from_arrays(IMAGES, np.ones(BATCH, int))
source = one_of(SOURCE, wrong=(IMAGES, *ODD))
position = Role(
    lambda v, _: type(v) is int and -BATCH <= v < BATCH, count(0).values | st.sampled_from([slice(2), X]), 0
)
label_of = Role(
    lambda v, a: is_array(v, jnp.integer) and v.shape == batch_of(a["image"]), arrays([(BATCH,)]), np.ones(BATCH, int)
)


def bad(usual, *wrong):
    """Values that are all wrong: what is right would read or download a data set."""
    return Role(lambda *_: False, st.sampled_from(wrong), usual)


READ = {
    "source": source,
    "batch_size": count(2, 1),
    "process_count": Role(lambda v, _: type(v) is int and v in (1, 2), count(1).values, 1),
    "process_index": count(0, 0, 0),
}


UNET = nn.UNet(lambda t: t, channels=4, multipliers=(1,), blocks=1, attention=())
PARAMS = jax.tree.map(
    lambda leaf: np.zeros(leaf.shape, np.float32),
    jax.eval_shape(lambda: UNET.init(jax.random.key(0), jnp.zeros((1, 4, 4, 1)), jnp.zeros(1))["params"]),
)
REFERENCE = jax.device_get(score_sde.restore_names(PARAMS, UNET, image_size=4))
module = one_of(UNET, wrong=(nn.ResidualMLP(lambda t: t), UNET.copy(num_classes=3), *ODD))
STEM = np.zeros((3, 3, 1, 4), np.float32)


def broken(good, stem):
    """Parameters that are not those of the network."""
    return (
        *({}, [], {stem: STEM}, {stem: 1.5}, {stem: STEM[0]}, {stem: STEM.astype(int)}, {stem: "x"}),
        *(good | {"more": STEM}, {name: leaf for name, leaf in good.items() if name not in (stem, "stem")}),
    )


ENTRIES = [
    Entry(
        checkpoint.open_manager,
        {
            "directory": Role(
                fits_directory,
                st.sampled_from(["foreign", "empty", "file", "file/in it", "not there", "", *ODD[:5], None, b"x"]),
                "saved",
            ),
            "keep": count(3),
            "every": count(1),
            "read_only": one_of(False, True, wrong=(False,)),
        },
        lambda a: [],
        opened,
        host=True,
        errors=ERRORS,
    ),
    Entry(
        checkpoint.save,
        {"manager": manager, "step": count(2, 0), "items": one_of(LIKE, *good_items, wrong=(*wrong_items, *ODD))},
        lambda a: [],
        saved,
        host=True,
        errors=ERRORS,
    ),
    Entry(
        checkpoint.restore,
        {
            "manager": manager,
            "like": one_of(
                LIKE,
                *({"params": {"a": jax.ShapeDtypeStruct(X.shape, X.dtype)}, "meta": None}, {"meta": {"c": 1}}, {}),
                wrong=(
                    *(
                        {"params": {"b": X}},
                        {"ema": LIKE},
                        {"params": X},
                        {"params": {"a": X[:1]}},
                        {"x": 1},
                    ),
                    *({"params": {"a": X.astype(int)}}, {"params": {"a": 1.5}}, {"params": {"a": X, "b": X}}),
                    *({"meta": {"c": 2}}, {"meta": {"d": 1}}, {"meta": 3}, *ODD),
                ),
            ),
            "step": one_of(None, 1, wrong=(2, -1, 1.5, True, "1", X)),
            "sharding": one_of(
                None, HERE, {"params": HERE}, {"params": {"a": HERE}}, wrong=(TWO, {"params": 3}, *ODD[:8])
            ),
        },
        lambda a: [*([X.shape] if "params" in a["like"] else []), ()],
        restored,
        host=True,
        errors=ERRORS,
    ),
    Entry(
        data.from_arrays,
        {
            "image": Role(
                levels,
                arrays([IMAGES.shape]) | st.sampled_from([IMAGES, np.full((1, 1, 1, 1), -1), [[1], [1, 2]]]),
                IMAGES,
            ),
            "label": optional(label_of),
            "levels": count(256, 2),
            "classes": Role(classes, optional(count(3)).values, None),
        },
        lambda a: [np.shape(a["image"]), *([] if a["label"] is None else [batch_of(a["image"])])],
        lambda **a: data.from_arrays(**a).arrays(),
        host=True,
    ),
    Entry(
        data.Source.__getitem__,
        {"position": position},
        lambda a: [(2, 2, 1), ()],
        lambda position: SOURCE[position],
        host=True,
        errors=(ValueError, TypeError, IndexError),
    ),
    Entry(
        data.batches,
        READ | {"seed": count(0, 0), "threads": count(1, 0), "prefetch": count(1, 0)},
        lambda a: [],
        lambda **a: [] if data.batches(**a) else None,
        host=True,
    ),
    Entry(
        data.evaluation_batches,
        READ | {"start": one_of(0, 1, wrong=(3, -1, 1.5, True, "x"))},
        lambda a: [(a["batch_size"] // a["process_count"], *n) for n in ((2, 2, 1), (), (), ())],
        lambda **a: next(data.evaluation_batches(**a)),
        host=True,
    ),
    Entry(
        prepared.data_directory,
        {"data_dir": one_of(None, "x", pathlib.Path("x"), wrong=(b"x", *ODD[:5]))},
        lambda a: [],
        lambda data_dir: [] if isinstance(data.data_directory(data_dir), str) else None,
        host=True,
    ),
    Entry(
        data.load,
        {"name": bad("digits", "", "a b", "../x", "x:1", *ODD[:5], None), "split": bad("train", *ODD[:5], None)},
        lambda a: [],
        host=True,
    ),
    Entry(
        data.prepare,
        {"name": bad("digits", "", "a b", "../x", "x:1", *ODD[:5], None), "data_dir": bad(None, b"x", *ODD[:5])},
        lambda a: [],
        host=True,
    ),
    Entry(
        flax_msgpack.read,
        {"path": one_of(EXAMPLE, wrong=("not there", "", "/", b"x", *ODD[:5], None, 0))},
        lambda a: [],
        lambda path: [] if flax_msgpack.read(path) else None,
        host=True,
        errors=ERRORS,
    ),
    Entry(
        score_sde.rename,
        {
            "reference": one_of(REFERENCE, wrong=(*broken(REFERENCE, "Conv_0/kernel"), *ODD)),
            "module": module,
            "image_size": count(4),
        },
        lambda a: [leaf.shape for leaf in jax.tree.leaves(PARAMS)],
        host=True,
    ),
    Entry(
        score_sde.restore_names,
        {
            "params": one_of(PARAMS, wrong=(*broken(PARAMS, "stem/kernel"), *ODD)),
            "module": module,
            "image_size": count(4),
        },
        lambda a: [leaf.shape for leaf in jax.tree.leaves(REFERENCE)],
        host=True,
    ),
    Entry(
        score_sde_pytorch.to_reference,
        {
            "tensors": one_of(
                {"all_modules.1.bias": np.zeros(16)}, {}, wrong=({3: STEM}, {"a": 1.5}, {"a": STEM}, *ODD)
            ),
            "module": one_of(UNET, wrong=ODD),
            "image_size": count(4),
        },
        lambda a: [np.shape(leaf) for leaf in a["tensors"].values()],
        host=True,
    ),
]


test_arguments_that_do_not_fit_are_named, test_many_arguments_that_do_not_fit_are_named = fast_and_slow(ENTRIES)
