"""Published checkpoints: what is written in their layouts comes back bit for bit, and nothing else comes through."""

import functools
import json
import subprocess
import sys

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


@pytest.mark.slow_but("ncsnpp_skip")
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
        checkpoint_files.write_safetensors(
            file, checkpoint_files.port_of(reference, prefix=prefix, **SMALL[name]), {"step": "7"}
        )
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


@pytest.mark.slow
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
        port = checkpoint_files.port_of(empty, **sizes)
        assert sum(tensor.size for tensor in port.values()) > 30e6
        back = score_sde_pytorch.to_reference(port, module, image_size=size)
        assert {k: v.shape for k, v in back.items()} == {k: v.shape for k, v in like.items()}


def small_files(folder, row=ROW):
    """Write both layouts of a row's small twin; return its configuration, network, reference's leaves and files."""
    c = reproduce.config(row, "smoke")
    module = build.network(c, 1, 17, None)
    reference = checkpoint_files.reference_of(module, 8, channels=1)
    checkpoint_files.write_flax(folder / "checkpoint_26", reference)
    port = checkpoint_files.port_of(reference, image_size=8, attention=(4,), **SMALL[c.network.name])
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
    reference = checkpoint_files.reference_of(module, 8, channels=1)
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
    reference = checkpoint_files.reference_of(network, 32)
    size = sum(leaf.nbytes for leaf in reference.values())
    assert size == 4 * 61_804_419
    port = checkpoint_files.port_of(reference, image_size=32, levels=4, blocks=4, attention=(16,), **SMALL["ddpmpp"])
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
