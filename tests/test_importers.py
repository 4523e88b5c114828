"""Published checkpoints: what is written in their layouts comes back bit for bit, and nothing else comes through."""

import collections
import functools
import json
import re
import signal
import struct
import subprocess
import sys
import tracemalloc

import checkpoint_files
import jax
import jax.numpy as jnp
import msgpack
import nn_reference
import numpy as np
import pytest
from flax import serialization

from experiments import build, cli, export, import_checkpoint, model, reproduce, tensors
from experiments.artefacts import Run
from jdiff import checkpoint, data, nn
from jdiff.importers import flax_msgpack, score_sde, score_sde_pytorch

ROW = "vp/cifar10_ddpmpp_continuous"
SMALL = {
    "ddpmpp": {"kind": "biggan"},
    "ncsnpp": {"kind": "biggan", "progressive_input": "residual"},
    "ncsnpp_skip": {"kind": "ddpmpp", "progressive": "output_skip", "progressive_input": "input_skip"},
    "ddpm": {"kind": "ddpm"},
}


def reference_of(module, image_size, channels=3):
    """{reference's path: array} of a network, filled by the rule of the parity files."""
    params = nn_reference.reference_params(module, image_size, channels)
    return jax.device_get(score_sde.restore_names(params, module, image_size=image_size))


def port_of(reference, image_size=16, levels=2, blocks=1, attention=(8,), prefix="module.", **kind):
    modules = checkpoint_files.port_modules(
        height=image_size, levels=levels, blocks=blocks, attention=attention, **kind
    )
    return checkpoint_files.port_tensors(reference, modules, prefix=prefix)


def test_the_writer_writes_the_layout_of_the_example():
    content = (nn_reference.DATA / "nn_flax031.msgpack").read_bytes()
    tree = serialization.msgpack_restore(content)
    assert msgpack.packb(checkpoint_files.pack(tree), use_bin_type=True) == content
    # Cut in chunks it is what flax restores, too.
    pieces = msgpack.packb(checkpoint_files.pack(tree, chunk=100), use_bin_type=True)
    assert b"__msgpack_chunked_array__" in pieces
    jax.tree.map(np.testing.assert_array_equal, serialization.msgpack_restore(pieces), tree)


def test_the_example_is_read():
    step, params = flax_msgpack.read(nn_reference.DATA / "nn_flax031.msgpack")
    tree = serialization.msgpack_restore((nn_reference.DATA / "nn_flax031.msgpack").read_bytes())
    assert step == 0 and set(params) == {"Conv_0/kernel", "Conv_0/bias", "GroupNorm_0/scale", "GroupNorm_0/bias"}
    jax.tree.map(np.testing.assert_array_equal, checkpoint_files.nest(params), tree["params_ema"])


@pytest.mark.parametrize("name", SMALL)
def test_a_round_trip_gives_identical_outputs(name, tmp_path):
    network, recorded = nn_reference.small(name), nn_reference.load(name)
    params = nn_reference.reference_params(network, 16)
    reference = jax.device_get(score_sde.restore_names(params, network, image_size=16))
    file, read = tmp_path / "checkpoint", {}
    for chunk, wide in ((2**30, True), (2000, False)):
        checkpoint_files.write_flax(file, reference, chunk=chunk, wide_norms=wide)
        step, flat = flax_msgpack.read(file)
        assert step == 1_300_000
        assert flat["GroupNorm_0/scale"].ndim == (4 if wide else 1)
        read[f"flax {chunk}"] = score_sde.rename(flat, network, image_size=16)
    for prefix in ("module.", ""):
        checkpoint_files.write_safetensors(file, port_of(reference, prefix=prefix, **SMALL[name]), {"step": "7"})
        metadata, flat = tensors.read(file)
        assert metadata == {"step": "7"}
        theirs = score_sde_pytorch.to_reference(flat, network, image_size=16)
        read[f"port {prefix}"] = score_sde.rename(theirs, network, image_size=16)

    field = nn_reference.quick_jit(lambda params: nn.as_field(network, params)(recorded["x"], recorded["labels"][0]))
    expected = field(params)
    assert np.abs(expected - recorded["outputs"][0]).max() <= 2e-5 * np.abs(recorded["outputs"][0]).max()
    for which, ours in read.items():
        jax.tree.map(functools.partial(np.testing.assert_array_equal, err_msg=which), ours, params)
        np.testing.assert_array_equal(field(ours), expected)


