"""One training step as a pure function: parameters, optimiser state, an average of the parameters, and no diffusion."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jdiff._array import check_count, check_integers, check_one_key, check_positive
from jdiff._typing import PyTree

__all__ = [
    "LossFn",
    "TrainState",
    "adam",
    "apply_gradient",
    "example_keys",
    "init_state",
    "learning_rate",
    "make_train_step",
    "mean_gradient",
    "shared_key",
]

LossFn = Callable[[PyTree, jax.Array, Mapping[str, Any]], tuple[jax.Array, Mapping[str, jax.Array]]]


class TrainState(NamedTuple):
    """All that training carries from step to step: arrays only, no functions and no key.

    Attributes:
        step: () int32, number of finished updates.
        params: the network's parameters.
        ema: their exponential moving average, in float32 or wider.
        opt_state: state of the optax transformation.
    """

    step: jax.Array
    params: PyTree
    ema: PyTree
    opt_state: PyTree


def init_state(params: PyTree, tx: optax.GradientTransformation) -> TrainState:
    """State before the first update: step 0, average equal to the parameters.

    Every leaf is a fresh buffer, so that donating the state neither deletes the caller's `params` nor donates one
    buffer twice. May be called under `jax.eval_shape` to plan a state without allocating it.

    Raises:
        TypeError: a leaf of `params` is no array.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if not hasattr(leaf, "dtype"):
            raise TypeError(f"params must be arrays, got {type(leaf).__name__} at {jax.tree_util.keystr(path)!r}")
    copy = lambda tree: jax.tree.map(jnp.copy, tree)
    ema = jax.tree.map(lambda leaf: jnp.array(leaf, dtype=_wide(leaf.dtype)), params)
    return TrainState(jnp.zeros((), jnp.int32), copy(params), ema, copy(tx.init(params)))


def example_keys(key: jax.Array, step: jax.Array | int, index: jax.Array) -> jax.Array:
    """One key per example, a function of (key, step, position in the global batch) and of nothing else.

    `keys[i] = fold_in(fold_in(key, step), index[i])`. Device, process, batch size and mapping do not enter, so that
    resuming and resharding change no noise.

    Args:
        key: one typed threefry key.
        step: () integer.
        index: (batch,) integers.

    Returns:
        Keys, shape (batch,).

    Raises:
        TypeError: `key` is no typed threefry key, or `index` no integers.
        ValueError: `key` is not one key, or `index` not of shape (batch,).
    """
    check_one_key(key)
    check_integers(index, "index")
    if index.ndim != 1:
        raise ValueError(f"index must have shape (batch,), got {index.shape}")
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.fold_in(key, step), index)


def shared_key(key: jax.Array, step: jax.Array | int) -> jax.Array:
    """One key for the whole global batch of a step, the same on every device: for stratified times and the like.

    `fold_in(fold_in(key, step), 2^32 - 1)`: no example has that index, so it is none of `example_keys`.

    Raises:
        TypeError: `key` is no typed threefry key.
        ValueError: `key` is not one key.
    """
    check_one_key(key)
    return jax.random.fold_in(jax.random.fold_in(key, step), jnp.uint32(2**32 - 1))


