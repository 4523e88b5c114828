"""Configurations: every mistake names the field and what it may be, before anything compiles."""

import json
import math
import pathlib
import re

import pytest
from ml_collections import ConfigDict

from configs.common import defaults
from experiments import build, checks, cli
from jdiff import VP

ROOT = pathlib.Path(__file__).parents[1]
FILES = sorted(p for p in (ROOT / "configs").rglob("*.py") if p.stem not in ("__init__", "common", "song2021"))


@pytest.fixture
def config():
    return cli.load(str(ROOT / "configs" / "smoke.py"))


def _file(tmp_path, body):
    file = tmp_path / "mine.py"
    file.write_text(
        f"from configs.common import defaults\n\n\ndef get_config(mode='full'):\n    c = defaults()\n{body}"
    )
    return str(file)


@pytest.mark.parametrize("mode", ["full", "smoke"])
@pytest.mark.parametrize("file", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_configuration_is_complete_and_can_be_built(file, mode):
    config = cli.load(str(file), mode)
    checks.check(config)
    # What a run folder holds is the same configuration again.
    again = cli.from_dict(json.loads(json.dumps(config.to_dict())))
    checks.check(again)
    assert again.to_json(sort_keys=True) == config.to_json(sort_keys=True)
    assert config.to_dict().keys() == defaults().to_dict().keys()


def test_values_of_the_right_type_are_set(config):
    cli.override(config, "training.steps=7")
    cli.override(config, "optimiser.learning_rate=1")  # an integer is a number
    cli.override(config, "optimiser.cosine=true")
    cli.override(config, "sampling.solver=heun")
    cli.override(config, 'data.test="test[:10%]"')
    for label in ("3", "null", "true"):  # JSON too, but the field is a string
        cli.override(config, f"sampling.label={label}")
        assert config.sampling.label == label
    cli.override(config, "process.options.beta_max=10")
    cli.override(config, 'network.options={"size": "small", "channels": 4}')
    assert config.training.steps == 7 and config.optimiser.cosine is True
    assert config.optimiser.learning_rate == 1.0 and type(config.optimiser.learning_rate) is float
    assert config.sampling.solver == "heun" and config.data.test == "test[:10%]"
    assert build.process(config) == VP(beta_max=10)
    assert config.network.options.to_dict() == {"size": "small", "channels": 4}
    checks.check(config)


def test_options_by_regular_expressions(config, tmp_path):
    """Dots in their names: from the command line, from a file, and back from config.json."""
    expected = {"up_.*/kernel": 0, "stem": None}
    cli.override(config, f"training.sharding.options={json.dumps(expected)}")
    file = "".join(f"    c.training.sharding.options[{name!r}] = {axis}\n" for name, axis in expected.items())
    for given in (config, cli.load(_file(tmp_path, f"{file}    return c\n"))):
        again = cli.from_dict(json.loads(json.dumps(given.to_dict())))
        for copy in (again, ConfigDict(again), again.copy_and_resolve_references()):
            assert copy.training.sharding.options.to_dict() == expected


@pytest.mark.parametrize(
    "text, message",
    [
        ("trainign.steps=3", r"'trainign'.*did you mean training\?"),
        ("training.stpes=3", r"'training.stpes'.*did you mean steps.*There are accumulate, batch_size"),
        ("training.steps.more=3", r"'training.steps.more'.*none below it"),
        ("steps=3", r"unknown configuration field 'steps'.*There are data, likelihood"),
        ("process.options.a.b=3", r"'process.options.a'"),
        ("training.steps", r"field=value, got 'training.steps'"),
        ("training.steps=many", r"training.steps must be of type int, like 20; got 'many'"),
        ("training.steps=1.5", r"training.steps must be of type int.*1.5"),
        ("training.steps=true", r"training.steps must be of type int.*True"),
        ("optimiser.clip=true", r"optimiser.clip must be of type float"),
        ("optimiser.cosine=1", r"optimiser.cosine must be of type bool"),
        ("training=5", r"training must be of type ConfigDict"),
        ("process.options=5", r"process.options must be a JSON object, got 5"),
    ],
)
def test_a_wrong_override_names_the_field_and_its_neighbours(config, text, message):
    before = config.to_json()
    with pytest.raises(ValueError, match=message):
        cli.override(config, text)
    assert config.to_json() == before


def test_a_wrong_file_names_the_field_and_its_neighbours(tmp_path):
    with pytest.raises(ValueError, match=r"'training.step'.*did you mean steps"):
        cli.load(_file(tmp_path, "    c.training.step = 3\n    return c\n"))
    with pytest.raises(ValueError, match=r"'optimizer'.*did you mean optimiser"):
        cli.load(_file(tmp_path, "    c.optimizer = 3\n    return c\n"))
    with pytest.raises(ValueError, match=r"lacks training.steps"):
        cli.load(_file(tmp_path, "    del c.training.steps\n    return c\n"))
    with pytest.raises(ValueError, match=r"loss.weight must be a group of fields, got 'unit'"):
        cli.load(_file(tmp_path, "    del c.loss.weight\n    c.loss.weight = 'unit'\n    return c\n"))
    with pytest.raises((ValueError, TypeError), match=r"steps|int"):
        cli.load(_file(tmp_path, "    c.training.steps = 'many'\n    return c\n"))
    with pytest.raises(FileNotFoundError, match=r"no configuration file .*nowhere.py"):
        cli.load(str(tmp_path / "nowhere.py"))
    (tmp_path / "empty.py").write_text("")
    with pytest.raises(ValueError, match="get_config"):
        cli.load(str(tmp_path / "empty.py"))


def test_a_wrong_config_json_names_the_field(config):
    def changed(change):
        values = json.loads(config.to_json())
        change(values)
        return values

    with pytest.raises(ValueError, match=r"'training.stpes'.*did you mean steps"):
        cli.from_dict(changed(lambda v: v["training"].update(stpes=3)))
    with pytest.raises(ValueError, match=r"lacks data"):
        cli.from_dict(changed(lambda v: v.pop("data")))
    with pytest.raises(ValueError, match=r"seed must be of type int, like 0; got '0'"):
        cli.from_dict(changed(lambda v: v.update(seed="0")))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"process.name": "VPP"}, r"process.name = 'VPP' is unknown.*mean VP.*Rectified"),
        ({"process.options": {"beta": 1.0}}, r"no option 'beta'.*beta_min, beta_max"),
        ({"process.options": {"beta_min": -0.1}}, r"process.options.beta_min must be .*-0.1"),
        ({"process.options": {"beta_min": 30}}, r"beta_min < beta_max, got beta_min = 30"),
        ({"process.options": {"beta_min": "0.1"}}, r"process.options.beta_min.*'0.1'"),
        ({"process.options": {"beta_max": math.nan}}, r"process.options.beta_max.*nan"),
        ({"process.options": {"beta_max": math.inf}}, r"process.options.beta_max.*inf"),
        ({"process.options": {"beta_max": True}}, r"process.options.beta_max.*True"),
        ({"process.options": {"t_min": 1.0}}, r"0 <= t_min < t_max"),
        ({"process.options": {"t_max": 2.0}}, r"t_max <= 1.0, got 2.0"),
        ({"process": {"name": "VE", "options": {"sigma_min": 50.0}}}, r"sigma_min < sigma_max"),
        ({"process": {"name": "VE", "options": {"sigma_min": 0}}}, r"sigma_min > 0"),
        ({"process": {"name": "EDM", "options": {"sigma_min": 100.0}}}, r"sigma_min < sigma_max"),
        ({"process": {"name": "EDM", "options": {"sigma_min": 0}}}, r"sigma_min > 0"),
        ({"process": {"name": "Cosine", "options": {"shift": 0}}}, r"shift > 0"),
        ({"network.name": "dpmpp"}, r"network.name = 'dpmpp' is unknown.*ddpmpp"),
        ({"network.options": {"widht": 3}}, r"network ddpmpp has no option 'widht'"),
        ({"network.options": {"dtype": "float16"}}, r"network dtype = 'float16'.*bfloat16"),
        ({"network.options": {"out_channels": 3}}, r"no option 'out_channels'"),
        ({"network.predict": "noise"}, r"noise.*eps"),
        ({"network.precondition": "level"}, r"network.precondition = 'level'.*mean levels"),
        ({"network.precondition": "levels", "data.dequantise": False}, r"levels.*data.dequantise"),
        ({"loss.weight.name": "min-snr"}, r"loss.weight.name = 'min-snr'.*min_snr"),
        ({"loss.weight.options": {"gamma": 5.0}}, r"loss.weight likelihood has no option 'gamma'; it has none"),
        ({"loss.weight": {"name": "min_snr", "options": {"gamma": 0.0}}}, r"gamma must be positive"),
        ({"loss.times.name": "lognormal"}, r"loss.times.name = 'lognormal'.*log_normal"),
        ({"loss.times.options": {"mean": 0.0}}, r"loss.times importance has no option 'mean'"),
        ({"loss.times": {"name": "log_normal", "options": {"std": -1.0}}}, r"std"),
        ({"loss.times.shift": 0.0}, r"shift must be positive and finite, got 0.0"),
        ({"loss.coupling": "optimal"}, r"loss.coupling = 'optimal'.*optimal_transport"),
        (
            {"loss.name": "maximum_likelihood", "loss.coupling": "optimal_transport"},
            "'maximum_likelihood' has none to pair",
        ),
        (
            {
                "loss.name": "classifier",
                "network.name": "wide_resnet",
                "network.options": {},
                "network.precondition": "none",
            },
            "is not weighted",
        ),
        ({"sampling.negative": "3"}, "'3' is without effect at sampling.guidance = 1"),
        ({"loss.coupling_group": 0}, r"loss.coupling_group must be positive, got 0"),
        ({"data.pairs": "a", "loss.coupling": "optimal_transport"}, r"data.pairs have their noise.*optimal_transport"),
        ({"loss.label_dropout": 1.5}, r"loss.label_dropout.*1.5"),
        ({"optimiser.learning_rate": 0.0}, r"optimiser.learning_rate must be positive"),
        ({"optimiser.learning_rate": math.nan}, r"optimiser.learning_rate must be positive"),
        ({"optimiser.b2": 1.0}, r"b2"),
        ({"optimiser.clip": -1.0}, r"clip"),
        ({"training.steps": 0}, r"training.steps must be positive"),
        ({"training.batch_size": -8}, r"training.batch_size must be positive"),
        ({"training.keep": 0}, r"training.keep must be positive"),
        ({"training.ema_decay": 1.0}, r"training.ema_decay"),
        ({"training.mapping": "vmap"}, r"training.mapping = 'vmap'.*shard_map"),
        ({"likelihood.rtol": 0.0}, r"likelihood.rtol must be positive"),
        ({"likelihood.atol": -1e-5}, r"likelihood.atol must be positive"),
        ({"likelihood.rtol": math.nan}, r"likelihood.rtol must be positive"),
        ({"likelihood.atol": math.inf}, r"likelihood.atol must be positive and finite"),
        ({"likelihood.probes": 0}, r"likelihood.probes must be positive"),
        ({"likelihood.draws": 0}, r"likelihood.draws must be positive"),
        ({"likelihood.divergence": "hutchinson"}, r"likelihood.divergence = 'hutchinson'.*rademacher"),
        ({"likelihood.images": -1}, r"likelihood.images must be finite and not negative"),
        ({"sampling.solver": "huen"}, r"sampling.solver = 'huen'.*mean heun"),
        ({"sampling.grid": "karas"}, r"sampling.grid = 'karas'.*mean karras"),
        ({"sampling.steps": 0}, r"sampling.steps must be positive"),
        ({"sampling.t_min": 2.0}, r"t_min"),
        ({"sampling.eta": -1.0}, r"eta"),
        ({"sampling.number": 0}, r"sampling.number must be positive"),
        ({"data.name": ""}, r"data.name is empty"),
        (
            {
                "data.size": 28,
                "network.name": "ddpmpp",
                "network.options": {"multipliers": (1, 2, 2), "attention": (14, 16)},
            },
            r"attention has heights \[16\], which no level has: images of 28 have levels of 28, 14, 7",
        ),
    ],
    ids=str,
)
def test_what_cannot_be_built_is_refused(config, changes, message):
    checks.check(config)
    for path, value in changes.items():
        *parents, last = path.split(".")
        node = config
        for name in parents:
            node = node[name]
        with node.ignore_type():
            node[last] = ConfigDict(value) if isinstance(value, dict) else value
    with pytest.raises(ValueError, match=message):
        checks.check(config)


def test_labels_need_a_data_set_with_labels(config):
    config.network.conditional = True
    with pytest.raises(ValueError, match=r"network.conditional needs labels, and digits has none"):
        build.network(config, 1, 17, None)
    assert build.network(config, 1, 17, 10).num_classes == 10


def test_values_are_text_or_json_and_never_code(config):
    cli.override(config, "data.name=__import__('os').getcwd()")
    assert config.data.name == "__import__('os').getcwd()"
    for file in [*ROOT.glob("experiments/**/*.py"), *ROOT.glob("jdiff/**/*.py")]:
        found = re.findall(r"\b(?:eval|exec)\(|\bimport (?:pickle|yaml|dill|joblib)\b", file.read_text())
        assert not found, (file, found)
