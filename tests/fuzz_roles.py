"""What the arguments of the fuzz tests must be, and values of every kind: arrays, numbers, keys, grids, functions."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from fuzzing import Entry, Role
from hypothesis import strategies as st

import jdiff
from jdiff import solvers, transforms

BATCH = 3
FLOATS = ("float32", "float16")
DTYPES = (*FLOATS, "int32", "uint8", "bool", "complex64")
ODD = (True, 7, -1, 1.5, math.nan, "x", b"x", [3], {"x": "y"}, object())
"""Values that are hardly ever what is asked for."""

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
        if not is_array(value, jnp.integer) or value.ndim < 1 or 0 in value.shape[1:]:
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
    values = st.one_of(st.integers(-2, 5), st.sampled_from([1.5, math.nan, "x"]))
    fits = lambda value, _: isinstance(value, int) and not isinstance(value, bool) and least <= value <= most
    return Role(fits, values, usual)


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


def one_of(usual: Any, *fine: Any, wrong: tuple = ODD) -> Role:
    """The usual value or another that is as good, by identity, against wrong ones."""
    allowed = (usual, *fine)
    fits = lambda value, _: any(value is one for one in allowed)
    return Role(fits, st.one_of(st.sampled_from(wrong), st.sampled_from([*allowed, *wrong])), usual)


def optional(role: Role) -> Role:
    """What a role is, or None."""
    return Role(lambda value, a: value is None or role.fits(value, a), role.values | st.none(), role.usual)


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


# ------------------------------------------------------------------------------------------- what several files use ---

VP = jdiff.VP()
X = jnp.linspace(-1.0, 1.0, 2 * BATCH).reshape(BATCH, 2)
IMAGE = jnp.linspace(-1.0, 1.0, 16 * BATCH).reshape(BATCH, 4, 4, 1)
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


KINDS = ("x0", "eps", "v", "score", "velocity")
event = states(X, rank=2)
exact = states(X, exact=(BATCH, 2))
HEUN = solvers.heun(jdiff.probability_flow(VP, lambda x, t: -x))

not_negative = lambda value: 0 <= value < math.inf
probability = lambda value: 0 <= value <= 1


def summed(x):
    """A log-density."""
    return -jnp.sum(x, axis=tuple(range(1, x.ndim)))


def batch_asked(a):
    """The batch axis of a shape that is asked for."""
    return a["shape"][:1] if isinstance(a["shape"], tuple) else ()


def field_of(make, **fixed):
    """Build a field and call it at (x, t)."""
    return lambda x, t, **a: make(**fixed, **a)(x, t)


def parted(given):
    """Arguments that stay as they are, and those with a role."""
    fixed = {name: value for name, value in given.items() if not isinstance(value, Role)}
    return fixed, {name: given[name] for name in given.keys() - fixed.keys()}


def at(function, make=None, **roles):
    """A field of fields: its call at (x, t) with roles for the other arguments."""
    fixed, roles = parted(roles)
    return Entry(function, {"x": state, "t": times("x")} | roles, of_x("x"), field_of(make or function, **fixed))


def with_process(function):
    """The call of a function with a process."""
    return lambda **a: function(process=VP, **a)


def integers_like(usual, x):
    """Integers of the shape of an argument."""
    fits = lambda value, a: is_array(value, jnp.integer) and value.shape == np.shape(a[x])
    return Role(fits, integers(usual).values, usual)