def make_train_step(
    loss_fn: LossFn,
    tx: optax.GradientTransformation,
    *,
    ema_decay: float,
    ema_warmup: bool = True,
    axis_name: str | tuple[str, ...] | None = None,
    accumulate: int = 1,
) -> Callable[[TrainState, jax.Array, Mapping[str, Any]], tuple[TrainState, dict[str, jax.Array]]]:
    """One update: mean loss over the global batch, its gradient, an optax update, the moving average.

    `mean_gradient`, whose mean is weighted where the batch has weights or a mask, followed by `apply_gradient`. The
    function is pure and unmapped: put it into `jax.jit` over sharded arrays (`axis_name=None`), or into `jax.shard_map`
    or `jax.pmap` with the state replicated, the batch split in equal parts and `axis_name` their axis. All give the
    gradient of the same global mean. Buffer donation belongs to the caller's `jit`; `jdiff.parallel.data_parallel` does
    both.

    Nothing is skipped when the loss or the gradient is not finite: `metrics["finite"]` says so and the caller stops
    (or `tx` is wrapped in `optax.apply_if_finite`).

    Args:
        loss_fn: see `mean_gradient`.
        tx: an optax transformation.
        ema_decay: see `apply_gradient`.
        ema_warmup: see `apply_gradient`.
        axis_name: mapped axis or axes, None under `jit`.
        accumulate: see `mean_gradient`.

    Returns:
        `(state, key, batch) -> (state, metrics)`. `batch` is a mapping with `batch["index"]`, (batch,) integers: each
        example's position in the global batch. `metrics` holds () arrays: `loss`, `grad_norm` (before any clipping in
        `tx`), `finite` (bool: loss and gradient norm are finite) and the loss function's own. While it is traced the
        step raises `TypeError` or `ValueError` for a key, an index, a loss or a metric of the wrong kind.

    Raises:
        ValueError: `ema_decay` outside [0, 1), `accumulate` below 1.
        TypeError: `accumulate` is no integer.
    """
    gradient = mean_gradient(loss_fn, accumulate=accumulate, axis_name=axis_name)
    apply = apply_gradient(tx, ema_decay=ema_decay, ema_warmup=ema_warmup)

    def train_step(state, key, batch):
        params = state.params
        if axis_name is not None:
            # shard_map sums the gradient of a replicated value over the devices; that of a varying one stays local,
            # as in pmap.
            params = jax.lax.pcast(params, axis_name, to="varying")
        grads, metrics = gradient(params, state.step, key, batch)
        if axis_name is not None:
            grads, metrics = jax.lax.pmean((grads, metrics), axis_name)
        return apply(state, grads, metrics)

    return train_step


