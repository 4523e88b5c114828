"""The machinery of the fuzz tests: what an argument must be, values that it is and values that it is not.

An entry is a call with one `Role` an argument. A role knows when a value fits the other arguments and how to draw any
value. Whatever is drawn, the call must return what is documented where all arguments fit, and raise a ValueError or a
TypeError otherwise: made by jdiff, before anything runs, with the argument's name or what was got in it.
"""

import dataclasses
import inspect
import math
import pathlib
import re
import sys
import traceback
from collections.abc import Callable
from typing import Any

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

import jdiff
from jdiff import transforms

HOME = str(pathlib.Path(jdiff.__file__).parent)
BATCH = 3
FLOATS = ("float32", "float16")
DTYPES = (*FLOATS, "int32", "uint8", "bool", "complex64")


@dataclasses.dataclass(frozen=True)
class Role:
    """`fits(value, arguments)` is what the documentation asks for; `values` draws anything."""

    fits: Callable[[Any, dict], bool]
    values: st.SearchStrategy
    usual: Any = dataclasses.field(default=None, repr=False)


@dataclasses.dataclass(frozen=True)
class Entry:
    """A call of `function` (or of `call`, which builds something by it and uses that) with roles for its arguments."""

    function: Callable
    roles: dict[str, Role]
    returns: Callable[[dict], Any]
    """arguments -> the documented shapes, a tree of tuples."""
    call: Callable | None = None

    @property
    def name(self) -> str:
        return f"{self.function.__module__.removeprefix('jdiff.')}.{self.function.__qualname__}"


# The same examples every time; deadlines are for machines that do one thing. A hang would be found by the whole suite.
FAST = hypothesis.settings(
    derandomize=True, deadline=None, database=None, suppress_health_check=list(hypothesis.HealthCheck)
)


def fuzz(entry: Entry, data: st.DataObject) -> None:
    """Draw each argument of an entry in turn, and check the call."""
    for name, role in sorted(entry.roles.items()):
        check(entry, {name: data.draw(role.values)})


def fast_and_slow(entries: list[Entry]) -> tuple[Callable, Callable]:
    """The fast and the slow test of a file's entries."""

    def made(examples):
        @pytest.mark.parametrize("entry", entries, ids=lambda entry: entry.name)
        @hypothesis.given(data=st.data())
        @hypothesis.settings(FAST, max_examples=examples)
        def test(entry, data):
            fuzz(entry, data)

        return test

    return made(3), pytest.mark.slow(made(100))


def check(entry: Entry, changed: dict[str, Any]) -> None:
    """Call with some usual arguments replaced, and hold the result against the documentation."""
    arguments = {name: role.usual for name, role in entry.roles.items()} | changed
    fits = all(role.fits(arguments[name], arguments) for name, role in entry.roles.items())
    call = entry.call or entry.function
    told = f"{entry.name} with " + ", ".join(f"{name} = {describe(value)}" for name, value in changed.items())
    try:
        out = jax.eval_shape(lambda: _arrays(call(**arguments)))
    except (ValueError, TypeError) as error:
        assert not fits or type(error).__name__ == "TypePromotionError", f"{told} was refused: {error}"
        _check_error(entry, changed, error, told)
        return
    except Exception as error:
        raise AssertionError(f"{told} ended in {type(error).__name__}: {error}") from error
    assert fits, f"{told} was taken in silence, with a result of {jax.tree.map(lambda leaf: leaf.shape, out)}"
    got = [leaf.shape for leaf in jax.tree.leaves(out)]
    want = jax.tree.leaves(entry.returns(arguments), is_leaf=lambda node: isinstance(node, tuple) and _is_shape(node))
    assert got == [tuple(shape) for shape in want], f"{told} returned shapes {got}, documented are {want}"


def _check_error(entry, changed, error, told):
    *_, last = traceback.extract_tb(error.__traceback__)
    if type(error).__name__ == "TypePromotionError":
        # A session that is strict about dtypes says so itself where one kind of float meets another.
        floats = [v for v in changed.values() if hasattr(v, "dtype") and jnp.issubdtype(v.dtype, jnp.floating)]
        assert floats, f"{told}: {error}"
        return
    assert last.filename.startswith(HOME), f"{told} was refused by {last.filename}:{last.lineno}, not jdiff: {error}"
    # Or another argument that it does not go with.
    words = {"a must" if name == "a" else name for name in entry.roles} | {"key", "must return", "must give"}
    # Or what was got, by its shape or as it is.
    got = {str(np.shape(v)) if hasattr(v, "shape") else repr(v) for v in changed.values()}
    named = any(re.search(rf"(?<!\w){re.escape(word)}(?!\w)", str(error)) for word in words)
    named = named or any(text in str(error) for text in got)
    assert named, f"{told}: the message names none of {sorted(words)}: {error}"
    documented = (inspect.getdoc(entry.function) or "") + (sys.modules[entry.function.__module__].__doc__ or "")
    if inspect.isclass(entry.function):
        documented += inspect.getdoc(entry.function.__call__) or ""
    kinds = [kind.__name__ for kind in (ValueError, TypeError) if isinstance(error, kind)]
    assert any(kind in documented for kind in kinds) or "errors as in" in documented, (
        f"{told}: the documentation does not mention that it raises {kinds[0]}: {error}"
    )


