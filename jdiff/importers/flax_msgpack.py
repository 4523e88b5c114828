"""Checkpoints of the flax of 2021 (0.3.1, msgpack), read as a stream that takes nothing in the file on trust.

The file is one map: `step`, `params_ema/<path>` and, among more, the parameters and their Adam moments, three quarters
of it, which are passed over by their lengths. Nothing is executed, and nothing is allocated before its size was
compared with the bytes that are left.
"""

import io
import math
import os
from collections.abc import Iterator
from typing import NoReturn

import numpy as np

__all__ = ["read"]

# Array, complex number, scalar: the codes that flax gives to msgpack's extension types.
_ARRAY, _COMPLEX, _SCALAR = 1, 2, 3
_FLOATS, _INTEGERS = {"float32": "<f4"}, {"int32": "<i4", "int64": "<i8"}
_CHUNKED = "__msgpack_chunked_array__"
# The largest published file has 963 leaves, each four times with its moments, at depth 6.
_ITEMS, _DEPTH, _NAME, _AXES = 100_000, 16, 255, 8


def read(path: str | os.PathLike) -> tuple[int, dict[str, np.ndarray]]:
    """Return step and averaged parameters of a checkpoint.

    Memory: the returned arrays, and a quarter of the largest.

    Args:
        path: the file, as flax.training.checkpoints of flax 0.3 wrote it. Large arrays may be cut in chunks.

    Returns:
        The step, and `params_ema` by path with "/" between the parts: float32, in the shapes that are stored.

    Raises:
        ValueError: anything but such a file: cut short, bytes left over, repeated keys or ones that are no strings,
            unknown types, lengths that disagree, values that are not finite. File, fault and byte are named.
        TypeError: `path` is no path (a number would be a file that is open already).
        OSError: the file cannot be read.
    """
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"path must be a path, got {path!r}")
    with open(path, "rb") as file:
        reader = _Reader(file, os.fspath(path))
        step: int | None = None
        params: dict[str, np.ndarray] = {}
        for key in reader.keys(0):
            if key == "step":
                step = reader.step()
            elif key == "params_ema":
                reader.leaves("", params, 1)
            else:
                reader.skip(1)
        if reader.left():
            reader.fail(f"{reader.left()} bytes are left over")
        if step is None or not params:
            reader.fail(f"there is no {'step' if step is None else 'leaf of params_ema'}")
        return step, params


