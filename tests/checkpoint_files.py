"""Checkpoints in the layouts of the published files, for tests: flax 0.3.1 msgpack, and the PyTorch port's tensors.

Both are written from the reference's names alone. The port's numbering is restated here from the list of modules that
its constructors append, as another witness than `jdiff.importers.score_sde_pytorch`.
"""

import json
import struct

import jax
import msgpack
import nn_reference
import numpy as np

from jdiff.importers import score_sde


def _pack_array(array, code=1):
    return msgpack.ExtType(code, msgpack.packb((array.shape, array.dtype.name, array.tobytes()), use_bin_type=True))


def pack(value, chunk=2**30):
    """What flax 0.3.1 makes of a tree: extension 1 for arrays, 3 for scalars, pieces of what is above `chunk` bytes."""
    if isinstance(value, dict):
        return {key: pack(part, chunk) for key, part in value.items()}
    if isinstance(value, np.generic):
        return _pack_array(np.asarray(value), 3)
    if isinstance(value, complex):
        return msgpack.ExtType(2, msgpack.packb((value.real, value.imag)))
    if not isinstance(value, np.ndarray):
        return value
    if value.nbytes <= chunk:
        return _pack_array(value)
    flat, size = value.reshape(-1), max(1, chunk // value.itemsize)
    pieces = [_pack_array(flat[i : i + size]) for i in range(0, flat.size, size)]
    numbered = lambda items: {str(i): item for i, item in enumerate(items)}
    return {"__msgpack_chunked_array__": True, "shape": numbered(value.shape), "chunks": numbered(pieces)}


def nest(flat):
    """Nest {"a/b": leaf}."""
    tree = {}
    for path, leaf in flat.items():
        *parents, name = path.split("/")
        node = tree
        for part in parents:
            node = node.setdefault(part, {})
        node[name] = leaf
    return tree


def state(reference, *, step=1_300_000, wide_norms=True, moments=""):
    """Return a State as the reference's code held it: {path: array} of the EMA, parameters and Adam moments beside it.

    wide_norms: GroupNorm vectors as (1, 1, 1, c), like flax 0.3.1; else (c,).
    moments: what is beside the EMA is of the paths that begin so.
    """
    shaped = {k: v.reshape(1, 1, 1, -1) if wide_norms and "GroupNorm" in k else v for k, v in reference.items()}
    beside = {k: v - np.float32(1) for k, v in shaped.items() if k.startswith(moments)}
    adam = {k: {"grad_ema": np.zeros_like(v), "grad_sq_ema": np.zeros_like(v)} for k, v in beside.items()}
    step = np.asarray(step, np.int32)
    return {
        "step": step,
        "optimizer": {
            "target": nest(beside),
            "state": {"step": step, "param_states": nest(adam)},
        },
        "lr": np.float32(2e-4),
        "ema_rate": np.asarray(0.9999, np.float32),
        "model_state": {},
        "params_ema": nest(shaped),
        "rng": np.zeros(2, np.uint32),
    }


def write_flax(file, reference, *, chunk=2**30, **options):
    """Write {reference's path: array} as a flax 0.3.1 checkpoint; arrays above `chunk` bytes go in pieces."""
    packer = msgpack.Packer(use_bin_type=True)
    with open(file, "wb") as out:
        tree = state(reference, **options)
        out.write(packer.pack_map_header(len(tree)))
        for key, value in tree.items():  # one at a time: a full-size state is 1 GB
            out.write(packer.pack(key))
            out.write(packer.pack(pack(value, chunk)))


def port_modules(kind, height, *, levels, blocks, attention, progressive="none", progressive_input="none"):
    """Return the reference's names of the port's `all_modules`, in the order in which it appends them.

    kind: "ddpm" (models/ddpm.py), or "biggan", "ddpmpp" for the blocks of models/ncsnpp.py. The Fourier projection
    stands before all of it where there is one.
    """
    suffix = "" if kind == "ddpm" else "pp"
    block = "ResnetBlockBigGANpp" if kind == "biggan" else f"ResnetBlockDDPM{suffix}"
    order, heights = ["Dense", "Dense", "Conv"], [height // 2**level for level in range(levels)]
    for level in range(levels):
        for _ in range(blocks):
            order += [block] + [f"AttnBlock{suffix}"] * (heights[level] in attention)
        if level < levels - 1:
            order += [block if kind == "biggan" else "Downsample"]
            order += ["Downsample"] * (progressive_input != "none") + ["Combine"] * (progressive_input == "input_skip")
    order += [block, f"AttnBlock{suffix}", block]
    for level in reversed(range(levels)):
        order += [block] * (blocks + 1) + [f"AttnBlock{suffix}"] * (heights[level] in attention)
        if progressive == "output_skip":
            order += ["Upsample"] * (level < levels - 1) + ["GroupNorm", "Conv"]
        if level:
            order += [block if kind == "biggan" else "Upsample"]
    if progressive == "none":
        order += ["GroupNorm", "Conv"]
    return [f"{name}_{order[:i].count(name)}" for i, name in enumerate(order)]


def port_tensors(reference, modules, *, prefix="module."):
    """Return the port's state dict, OIHW and (out, in), of {reference's path: array}."""
    if any("Fourier" in path for path in reference):
        modules = ["GaussianFourierProjection_0", *modules]
    tensors = {f"{prefix}sigmas": np.geomspace(50, 0.01, 10, dtype=np.float32)}
    for path, array in reference.items():
        parent, *inner, leaf = path.split("/")
        inner = ["Conv"] if parent.startswith("Combine") else inner
        if array.ndim == 4:
            leaf, array = "weight", array.transpose(3, 2, 0, 1)
        elif leaf == "kernel":
            leaf, array = "weight", array.T
        leaf = "weight" if leaf == "scale" else leaf
        name = ".".join([f"{prefix}all_modules", str(modules.index(parent)), *inner, leaf])
        tensors[name] = array
    return tensors


def write_safetensors(file, tensors, metadata=None):
    """Write a safetensors file by its definition: length, JSON header, bytes."""
    header, end = {"__metadata__": metadata} if metadata else {}, 0
    for name, array in tensors.items():
        header[name] = {"dtype": "F32", "shape": list(array.shape), "data_offsets": [end, end + array.nbytes]}
        end += array.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(file, "wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        for array in tensors.values():
            out.write(array.tobytes())


def read_safetensors(file):
    """Read (metadata, tensors) with JSON and NumPy alone."""
    with open(file, "rb") as source:
        content = source.read()
    (length,) = struct.unpack("<Q", content[:8])
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    metadata = header.pop("__metadata__", {})
    dtypes = {"F32": np.float32}
    return metadata, {
        name: np.frombuffer(data[slice(*entry["data_offsets"])], dtypes[entry["dtype"]]).reshape(entry["shape"])
        for name, entry in header.items()
    }


def reference_of(module, image_size, channels=3):
    """{reference's path: array} of a network, filled by the rule of the parity files."""
    params = nn_reference.reference_params(module, image_size, channels)
    return jax.device_get(score_sde.restore_names(params, module, image_size=image_size))


def port_of(reference, image_size=16, levels=2, blocks=1, attention=(8,), prefix="module.", **kind):
    modules = port_modules(height=image_size, levels=levels, blocks=blocks, attention=attention, **kind)
    return port_tensors(reference, modules, prefix=prefix)
