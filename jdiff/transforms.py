"""From integer images to the space a model lives in and back, with the volume it costs; bits per dimension.

    levels 0 .. L-1 --dequantise or rescale--> unit interval --forward--> [-1, 1], [0, 1] or R --inverse--> levels

A density on the model space becomes a probability of integer images through the log-determinant of that map alone:
there is no constant to remember (the often quoted offsets 7 and 8 are log2(256/2) and log2(256)).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jdiff._array import check_array, per_example_keys, sum_event
from jdiff._pytree import register_dataclass
from jdiff._typing import Array, Key

__all__ = ["DataTransform", "bits_per_dim", "random_flip"]

# Keeps the logit's argument off 0 and 1.
_MARGIN = 1e-6


@register_dataclass
@dataclasses.dataclass(frozen=True)
class DataTransform:
    """How integer images map to the space of the model. Static: both fields are known when a function is traced.

    One transform serves training and evaluation, also where a model is trained on noiseless images (`rescale`) and
    evaluated on dequantised ones, as by Song et al. 2021 (arXiv 2011.13456): which of the two is a call, not a field.

    Attributes:
      levels: the number L of levels a pixel can take, from 0 to L-1: 256 for 8-bit images, 17 for the 8x8 digits.
      centered: True maps the unit interval to [-1, 1], False leaves it.
      logit: instead, the unit interval is stretched to all reals, logit(m + (1 - 2 m) unit) with m = 1e-6, so that
        pixels that are always at an end vary as much as others: Dinh et al. 2017 (arXiv 1605.08803), section 4.1, with
        the margin of Grathwohl et al. 2019 (arXiv 1810.01367). Cells are of many widths then.
    """

    levels: int = dataclasses.field(default=256, metadata={"static": True})
    centered: bool = dataclasses.field(default=True, metadata={"static": True})
    logit: bool = dataclasses.field(default=False, metadata={"static": True})

    def dequantise(self, key: Key, x: Array, *, dtype: DTypeLike = jnp.float32) -> Array:
        """Uniform dequantisation (x + u) / L, u ~ U(0, 1) per entry (Theis et al. 2016, arXiv 1511.01844, section 3.1).

        u is drawn from the midpoints of 2^n equal cells, as fine as the dtype resolves next to the levels, so that
        ``inverse(forward(dequantise(key, x)))`` is always x (a plain u rounds 255 + u up to 256 now and then).

        Args:
          key: one key, split into one per example, or one key per example, shape (batch,).
          x: integer levels, (batch, *event).
          dtype: the floating-point type of the result.

        Returns:
          An array like x in (0, 1).

        Raises:
          TypeError: x is not an integer array, or key not a typed threefry key.
          ValueError: no batch axis, another number of keys, levels below 2, or a dtype too coarse for them.
        """
        batch = self._check(x)
        keys = per_example_keys(key, batch)
        cells = 2.0 ** _noise_bits(self.levels, dtype)
        draw = jax.vmap(lambda k: jax.random.uniform(k, x.shape[1:], dtype))
        return self._dequantised(x, (jnp.floor(draw(keys) * cells) + 0.5) / cells)

    def rescale(self, x: Array, *, dtype: DTypeLike = jnp.float32) -> Array:
        """Noiseless x / (L - 1): levels spread over the closed unit interval, to train without dequantisation.

        A density of such images says nothing about the probability of levels. `inverse` still returns the levels (in
        float32 up to some thousand of them).

        Raises:
          TypeError: x is not an integer array.
          ValueError: no batch axis, or levels below 2.
        """
        self._check(x)
        return x.astype(dtype) / (self.levels - 1)

    def forward(self, unit: Array) -> Array:
        """From the unit interval to the model space: 2 unit - 1 if centered, else unit; or its logit."""
        if self.logit:
            inner = _MARGIN + (1 - 2 * _MARGIN) * unit
            return jnp.log(inner) - jnp.log1p(-inner)
        return 2.0 * unit - 1.0 if self.centered else unit

    def inverse(self, x: Array) -> Array:
        """From the model space to integer levels, clip(floor(L unit), 0, L-1): undoes both ways there.

        The logit's rounding may take a draw next to the edge of its cell over it.

        Returns:
          uint8 for up to 256 levels, else uint16 or int32. Entries out of range are clipped; NaN has no level.

        Raises:
          TypeError: x is not floating point.
        """
        dtype = getattr(x, "dtype", None)
        if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(f"x must be an array of floating point, got {dtype or type(x).__name__}")
        x = x.astype(jnp.float32) if jnp.finfo(x.dtype).bits < 32 else x
        unit = 0.5 * (x + 1.0) if self.centered else x
        if self.logit:
            unit = (jax.nn.sigmoid(x) - _MARGIN) / (1 - 2 * _MARGIN)
        smallest = jnp.uint8 if self.levels <= 2**8 else jnp.uint16 if self.levels <= 2**16 else jnp.int32
        return jnp.clip(jnp.floor(unit * self.levels), 0, self.levels - 1).astype(smallest)

    @property
    def width(self) -> float:
        """The width of a level's cell in the model space: 2/L if centered, else 1/L.

        Raises:
          ValueError: logit: it differs from level to level.
        """
        self._check_affine()
        return (2.0 if self.centered else 1.0) / self.levels

    def center(self, x: Array, *, dtype: DTypeLike = jnp.float32) -> Array:
        """The middle of each level's cell in the model space, forward((x + 1/2) / L).

        Raises:
          TypeError: x is not an integer array.
          ValueError: no batch axis, levels below 2, or a dtype too coarse for them.
        """
        self._check(x)
        _noise_bits(self.levels, dtype, least=0)
        return self.forward(self._dequantised(x, jnp.asarray(0.5, dtype)))

    def log_det(self, event_shape: Sequence[int]) -> float:
        """Nats per image of the map y -> forward(y / L) from level units, where a level is a cell of volume one.

        D log(2 / L) if centered, else -D log L, with D = prod(event_shape). By the change of variables and Jensen's
        inequality, log P(levels) >= E_u[log p(forward((levels + u) / L))] + log_det (Theis et al. 2016, section 3.1).

        Raises:
          ValueError: event_shape is not a shape of positive sizes, levels below 2, or logit: see `log_det_at`.
        """
        self._check_affine()
        _check_levels(self.levels)
        return size_of(event_shape) * (math.log(2.0 if self.centered else 1.0) - math.log(self.levels))

    def log_det_at(self, x: Array) -> Array:
        """`log_det` at points of the model space (batch, *event), shape (batch,): where the map is no affine one.

        The logit's is sum log(1 - 2 m) + softplus(x) + softplus(-x) - log L.

        Raises:
          ValueError: x has no batch axis, or levels below 2.
          TypeError: x is not floating point.
        """
        check_array(x)
        if not self.logit:
            return jnp.full_like(x, self.log_det(x.shape[1:]), shape=x.shape[:1])
        _check_levels(self.levels)
        constant = math.log(1 - 2 * _MARGIN) - math.log(self.levels)
        return sum_event(jax.nn.softplus(x) + jax.nn.softplus(-x) + constant)

    def _check_affine(self) -> None:
        if self.logit:
            raise ValueError("with logit cells have many widths: there is no one number; see log_det_at")

    def _dequantised(self, x: Array, u: Array) -> Array:
        return (x.astype(u.dtype) + u) / self.levels

    def _check(self, x: Array) -> int:
        _check_levels(self.levels)
        return check_images(x, self.levels, "x")


def check_images(x: Array, levels: int, name: str) -> int:
    """Return the batch size of integer images; raise TypeError or ValueError, by their name, for what is none."""
    dtype = getattr(x, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jnp.integer):
        got = type(x).__name__ if dtype is None else f"dtype {dtype}"
        raise TypeError(f"{name} must hold integer levels 0 to {levels - 1}, got {got}")
    if jnp.ndim(x) < 1:
        raise ValueError(f"{name} must have a leading batch axis, got a scalar")
    if 0 in jnp.shape(x)[1:]:
        raise ValueError(f"{name} must have entries in each example, got shape {jnp.shape(x)}")
    return jnp.shape(x)[0]


def bits_per_dim(log_prob: Array, transform: DataTransform, event_shape: Sequence[int]) -> Array:
    """Bits per dimension of integer images, -(log_prob + log_det) / (D log 2).

    Args:
      log_prob: nats per image, (batch,), of dequantised images in the model space.
      transform: the map that took them there.
      event_shape: the shape of one image; D is its product.

    Returns:
      An array like log_prob: an upper bound on the bits of the integer image, in expectation over the dequantisation.

    Raises:
      ValueError: event_shape is not a shape of positive sizes, or levels below 2.
    """
    return -(log_prob + transform.log_det(event_shape)) / (size_of(event_shape) * math.log(2.0))


def random_flip(key: Key, x: Array) -> Array:
    """Mirror each image left to right with probability one half.

    Args:
      key: one key, split into one per example, or one key per example, shape (batch,).
      x: images (batch, height, width, channels), of any dtype.

    Raises:
      ValueError: x has another rank, or there is another number of keys.
      TypeError: key is not a typed threefry key.
    """
    if getattr(x, "ndim", 0) != 4:
        got = getattr(x, "shape", type(x).__name__)
        raise ValueError(f"x must be images of shape (batch, height, width, channels), got {got}")
    keys = per_example_keys(key, x.shape[0])
    flipped = jax.vmap(jax.random.bernoulli)(keys)
    return jnp.where(flipped[:, None, None, None], x[:, :, ::-1], x)


def _noise_bits(levels: int, dtype: DTypeLike, least: int = 4) -> int:
    """Bits of u that survive (x + u) / L, 2 unit - 1 and back: mantissa less level, two for rounding; 0: the middle."""
    bits = jnp.finfo(dtype).nmant - 2 - math.ceil(math.log2(levels))
    if bits < least:
        raise ValueError(f"{jnp.dtype(dtype).name} is too coarse for {levels} levels: take float32, then cast")
    return bits


def _check_levels(levels: int) -> None:
    if not isinstance(levels, int) or levels < 2:
        raise ValueError(f"levels must be an integer of at least 2, got {levels!r}")


def size_of(event_shape: Sequence[int]) -> int:
    """Return the product of a shape of positive sizes; raise ValueError for anything else."""
    if not isinstance(event_shape, tuple | list) or not all(isinstance(n, int) and n > 0 for n in event_shape):
        raise ValueError(f"event_shape must be a tuple of positive sizes, got {event_shape!r}")
    return math.prod(event_shape)