def describe(value: Any) -> str:
    """A value in a few words."""
    if callable(value):
        return "a function"
    return (
        f"{value.dtype}{list(value.shape)}"
        if hasattr(value, "dtype") and np.ndim(value)
        else repr(value).split("\n")[0]
    )


def _arrays(out):
    return [jnp.asarray(leaf) for leaf in jax.tree.leaves(out)]


def _is_shape(node):
    return all(isinstance(n, int) for n in node)


# ----------------------------------------------------------------------------------------------------------- values ---

shapes = st.lists(st.integers(0, 3), max_size=4).map(tuple)
numbers = st.sampled_from([0.0, -1.0, 0.5, 1e9, -1e9, math.nan, math.inf, -math.inf])


@st.composite
def arrays(draw, near=()):
    """An array, nearly the usual one or of any shape and dtype, in the hands of JAX or NumPy; or no array at all."""
    if draw(st.integers(0, 9)) == 0:
        return draw(st.sampled_from([None, 1.5, [0.5, 0.5, 0.5], "x", np.asarray([None] * BATCH)]))
    near = [*near, *(shape[1:] for shape in near), *((*shape, 1) for shape in near), *((1, *s[1:]) for s in near if s)]
    shape = draw(st.one_of(st.sampled_from(near), shapes) if near else shapes)
    dtype = draw(st.sampled_from(["float32"] * 3 + list(DTYPES)))
    value = draw(numbers) if dtype in FLOATS else 1
    with np.errstate(over="ignore"):
        array = np.full(shape, value, dtype)
    return array if draw(st.booleans()) else jnp.asarray(array)


def batch_of(value: Any) -> tuple[int, ...]:
    """The batch axis of an array, of a batch of levels or of images."""
    return np.shape(value)[:1]


def is_array(value: Any, kind: Any = jnp.floating) -> bool:
    """Whether it is an array of a kind of numbers."""
    return hasattr(value, "dtype") and value.dtype != object and bool(jnp.issubdtype(value.dtype, kind))


# ------------------------------------------------------------------------------------------------------------ roles ---


def states(usual: Any, *, rank: int = 1, like: str | None = None, exact: tuple | None = None) -> Role:
    """Floating-point arrays with a batch axis; of the shape of another argument, or of a shape, where one is named."""

    def fits(value, arguments):
        if not is_array(value) or value.ndim < rank or 0 in value.shape[1:]:
            return False
        other = arguments[like] if like else None
        return (like is None or (hasattr(other, "shape") and value.shape == other.shape)) and (
            exact is None or value.shape == exact
        )

    return Role(fits, arrays([usual.shape]), usual)


def integers(usual: Any, *, like: str | None = None) -> Role:
    """Integer arrays: levels, or one number an example of another argument."""

    def fits(value, arguments):
        if not is_array(value, jnp.integer) or value.ndim < 1:
            return False
        return like is None or value.shape == batch_of(arguments[like])

    return Role(fits, arrays([usual.shape]), usual)


def times(x: str) -> Role:
    """Scalars, or one time an example; a Python integer is a time too."""

    def fits(value, arguments):
        if isinstance(value, bool) or not (is_array(value) or isinstance(value, (int, float))):
            return False
        return np.shape(value) in ((), batch_of(arguments[x]))

    return Role(fits, st.one_of(numbers, st.sampled_from([0, 1]), arrays([(), (BATCH,)])), jnp.full(BATCH, 0.5))


def per_example(x: str, usual: Any = 0.5, *, also: Callable[[Any], bool] = lambda value: True) -> Role:
    """A number, or one an example."""

    def fits(value, arguments):
        real = is_array(value) or is_array(value, jnp.integer) or isinstance(value, int | float)
        return real and np.shape(value) in ((), batch_of(arguments[x])) and bool(also(value))

    return Role(fits, st.one_of(numbers, arrays([(), (BATCH,)])), usual)


def elementwise() -> Role:
    """Times of any shape, floating or integer; numbers too."""

    def fits(value, arguments):
        real = is_array(value) or is_array(value, jnp.integer)
        return real or (isinstance(value, (int, float)) and not isinstance(value, bool))

    return Role(fits, st.one_of(numbers, st.sampled_from([0, 1]), arrays([(BATCH,)])), jnp.full(BATCH, 0.5))


def number(usual: float, allowed: Callable[[float], bool]) -> Role:
    """A Python number in a range; NaN is in none."""
    values = st.one_of(numbers, st.floats(-1e6, 1e6), st.integers(-2, 3))
    return Role(lambda value, _: bool(allowed(value)), values, usual)


