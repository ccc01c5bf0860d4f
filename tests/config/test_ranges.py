"""Every setting states what it may be, and one function refuses the rest."""

import math
import re
from copy import deepcopy
from dataclasses import is_dataclass
from enum import Enum
from functools import cache
from typing import get_args, get_origin

import pytest
from omegaconf import OmegaConf

from llada_megatron.config.compose import compose, resolve
from llada_megatron.config.errors import BadInput
from llada_megatron.config.ranges import LARGEST, Range, check_values, hints_of, leaves, rules_of, text
from llada_megatron.config.schema import Config, RotaryScalingConfig

FREE_TEXT = {
    "run.allow_change[]",
    "training.freeze[]",  # patterns of names that the model must have, in training/frozen.py
    "model.family",  # of FAMILIES, in formulas_of
    "data.cache_dir",
    "schedule.stages[].objective",  # of OBJECTIVES, in Schedule
    "checkpoint.copy_to",
    "checkpoint.init_from",
    "logging.wandb_project",
    "cluster.name",
    *(f"slurm.{name}" for name in ("account", "partition", "qos", "constraint", "image", "python")),
    *(f"slurm.{name}[]" for name in ("options", "setup", "mounts")),
}
"""Text that is not one of a few; a new setting belongs here, in choices.py, or under a rule of ranges.py."""


def stated(group: type, prefix: str = ""):
    """(key, bare type, rules) of every leaf that a schema has; `[]` for an element of a list."""
    for name, hint in hints_of(group).items():
        yield from _stated(f"{prefix}{name}", hint)


def _stated(key: str, hint):
    bare, rules = rules_of(hint)
    if is_dataclass(bare):
        yield from stated(bare, f"{key}.")
    elif get_origin(bare) is list:
        yield from _stated(f"{key}[]", get_args(bare)[0])
    else:
        yield key, bare, rules


STATED = list(stated(Config))
NUMBERS = {key: (bare, rules) for key, bare, rules in STATED if bare in (int, float)}


@cache
def sound() -> Config:
    """Every list of numbers has an element."""
    config = compose(["experiment=parity", "data.weights=[1]", "layout.pipeline=[4]"])
    config.schedule.stages[0].weights = [1.0]
    config.schedule.stages[0].rotary_scaling = RotaryScalingConfig()
    return config


def with_values(key: str, value: object) -> Config:
    """A sound run but for one leaf."""
    config = deepcopy(sound())
    *groups, name = re.sub(r"\[\]", ".0", key).split(".")
    node = config
    for part in groups:
        node = node[0] if part == "0" else getattr(node, part)
    if name == "0":
        node[0] = value
    else:
        setattr(node, name, value)
    return config


def test_every_number_states_its_range():
    assert len(NUMBERS) > 60
    assert [key for key, (_, rules) in NUMBERS.items() if not any(isinstance(r, Range) for r in rules)] == []


def test_every_text_is_one_of_a_few_or_says_what_it_may_be():
    loose = {key for key, bare, rules in STATED if bare is str and rules in ([], [text])}
    assert loose == FREE_TEXT
    assert all(rules for _, bare, rules in STATED if bare is str)
    assert {bare for _, bare, _ in STATED if bare not in (int, float, str, bool)} == {
        bare for _, bare, _ in STATED if isinstance(bare, type) and issubclass(bare, Enum)
    }


def limits(rule: Range, kind: type):
    """(number inside, number just outside) at both ends of a range."""
    step = (lambda n, to: n + (1 if to > 0 else -1)) if kind is int else math.nextafter
    if rule.at_least is not None:
        yield kind(rule.at_least), step(kind(rule.at_least), -math.inf)
    if rule.above is not None:
        yield step(kind(rule.above), math.inf), kind(rule.above)
    if rule.below is not None:
        yield step(kind(rule.below), -math.inf), kind(rule.below)
    else:
        largest = kind(LARGEST[kind] if rule.at_most is None else rule.at_most)
        yield largest, step(largest, math.inf)


@pytest.mark.parametrize("key", NUMBERS)
def test_a_number_is_refused_on_both_sides_of_its_range_and_where_it_is_no_number(key):
    kind, rules = NUMBERS[key]
    (ends,) = (list(limits(rule, kind)) for rule in rules)
    assert len(ends) == 2
    place = key.replace("[]", "[0]")
    config = with_values(key, ends[0][0])
    for inside, outside in ends:
        check_values(with_values(key, inside))
        with pytest.raises(BadInput, match=re.escape(f"{place}={outside} is out of range: give a number ")):
            check_values(with_values(key, outside))
    for nothing in () if kind is int else (math.nan, math.inf, -math.inf):
        with pytest.raises(BadInput, match=re.escape(f"{place}={nothing} is out of range")):
            check_values(with_values(key, nothing))
    assert place in {each for each, _, _ in leaves(config)}