class _Reader:
    """A position in a file, and the end of what may be read now: the file's, or an extension's."""

    def __init__(self, file: io.BufferedReader, path: str):
        self._file, self._path = file, path
        self._at, self._end, self._items = 0, os.fstat(file.fileno()).st_size, _ITEMS

    def fail(self, fault: str) -> NoReturn:
        raise ValueError(f"{self._path} is not a whole flax checkpoint: {fault} (at byte {self._at})")

    def left(self) -> int:
        return self._end - self._at

    def keys(self, depth: int) -> Iterator[str]:
        """Yield the keys of a map; the caller reads the value after each."""
        kind, count = self._head()
        if kind != "map":
            self.fail(f"a map was expected, got {kind}")
        yield from self._keys(count, depth)

    def step(self) -> int:
        kind, step = self._head()
        if kind == "extension":
            step = int(self._array("step", step, _INTEGERS, shape=()))
        elif kind != "integer":
            self.fail(f"step must be an integer, got {kind}")
        if not 0 <= step < 2**31:
            self.fail(f"step must be at least 0 and below 2^31, got {step}")
        return step

    def leaves(self, path: str, into: dict[str, np.ndarray], depth: int) -> None:
        """Read a tree of arrays, and enter them by their paths."""
        kind, value = self._head()
        if kind == "extension":
            array = self._array(path, value, _FLOATS)
        elif kind == "map":
            keys = self._keys(value, depth)
            array = None
            for i, key in enumerate(keys):
                if i == 0 and key == _CHUNKED:
                    array = self._chunked(path, keys, depth + 1)
                    break
                if not key or "/" in key or key == _CHUNKED:
                    self.fail(f"{key!r} in {path!r} is no name")
                self.leaves(f"{path}/{key}" if path else key, into, depth + 1)
        else:
            self.fail(f"{path!r} must be an array or a map, got {kind}")
        if array is not None:
            if not path:
                self.fail("params_ema is an array")
            if not np.isfinite(array).all():
                self.fail(f"{path} {array.shape} has values that are not finite")
            into[path] = array

    def skip(self, depth: int) -> None:
        """Pass over a value; its structure is checked, its arrays are not looked into."""
        kind, value = self._head()
        if kind == "map":
            for _ in self._keys(value, depth):
                self.skip(depth + 1)
        elif kind == "array":
            self._count(value, value, depth)
            for _ in range(value):
                self.skip(depth + 1)
        elif kind == "extension":
            self._extension(value, (_ARRAY, _COMPLEX, _SCALAR))
            self._pass(value[1])
        elif kind in ("string", "bytes", "number"):
            self._pass(value)

    def _keys(self, count, depth):
        self._count(count, 2 * count, depth)
        seen = set()
        for _ in range(count):
            key = self._text("a key", ("string",))
            if key in seen:
                self.fail(f"the key {key!r} is there twice")
            seen.add(key)
            yield key

    def _count(self, count, least, depth):
        """Check a container's length: each item takes at least a byte."""
        self._items -= count
        if least > self.left():
            self.fail(f"{count} items in {self.left()} bytes")
        if self._items < 0 or depth >= _DEPTH:
            self.fail(f"more than {_ITEMS} items, or deeper than {_DEPTH}")

    def _chunked(self, path, keys, depth):
        """Read the rest of {_CHUNKED: True, "shape": ..., "chunks": ...}: a flat array in pieces."""
        if self._head() != ("boolean", True) or next(keys, None) != "shape":
            self.fail(f"{path}: chunks without a shape")
        shape = self._shape(path, [self._integer(path) for _ in self._numbered(path, depth)])
        if next(keys, None) != "chunks" or 4 * math.prod(shape) > self.left():
            self.fail(f"{path} {shape}: {self.left()} bytes are left for its chunks")
        flat, done = np.empty(math.prod(shape), "<f4"), 0
        for _ in self._numbered(path, depth):
            kind, value = self._head()
            if kind != "extension":
                self.fail(f"a chunk of {path} is {kind}")
            done += self._array(path, value, _FLOATS, into=flat[done:]).size
        if done != flat.size or next(keys, None) is not None:
            self.fail(f"{path} {shape} has {done} values in its chunks, or something beside them")
        return flat.reshape(shape)

    def _numbered(self, path, depth):
        """Yield before each item of a tuple, which flax wrote as {"0": ..., "1": ...}; lists are read, too."""
        kind, count = self._head()
        if kind == "array":
            self._count(count, count, depth)
            yield from range(count)
            return
        if kind != "map":
            self.fail(f"{path}: a tuple was expected, got {kind}")
        for i, key in enumerate(self._keys(count, depth)):
            if key != str(i):
                self.fail(f"{path}: {key!r} where {i} was expected")
            yield i

    def _array(self, path, extension, dtypes, *, shape=None, into=None):
        """Read an extension of (shape, dtype, bytes): a new array, or the beginning of the flat one `into`."""
        self._extension(extension, (_ARRAY, _SCALAR))
        outer, self._end = self._end, self._at + extension[1]
        if self._head() != ("array", 3):
            self.fail(f"{path} is no (shape, dtype, bytes)")
        kind, axes = self._head()
        if kind != "array" or axes > _AXES:
            self.fail(f"{path} has no shape of at most {_AXES} axes")
        found = self._shape(path, [self._integer(path) for _ in range(axes)])
        if shape is not None and found != shape:
            self.fail(f"{path} must have shape {shape}, got {found}")
        name = self._text(f"the dtype of {path}", ("string", "bytes"))
        if name not in dtypes:
            self.fail(f"{path} {found} must be {' or '.join(dtypes)}, got {name!r}")
        kind, count = self._head()
        dtype = np.dtype(dtypes[name])
        if kind != "bytes" or count != math.prod(found) * dtype.itemsize or count != self.left():
            self.fail(f"{path} {name}{list(found)}: its bytes have another length")
        if into is None:
            array = np.empty(found, dtype)
        elif len(found) != 1 or found[0] > into.size:
            self.fail(f"a chunk of {path} has shape {found}, and {into.size} values are missing")
        else:
            array = into[: found[0]]
        if count and self._file.readinto(array.reshape(-1).view(np.uint8).data) != count:
            self.fail("the file became shorter")
        self._at, self._end = self._end, outer
        return array

    def _extension(self, extension, allowed):
        code, size = extension
        if code not in allowed:
            self.fail(f"extension type {code}, where only {allowed} may be")
        if size > self.left():
            self.fail(f"{size} bytes are announced, {self.left()} are left")

    def _shape(self, path, axes):
        # NumPy refuses large axes although there is nothing in the array, because another axis is 0.
        hollow = 0 in axes and math.prod(max(n, 1) for n in axes) >= 2**60
        if len(axes) > _AXES or any(n < 0 for n in axes) or hollow:
            self.fail(f"{path} cannot have shape {axes}")
        return tuple(axes)

    def _integer(self, path):
        kind, value = self._head()
        if kind != "integer":
            self.fail(f"{path}: an integer was expected, got {kind}")
        return value

    def _text(self, what, kinds):
        kind, size = self._head()
        if kind not in kinds or size > _NAME:
            self.fail(f"{what} must be a string of at most {_NAME} bytes, got {kind}")
        try:
            return self._take(size).decode()
        except UnicodeDecodeError:
            self.fail(f"{what} is not UTF-8")

    def _head(self):
        """Read the first bytes of a value: (kind, what it holds or how long it is), after the msgpack specification."""
        b = self._take(1)[0]
        if b < 0x80 or b >= 0xE0:
            return "integer", b if b < 0x80 else b - 256
        if b < 0xC0:
            return ("map", b & 15) if b < 0x90 else ("array", b & 15) if b < 0xA0 else ("string", b & 31)
        if b in (0xC0, 0xC2, 0xC3):
            return ("nil", None) if b == 0xC0 else ("boolean", b == 0xC3)
        if 0xC4 <= b <= 0xC6:
            return "bytes", self._unsigned(1 << (b - 0xC4))
        if 0xC7 <= b <= 0xC9 or 0xD4 <= b <= 0xD8:
            size = self._unsigned(1 << (b - 0xC7)) if b < 0xD4 else 1 << (b - 0xD4)
            return "extension", (self._unsigned(1), size)
        if b in (0xCA, 0xCB):
            return "number", 4 if b == 0xCA else 8
        if 0xCC <= b <= 0xD3:
            return "integer", int.from_bytes(self._take(1 << ((b - 0xCC) & 3)), "big", signed=b >= 0xD0)
        for kind, first, least in (("string", 0xD9, 1), ("array", 0xDC, 2), ("map", 0xDE, 2)):
            if first <= b <= first + (2 if least == 1 else 1):
                return kind, self._unsigned(least << (b - first))
        self.fail(f"no value begins with {b:#x}")

    def _unsigned(self, size):
        return int.from_bytes(self._take(size), "big")

    def _take(self, size):
        """Read a few bytes."""
        if size > self.left():
            self.fail("it is cut short")
        data = self._file.read(size)
        if len(data) != size:
            self.fail("the file became shorter")
        self._at += size
        return data

    def _pass(self, size):
        if size > self.left():
            self.fail("it is cut short")
        self._at += size
        self._file.seek(self._at)