def test_published_networks_of_the_port_fit():
    """Full networks by name and shape: where a leaf stands shows in its number, and its layout in its shape."""
    full = {"image_size": 32, "levels": 4, "attention": (16,)}
    large = {"image_size": 256, "levels": 7, "blocks": 2, "attention": (16,)}
    rows = {
        "vp/ddpm/cifar10": full | {"blocks": 2} | SMALL["ddpm"],
        "ve/cifar10_ncsnpp_continuous": full | {"blocks": 4} | SMALL["ncsnpp"],
        "ve/ffhq_256_ncsnpp_continuous": large | SMALL["ncsnpp_skip"] | {"kind": "biggan"},
    }
    for row, sizes in rows.items():
        module = build.network(reproduce.config(row), 3, 256, None)
        size = sizes["image_size"]
        like = jax.eval_shape(
            functools.partial(score_sde.restore_names, module=module, image_size=size),
            checkpoint_files.nest(score_sde._expected(module, size, 3)),
        )
        empty = {k: np.broadcast_to(np.zeros((), np.float32), v.shape) for k, v in like.items()}
        port = port_of(empty, **sizes)
        assert sum(tensor.size for tensor in port.values()) > 30e6
        back = score_sde_pytorch.to_reference(port, module, image_size=size)
        assert {k: v.shape for k, v in back.items()} == {k: v.shape for k, v in like.items()}


def small_files(folder, row=ROW):
    """Write both layouts of a row's small twin; return its configuration, network, reference's leaves and files."""
    c = reproduce.config(row, "smoke")
    module = build.network(c, 1, 17, None)
    reference = reference_of(module, 8, channels=1)
    checkpoint_files.write_flax(folder / "checkpoint_26", reference)
    port = port_of(reference, image_size=8, attention=(4,), **SMALL[c.network.name])
    checkpoint_files.write_safetensors(folder / "checkpoint_26.safetensors", port, {"step": "1300000"})
    return c, module, reference, folder / "checkpoint_26", folder / "checkpoint_26.safetensors"


@pytest.mark.slow
def test_what_was_imported_is_evaluated_sampled_and_exported(tmp_path, digits, monkeypatch, capsys):
    c, module, reference, file, other = small_files(tmp_path)
    ours = score_sde.rename(reference, module, image_size=8)
    records = {}
    for source, path in (("score_sde", file), ("score_sde_pytorch", other)):
        run = Run(str(tmp_path / source))
        records[source] = import_checkpoint.import_checkpoint(c, run, str(path), source=source)
        trained = model.load(c, run, data.load("digits", "test"))
        assert trained.step == records[source]["step"] == 1_300_000 and records[source]["source"] == source
        jax.tree.map(np.testing.assert_array_equal, trained.params, ours)
    assert f"SHA-256 {records['score_sde']['sha256']}" in capsys.readouterr().out
    assert records["score_sde"]["sha256"] != records["score_sde_pytorch"]["sha256"]
    assert import_checkpoint.import_checkpoint(c, run, str(other)) == records[source]  # again: nothing to do

    # The row's one command, on its small twin.
    monkeypatch.setattr(reproduce, "config", lambda row: c)
    entry = reproduce.reproduce(ROW, str(other), str(tmp_path / "runs"), sha256=records[source]["sha256"])
    assert np.isfinite(entry["ours"]["bits_per_dim"]) and entry["ours"]["settings"]["step"] == 1_300_000
    assert entry["origin"] == f"imported, SHA-256 {records[source]['sha256'][:12]}"
    run = Run(entry["run"])

    monkeypatch.setattr(sys, "argv", ["export", "--workdir", str(run.path), "--out", str(tmp_path / "out.safetensors")])
    assert export.main() == 0
    metadata, exported = checkpoint_files.read_safetensors(tmp_path / "out.safetensors")
    assert json.loads(metadata["config"]) == json.loads(c.to_json())
    provenance = json.loads(metadata["provenance"])
    assert provenance["step"] == 1_300_000 and provenance["import"] == records[source]
    assert provenance["versions"]["packages"]["jax"] == jax.__version__
    assert {k for k in exported if not k.startswith("params/")} == {"statistics/mean", "statistics/std"}
    nested = checkpoint_files.nest(exported)["params"]
    jax.tree.map(np.testing.assert_array_equal, nested, jax.device_get(ours))
    monkeypatch.setattr(sys, "argv", ["export", "--workdir", str(run.path), "--out", "model.npz"])
    assert export.main() == 2 and "must end in .safetensors" in capsys.readouterr().err


