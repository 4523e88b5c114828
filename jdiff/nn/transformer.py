"""A transformer on image patches, for small images: matrix products only, which CPUs compile and run well."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from jdiff._typing import Array
from jdiff.nn.blocks import check_image
from jdiff.nn.conditioning import SMOOTH_FREQUENCIES, Conditioning, check_inputs, check_sizes, initializer
from jdiff.nn.conditions import Condition, read_condition, space_to_depth, with_image
from jdiff.nn.cross_attention import CrossAttention
from jdiff.nn.input_features import input_features
from jdiff.nn.normalisation import GroupNorm, at_least_float32

__all__ = ["PatchTransformer"]


class PatchTransformer(nn.Module):
    """Attention and MLP blocks on patches, each scaled and shifted by the noise level and label.

        h <- h + dropout(attention(modulate(norm(h))))
        h <- h + dropout(cross_attention(modulate(norm(h)), tokens))        where the condition has tokens
        h <- h + dropout(dense(swish(dense(modulate(norm(h))))))

    modulate(y) = (1 + scale) y + shift with [scale, shift] = dense(emb), zero at the start: the adaptive norm of DiT,
    Peebles & Xie 2023 (arXiv 2212.09748), without its gates. Positions are learned, and so is a bias for each pair of
    them in every head.

    Attributes:
        noise_level: `(batch,) -> (batch,)`, from the time to what `embedding` embeds, log-SNR for "smooth" (see
            `Conditioning`).
        width: channels of a token.
        depth: number of blocks.
        heads: attention heads, a divisor of `width`.
        patch: side of a patch in pixels, a divisor of height and width.
        expansion: hidden units of the MLP over `width`.
        dropout: rate, in training only.
        embedding: "smooth", "positional" or "fourier".
        frequencies: angular frequencies of "smooth".
        fourier_scale: standard deviation of the frequencies of "fourier".
        input_frequencies: exponents n of the features `sin(2^n pi x), cos(2^n pi x)` beside x (see `input_features`).
        num_classes: labels are `0 ... num_classes - 1`, and `num_classes` is the null label. None: no labels.
        vector_size: entries of a vector that is known (see `read_condition`). None: no vector.
        image_channels: channels of an image that is known, of x's height and width; the network sees it beside x, with
            a channel that says whether it is there. None: no image.
        token_size: entries of tokens that are known; each block attends to them after itself. None: no tokens.
        out_channels: channels of the output; None is x's.
        dtype: of the computation, such as bfloat16; None is x's. Parameters are float32, the last layer is in x's.
    """

    noise_level: Callable[[Array], Array]
    width: int = 96
    depth: int = 4
    heads: int = 4
    patch: int = 2
    expansion: int = 2
    dropout: float = 0.0
    embedding: str = "smooth"
    frequencies: tuple[float, ...] = SMOOTH_FREQUENCIES
    fourier_scale: float = 16.0
    input_frequencies: tuple[int, ...] = ()
    num_classes: int | None = None
    vector_size: int | None = None
    image_channels: int | None = None
    token_size: int | None = None
    out_channels: int | None = None
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, x: Array, t: Array, cond: Condition = None, *, train: bool = False) -> Array:
        """Evaluate the network.

        Args:
            x: `(batch, height, width, c)`, of order 1.
            t: `(batch,)`.
            cond: labels `(batch,)`, or a dict of what the network was built for (see `read_condition`); None is the
                null condition. A label out of range gives NaN.
            train: dropout on; `apply` then needs `rngs={"dropout": key}`.

        Returns:
            `(batch, height, width, out_channels)` in the dtype of x.

        Raises:
            ValueError: wrong shapes, a height or width that `patch` does not divide, heads that do not divide `width`,
                sizes below 1, a dropout outside [0, 1), what `read_condition` raises.
            TypeError: x or t not floating, sizes that are no integers, what `read_condition` raises.
        """
        check_sizes(self, width=1, depth=0, heads=1, patch=1, expansion=1, out_channels=1)
        check_inputs(x, t)
        dtype, p = self.dtype or x.dtype, self.patch
        check_image(x.shape, p, "use another patch")
        if self.width % self.heads:
            raise ValueError(f"heads = {self.heads} must divide width = {self.width}")
        batch, rows, columns, channels = x.shape[0], x.shape[1] // p, x.shape[2] // p, x.shape[3]
        tokens = rows * columns

        def dense(units, name, scale=1.0, dtype=dtype):
            return nn.Dense(units, kernel_init=initializer(scale), dtype=dtype, name=name)

        def drop(h):
            return nn.Dropout(self.dropout, deterministic=not train)(h) if self.dropout else h

        sizes = {name: getattr(self, name) for name in ("num_classes", "vector_size", "image_channels", "token_size")}
        seen = read_condition(cond, x, **sizes)
        embedded = {name: seen[name] for name in ("label", "vector") if name in seen}
        emb = Conditioning(
            self.noise_level,
            2 * self.width,
            embedding=self.embedding,
            features=2 * self.width,
            frequencies=self.frequencies,
            fourier_scale=self.fourier_scale,
            num_classes=self.num_classes,
            vector_size=self.vector_size,
            dtype=dtype,
            name="conditioning",
        )(x, t, embedded | {"present": seen["present"]} if embedded else None)
        emb = nn.swish(emb)

        def modulate(h, name):
            norm = GroupNorm(1, affine=False, dtype=dtype)(h.reshape(batch * tokens, self.width)).reshape(h.shape)
            scale, shift = jnp.split(dense(2 * self.width, name, scale=0.0)(emb)[:, None], 2, axis=-1)
            return norm * (1 + scale) + shift

        inputs = input_features(x, self.input_frequencies)
        if "image" in seen:
            inputs = with_image(inputs, seen["image"], seen["present"])
        h = dense(self.width, "stem")(space_to_depth(inputs, p).reshape(batch, tokens, -1))
        positions = self.param("positions", nn.initializers.normal(0.5), (tokens, self.width), jnp.float32)
        h = h + positions.astype(dtype)[None]
        for i in range(self.depth):
            y = dense(3 * self.width, f"block_{i}_qkv")(modulate(h, f"block_{i}_film_0"))
            bias = self.param(f"block_{i}_bias", nn.initializers.zeros, (self.heads, tokens, tokens), jnp.float32)
            y = _attend(y.reshape(batch, tokens, 3, self.heads, self.width // self.heads), bias)
            h = h + drop(dense(self.width, f"block_{i}_proj", scale=0.1)(y))
            if "tokens" in seen:
                y = modulate(h, f"block_{i}_film_tokens")
                y = CrossAttention(self.heads, dtype=dtype, name=f"block_{i}_tokens")(
                    y, seen["tokens"], seen["tokens_mask"] & seen["present"][:, None]
                )
                h = h + drop(y)
            y = nn.swish(dense(self.expansion * self.width, f"block_{i}_dense_0")(modulate(h, f"block_{i}_film_1")))
            h = h + drop(dense(self.width, f"block_{i}_dense_1", scale=0.1)(y))
        h = nn.swish(modulate(h, "head_film"))
        out = self.out_channels or channels
        h = dense(p * p * out, "head", scale=0.0, dtype=x.dtype)(h)
        h = h.reshape(batch, rows, columns, p, p, out).transpose(0, 1, 3, 2, 4, 5)
        return h.reshape(batch, rows * p, columns * p, out)


def _attend(qkv, bias):
    """Softmax attention over tokens, `(batch, tokens, 3, heads, dim) -> (batch, tokens, heads dim)`."""
    q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
    logits = at_least_float32(jnp.einsum("bthd,bshd->bhts", q, k)) * q.shape[-1] ** -0.5
    weights = jax.nn.softmax(logits + bias.astype(logits.dtype)[None], axis=-1).astype(v.dtype)
    return jnp.einsum("bhts,bshd->bthd", weights, v).reshape(*qkv.shape[:2], -1)
