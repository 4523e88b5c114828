"""What the fuzz of tests/test_fuzz_*.py found, one case each; and values: NaN, huge ones, no examples, broken files."""

import collections
import dataclasses

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fuzzing import FAST
from hypothesis import strategies as st

import jdiff
from jdiff import (
    bounds,
    checkpoint,
    cnf,
    conditions,
    control,
    coupling,
    data,
    editing,
    grid_search,
    guidance,
    levels,
    losses,
    nn,
    operators,
    parallel,
    processes,
    saturation,
    sde,
    solvers,
    times,
    training,
    transforms,
)
from jdiff.importers import flax_msgpack, score_sde, score_sde_pytorch

VP, KEY = jdiff.VP(), jax.random.key(0)
X, T = jnp.linspace(-1.0, 1.0, 6).reshape(3, 2), jnp.full(3, 0.5)
TS, UP = jnp.asarray([1.0, 0.5, 0.1]), jnp.asarray([0.1, 0.5, 1.0])
T8 = transforms.DataTransform(8)
shrink = lambda x, t: -x
total = lambda z: -jnp.sum(z)
one = jnp.ones(1)
HEUN = solvers.heun(jdiff.probability_flow(VP, shrink))
MANAGER = object.__new__(checkpoint.Manager)
MANAGER.read_only, MANAGER.every = False, 1
MANAGER.all_steps = list
IMAGES = np.ones((1, 2, 2, 1), np.uint8)
SOURCE = data.from_arrays(IMAGES)
call = lambda net: net.init(KEY, IMAGE, jnp.ones(1))
IMAGE = jnp.ones((1, 4, 4, 1))
mask = operators.mask(jnp.ones((1, 2)), (2,))
run = lambda solver, key=None: solvers.integrate(key, solver, X, TS)