def count(usual: int, least: int = 1, most: float = math.inf) -> Role:
    """A Python integer in a range."""
    values = st.one_of(st.integers(-2, 5), st.sampled_from([1.5, math.nan]))
    return Role(lambda value, _: isinstance(value, int) and least <= value <= most, values, usual)


def word(usual: str, *known: str) -> Role:
    """One of some strings."""
    values = st.one_of(st.sampled_from([*known, "", "X0", None, 3, ("x0",)]), st.text(max_size=3))
    return Role(lambda value, _: isinstance(value, str) and value in known, values, usual)


kind = word("eps", "x0", "eps", "v", "score", "velocity")


def keys(x: str | None = None, *, none: Callable[[dict], bool] = lambda _: False, batch: Any = None) -> Role:
    """One typed threefry key, or one an example of x (or of a batch that is told from the arguments)."""

    def fits(value, arguments):
        if value is None:
            return none(arguments)
        if not isinstance(value, jax.Array) or value.dtype != jax.random.key(0).dtype:
            return False
        size = batch(arguments) if batch else batch_of(arguments[x])
        return value.shape in ((), tuple(size))

    made = {
        "one": jax.random.key(0),
        "each": jax.random.split(jax.random.key(0), BATCH),
        "of two": jax.random.split(jax.random.key(0), 2),
        "column": jax.random.split(jax.random.key(0), (BATCH, 1)),
        "legacy": jnp.zeros(2, jnp.uint32),
        "rbg": jax.random.key(0, impl="rbg"),
    }
    values = st.one_of(st.sampled_from(list(made)).map(made.get), st.sampled_from([None, 0, "key", np.zeros(2)]))
    return Role(fits, values, made["one"])


def grids(usual: Any, allowed: Callable[[np.ndarray], bool]) -> Role:
    """Vectors of at least two finite, strictly monotone times."""

    def fits(value, arguments):
        if not is_array(value) or value.ndim != 1 or len(value) < 2 or not np.isfinite(value).all():
            return False
        steps = np.diff(np.asarray(value, np.float64))
        monotone = (steps > 0).all() or (steps < 0).all()
        return bool(monotone and allowed(np.asarray(value, np.float64)))

    ts = np.asarray(usual)
    near = [ts, ts[::-1], ts[:1], ts[:0], ts[None], ts + 1, ts - 1, 0 * ts, np.where(ts == ts[0], np.nan, ts)]
    near += [np.where(ts == ts[0], np.inf, ts), ts.astype(np.int32), ts.astype(np.float16), ts.astype(complex)]
    return Role(fits, st.one_of(st.sampled_from([*near, *map(jnp.asarray, near)]), arrays()), usual)


def event_shapes(usual: tuple[int, ...], least: int = 1) -> Role:
    """(batch, *event), a tuple of sizes."""

    def fits(value, _):
        return (
            isinstance(value, tuple)
            and len(value) >= 1
            and value[0] >= least
            and all(isinstance(n, int) for n in value)
            and all(n >= 1 for n in value[1:])
        )

    wrong = [(), (-1, 2), (BATCH, -2), (0, 2), (BATCH, 1.5), 3, "ab", None]
    return Role(fits, st.one_of(st.sampled_from(wrong), shapes), usual)


def fields(call: Callable, *, but: tuple[str, ...] = ()) -> Role:
    """Functions of (x, t, ...); the wrong ones return another shape than they must."""

    def scalar(x, *rest):
        return jnp.sum(x)

    wrong = {
        "one column": lambda x, *rest: call(x, *rest)[..., :1],
        "no batch": lambda x, *rest: call(x, *rest)[0],
        "first example": lambda x, *rest: call(x, *rest)[:1],
        "a pair": lambda x, *rest: (call(x, *rest), call(x, *rest)),
        "nothing": lambda x, *rest: None,
        "a sum": scalar,
        "one axis more": lambda x, *rest: call(x, *rest)[..., None],
    }
    values = st.sampled_from([call, *(made for name, made in wrong.items() if name not in but)])
    return Role(lambda value, _: value is call, values, call)


# ---------------------------------------------------------------------------------------------- what both files use ---

VP = jdiff.VP()
X = jnp.linspace(-1.0, 1.0, 2 * BATCH).reshape(BATCH, 2)
LEVELS = jnp.arange(2 * BATCH).reshape(BATCH, 2)
TS = jnp.asarray([1.0, 0.5, 0.1])
T8 = transforms.DataTransform(8)

state = states(X)
shrink = fields(lambda x, t: -x)
either = grids(TS, lambda ts: True)


def positive(value: float) -> bool:
    """Whether a number is positive and finite."""
    return 0 < value < math.inf


def of_x(name: str) -> Callable[[dict], tuple[int, ...]]:
    """The shape of an argument."""
    return lambda a: np.shape(a[name])


def each(name: str) -> Callable[[dict], tuple[int, ...]]:
    """One number for each example of an argument."""
    return lambda a: batch_of(a[name])