def mean_gradient(
    loss_fn: LossFn, *, accumulate: int = 1, axis_name: str | tuple[str, ...] | None = None
) -> Callable[[PyTree, jax.Array, jax.Array, Mapping[str, Any]], tuple[PyTree, dict[str, jax.Array]]]:
    """The gradient of the mean loss over a batch, whose noise is a function of (key, step, index).

    With `batch["weight"]`, (batch,) real numbers, with `batch["mask"]`, (batch,) bool, or with both, the loss and the
    per-example metrics are the weighted means `sum(w l) / sum(w)`, w the product of the two, over the *global* batch:
    an example of weight zero changes nothing, whatever device or part it is in (if losses are per example: a
    `jdiff.coupling` within them is not), so that a ragged batch may be filled up
    with any examples whose loss is finite. Where all weights are zero so are loss and gradient. The two names are
    reserved: other masks need another one.

    Args:
        loss_fn: (params, keys, batch) -> (per-example loss (batch,), metrics); keys (batch,), metrics a dict of
            per-example or scalar values, averaged over the batch. The batch has one more entry here, `batch["key"]`:
            the step's `shared_key`. The network's compute dtype is its own matter.
        accumulate: in how many parts the batch is taken, one after the other, their gradients averaged: the same
            numbers from activations of `batch / accumulate` examples. Parts are every `accumulate`-th example, so that
            a batch split over devices stays where it is.
        axis_name: inside `jax.shard_map` or `jax.pmap`, the axis or axes over which the batch is split: weights are
            shares of the sum over all of it. The gradient is that of this device's part, to be averaged over the axis.

    Returns:
        `(params, step, key, batch) -> (gradient, metrics)`: means over the batch, `metrics["loss"]` among them.

    Raises:
        ValueError: `accumulate` below 1; while tracing, a batch that it does not divide, or weights of another shape.
        TypeError: `accumulate` is no integer; while tracing, a mask that is not bool, weights that are not real.
    """
    check_count(accumulate, "accumulate")

    def mean_loss(params, keys, share, batch):
        loss, metrics = loss_fn(params, keys, batch)
        if jnp.shape(loss) != keys.shape:
            raise ValueError(f"loss_fn must return one loss per example, shape {keys.shape}, got {jnp.shape(loss)}")
        if reserved := {"loss", "grad_norm", "finite"} & set(metrics):
            raise ValueError(f"loss_fn's metrics may not use the names {sorted(reserved)}")
        for name, value in metrics.items():
            if jnp.shape(value) not in ((), keys.shape):
                raise ValueError(f"metric {name!r} must have shape () or {keys.shape}, got {jnp.shape(value)}")
        metrics = {"loss": loss, **metrics}
        means = {name: _mean(value, share) for name, value in metrics.items()}
        return means["loss"], means

    def gradient(params, step, key, batch):
        if not isinstance(batch, Mapping) or "index" not in batch:
            raise ValueError(
                'batch must be a mapping with "index", the (batch,) positions in the global batch; '
                f"got {sorted(batch) if isinstance(batch, Mapping) else type(batch).__name__}"
            )
        if "key" in batch:
            raise ValueError('batch may not have an entry "key": the step puts its shared_key there')
        keys = example_keys(key, step, batch["index"])
        shared = shared_key(key, step)
        share = _share(batch, keys.shape, axis_name)
        gradient_of = jax.grad(mean_loss, has_aux=True)
        part = lambda keys, share, batch: gradient_of(params, keys, share, {**batch, "key": shared})
        if accumulate == 1:
            return part(keys, share, batch)
        if len(keys) % accumulate:
            raise ValueError(f"a batch of {len(keys)} does not divide into accumulate = {accumulate} parts")
        split = lambda leaf: leaf.reshape(len(keys) // accumulate, accumulate, *leaf.shape[1:]).swapaxes(0, 1)
        parts = jax.tree.map(split, (keys, share, dict(batch)))

        def add(total, one):
            return jax.tree.map(jnp.add, total, part(*one)), None

        first = part(*jax.tree.map(lambda leaf: leaf[0], parts))
        rest = jax.tree.map(lambda leaf: leaf[1:], parts)
        # XLA:CPU runs backward convolutions inside a loop many times slower than outside.
        total, _ = jax.lax.scan(add, first, rest, unroll=jax.default_backend() == "cpu")
        return jax.tree.map(lambda leaf: leaf / accumulate, total)

    return gradient


def apply_gradient(
    tx: optax.GradientTransformation, *, ema_decay: float, ema_warmup: bool = True
) -> Callable[[TrainState, PyTree, dict[str, jax.Array]], tuple[TrainState, dict[str, jax.Array]]]:
    """The second half of an update: optax's transformation and the moving average.

    `ema <- ema + (1 - d) (params - ema)` with `d = min(ema_decay, (1 + step) / (10 + step))`, step counted before the
    update (the `num_updates` rule of TensorFlow's ExponentialMovingAverage); `ema_warmup=False` is the constant decay
    of Song et al. 2021 (arXiv 2011.13456).

    Args:
        tx: an optax transformation.
        ema_decay: in [0, 1).
        ema_warmup: lower the decay during the first updates.

    Returns:
        `(state, gradient, metrics) -> (state, metrics)`; adds `grad_norm` and `finite` to the metrics.

    Raises:
        ValueError: `ema_decay` outside [0, 1).
    """
    if not 0.0 <= ema_decay < 1.0:
        raise ValueError(f"ema_decay must lie in [0, 1), got {ema_decay}")

    def apply(state, grads, metrics):
        norm = optax.tree.norm(grads)
        metrics = {**metrics, "grad_norm": norm, "finite": jnp.isfinite(metrics["loss"]) & jnp.isfinite(norm)}
        with jax.numpy_dtype_promotion("standard"):
            # optax's Adam mixes dtypes and could not be traced in a session that is strict about its own code.
            updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = _average(state.ema, params, state.step, ema_decay, ema_warmup)
        return TrainState(state.step + 1, params, ema, opt_state), metrics

    return apply


def learning_rate(peak: float, *, warmup: int = 0, total: int | None = None) -> optax.Schedule:
    """Linear warm-up, then constant, or a cosine to zero at `total`.

    `peak min(step / warmup, 1)` (Song et al. 2021, arXiv 2011.13456, warm-up 5000), times
    `(1 + cos(pi (step - warmup) / (total - warmup))) / 2` after the warm-up where `total` is given.

    Args:
        peak: highest rate, > 0.
        warmup: updates of warm-up; 0 for none. With warm-up the first update has rate 0.
        total: updates until the rate reaches zero, > warmup.

    Raises:
        ValueError: a value out of range.
    """
    check_positive(peak, "peak")
    if not 0 <= warmup < math.inf:
        raise ValueError(f"warmup must be >= 0, got {warmup}")
    if total is not None and not total > warmup:
        raise ValueError(f"total must exceed warmup = {warmup}, got {total}")

    def schedule(step):
        step = jnp.asarray(step).astype(jnp.float32)
        rate = peak * jnp.minimum(step / max(warmup, 1), 1.0) if warmup else jnp.full_like(step, peak)
        if total is not None:
            progress = jnp.clip((step - warmup) / (total - warmup), 0.0, 1.0)
            rate = rate * 0.5 * (1.0 + jnp.cos(jnp.pi * progress))
        return rate

    return schedule


def adam(
    rate: float | optax.Schedule,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    clip: float | None = None,
    weight_decay: float = 0.0,
    decay_mask: Callable[[PyTree], PyTree] | None = None,
) -> optax.GradientTransformation:
    """Adam (Kingma & Ba 2015, arXiv 1412.6980) after a clipping of the gradient by its global norm.

    Args:
        rate: learning rate or schedule, e.g. `learning_rate(2e-4, warmup=5000)`.
        b1: decay of the first moment, in [0, 1).
        b2: decay of the second moment, in [0, 1).
        eps: added to the root of the second moment.
        clip: largest global norm of the gradient, > 0; None for no clipping.
        weight_decay: decoupled (Loshchilov & Hutter 2019, arXiv 1711.05101), times the learning rate.
        decay_mask: from the parameters to a tree of bools, True where weights decay; None: everywhere, also on what
            is not trained, such as the frequencies of Fourier features in `jdiff.nn`.

    Raises:
        ValueError: a value out of range.
    """
    for name, value in {"b1": b1, "b2": b2}.items():
        if not 0.0 <= value < 1.0:
            raise ValueError(f"{name} must lie in [0, 1), got {value}")
    if not eps > 0 or not weight_decay >= 0 or (clip is not None and not clip > 0):
        raise ValueError(
            "eps and clip must be positive and weight_decay >= 0, "
            f"got eps={eps}, clip={clip}, weight_decay={weight_decay}"
        )
    parts = [] if clip is None else [optax.clip_by_global_norm(clip)]
    parts.append(optax.scale_by_adam(b1, b2, eps))
    if weight_decay:
        parts.append(optax.add_decayed_weights(weight_decay, decay_mask))
    return optax.chain(*parts, optax.scale_by_learning_rate(rate))


def _average(ema, params, step, decay, warmup):
    # 1 - min(d, (1 + n) / (10 + n)) = max(1 - d, 9 / (10 + n)): no cancellation where d is near 1.
    weight = jnp.float32(1.0 - decay)
    if warmup:
        weight = jnp.maximum(weight, 9.0 / (10.0 + step.astype(jnp.float32)))
    return jax.tree.map(lambda e, p: e + weight.astype(e.dtype) * (p.astype(e.dtype) - e), ema, params)


def _wide(dtype):
    """The dtype to average in: a decay of 0.9999 is lost below float32."""
    return jnp.float32 if jnp.issubdtype(dtype, jnp.floating) and jnp.dtype(dtype).itemsize < 4 else dtype


def _share(batch, shape, axis_name):
    """Weights over their mean in the global batch: means of shares are weighted means, part by part. None: all one."""
    given = {name: batch[name] for name in ("weight", "mask") if name in batch}
    if not given:
        return None
    for name, value in given.items():
        if not hasattr(value, "dtype") or jnp.issubdtype(value.dtype, jnp.complexfloating):
            got = getattr(value, "dtype", type(value).__name__)
            raise TypeError(f"batch[{name!r}] must be an array of real numbers, got {got}")
        if value.shape != shape:
            raise ValueError(f"batch[{name!r}] must have shape {shape}, one number per example, got {value.shape}")
    if "mask" in given and given["mask"].dtype != bool:
        raise TypeError(f'batch["mask"] must be bool, got {given["mask"].dtype}; numbers are a "weight"')
    weight = math.prod(jnp.asarray(value).astype(jnp.float32) for value in given.values())
    mean = jnp.mean(weight)
    mean = mean if axis_name is None else jax.lax.pmean(mean, axis_name)
    return weight / jnp.where(mean == 0, 1.0, mean)


def _mean(value, share):
    dtype = _mean_dtype(value)
    if share is None or not jnp.ndim(value):
        return jnp.mean(value, dtype=dtype)
    return jnp.mean(value.astype(dtype) * share.astype(dtype))


def _mean_dtype(value):
    dtype = jnp.result_type(value)
    return _wide(dtype) if jnp.issubdtype(dtype, jnp.inexact) else jnp.float32
