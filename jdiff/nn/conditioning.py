"""What a network knows besides x: the noise level and, optionally, a label and a vector, as one vector per example."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.typing import DTypeLike

from jdiff._array import check_array, check_count, check_real
from jdiff._typing import Array
from jdiff.nn.conditions import Condition, absent_is_zero, read_condition
from jdiff.nn.normalisation import at_least_float32

__all__ = ["Conditioning"]

SMOOTH_FREQUENCIES = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)
"""Angular frequencies of the "smooth" embedding, in radians per unit of log-SNR."""

_LOG_SNR_LIMIT = 20.0
_EMBEDDINGS = ("fourier", "positional", "smooth")


def positional_features(value: Array, dim: int) -> Array:
    """Sinusoids `[sin(w_k v), cos(w_k v)]`, `w_k = 10000^(-k / (dim//2 - 1))`, zero-padded to an odd `dim`.

    Ho et al. 2020 (arXiv 2006.11239) after Vaswani et al. 2017 (arXiv 1706.03762, section 3.5); in published networks
    `v = 999 t`, which oscillates in `t` and makes the probability-flow ODE costly to integrate.

    Args:
        value: `(batch,)`, of the order of 0 to 1000.
        dim: number of features, at least 4.

    Returns:
        `(batch, dim)` in the dtype of `value`.

    Raises:
        ValueError: `dim` below 4.
    """
    if dim < 4:
        raise ValueError(f"positional features need dim >= 4, got {dim}")
    half = dim // 2
    features = _sin_cos(value, np.exp(-np.log(10000.0) * np.arange(half) / (half - 1)))
    return jnp.pad(features, ((0, 0), (0, dim - 2 * half)))


def smooth_features(log_snr: Array, frequencies: tuple[float, ...] = SMOOTH_FREQUENCIES) -> Array:
    """Sinusoids `[sin(w_k l), cos(w_k l)]` of the log signal-to-noise ratio `l`, at a few low frequencies `w_k`.

    `l` is clipped to +-20, so that processes without signal or without noise at an end (`l = -inf, inf`) stay finite.

    Args:
        log_snr: `(batch,)`, `log(alpha^2 / sigma^2)`.
        frequencies: angular frequencies.

    Returns:
        `(batch, 2 len(frequencies))` in the dtype of `log_snr`.
    """
    return _sin_cos(jnp.clip(log_snr, -_LOG_SNR_LIMIT, _LOG_SNR_LIMIT), np.asarray(frequencies))


class _FourierFeatures(nn.Module):
    """Sinusoids `[sin(2 pi W v), cos(2 pi W v)]` at random Gaussian frequencies `W`, drawn once and never trained.

    Tancik et al. 2020 (arXiv 2006.10739), as used by Song et al. 2021 (arXiv 2011.13456, appendix H) with
    `v = log sigma`. `W` lies among the parameters as `fourier/frequencies`, because published checkpoints hold it
    there; its gradient is zero, and a weight decay has to leave it out (`decay_mask` of `jdiff.training.adam`).

    Attributes:
        count: number of frequencies; there are twice as many features.
        scale: standard deviation of `W`.
    """

    count: int
    scale: float = 16.0

    @nn.compact
    def __call__(self, value: Array) -> Array:
        """Map `(batch,)` to `(batch, 2 count)`."""
        frequencies = self.param("frequencies", nn.initializers.normal(self.scale), (self.count,), jnp.float32)
        return _sin_cos(value, 2 * np.pi * jax.lax.stop_gradient(frequencies))


class Conditioning(nn.Module):
    """`(t, cond) -> dense(swish(dense(features(noise_level(t))))) + label + dense(vector)`, of `width` per example.

    Attributes:
        noise_level: `(batch,) -> (batch,)`, from the time to the very number that is embedded: `lambda t: 999 * t` for
            published "positional" networks, `log sigma(t)` for "fourier", `log(alpha^2 / sigma^2)` for "smooth".
        width: size of the vector.
        embedding: "smooth", "positional" or "fourier".
        features: number of features of "positional"; number of frequencies of "fourier".
        frequencies: angular frequencies of "smooth".
        fourier_scale: standard deviation of the frequencies of "fourier".
        num_classes: labels are `0 ... num_classes - 1`, and `num_classes` is the null label. None: no labels.
        vector_size: entries of a vector that is known. None: no vector.
        activation: between the two layers.
        dtype: of the computation; None is x's. Features are always computed in at least float32.
    """

    noise_level: Callable[[Array], Array]
    width: int
    embedding: str = "smooth"
    features: int = 128
    frequencies: tuple[float, ...] = SMOOTH_FREQUENCIES
    fourier_scale: float = 16.0
    num_classes: int | None = None
    vector_size: int | None = None
    activation: Callable[[Array], Array] = nn.swish
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, x: Array, t: Array, cond: Condition = None) -> Array:
        """Embed `t` `(batch,)` and `cond` (see `read_condition`) for a batch of `x`. Returns `(batch, width)`.

        Raises:
            ValueError: wrong shapes, sizes below 1, unknown `embedding`, what `read_condition` raises.
            TypeError: x or t not floating, sizes that are no integers, what `read_condition` raises.
        """
        if self.embedding not in _EMBEDDINGS:
            raise ValueError(f"embedding must be one of {', '.join(_EMBEDDINGS)}, got {self.embedding!r}")
        check_sizes(self, width=1, features=1)
        check_inputs(x, t)
        seen = read_condition(cond, x, num_classes=self.num_classes, vector_size=self.vector_size)
        dtype = self.dtype or x.dtype
        # 999 t in bfloat16 has steps of 4: the features are never computed below float32.
        level = self.noise_level(at_least_float32(t))
        if level.shape != t.shape:
            raise ValueError(f"noise_level must keep the shape {t.shape} of t, got {level.shape}")
        if self.embedding == "positional":
            features = positional_features(level, self.features)
        elif self.embedding == "fourier":
            features = _FourierFeatures(self.features, self.fourier_scale, name="fourier")(level)
        else:
            features = smooth_features(level, self.frequencies)
        hidden = nn.Dense(self.width, kernel_init=initializer(), dtype=dtype, name="dense_0")(features)
        vector = nn.Dense(self.width, kernel_init=initializer(), dtype=dtype, name="dense_1")(self.activation(hidden))
        if self.num_classes is not None:
            table = nn.Embed(self.num_classes + 1, self.width, embedding_init=nn.initializers.normal(1.0), name="label")
            vector = vector + table(seen["label"]).astype(dtype)
        if "vector" in seen:
            known = absent_is_zero(seen["vector"], seen["present"])  # before the layer for its gradient: 0 NaN is NaN
            known = nn.Dense(self.width, kernel_init=initializer(), dtype=dtype, name="vector")(known)
            vector = vector + absent_is_zero(known, seen["present"])
        return vector


def initializer(scale: float = 1.0) -> nn.initializers.Initializer:
    """Uniform, variance `scale / mean(fan_in, fan_out)`; scale 0 means 1e-10 ("zero, but with a gradient").

    Glorot & Bengio 2010, with the scales of Ho et al. 2020 (arXiv 2006.11239).
    """
    return nn.initializers.variance_scaling(max(scale, 1e-10), "fan_avg", "uniform")


def _sin_cos(value: Array, frequencies: Array | np.ndarray) -> Array:
    angle = value[:, None] * jnp.asarray(frequencies, value.dtype)[None, :]
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)


def check_sizes(module: nn.Module, **least: int) -> None:
    """Raise TypeError or ValueError for a size of a network that is no integer or below its least, or a bad dropout."""
    for name, smallest in least.items():
        value = getattr(module, name)
        if value is not None or type(module).__dataclass_fields__[name].default is not None:
            check_count(value, name, smallest)
    check_real(dropout := getattr(module, "dropout", 0.0), "dropout")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be in [0, 1), got {dropout}")


def check_inputs(x: Array, t: Array) -> None:
    """Raise a TypeError or a ValueError that names what a network cannot take."""
    check_array(x)
    dtype = getattr(t, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"t must be a floating array, got {dtype or type(t).__name__}")
    if t.shape != x.shape[:1]:
        raise ValueError(f"t must have shape {x.shape[:1]}, one time per example of x {x.shape}, got {t.shape}")