def test_ncsnv2_is_read_from_flax_alone(tmp_path):
    c = reproduce.config("ve/ncsnv2/cifar10", "smoke")
    module = build.network(c, 1, 17, None)
    reference = reference_of(module, 8, channels=1)
    checkpoint_files.write_flax(tmp_path / "checkpoint", reference)
    step, params, source = import_checkpoint.read(c, str(tmp_path / "checkpoint"))
    assert (step, source) == (1_300_000, "score_sde")
    jax.tree.map(np.testing.assert_array_equal, params, score_sde.rename(reference, module, image_size=8))
    with pytest.raises(ValueError, match="not for NCSNv2"):
        score_sde_pytorch.to_reference({}, module, image_size=8)


def test_what_is_refused(tmp_path, digits, monkeypatch, capsys):
    c, _, reference, file, port = small_files(tmp_path)
    run = Run(str(tmp_path / "run"))

    def refused(match, path=file, config=c, **given):
        with pytest.raises(ValueError, match=match):
            import_checkpoint.import_checkpoint(config, run, str(path), **given)
        assert not run.path.exists()

    refused("has SHA-256 [0-9a-f]{64}, not ab", sha256="ab")
    refused("--from = 'keras' is unknown", source="keras")
    refused("looks like score_sde, not score_sde_pytorch", source="score_sde_pytorch")
    refused("looks like score_sde_pytorch, not score_sde", path=port, source="score_sde")
    refused("no precondition and a fixed size", config=cli.load(str(nn_reference.DATA.parents[1] / "configs/smoke.py")))
    for content in (b"PK\x03\x04rest", b"\x80\x02}q\x00.", b"\x80\x04\x95"):
        (tmp_path / "checkpoint.pth").write_bytes(content)
        refused("is a PyTorch file.*refused.*docs/reproduce.md", path=tmp_path / "checkpoint.pth")
    (tmp_path / "empty").write_bytes(b"")
    refused("is not a whole flax checkpoint: it is cut short", path=tmp_path / "empty")
    # Every leaf that does not fit, at once, in either layout.
    bad = reference | {"Conv_1/bias": np.zeros(5, np.float32), "Rest_0/bias": np.zeros(2, np.float32)}
    del bad["Dense_0/bias"]
    checkpoint_files.write_flax(tmp_path / "bad", bad)
    named = (
        r"does not fit network ddpmpp.*(\n.*)*missing Dense_0/bias .*\nConv_1/bias has shape \(5,\).*\nleft over Rest_0"
    )
    refused(named, path=tmp_path / "bad")
    tensor = {
        "module.all_modules.0.kernel": np.zeros((2, 2), np.float32),
        "all_modules.99.bias": np.zeros(3, np.float32),
    }
    checkpoint_files.write_safetensors(tmp_path / "bad.safetensors", tensor)
    refused(r"(?s)all_modules.99.bias \(3,\).*all_modules.0.kernel \(2, 2\)", path=tmp_path / "bad.safetensors")

    # As from the command line, and then another run in the same folder.
    def command(config, path, folder):
        argv = [
            "import_checkpoint",
            "--from",
            "score_sde",
            "--config",
            config,
            "--path",
            str(path),
            "--workdir",
            folder,
        ]
        monkeypatch.setattr(sys, "argv", argv)
        return import_checkpoint.main(), capsys.readouterr()

    code, said = command(ROW, file, str(run.path))
    assert code == 2 and "Conv_0/kernel" in said.err and not run.path.exists()  # the full network, and a small file
    code, said = command("vp/nothing", file, str(run.path))
    assert code == 2 and "no configuration file" in said.err
    import_checkpoint.import_checkpoint(c, run, str(file))
    match = "holds checkpoints of the file with SHA-256"
    with pytest.raises(ValueError, match=match):
        import_checkpoint.import_checkpoint(c, run, str(port))
    with pytest.raises(ValueError, match="is a run of another configuration"):
        import_checkpoint.import_checkpoint(reproduce.config("ve/ncsnv2/cifar10", "smoke"), run, str(port))
    (run / "import.json").unlink()
    with pytest.raises(ValueError, match="holds checkpoints of a training"):
        import_checkpoint.import_checkpoint(c, run, str(file))


# Faults, each by itself.

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


# 2,000 mutated files.

MUTATED, SECONDS = 1000, 10
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