# What broadcast in silence.
BROADCAST = {
    "prior of a likelihood": (lambda: jdiff.log_likelihood(KEY, VP, shrink, X, prior_log_prob=total), "prior_log_prob"),
    "prior of a CNF": (lambda: cnf.maximum_likelihood(KEY, VP, shrink, X, TS[::-1], prior_log_prob=total), "prior_log"),
    "prior of a bound": (lambda: bounds.density_bound(KEY, VP, shrink, X, prior_log_prob=total), "prior_log_prob"),
    "eps-field of a bound": (lambda: bounds.density_bound(KEY, VP, lambda x, t: jnp.sum(x), X, predict="eps"), "must"),
    "eta of reverse": (lambda: sde.reverse(VP, shrink, eta=one).drift(X, T), "eta must be a scalar"),
    "eta of DDIM": (lambda: run(solvers.ddim(VP, shrink, one), KEY), "eta must be a scalar"),
    "eta of 2M": (lambda: run(solvers.dpmpp_2m(VP, shrink, one), KEY), "eta must be a scalar"),
    "mix": (lambda: saturation.rescale(VP, one, predict="x0")(X, X, X, T), "mix must be a scalar"),
    "weight": (lambda: editing.slerp(X, X, one), "weight must be a scalar"),
    "edit": (
        lambda: editing.edit_latent(solvers.heun(jdiff.probability_flow(VP, shrink)), X, TS, lambda z: z[:1]),
        "edit",
    ),
    "matrix": (lambda: operators.conjugate_gradients(lambda u: u[..., :1], X, 2), "matrix must return"),
    "levels": (lambda: bounds.decode(VP, X, T, jnp.zeros((1, 2), int), T8), "levels must have the shape of z"),
    "decoded mean": (lambda: bounds.decode_cells(X[:1], 0.1, jnp.zeros((3, 2), int), T8), "levels must have the shape"),
    "label": (lambda: losses.label_log_prob(X, jnp.zeros(1, int)), "label must have shape"),
    "std of a measurement": (lambda: control.dps(VP, shrink, lambda x: x, X, one)(X, T), "std must be a scalar"),
    "residual": (lambda: operators.solve(mask, X[0], 1.0, 1.0), "residual|y must fit"),
    "logits": (lambda: levels.level_field(VP, lambda x, t: jnp.zeros((1, 24)), jnp.zeros((2, 4)))(X, T), "logits"),
    "any coefficient": (lambda: jdiff._array.lincomb((one, X)), "a coefficient must be a scalar or have shape"),
}
# What was taken as if it were something else, or ended inside of JAX.
TAKEN = {
    "half a step": (lambda: times.linear(VP, 1.5), "n must be an integer"),
    "half a candidate": (
        lambda: grid_search.best_grid(VP, shrink, jnp.zeros((3, 2, 2)), TS, 1.5),
        "n must be an integer",
    ),
    "rho": (lambda: times.karras(VP, 3, rho=np.inf), "rho must be positive and finite"),
    "std": (lambda: times.log_normal(KEY, VP, jnp.arange(3), 3, std=np.nan), "std must be positive"),
    "mean": (lambda: times.logit_normal(KEY, VP, jnp.arange(3), 3, mean=np.nan), "mean must be finite"),
    "keys for a batch": (lambda: times.uniform(jax.random.split(KEY, 3), VP, jnp.arange(3), 3), "key must be one key"),
    "index": (lambda: times.stratified(KEY, VP, jnp.ones(3), 3), "index must be an array of integers"),
    "total": (lambda: times.stratified(KEY, VP, jnp.arange(3), 0), "total must be at least 1"),
    "complex times": (lambda: processes.log_snr(VP, 1j * T), "t must be a real number"),
    "a negative size": (lambda: processes.prior_sample(KEY, VP, (3, -2)), "shape must be"),
    "no entries": (lambda: jdiff.log_likelihood(KEY, VP, shrink, jnp.zeros((3, 0))), "x must have entries"),
    "no tolerance": (lambda: solvers.langevin(shrink, snr=np.inf), "snr must be positive and finite"),
    "a path the other way": (lambda: solvers.brownian(KEY, VP, t_min=0.5, t_max=0.1), "t_min < t_max"),
    "an endless range": (lambda: saturation.threshold(VP, shrink, predict="x0", high=np.inf), "both finite"),
    "a half draw": (lambda: bounds.level_bound(KEY, VP, shrink, jnp.zeros((3, 2), int), T8, ts=TS, draws=1.5), "draws"),
    "a rate of 2": (lambda: conditions.drop_condition(jax.random.split(KEY, 3), X, X, 2), "rate must be a probability"),
    "labels": (lambda: coupling.optimal_transport(X, X, labels=T), "labels must be an array of integers"),
    "weight decay": (lambda: training.adam(1e-3, weight_decay=np.nan), "weight_decay"),
    "parts": (lambda: training.mean_gradient(None, accumulate=1.5), "accumulate must be an integer"),
    "sigma_data": (lambda: losses.edm(np.nan), "sigma_data must be positive"),
    "gamma": (lambda: losses.min_snr(np.nan), "gamma must be positive"),
    "start": (lambda: jdiff.dequantisation.start_time(VP, T8, np.inf), "tau must be positive"),
    "no folder": (lambda: checkpoint.open_manager(""), "directory must not be empty"),
    "half a checkpoint": (lambda: checkpoint.open_manager(".", keep=1.5), "keep must be an integer"),
    "a list of items": (lambda: checkpoint.save(MANAGER, 1, [X]), "items must map names"),
    "an item outside": (lambda: checkpoint.save(MANAGER, 1, {"../a": X}), "items must have words for names"),
    "a step of no items": (lambda: checkpoint.save(MANAGER, 1, {"step": None}), "step.* must be an integer"),
    "a leaf below a leaf": (lambda: checkpoint.save(MANAGER, 1, {"a": {"b": X, "b/c": X}}), "lies below another"),
    "a leaf above one": (
        lambda: checkpoint.save(MANAGER, 1, {"a": collections.OrderedDict([("b/c", X), ("b", X)])}),
        "another one below",
    ),
    "a meta without names": (lambda: checkpoint.save(MANAGER, 1, {"meta": [1]}), "meta must be a JSON object"),
    "no manager": (lambda: checkpoint.restore(None, {}), "manager must be what open_manager returns"),
    "a half class": (lambda: data.from_arrays(IMAGES, [0], classes=2.5), "classes must be an integer"),
    "rows of two lengths": (lambda: data.from_arrays([[1], [1, 2]]), "images of arrays/train must be an array"),
    "a slice of a source": (lambda: SOURCE[:1], "position must be an integer"),
    "a half batch": (lambda: data.batches(SOURCE, 1.5, seed=0), "batch_size must be an integer"),
    "no source": (lambda: data.evaluation_batches(IMAGES, 1), "source must be a Source"),
    "no name": (lambda: data.load(None, "train"), "name must be a string"),
    "a stream that is open": (lambda: flax_msgpack.read(0), "path must be a path"),
    "no network": (lambda: score_sde.rename({}, None), "module must be a UNet"),
    "no stem": (lambda: score_sde.restore_names({}, nn.UNet(shrink)), "stem/kernel is missing in params"),
    "tensors without names": (lambda: score_sde_pytorch.to_reference([X], nn.UNet(shrink)), "tensors must map names"),
    "half a device": (lambda: parallel.data_mesh(fsdp=1.5), "fsdp must be an integer"),
    "a mesh that is a list": (lambda: parallel.shard_batch(X, jax.devices()), "mesh must be a jax.sharding.Mesh"),
    "an axis from the end": (lambda: parallel.shard_batch(X, parallel.data_mesh(), axis=-1), "axis must be at least 0"),
    "another tree": (lambda: parallel.place({"a": X}, {"b": None}), "sharding must have the structure of tree"),
    "half a process": (lambda: parallel.start_processes("h:1", 1.5, 0), "processes must be an integer"),
    "no parameters": (lambda: training.init_state({"a": 1.5}, None), "params must be arrays"),
    "a shared key of two": (lambda: training.shared_key(jax.random.split(KEY), 0), "key must be one key"),
    "no patches": (lambda: nn.image_tokens(X.reshape(1, 3, 2, 1), 0), "patch must be at least 1"),
    "no heads": (lambda: call(nn.PatchTransformer(lambda t: t, heads=0)), "heads must be at least 1"),
    "no levels": (lambda: call(nn.UNet(lambda t: t, multipliers=())), "multipliers must have an entry"),
    "a dropout of all": (lambda: call(nn.ResidualMLP(lambda t: t, dropout=np.nan)), "dropout must be in"),
    "channels of no axis": (
        lambda: nn.ResidualMLP(lambda t: t, out_channels=1).init(KEY, T, T),
        "out_channels is the size of the last axis, which x of shape .* does not have",
    ),
    "a flow without a bound": (lambda: nn.CouplingFlow(bound=0.0).init(KEY, X), "bound must be positive"),
    "a flow of integers": (lambda: nn.CouplingFlow().init(KEY, jnp.zeros((3, 2), int)), "x must be floating point"),
    "a size with a typo": (lambda: nn.read_condition(None, X, num_class=3), "sizes must be num_classes"),
    "a condition of words": (lambda: nn.read_condition("x", X, num_classes=3), "cond must hold arrays"),
    "half a null label": (lambda: conditions.with_null(jnp.arange(3), 1.5), "num_classes must be an integer"),
    "noise of two keys": (
        lambda: solvers.white(jax.random.split(KEY), X, 1.0, 0.5),
        "keys must be one key per example",
    ),
    "two masks": (lambda: operators.mask(jnp.ones((2, 2)), (2,)).forward(X), "known must have one mask or one for"),
    "a complex mask": (lambda: operators.mask(jnp.ones((1, 2), complex), (2,)), "known must be of real numbers"),
    "a complex kernel": (lambda: operators.blur((4, 4, 1), jnp.ones((1, 3), complex)), "kernel must be of real"),
    "a grid the other way": (lambda: editing.edit_latent(HEUN, X, UP), "ts must decrease here, but it increases"),
    "a complex prior": (
        lambda: levels.level_field(VP, shrink, jnp.ones((2, 4), complex)),
        "log_prior must be floating",
    ),
    "levels of no pixels": (lambda: T8.rescale(jnp.zeros((3, 0), int)), "x must have entries in each example"),
    "infinite times": (lambda: solvers.integrate(None, HEUN, X, np.full(2, np.inf, np.float32)), "strictly monotone"),
    "no array": (lambda: processes.perturb(VP, X, None, T), "eps must be one array"),
}


