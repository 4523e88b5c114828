"""safetensors files: read with nothing in the header taken on trust, written whole or not at all."""

from __future__ import annotations

import json
import math
import os
import pathlib
import uuid

import numpy as np
import safetensors
import safetensors.numpy

_HEADER, _TENSORS, _AXES = 2**24, 20_000, 8
_BYTES = {"F32": 4, "F64": 8}


def read(path: str | os.PathLike) -> tuple[dict[str, str], dict[str, np.ndarray]]:
    """Return (metadata, tensors) of a file, as float32; float64 is converted: the port's buffer of scales is.

    The file: 8 bytes, the header's length, little-endian; the header in JSON, {name: {"dtype", "shape",
    "data_offsets"}}; the bytes of all tensors, without gaps.

    Raises:
      ValueError: anything but such a file, a name that is there twice, another dtype, values that are not finite. File
        and fault are named.
      OSError: the file cannot be read.
    """
    metadata, shapes = _header(path)
    tensors = {}
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            for name, shape in shapes.items():
                tensor = file.get_tensor(name)
                if tensor.shape != shape or tensor.dtype not in (np.float32, np.float64):
                    raise _fault(path, f"{name} {shape} reads as {tensor.dtype}{tensor.shape}")
                with np.errstate(over="ignore"):  # an infinity is found below
                    tensors[name] = tensor.astype(np.float32, copy=False)
                if not np.isfinite(tensors[name]).all():
                    raise _fault(path, f"{name} {shape} has values that are not finite")
    except safetensors.SafetensorError as error:
        raise _fault(path, str(error)) from error
    return metadata, tensors


def write(path: str | os.PathLike, tensors: dict[str, np.ndarray], metadata: dict[str, str]) -> None:
    """Write a file."""
    temporary = pathlib.Path(path).with_name(f".{pathlib.Path(path).name}.{uuid.uuid4().hex}")
    try:
        safetensors.numpy.save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, temporary, metadata)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def is_safetensors(path: str | os.PathLike) -> bool:
    """Return whether a file begins like one: a length that it has room for, and a brace."""
    with open(path, "rb") as file:
        head = file.read(9)
    return head[8:] == b"{" and int.from_bytes(head[:8], "little") <= os.path.getsize(path) - 8


def _header(path):
    """Return metadata and {name: shape}, after every size was compared with the file's."""
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _HEADER):
            raise _fault(path, f"a header of {length} bytes in a file of {size}; at most {_HEADER} are read")
        text = file.read(length)
    try:
        header = json.loads(text.decode(), object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise _fault(path, f"its header cannot be read: {error}") from error
    if not isinstance(header, dict) or not 0 < len(header) <= _TENSORS:
        raise _fault(path, f"its header must be an object of at most {_TENSORS} tensors")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _fault(path, "its metadata are not strings")

    shapes, ends = {}, []
    for name, entry in header.items():
        if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
            raise _fault(path, f"{name!r} needs dtype, shape and data_offsets")
        shape, offsets = entry["shape"], entry["data_offsets"]
        if entry["dtype"] not in tuple(_BYTES):
            raise _fault(path, f"{name!r} must be F32 or F64, got {entry['dtype']!r}")
        if not _naturals(shape) or len(shape) > _AXES or not _naturals(offsets) or len(offsets) != 2:
            raise _fault(path, f"{name!r} cannot have shape {shape} and offsets {offsets}")
        if offsets[1] - offsets[0] != _BYTES[entry["dtype"]] * math.prod(shape):
            raise _fault(path, f"{name!r} of shape {shape} does not fill its offsets {offsets}")
        if math.prod(max(n, 1) for n in shape) >= 2**60:  # NumPy refuses it although an axis is 0
            raise _fault(path, f"{name!r} cannot have shape {shape}")
        shapes[name] = tuple(shape)
        ends.append(offsets)
    end = 0
    for first, last in sorted(ends):
        if first != end:
            raise _fault(path, f"a gap or an overlap at byte {end} of the tensors")
        end = last
    if end != size - 8 - length:
        raise _fault(path, f"its tensors take {end} bytes, and {size - 8 - length} are there")
    return metadata, shapes


def _once(pairs):
    """Return a JSON object's pairs as a dictionary."""
    if len(values := dict(pairs)) != len(pairs):
        raise ValueError(f"a name is there twice among {[name for name, _ in pairs][:5]}")
    return values


def _naturals(values):
    return isinstance(values, list) and all(type(n) is int and 0 <= n < 2**63 for n in values)


def _fault(path, text):
    return ValueError(f"{os.fspath(path)} is not a whole safetensors file: {text[:300]}")
