"""Names and layouts of score_sde_pytorch, the PyTorch port of the networks of Song et al. 2021 (arXiv 2011.13456)."""

import re
from collections.abc import Mapping

import numpy as np

from jdiff._array import check_count
from jdiff.importers.score_sde import _unet
from jdiff.nn import UNet

__all__ = ["to_reference"]

# kind of module -> its leaf -> the reference's leaf, and the order of axes: convolutions are OIHW there, HWIO here.
_Leaves = dict[str, tuple[str, tuple[int, ...]]]
_CONV: _Leaves = {"weight": ("kernel", (2, 3, 1, 0)), "bias": ("bias", (0,))}
_LEAVES: dict[str, _Leaves] = {
    "Conv": _CONV,
    "Conv2d": _CONV | {"weight": ("weight", (2, 3, 1, 0))},
    "Dense": _CONV | {"weight": ("kernel", (1, 0))},
    "GroupNorm": {"weight": ("scale", (0,)), "bias": ("bias", (0,))},
    "NIN": {"W": ("W", (0, 1)), "b": ("b", (0,))},
    "GaussianFourierProjection": {"W": ("W", (0,))},
}


def to_reference(tensors: Mapping[str, np.ndarray], module: UNet, *, image_size: int = 32) -> dict[str, np.ndarray]:
    """Give the tensors of the port the names and layouts of the reference, which `score_sde.rename` reads.

    The port numbers its modules in order of construction, whatever their kind: `all_modules.7.Conv_0.weight`, with
    `module.` before it where it was trained on several devices. Its buffer `sigmas` is no parameter and is left out.

    Args:
        tensors: by the port's names.
        module: the network, one of the three U-Nets.
        image_size: height of the images; it decides which levels have attention.

    Returns:
        The reference's tree, flat, "/" between the parts of a path. Views of the tensors: nothing is copied.

    Raises:
        ValueError: NCSNv2, whose modules have other names there; tensors that no module of such a network has: each is
            named, with its shape, on a line. Missing ones are found by `rename`.
        TypeError: tensors that are no mapping from strings to arrays, `image_size` is no integer.
    """
    check_count(image_size, "image_size")
    if not isinstance(tensors, Mapping):
        raise TypeError(f"tensors must map names to arrays, got {type(tensors).__name__}")
    if not isinstance(module, UNet):
        raise ValueError(f"tensors of the port are read for DDPM, DDPM++ and NCSN++, not for {type(module).__name__}")
    absent = set() if module.embedding == "fourier" else {"GaussianFourierProjection_0"}
    absent |= set() if module.timed else {"Dense_0", "Dense_1"}
    names = [theirs.split("/")[0] for theirs, _ in _unet(module, image_size)]
    order = [name for name in dict.fromkeys(names) if name not in absent]

    reference, faults = {}, []
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not hasattr(tensor, "dtype"):
            raise TypeError(f"tensors must map names to arrays, got {type(tensor).__name__} for {name!r}")
        if name.removeprefix("module.") == "sigmas":
            continue
        found = _place(name, order)
        if found is None or len(found[1]) != tensor.ndim or found[0] in reference:
            faults.append(f"{name} {tensor.shape}")
            continue
        path, axes = found
        reference[path] = tensor.transpose(axes)
    if faults:
        raise ValueError("not tensors of this network:\n" + "\n".join(sorted(faults)))
    return reference


def _place(name, order):
    """Return the reference's path for a name of the port and its axes; None where the network has no such tensor."""
    match = re.fullmatch(r"(?:module\.)?all_modules\.(\d{1,6})((?:\.\w+)?)\.(\w+)", name, re.ASCII)
    if match is None or int(match[1]) >= len(order):
        return None
    parent, inner = order[int(match[1])], match[2][1:]
    if inner:
        # The port's Combine has one convolution, and no number for it.
        parent += "/" + ("Conv_0" if inner == "Conv" and parent.startswith("Combine") else inner)
    kind = parent.split("/")[-1].rsplit("_", 1)[0]
    if match[3] not in _LEAVES.get(kind, {}):
        return None
    leaf, axes = _LEAVES[kind][match[3]]
    return f"{parent}/{leaf}", axes