@pytest.mark.parametrize("name", [*BROADCAST, *TAKEN])
def test_what_the_fuzz_found_is_refused(name):
    call, message = (BROADCAST | TAKEN)[name]
    with pytest.raises((ValueError, TypeError), match=message):
        jax.eval_shape(
            lambda: jax.tree.map(jnp.asarray, [leaf for leaf in jax.tree.leaves(call()) if not callable(leaf)])
        )


@pytest.mark.parametrize("processes", [1, 2])
def test_a_process_may_have_one_example_of_a_batch(processes):
    """Grain counted batches of one in floats, which overflow: (2^63 - 1) / 1."""
    pytest.importorskip("grain")
    source = data.from_arrays(np.arange(3, dtype=np.uint8).reshape(3, 1, 1, 1))
    drawn = [
        data.batches(source, processes, seed=0, process_index=i, process_count=processes) for i in range(processes)
    ]
    whole = data.batches(source, 6, seed=0)
    seen = [next(part)["image"].ravel() for _ in range(6 // processes) for part in drawn]
    np.testing.assert_array_equal(np.concatenate(seen), next(whole)["image"].ravel())


def test_what_is_right_was_refused():
    """Calls that ended in an error although nothing is wrong with them."""

    # Inside jit JAX's own comparison of a known number is not known.
    def guided(x, t):
        return control.dps(VP, shrink, lambda x: x, X, 0.1)(x, t)

    def bound(levels):
        return bounds.level_bound(KEY, VP, shrink, levels, T8, ts=np.asarray(TS), draws=2).value

    def costs(path):
        return grid_search.step_costs(VP, shrink, path, TS)

    def clipped(x, t):
        return saturation.threshold(VP, shrink, predict="x0", quantile=0)(x, t)

    # Labels of any integers, in NumPy 0 * inf.
    logits, label = (lambda x, t: jnp.zeros((3, 5))), jnp.zeros(3, jnp.uint8)
    assert jax.eval_shape(lambda: losses.classification(KEY, logits, VP, X, T, label))[1].shape == (3,)
    infinite = np.full((3, 2), np.inf, np.float32)
    assert jax.eval_shape(lambda: jdiff.log_likelihood(KEY, VP, shrink, infinite)).log_prob.shape == (3,)
    assert jax.eval_shape(lambda: cnf.maximum_likelihood(KEY, VP, shrink, infinite, UP))[0].shape == (3,)

    assert jax.eval_shape(guided, X, T).shape == X.shape
    assert jax.eval_shape(bound, jnp.zeros((3, 2), int)).shape == (3,)
    assert jax.eval_shape(costs, jnp.zeros((3, 4, 2), jnp.float16)).shape == (3, 3)
    assert jax.eval_shape(clipped, X, T).shape == X.shape


def test_no_examples_are_no_results():
    empty = jnp.zeros((0, 2))
    solver = solvers.deis(VP, shrink)
    assert jax.eval_shape(lambda x: solvers.integrate(None, solver, x, TS)[0], empty).shape == (0, 2)
    found = jax.eval_shape(lambda x: jdiff.log_likelihood(KEY, VP, lambda x, t: -x, x), empty)
    assert [leaf.shape for leaf in found] == [(0,), (0, 2), (0,), (0,), (0,)]
    assert losses.denoising(KEY, shrink, VP, empty, 0.5, predict="eps").shape == (0,)
    with pytest.raises(ValueError, match="batch >= 1"):
        jdiff.sample(KEY, VP, solver, (0, 2), TS)


EACH = jax.random.split(KEY, 3)
# Traced once for all values.
OF_EXAMPLES = {
    "loss": jax.jit(lambda x: losses.denoising(EACH, shrink, VP, x, T, predict="eps")),
    "step": jax.jit(lambda x: solvers.integrate(EACH, solvers.dpmpp_2m(VP, shrink, 1.0), x, TS)[0]),
}
LIKELIHOOD = jax.jit(lambda x: jdiff.log_likelihood(EACH, VP, shrink, x, max_steps=50))


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e30], ids=str)
def test_a_value_that_is_not_finite_or_huge_stays_in_its_example(value):
    broken = X.at[1, 0].set(value)
    found, usual = LIKELIHOOD(broken), LIKELIHOOD(X)
    assert found.failed[1] and np.isnan(found.log_prob[1]) and not found.failed[::2].any()
    np.testing.assert_array_equal(found.log_prob[::2], usual.log_prob[::2])
    for of_examples in OF_EXAMPLES.values():
        np.testing.assert_array_equal(of_examples(broken)[::2], of_examples(X)[::2])


