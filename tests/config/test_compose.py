import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from llada_megatron.config import rules
from llada_megatron.config.compose import (
    CONFIG_DIR,
    compose,
    differences,
    load,
    model_of,
    resolve,
    save,
    tree_of,
)
from llada_megatron.config.errors import BadInput
from llada_megatron.config.schema import Denominator, RotaryScalingConfig

EXPERIMENTS = sorted(path.stem for path in (CONFIG_DIR / "experiment").glob("*.yaml"))
MODELS = sorted(path.stem for path in (CONFIG_DIR / "model").glob("*.yaml"))
PARITY = ["experiment=parity"]


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_composes_and_keeps_the_rules(experiment):
    config = compose([f"experiment={experiment}"])
    schedule = rules.check(config)
    assert schedule.total_steps > 0


@pytest.mark.parametrize("model", MODELS)
def test_every_model_fits_a_run(model):
    is_dlcm = OmegaConf.load(CONFIG_DIR / "model" / f"{model}.yaml").get("family") == "dlcm"
    rules.check(compose([*(["experiment=dlcm_parity"] if is_dlcm else PARITY), f"model={model}"]))


@pytest.mark.parametrize(
    ("override", "names"),
    [
        ("optimizer.learning_rate=1", "learning_rate"),
        ("diffusion.embedding_noise.sigm=1", "sigm"),
        ("difusion.weight=flat", "difusion"),
        ("diffusion.weight=invers", "invers"),
        ("layout.tp=two", "two"),
        ("schedule.stages=[{name: a, blocksize: '4', tokens: 1}]", "blocksize"),
        ("experiment=no_such_experiment", "no_such_experiment"),
    ],
)
def test_a_typo_fails_at_composition(override, names):
    with pytest.raises(BadInput) as caught:
        compose([*PARITY, override] if not override.startswith("experiment") else [override])
    causes = f"{caught.value} {caught.value.__cause__}"
    assert names in causes


def test_a_value_that_an_experiment_must_set_is_named():
    with pytest.raises(BadInput, match=r"run\.name is not set"):
        compose([])


def test_strings_become_members_and_interpolations_are_resolved():
    config = compose([*PARITY, "diffusion.denominator=masked", "run.name=x"])
    assert config.diffusion.denominator is Denominator.masked
    assert config.schedule.stages[0].objective == "diffusion"
    assert config.run.dir == "runs/x"


def test_save_and_load_return_the_same_configuration(tmp_path):
    config = compose([*PARITY, "diffusion.t_per=block", "evaluation.block_sizes=['4', full]"])
    save(config, tmp_path / "config.yaml")
    assert load(tmp_path / "config.yaml") == config
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


def test_load_refuses_a_key_that_nobody_knows(tmp_path):
    save(compose(PARITY), tmp_path / "config.yaml")
    text = (tmp_path / "config.yaml").read_text()
    (tmp_path / "config.yaml").write_text(text.replace("clip_grad:", "clip_gradient:"))
    with pytest.raises(BadInput, match="clip_gradient"):
        load(tmp_path / "config.yaml")


def test_differences_name_exactly_the_leaves_that_differ():
    saved = compose(PARITY)
    assert differences(saved, compose(PARITY)) == []
    now = compose([*PARITY, "optimizer.lr=0.5", "diffusion.weight=flat", "data.path=[a, b]"])
    assert differences(saved, now) == [
        "data.path[0]: runs/data/python -> a",
        "data.path[1]: absent -> b",
        "diffusion.weight: inverse -> flat",
        "optimizer.lr: 0.001 -> 0.5",
    ]


def test_a_layout_starts_as_few_processes_as_its_axes_ask_for():
    axes = ["layout.tp=2", "layout.pp=2", "layout.ep=4"]
    assert compose(["experiment=parity"]).layout.processes == 1
    assert compose(["experiment=parity", *axes]).layout.processes == 8
    assert compose(["experiment=parity", *axes, "layout.processes=16"]).layout.processes == 16


@pytest.mark.parametrize("content", [b"5", b"[1, 2]", b"a: [\n", b"\xff\xfe\x00", b"run: 3", b"seed: ${"])
def test_a_file_that_is_no_configuration_is_bad_input(tmp_path, content):
    (tmp_path / "config.yaml").write_bytes(content)
    with pytest.raises(BadInput):
        load(tmp_path / "config.yaml")


def test_a_broken_file_of_the_user_s_own_is_bad_input(tmp_path, monkeypatch):
    (tmp_path / "configs" / "experiment").mkdir(parents=True)
    (tmp_path / "configs" / "experiment" / "mine.yaml").write_text("run: [\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadInput, match=r"mine\.yaml"):
        compose(["experiment=mine"])


def test_the_tree_of_a_configuration_is_omegaconfs():
    config = compose([*PARITY, "model.rotary_scaling.type=linear", "model.rotary_scaling.factor=2"])
    tree = tree_of(config)
    assert tree == OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True)
    assert type(tree["model"]["rotary_scaling"]["type"]) is str


@pytest.mark.parametrize("override", ["layout.tp=[", "layout.tp", "layout[=3", "=", "layout.tpp=1"])
def test_an_override_of_a_saved_configuration_that_means_nothing_is_bad_input(override):
    with pytest.raises(BadInput):
        resolve({"run": {"name": "x"}}, [override])


def test_a_saved_model_has_defaults_for_what_came_later_and_keeps_what_it_says():
    scaling = ["model.rotary_scaling.type=linear", "model.rotary_scaling.factor=2"]
    model = compose([*PARITY, *scaling]).model
    tree = json.loads(json.dumps(asdict(model)))
    assert model_of(Path("here"), {"model": tree}) == model
    del tree["rotary_scaling"]
    assert model_of(Path("here"), {"model": tree}) == replace(model, rotary_scaling=RotaryScalingConfig())
    with pytest.raises(BadInput, match="nonesuch"):
        model_of(Path("here"), {"model": tree | {"nonesuch": 1}})