@pytest.mark.parametrize(
    ("key", "value", "instead"),
    [
        ("run.name", "", "a name"),
        ("run.name", "../../x", "a name"),
        ("run.name", "..", "a name"),
        ("run.name", ".hidden", "a name"),
        ("run.name", "-rf", "a name"),
        ("run.name", "a/b", "a name"),
        ("run.name", "a\nb", "a name"),
        ("run.name", " a", "a name"),
        ("run.name", "x" * 5000, "at most 255 bytes"),
        ("run.name", "é" * 128, "at most 255 bytes"),
        ("run.dir", "", "a path"),
        ("run.dir", "a\0b", "a path"),
        ("run.dir", " ", "a path"),
        ("run.resume", "", "a path"),
        ("data.path[]", "", "a path"),
        ("data.tokenizer", "", "a path"),
        ("data.cache_dir", "a\x1bb", "plain text"),
        ("data.split", "abc", "two shares"),
        ("data.split", "nan,1", "two shares"),
        ("data.split", "-1,1", "two shares"),
        ("checkpoint.best_metric", "foo", "nll_block32"),
        ("checkpoint.init_from", "\udce9", "plain text"),
        ("schedule.stages[].block_size", "0", "a number of tokens"),
        ("schedule.stages[].block_size", "٣", "a number of tokens"),
        ("schedule.stages[].name", "", "a name"),
        ("slurm.environment", "../x", "nccl"),
    ],
)
def test_text_that_nothing_can_be_made_of_is_refused(key, value, instead):
    with pytest.raises(BadInput, match="will not do: give .*" + re.escape(instead)) as caught:
        check_values(with_values(key, value))
    assert str(caught.value).startswith(key.replace("[]", "[0]")) and len(str(caught.value)) < 250


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("run.name", "a run=1, über"),
        ("run.name", "x" * 255),
        ("run.dir", "/a b/lr=0.1/é"),
        ("data.split", "0,1"),
        ("schedule.stages[].block_size", "full"),
        ("checkpoint.best_metric", "nll_blockfull"),
        ("slurm.setup", ["export A=1\texport B"]),
    ],
)
def test_unusual_text_that_can_be_used_is_let_through(key, value):
    check_values(with_values(key, value))


@pytest.mark.parametrize(
    "override",
    [
        "optimizer.lr=inf", "optimizer.beta1=2", "optimizer.eps=-1", "optimizer.clip_grad=-1",
        "optimizer.weight_decay=nan", "training.steps=-1", "training.threads=-1",
        "training.hang_timeout_sec=nan", "logging.every_steps=0", "checkpoint.keep_last=-1",
        "checkpoint.every_steps=-1", "checkpoint.best_metric=foo", "evaluation.sequences=0",
        "evaluation.sequences=-1", "evaluation.draws=0", "model.norm_eps=-1", "model.init_std=nan",
        "model.rotary_base=0", "diffusion.embedding_noise.sigma_over_rms=-1",
        "diffusion.embedding_noise.sigma_over_rms=nan", "run.seed=-1", "run.name=../../x", "run.name=",
        f"run.name={'x' * 5000}", "model.attention_backend=bogus", "data.split=abc", "model.layer_spec=fused",
        "precision.dtype=fp16", "optimizer.decay_style=sometimes", "logging.wandb=on",
        "layout.recompute_modules=[core_attention]",
    ],
)  # fmt: skip
def test_nonsense_is_refused_when_a_run_is_composed_and_its_setting_named(override):
    with pytest.raises(BadInput) as caught:
        compose(["experiment=parity", override])
    assert override.partition("=")[0] in str(caught.value) and str(caught.value).endswith(".")


@pytest.mark.parametrize("key", ["data.path", "evaluation.block_sizes"])
def test_a_list_is_no_element_of_a_list(key):
    tree = OmegaConf.structured(compose(["experiment=parity"]))
    plain = OmegaConf.create(OmegaConf.to_container(tree, enum_to_str=True))
    OmegaConf.update(plain, key, [[]])
    with pytest.raises(BadInput, match=re.escape(f"{key}[0]=[] will not do: give one value.")):
        resolve(plain)