@hypothesis.given(
    st.binary(max_size=64) | st.binary(max_size=32).map(lambda tail: b"\x82\xa4step\x01\xaaparams_ema" + tail)
)
@hypothesis.settings(FAST, max_examples=100)
def test_bytes_that_are_no_checkpoint_are_refused(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "checkpoint"
    path.write_bytes(data)
    with pytest.raises(ValueError, match="is not a whole flax checkpoint"):
        flax_msgpack.read(path)


# What the checks refused, or changed, at first.


def test_a_class_that_inherits_from_process_sets_its_times():
    """Times that are fields without a default, and attributes that are set."""

    @dataclasses.dataclass(frozen=True)
    class Fields(jdiff.Process):
        t_min: float
        t_max: float

        def marginal(self, t):
            return 1 - t, t

    class Attributes(jdiff.Process):
        def __init__(self):
            self.t_min, self.t_max = 1e-3, 1.0

        def marginal(self, t):
            return 1 - t, t

    for process in (Fields(1e-3, 1.0), Attributes()):
        assert isinstance(process, jdiff.Process)
        np.testing.assert_array_equal(times.linear(process, 4), times.linear(jdiff.Rectified(), 4, t_min=1e-3))


def test_a_quantile_is_not_rounded_to_half_precision():
    """0.999 is 1 in bfloat16: the largest entry would be the threshold. bfloat16 of x0 itself costs less than 1e-2."""
    x = jax.random.normal(KEY, (2, 32, 32, 3))
    bounded = jax.jit(lambda x: saturation.threshold(VP, lambda x, t: 3 * x, predict="x0", quantile=0.999)(x, 0.5))
    expected, ours = (np.abs(np.asarray(bounded(x), np.float32)).mean() for x in (x, x.astype(jnp.bfloat16)))
    assert abs(ours / expected - 1) < 1e-2
    largest = saturation.threshold(VP, lambda x, t: 3 * x, predict="x0", quantile=1.0)(x, 0.5)
    assert np.abs(np.asarray(largest)).mean() < 0.97 * expected


def test_a_bound_in_half_precision_keeps_its_times():
    """Times just below 1, rounded to bfloat16, are 1, where a score says nothing of x0."""
    process, x = jdiff.Cosine(), 0.5 * jax.random.normal(KEY, (3, 4))
    exact = jdiff.analytic.gaussian(process, jnp.zeros(4), 0.5)
    field = lambda x, t: exact.score(x.astype(jnp.float32), t.astype(jnp.float32)).astype(x.dtype)
    bound = jax.jit(lambda x: bounds.density_bound(KEY, process, field, x, predict="score", draws=64))
    half = bound(x.astype(jnp.bfloat16)).value
    assert np.isfinite(np.asarray(half)).all()


def test_cells_are_decoded_in_half_precision_too():
    mean, std = 0.3 * X, jnp.full(3, 0.1)
    decode = jax.jit(lambda mean: bounds.decode_cells(mean, std, jnp.full((3, 2), 4), T8))
    whole, half = (decode(m) for m in (mean, mean.astype(jnp.bfloat16)))
    assert half.dtype == jnp.float32
    np.testing.assert_allclose(half, whole, rtol=0.05)


def test_numbers_of_jax_are_numbers():
    """Ends of a Brownian path that are traced, counts that are integers of JAX; True is no count."""
    noise = lambda t_min: solvers.brownian(KEY, VP, t_min=t_min)(None, X, 0.7, 0.3)
    np.testing.assert_allclose(jax.jit(noise)(0.1), noise(0.1), rtol=1e-5)
    t, _ = times.uniform(KEY, VP, jnp.arange(3), jnp.int32(3))
    np.testing.assert_array_equal(t, times.uniform(KEY, VP, jnp.arange(3), 3)[0])
    with pytest.raises(TypeError, match="n must be an integer, got True"):
        times.linear(VP, True)
    with pytest.raises(ValueError, match=r"rho must be one number, got shape \(3,\)"):
        times.karras(VP, 4, rho=jnp.ones(3))


def test_a_measurement_may_be_of_integers_and_a_scale_on_or_off():
    guided = lambda y: control.pseudoinverse(VP, shrink, mask, y, 0.1)(X, T)
    np.testing.assert_array_equal(guided(jnp.ones((3, 2), jnp.int32)), guided(jnp.ones((3, 2))))
    on = guidance.autoguidance(shrink, lambda x, t: x, lambda t: t < 0.6)(X, T)
    np.testing.assert_array_equal(on, -X)


def test_what_checks_had_refused_although_it_fits():
    """Integers of NumPy, lists of traced labels, a traced null label, multipliers in an array, a mesh of no devices."""
    levels = data.from_arrays(IMAGES, levels=np.int64(8)).levels
    assert type(levels) is int and transforms.DataTransform(levels).rescale(IMAGES).shape == IMAGES.shape
    net = nn.ResidualMLP(lambda t: t, width=4, depth=1, num_classes=3)
    params = jax.jit(net.init)(KEY, X[:2], T[:2])["params"]
    labelled = jax.jit(lambda *labels: net.apply({"params": params}, X[:2], T[:2], {"label": [*labels]}))
    np.testing.assert_allclose(labelled(0, 1), labelled(*jnp.asarray([0, 1])))
    _, null = jax.jit(conditions.with_null)(jnp.arange(3), 10)
    np.testing.assert_array_equal(null, 10)
    jax.eval_shape(nn.UNet(lambda t: t, channels=4, groups=2, multipliers=np.array([1, 2])).init, KEY, IMAGE, one)
    planned = parallel.state_sharding({"w": X}, jax.sharding.AbstractMesh((2,), ("fsdp",)), min_size=1)
    assert planned["w"].spec == jax.sharding.PartitionSpec(None, "fsdp")


def test_conditions_and_dropout_that_do_not_fit_are_named():
    net = nn.ResidualMLP(lambda t: t, width=4, depth=1, num_classes=3)
    keys = {"dropout": jax.random.split(KEY, 3)}
    with pytest.raises(ValueError, match=r"cond must have the batch of x, \(3,\), got \(\)"):
        nn.as_field(net, {}, cond=[0, 1, 2], train=True, rngs=keys)(X, T)
    with pytest.raises(TypeError, match="dropout must be a real number"):
        jax.eval_shape(nn.PatchTransformer(lambda t: t, dropout=None).init, KEY, IMAGE, one)
