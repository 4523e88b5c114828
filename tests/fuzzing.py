"""The machinery of the fuzz tests: what an argument must be, values that it is and values that it is not.

An entry is a call with one `Role` an argument. A role knows when a value fits the other arguments and how to draw any
value. Whatever is drawn, the call must return what is documented where all arguments fit, and raise a ValueError or a
TypeError otherwise: made by jdiff, before anything runs, with the argument's name or what was got in it.
"""

import dataclasses
import inspect
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
from jdiff import _array
from jdiff.solvers import base

HOME = str(pathlib.Path(jdiff.__file__).parent)


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
    host: bool = False
    """Of files, devices and values that are looked at: run and not only traced."""
    errors: tuple[type[Exception], ...] = (ValueError, TypeError)

    @property
    def name(self) -> str:
        return f"{self.function.__module__.removeprefix('jdiff.')}.{self.function.__qualname__}"


# The same examples every time; deadlines are for machines that do one thing. A hang would be found by the whole suite.
# One argument differs from the usual ones: there is nothing to shrink.
FAST = hypothesis.settings(
    derandomize=True,
    deadline=None,
    database=None,
    phases=[hypothesis.Phase.generate],
    suppress_health_check=list(hypothesis.HealthCheck),
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
        made = lambda: _arrays(call(**arguments))
        out = made() if entry.host else jax.eval_shape(made)
    except entry.errors as error:
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
    ours = last.filename.startswith(HOME) or isinstance(error, OSError)  # a file's fault is the system's to tell
    assert ours, f"{told} was refused by {last.filename}:{last.lineno}, not jdiff: {error}"
    # Or another argument that it does not go with.
    words = {name for name in entry.roles if name != "a"} | {"a must", "a needs", "key", "must return", "must give"}
    # Or a part of an argument.
    words |= {key for value in changed.values() if isinstance(value, dict) for key in value if isinstance(key, str)}
    # Or what was got, by its shape or as it is.
    got = {str(np.shape(v)) if hasattr(v, "shape") else repr(v) for v in changed.values()}
    named = any(re.search(rf"(?<!\w){re.escape(word)}s?(?!\w)", str(error)) for word in words)
    named = named or any(text in str(error) for text in got)
    assert named, f"{told}: the message names none of {sorted(words)}: {error}"
    if last.filename in (_array.__file__, base.__file__):
        return  # what the package's own docstring says of all functions
    documented = (inspect.getdoc(entry.function) or "") + (sys.modules[entry.function.__module__].__doc__ or "")
    if inspect.isclass(entry.function):
        documented += inspect.getdoc(entry.function.__call__) or ""
    kinds = [kind.__name__ for kind in type(error).__mro__]
    assert any(re.search(rf"\b{kind}\b", documented) for kind in kinds) or "errors as in" in documented, (
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
    assert out is not None, "a result is an array or a tree of them; what has none is ([] if CONDITION else None)"
    return [leaf if isinstance(leaf, np.ndarray) else jnp.asarray(leaf) for leaf in jax.tree.leaves(out)]


def _is_shape(node):
    return all(isinstance(n, int) for n in node)
