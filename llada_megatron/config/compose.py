"""hydra's composition of `configs/` into a resolved `Config`, and its file in the run directory."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError, MissingMandatoryValue, OmegaConfBaseException
from yaml import YAMLError

from llada_megatron.config.errors import BadInput
from llada_megatron.config.families import formulas_of
from llada_megatron.config.layout import smallest_world
from llada_megatron.config.overrides import check as check_overrides
from llada_megatron.config.overrides import check_setting, settings
from llada_megatron.config.plain_yaml import read_plain_yaml
from llada_megatron.config.ranges import check_values
from llada_megatron.config.schema import Config, LayoutConfig, ModelConfig

CONFIG_DIR = Path(__file__).resolve().parents[1] / "configs"
OWN_CONFIG_DIR = "configs"
"""Of the user, in the working directory: its experiments, models and sites are found by name too."""
NOT_YAML = (YAMLError, UnicodeDecodeError, RecursionError)
"""What the reading of a file raises; the last one for brackets within brackets."""


def compose(overrides: list[str]) -> Config:
    """Compose `configs/config.yaml` with hydra overrides such as `experiment=demo run.seed=2`.

    Raises BadInput for a value that an experiment must set and does not, unknown keys, wrong types, and
    values out of their range.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.errors import HydraException

    own = _own_configs()
    check_overrides(overrides, _groups(own))
    searched = [f"hydra.searchpath=['file://{own}']"] if own else []
    _offer_schema()
    try:
        with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
            composed = hydra_compose("config", overrides=[*searched, *overrides])
    except (HydraException, OmegaConfBaseException) as error:
        raise BadInput(_sentence(error) + _hint(error)) from error
    except (
        *NOT_YAML,
        OSError,
        ValueError,
    ) as error:  # in one of the user's files
        if isinstance(error, OSError) and error.errno is not None:
            raise
        _read_all(own)
        raise BadInput(f"A file in {OWN_CONFIG_DIR}/ cannot be composed: {_one_line(error)}.") from error
    return resolve(composed)


@cache
def _schema() -> DictConfig:
    """Config as omegaconf's tree, which `OmegaConf.merge` copies: the copy is quicker than another one."""
    return OmegaConf.structured(Config)


@cache
def _offer_schema() -> None:
    """The schema of configs/config.yaml, by the name that it says."""
    from hydra.core.config_store import ConfigStore

    ConfigStore.instance().store(name="schema", node=Config)


def _hint(error: Exception) -> str:
    """What to write where a file of experiments does not say that its keys are those of a whole run."""
    if "Key 'experiment' not in" not in str(error):
        return ""
    return " An experiment's file begins with the line `# @package _global_` and holds `key: value` lines."


def _read_all(own: Path | None) -> None:
    """Raise BadInput for the first file of the user's that is no YAML mapping."""
    for path in sorted(own.glob("*/**/*.yaml")) if own else []:
        if path.read_bytes().strip():
            read_yaml(path)


def load(path: str | os.PathLike[str]) -> Config:
    """Read a resolved configuration that `save` wrote; BadInput, naming the file, for anything else."""
    tree = read_yaml(path)
    try:
        return resolve(tree)
    except BadInput as fault:
        raise BadInput(f"{path}: {fault}") from fault


def read_yaml(path: str | os.PathLike[str]) -> DictConfig:
    """The mapping that a YAML file holds, whatever its keys; BadInput for anything else."""
    text = read_plain_yaml(Path(path), "write `key: value` lines")
    try:
        content = OmegaConf.load(io.StringIO(text))
    except (*NOT_YAML, ValueError, OmegaConfBaseException) as error:  # ValueError: of int()
        raise BadInput(f"{path} is not YAML: {_one_line(error)}.") from error
    except OSError as error:
        if error.errno is not None:
            raise
        content = None  # omegaconf's word for a file that holds a number
    if not isinstance(content, DictConfig):
        raise BadInput(f"{path} holds no `key: value` lines: give the config.yaml of a run.")
    return content


def save(config: Config, path: str | os.PathLike[str]) -> None:
    """Write the resolved configuration as YAML, whole or not at all."""
    aside = f"{os.fspath(path)}.{os.getpid()}.tmp"
    OmegaConf.save(OmegaConf.create(tree_of(config)), aside)
    os.replace(aside, path)


def differences(saved: Config, now: Config) -> list[str]:
    """`key: saved -> now` for every leaf in which two configurations differ."""
    return leaf_differences(tree_of(saved), tree_of(now))


def tree_of(config: object) -> Any:
    """A configuration, or a group of it, as dicts and lists of plain values; a choice by its name."""
    if is_dataclass(config):
        return {each.name: tree_of(getattr(config, each.name)) for each in fields(config)}
    if isinstance(config, dict):
        return {key: tree_of(value) for key, value in config.items()}
    if isinstance(config, list):
        return [tree_of(value) for value in config]
    return config.name if isinstance(config, Enum) else config


def leaf_differences(saved: object, now: object) -> list[str]:
    """`key: saved -> now` for every leaf in which two trees of dicts and lists differ."""

    def leaves(node: object, prefix: str = "") -> dict[str, object]:
        if isinstance(node, dict):
            pairs = ((f"{prefix}.{key}" if prefix else str(key), value) for key, value in node.items())
        elif isinstance(node, list):
            pairs = ((f"{prefix}[{index}]", value) for index, value in enumerate(node))
        else:
            return {prefix: node}
        return {name: leaf for key, value in pairs for name, leaf in leaves(value, key).items()}

    before, after = leaves(saved), leaves(now)
    return [
        f"{key}: {before.get(key, 'absent')} -> {after.get(key, 'absent')}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key, "absent") != after.get(key, "absent")
    ]