@pytest.mark.parametrize("layout", ["flax", "port"])
def test_mutated_files_are_refused_or_whole(layout, tmp_path, monkeypatch):
    """Only ValueError, or finite parameters of the network's structure; in bounded time and memory."""
    expected = score_sde._expected
    monkeypatch.setattr(score_sde, "_expected", functools.cache(expected))
    network = nn_reference.small_network(channels=8, multipliers=(1,), attention=())
    reference, file = reference_of(network, 4, channels=1), tmp_path / "file"
    if layout == "flax":
        checkpoint_files.write_flax(file, reference, chunk=1500, moments="ResnetBlockBigGANpp_0")
        words, before, after = (b"float32", b"__msgpack"), 28, 16
        parse = lambda: flax_msgpack.read(file)[1]
    else:
        port = port_of(reference, image_size=4, levels=1, attention=(), kind="biggan")
        checkpoint_files.write_safetensors(file, port, {"step": "5"})
        words, before, after = (b'"F32"',), 60, 60
        parse = lambda: score_sde_pytorch.to_reference(tensors.read(file)[1], network, image_size=4)
    good, whole = file.read_bytes(), parse()
    score_sde.rename(whole, network, image_size=4)
    shapes = {path: leaf.shape for path, leaf in whole.items()}
    marks = [match.start() for word in words for match in re.finditer(re.escape(word), good)]
    spots = np.unique([at for mark in marks for at in range(max(0, mark - before), min(len(good), mark + after))])
    assert len(marks) > 30 and len(spots) < len(good) / 2

    def hung(number, frame):
        pytest.fail(f"file {i} took {SECONDS} s")

    handler, outcomes = signal.signal(signal.SIGALRM, hung), collections.Counter()
    tracemalloc.start()
    try:
        for i in range(MUTATED):
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
    assert outcomes["refused"] > MUTATED / 3 and outcomes["read"] > 20, outcomes
    print(outcomes, len(good))


# Prints the largest resident memory (MiB) after the imports, and after the command of which argv tells. From /proc, for
# getrusage counts what the process was forked from, too.
MEASURED = """
import sys
from experiments import import_checkpoint
peak = lambda: int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) / 1024
before = peak()
if sys.argv[1] == "read":
    from jdiff.importers import flax_msgpack
    flax_msgpack.read(sys.argv[2])
    code = 0
else:
    code = import_checkpoint.main()
print("peak", before, peak(), flush=True)
sys.exit(code)
"""


@pytest.mark.slow
def test_a_full_size_file_of_each_layout_gives_identical_outputs(tmp_path):
    """61,804,419 parameters, with the Adam moments beside them; a process of its own for each, to see its memory."""
    c = reproduce.config(ROW)
    network = build.network(c, 3, 256, None)
    reference = reference_of(network, 32)
    size = sum(leaf.nbytes for leaf in reference.values())
    assert size == 4 * 61_804_419
    port = port_of(reference, image_size=32, levels=4, blocks=4, attention=(16,), **SMALL["ddpmpp"])
    files = {name: tmp_path / name for name in ("flax", "flax_chunked", "port.safetensors")}
    checkpoint_files.write_flax(files["flax"], reference)
    checkpoint_files.write_flax(files["flax_chunked"], reference, chunk=2**20, wide_norms=False)
    checkpoint_files.write_safetensors(files["port.safetensors"], port, {"step": "1300000"})

    def measured(*arguments):
        command = [sys.executable, "-c", MEASURED, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, cwd=nn_reference.DATA.parents[1], check=False)
        assert done.returncode == 0, done.stderr
        before, peak = (float(n) * 2**20 for n in done.stdout.rsplit("peak", 1)[1].split())
        print(f"{arguments[:2]}: {before / 2**20:.0f} MiB before, {peak / 2**20:.0f} MiB at most")
        return peak - before

    print(f"averages {size / 2**20:.0f} MiB;", *(f"{k} {v.stat().st_size / 2**20:.0f} MiB" for k, v in files.items()))
    for name in ("flax", "flax_chunked"):
        assert measured("read", str(files[name])) < 1.1 * size
    params, x = score_sde.rename(reference, network), nn_reference.fill({"x": (1, 32, 32, 3)})["x"]
    field = jax.jit(lambda params: nn.as_field(network, params)(x, jnp.full((1,), 0.5, jnp.float32)))
    expected = field(params)
    assert np.isfinite(expected).all() and np.std(expected) > 0
    like = {"ema": jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)}
    for name, path in files.items():
        folder = tmp_path / f"run_{name}"
        source = "score_sde_pytorch" if "port" in name else "score_sde"
        arguments = ("--from", source, "--config", ROW, "--path", str(path), "--workdir", str(folder))
        assert measured(*arguments) < 3.5 * size
        with checkpoint.open_manager(str(folder / "checkpoints"), read_only=True) as manager:
            restored = checkpoint.restore(manager, like)
        assert int(restored["step"]) == 1_300_000
        jax.tree.map(np.testing.assert_array_equal, restored["ema"], params)
        np.testing.assert_array_equal(field(restored["ema"]), expected)
