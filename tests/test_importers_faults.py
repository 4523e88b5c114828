"""Damaged checkpoints in the published layouts: each fault is named, and mutated files are refused or whole."""

import collections
import functools
import json
import re
import signal
import struct
import tracemalloc

import checkpoint_files
import msgpack
import nn_reference
import numpy as np
import pytest

from experiments import tensors
from jdiff.importers import flax_msgpack, score_sde, score_sde_pytorch

MAP, KEY = b"\x81", lambda text: msgpack.packb(text)
ONE = msgpack.packb(checkpoint_files.pack(np.asarray(1, np.int32)))
LEAF = msgpack.packb(checkpoint_files.pack(np.ones(3, np.float32)))


def state_of(leaf, *, step=ONE, extra=b""):
    """A state of one leaf, `a`, given as msgpack."""
    count = 2 + (1 if extra else 0)
    return bytes([0x80 + count]) + KEY("step") + step + extra + KEY("params_ema") + MAP + KEY("a") + leaf


def array(shape=(3,), dtype="float32", data=b"\0" * 12, code=1):
    return msgpack.packb(msgpack.ExtType(code, msgpack.packb((shape, dtype, data))))


def chunked(shape=None, chunks=None, **changes):
    tree = {"__msgpack_chunked_array__": True, "shape": shape or {"0": 3}} | changes
    piece = msgpack.ExtType(1, msgpack.packb(((3,), "float32", b"\0" * 12)))
    return msgpack.packb(tree | {"chunks": {"0": piece} if chunks is None else chunks})


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"", "cut short"),
        (state_of(LEAF)[:-1], r"\d+ bytes are announced, \d+ are left"),
        (state_of(LEAF) + b"\0", "1 bytes are left over"),
        (b"\x90", "a map was expected, got array"),
        (b"\x80", "there is no step"),
        (MAP + KEY("step") + ONE, "there is no leaf of params_ema"),
        (state_of(LEAF, step=KEY("x")), "step must be an integer, got string"),
        (state_of(LEAF, step=b"\xff"), "step must be at least 0 and below 2.31, got -1"),
        (state_of(LEAF, step=b"\xcf" + b"\xff" * 8), "below 2.31, got 18446744073709551615"),
        (state_of(LEAF, step=LEAF), r"step \(3,\)|must have shape"),
        (state_of(LEAF, extra=KEY("step") + ONE), "the key 'step' is there twice"),
        (state_of(LEAF, extra=KEY("m") + b"\x82" + KEY("b") + ONE + KEY("b") + ONE), "the key 'b' is there twice"),
        (state_of(LEAF, extra=b"\x07" + ONE), "a key must be a string of at most 255 bytes, got integer"),
        (state_of(LEAF, extra=b"\xa1\xff" + ONE), "a key is not UTF-8"),
        (state_of(LEAF, extra=KEY("k" * 256) + ONE), "a key must be a string"),
        (state_of(LEAF, extra=KEY("m") + b"\xc1"), "no value begins with 0xc1"),
        (state_of(LEAF, extra=KEY("m") + b"\x91" * 16 + ONE), "deeper than 16"),
        (state_of(LEAF, extra=KEY("m") + b"\x91" * 100_000 + ONE), "deeper than 16"),
        (state_of(LEAF, extra=KEY("m") + b"\xdd" + b"\xff" * 4), "4294967295 items in"),
        (state_of(LEAF, extra=KEY("m") + b"\xdf" + b"\xff" * 4), "4294967295 items in"),
        (state_of(LEAF, extra=KEY("m") + b"\xdd\0\x02\0\0" + b"\0" * 2**17), "more than 100000 items"),
        (state_of(LEAF, extra=KEY("m") + b"\xc6" + b"\xff" * 4), "cut short"),
        (state_of(LEAF, extra=KEY("m") + b"\xc9" + b"\xff" * 4 + b"\x01"), "4294967295 bytes are announced"),
        (state_of(LEAF, extra=KEY("m") + b"\xd4\x05\0"), "extension type 5"),
        (state_of(b"\xd4\xff\0"), "extension type 255"),
        (state_of(array(code=2)), "extension type 2"),
        (state_of(ONE), "a .. must be float32, got 'int32'"),
        (state_of(array(dtype="object")), r"a \(3,\) must be float32, got 'object'"),
        (state_of(array(dtype="float64", data=b"\0" * 24)), "must be float32, got 'float64'"),
        (state_of(array(dtype=7)), "the dtype of a must be a string"),
        (state_of(array((2,))), r"a float32\[2\]: its bytes have another length"),
        (state_of(array((2**62, 2**62))), "its bytes have another length"),
        (state_of(array((-3,))), r"cannot have shape \[-3\]"),
        (state_of(array((1,) * 9, data=b"\0" * 4)), "at most 8 axes"),
        (state_of(array(("x",))), "an integer was expected, got string"),
        (state_of(array(data="text")), "its bytes have another length"),
        (state_of(msgpack.packb(msgpack.ExtType(1, b"\x92\0\0"))), "no .shape, dtype, bytes."),
        (state_of(array(data=struct.pack("<3f", 1, float("nan"), 1))), r"a \(3,\) has values that are not finite"),
        (state_of(array(data=struct.pack("<3f", 1, float("-inf"), 1))), "not finite"),
        (state_of(b"\xc0"), "'a' must be an array or a map, got nil"),
        (state_of(MAP + KEY("b/c") + LEAF), "'b/c' in 'a' is no name"),
        (state_of(MAP + KEY("") + LEAF), "'' in 'a' is no name"),
        (state_of(chunked({"0": 2})), r"a chunk of a has shape \(3,\), and 2 values are missing"),
        (state_of(chunked({"0": 4})), r"a \(4,\) has 3 values in its chunks"),
        (state_of(chunked({"0": 2**40})), "bytes are left for its chunks"),
        (state_of(chunked({"0": 2**40, "1": 0})), r"has 3 values|3 values|0 values are missing"),
        (state_of(chunked({"1": 3})), "'1' where 0 was expected"),
        (state_of(chunked({"0": -3})), "cannot have shape"),
        (state_of(chunked(chunks={"0": 1, "1": "0123456789ab"})), "a chunk of a is integer"),
        (state_of(chunked(chunks="0123456789ab")), "a tuple was expected, got string"),
        (state_of(chunked(more=1)), "bytes are left for its chunks"),
        (state_of(chunked(__msgpack_chunked_array__=False)), "chunks without a shape"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_fault_of_a_flax_file_is_named(content, fault, tmp_path):
    good = tmp_path / "good"
    good.write_bytes(state_of(chunked(), step=b"\x05"))
    assert flax_msgpack.read(good)[0] == 5  # what the faults are planted in
    file = tmp_path / "checkpoint_26"
    file.write_bytes(content)
    with pytest.raises(
        ValueError, match=rf"checkpoint_26 is not a whole flax checkpoint: .*({fault}).* \(at byte \d+\)"
    ):
        flax_msgpack.read(file)


def safetensors_of(header, data=b"\0" * 12, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


ENTRY = {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]}


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"", "a header of 0 bytes in a file of 0"),
        (safetensors_of({"a": ENTRY}, length=2**63), "a header of 9223372036854775808 bytes"),
        (safetensors_of({"a": ENTRY}, length=2**25, data=b" " * 2**26), "at most 16777216 are read"),
        (safetensors_of(b"{"), "its header cannot be read"),
        (safetensors_of(b"\xff"), "its header cannot be read"),
        (safetensors_of(b"[" * 100_000), "its header cannot be read"),
        (safetensors_of(b"[1]"), "must be an object"),
        (safetensors_of(b"{}"), "must be an object"),
        (safetensors_of(b'{"a": %s, "a": %s}' % ((json.dumps(ENTRY).encode(),) * 2)), "a name is there twice"),
        (safetensors_of({"a": ENTRY, "__metadata__": {"step": 1}}), "metadata are not strings"),
        (safetensors_of({"a": 1}), "'a' needs dtype, shape and data_offsets"),
        (safetensors_of({"a": ENTRY | {"dtype": "F16"}}), "'a' must be F32 or F64, got 'F16'"),
        (safetensors_of({"a": ENTRY | {"dtype": ["F32"]}}), "'a' must be F32"),
        (safetensors_of({"a": ENTRY | {"shape": [-3]}}), "cannot have shape"),
        (safetensors_of({"a": ENTRY | {"shape": [True, 3]}}), "cannot have shape"),
        (safetensors_of({"a": ENTRY | {"shape": 3}}), "cannot have shape"),
        (safetensors_of({"a": ENTRY | {"shape": [2**62, 2**62]}}), "does not fill its offsets"),
        (safetensors_of({"a": ENTRY | {"shape": [4]}}), "does not fill its offsets"),
        (safetensors_of({"a": ENTRY | {"data_offsets": [4, 16]}}), "a gap or an overlap"),
        (safetensors_of({"a": ENTRY, "b": ENTRY}), "a gap or an overlap"),
        (safetensors_of({"a": ENTRY}, data=b"\0" * 11), "its tensors take 12 bytes, and 11 are there"),
        (safetensors_of({"a": ENTRY}, data=b"\0" * 13), "its tensors take 12 bytes, and 13 are there"),
        (
            safetensors_of(b'{"a": {"dtype": "F32", "shape": [%s], "data_offsets": [0, 12]}}' % (b"9" * 5000)),
            "cannot be read",
        ),
        (
            safetensors_of({"a": ENTRY}, data=struct.pack("<3f", 1, float("inf"), 1)),
            r"a \(3,\) has values that are not",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_fault_of_a_safetensors_file_is_named(content, fault, tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(safetensors_of({"a": ENTRY, "__metadata__": {"step": "1"}}))
    assert tensors.read(file)[1]["a"].shape == (3,)
    file.write_bytes(content)
    with pytest.raises(ValueError, match=rf"model.safetensors is not a whole safetensors file: .*{fault}"):
        tensors.read(file)


# Mutated files: 500, and 2,000 by `make test-slow`.

SECONDS = 10
FIRST_BYTES = bytes.fromhex("00 01 7f 80 81 8f 90 93 a0 a6 c0 c1 c3 c4 c6 c7 c9 ca cb cf d3 d4 d8 d9 db dc dd de df ff")
LONG = [bytes([code]) + b"\xff" * 4 for code in (0xC6, 0xC9, 0xDB, 0xDD, 0xDF)] + [b"\xcf" + b"\xff" * 8]
NAMES = (b"kernel", b"bias", b"scale", b"Conv_0", b"Conv_1", b"step", b"shape", b"chunks", b"params_ema", b"grad_ema")
NAMES += (b"F32", b"dtype", b"data_offsets", b"weight", b"all_modules.1", b"all_modules.2")


def mutate(good, spots, rng):
    """Return a mutated file: damage anywhere, at the structure (`spots`), or of one meaning."""
    data = bytearray(good)
    kind = rng.integers(9)
    if kind == 0:
        return good[: rng.integers(len(good))]
    if kind == 1:
        for at in rng.integers(len(data), size=rng.integers(1, 9)):
            data[at] ^= 1 << rng.integers(8)
    elif kind in (2, 3):
        for at in rng.choice(spots, size=rng.integers(1, 4)):
            data[at] = rng.choice(list(FIRST_BYTES)) if kind == 2 else rng.integers(256)
    elif kind == 4:
        at, long = rng.choice(spots), LONG[rng.integers(len(LONG))]
        data[at : at + len(long)] = long
    elif kind == 5:
        at, size = rng.choice(spots), rng.integers(1, 64)
        data[at : at + (size if rng.integers(2) else 0)] = rng.bytes(size) if rng.integers(2) else b""
    elif kind == 6:  # one name or dtype for another: duplicates, and leaves of other names
        old, new = (NAMES[i] for i in rng.integers(len(NAMES), size=2))
        places = [match.start() for match in re.finditer(re.escape(old), good)]
        if places:
            at = rng.choice(places)
            data[at : at + len(old)] = new
    elif kind == 7:
        word, others = (
            (b"float32", (b"float64", b"float16", b"object_", b"uint32\0"))
            if b"float32" in good
            else (b'"F32"', (b'"F64"', b'"F16"', b'"I32"', b'"U8" '))
        )
        places = [match.start() for match in re.finditer(re.escape(word), good)]
        at = rng.choice(places)
        data[at : at + len(word)] = others[rng.integers(4)]
    else:
        at = rng.integers(len(data) - 4)
        data[at : at + 4] = struct.pack("<f", (float("nan"), float("inf"), -float("inf"))[rng.integers(3)])
    return bytes(data)


@pytest.mark.slow_but("250")
@pytest.mark.parametrize("number", [250, 1000])
@pytest.mark.parametrize("layout", ["flax", "port"])
def test_mutated_files_are_refused_or_whole(layout, number, tmp_path, monkeypatch):
    """Only ValueError, or finite parameters of the network's structure; in bounded time and memory."""
    expected = score_sde._expected
    monkeypatch.setattr(score_sde, "_expected", functools.cache(expected))
    network = nn_reference.small_network(channels=8, multipliers=(1,), attention=())
    reference, file = checkpoint_files.reference_of(network, 4, channels=1), tmp_path / "file"
    if layout == "flax":
        checkpoint_files.write_flax(file, reference, chunk=1500, moments="ResnetBlockBigGANpp_0")
        words, before, after = (b"float32", b"__msgpack"), 28, 16
        parse = lambda: flax_msgpack.read(file)[1]
    else:
        port = checkpoint_files.port_of(reference, image_size=4, levels=1, attention=(), kind="biggan")
        checkpoint_files.write_safetensors(file, port, {"step": "5"})
        words, before, after = (b'"F32"',), 60, 60
        parse = lambda: score_sde_pytorch.to_reference(tensors.read(file)[1], network, image_size=4)
    good, whole = file.read_bytes(), parse()
    score_sde.rename(whole, network, image_size=4)
    shapes = {path: leaf.shape for path, leaf in whole.items()}
    marks = [match.start() for word in words for match in re.finditer(re.escape(word), good)]
    spots = np.unique([at for mark in marks for at in range(max(0, mark - before), min(len(good), mark + after))])
    assert len(marks) > 30 and len(spots) < len(good) / 2

    def hung(*_):
        pytest.fail(f"file {i} took {SECONDS} s")

    handler, outcomes = signal.signal(signal.SIGALRM, hung), collections.Counter()
    tracemalloc.start()
    try:
        for i in range(number):
            content = mutate(good, spots, np.random.default_rng(i))
            file.write_bytes(content)
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            signal.alarm(SECONDS)
            try:
                read = parse()
                assert all(np.isfinite(leaf).all() and leaf.dtype == np.float32 for leaf in read.values())
                if {path: leaf.shape for path, leaf in read.items()} != shapes:
                    score_sde.rename(read, network, image_size=4)
                outcomes["read"] += 1
            except ValueError as error:
                assert str(error)
                outcomes["refused"] += 1
            finally:
                signal.alarm(0)
            peak = tracemalloc.get_traced_memory()[1] - before
            assert peak < 4 * len(good) + 2**20, (i, peak)
    finally:
        tracemalloc.stop()
        signal.signal(signal.SIGALRM, handler)
    assert outcomes["refused"] > number / 3 and outcomes["read"] > number / 50, outcomes
    print(outcomes, len(good))