def model_of(checkpoint: Path, saved: dict[str, object]) -> ModelConfig:
    """The model of a checkpoint by its manifest's configuration; keys that came later have their defaults.

    Raises BadInput naming the checkpoint for an unknown key, a missing one, a wrong type or a wrong value.
    """
    try:
        node = OmegaConf.merge(OmegaConf.structured(ModelConfig), saved.get("model", {}))
        model = cast(ModelConfig, OmegaConf.to_object(node))
        check_values(model, "model")
    except (OmegaConfBaseException, TypeError, ValueError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise BadInput(f"{checkpoint} describes no model that is known here: {reason}.") from error
    return model


def elsewhere(saved: dict[str, object], overrides: Sequence[str]) -> Config:
    """The configuration of a checkpoint for another use of it: on one process, unless overrides say more.

    overrides: `key=value`, the value in YAML. Raises BadInput for what is no setting, and a model that cannot
    be built.
    """
    trained = saved.get("layout", {})
    if not isinstance(trained, dict):
        raise BadInput(f"layout is {type(trained).__name__}, and no settings.")
    names = ("global_batch", "micro_batch")
    layout: dict[str, object] = {name: trained[name] for name in names if name in trained}
    layout["processes"] = 0
    precision = saved.get("precision", {})
    if isinstance(precision, dict):
        precision = {**precision, "fp8": "none"}  # whose products need rows in multiples
    config = resolve({**saved, "layout": layout, "precision": precision}, overrides)
    formulas_of(config.model).check(config.model)
    return config


def resolve(tree: object, overrides: Sequence[str] = ()) -> Config:
    """A Config from a tree that may lack values with defaults, and `key=value` overrides of it.

    Raises BadInput for unknown keys, wrong types, and values out of their range.
    """
    try:
        if isinstance(tree, DictConfig) and OmegaConf.get_type(tree) is Config and not overrides:
            node = tree  # hydra has merged it into the schema
        else:
            node = cast(DictConfig, OmegaConf.merge(_schema(), tree, *map(_setting, overrides)))
        if node.layout.processes == 0:
            node.layout.processes = smallest_world(cast(LayoutConfig, OmegaConf.to_object(node.layout)))
        OmegaConf.resolve(node)
        config = cast(Config, OmegaConf.to_object(node))
    except MissingMandatoryValue as error:
        key = getattr(error, "full_key", None) or "a value"
        raise BadInput(f"{key} is not set: choose an experiment, for example `experiment=demo`.") from None
    except InterpolationResolutionError as error:
        raise BadInput(f"{_unresolved(node)} cannot be resolved: {_sentence(error)}") from error
    except (OmegaConfBaseException, YAMLError) as error:
        raise BadInput(_sentence(error)) from error
    check_values(config)
    return config


def _unresolved(node: DictConfig) -> str:
    """The setting whose `${other}` leads nowhere: the error does not say."""
    for key in settings():
        try:
            value = OmegaConf.select(node, key)
            if OmegaConf.is_config(value):
                OmegaConf.to_container(value, resolve=True)
        except OmegaConfBaseException:
            return key
    return "A setting"


def _setting(override: str) -> DictConfig:
    """The tree of one `key=value`, the value in YAML; BadInput, naming it, for what is no setting."""
    key, sign, _ = override.partition("=")
    try:
        tree = OmegaConf.from_dotlist([override])
        value = OmegaConf.select(tree, key)
    except (OmegaConfBaseException, YAMLError, ValueError) as error:
        raise BadInput(f"{override} is no KEY=VALUE: {_one_line(error)}.") from error
    if not sign:
        raise BadInput(f"{override} is no KEY=VALUE: write, for example, layout.tp=2.")
    plain = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
    check_setting(override, key, plain)
    return tree


def _own_configs() -> Path | None:
    """The user's folder, into which hydra looks after the package's; None without one.

    BadInput for a file with the name of one of the package's, which hydra would not read.
    """
    own = Path(OWN_CONFIG_DIR).resolve()
    if not own.is_dir() or own == CONFIG_DIR:
        return None
    for path in sorted(own.glob("*/**/*.yaml")):
        name = path.relative_to(own)
        if (CONFIG_DIR / name).is_file():
            raise BadInput(f"{path} has the name of a file of llada_megatron's own: rename it.")
    return own


def _groups(own: Path | None) -> dict[str, list[str]]:
    """The names that each group offers: `model` -> [demo, ...]."""
    found: dict[str, list[str]] = {}
    for folder in [CONFIG_DIR, *([own] if own else [])]:
        for path in sorted(folder.glob("*/**/*.yaml")):
            group, _, name = path.relative_to(folder).with_suffix("").as_posix().partition("/")
            found.setdefault(group, []).append(name)
    return found


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _sentence(error: Exception) -> str:
    """What hydra or omegaconf say, in one line: reasons and choices, without types and search paths."""
    said = []
    for line in (str(error).strip() or type(error).__name__).splitlines():
        if re.match(r"\s*(full_key|reference_type|object_type|Config search path)\b", line):
            break
        said.append(line.strip())
    sentence = " ".join(filter(None, said))
    key = getattr(error, "full_key", None) or _full_key(str(error))
    where = "" if not key or key in sentence else f" (in {key})"
    return f"{sentence.rstrip('.')}{where}."


def _full_key(dump: str) -> str:
    found = re.search(r"full_key: (\S+)", dump)
    return found[1] if found else ""
