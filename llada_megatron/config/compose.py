"""hydra's composition of `configs/` into a resolved `Config`, and its file in the run directory."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import cast

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException
from yaml import YAMLError

from llada_megatron.config.errors import BadInput
from llada_megatron.config.layout import smallest_world
from llada_megatron.config.plain_yaml import read_plain_yaml
from llada_megatron.config.schema import Config, LayoutConfig, ModelConfig

CONFIG_DIR = Path(__file__).resolve().parents[1] / "configs"
OWN_CONFIG_DIR = "configs"
"""Of the user, in the working directory: its experiments, models and sites are found by name too."""


def compose(overrides: list[str]) -> Config:
    """Compose `configs/config.yaml` with hydra overrides such as `experiment=demo run.seed=2`.

    Raises BadInput for a value that an experiment must set and does not, unknown keys and wrong types.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.config_store import ConfigStore
    from hydra.errors import HydraException

    ConfigStore.instance().store(name="schema", node=Config)
    try:
        with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
            composed = hydra_compose("config", overrides=[*_own_configs(), *overrides])
    except (HydraException, OmegaConfBaseException) as error:
        raise BadInput(_first_line(error)) from error
    except (YAMLError, UnicodeDecodeError) as error:  # in a file of the user's own
        raise BadInput(f"A file in {OWN_CONFIG_DIR}/ is not YAML: {_one_line(error)}.") from error
    return resolve(composed)


def load(path: str | os.PathLike[str]) -> Config:
    """Read a resolved configuration that `save` wrote; BadInput, naming the file, for anything else."""
    tree = read_yaml(path)
    try:
        return resolve(tree)
    except BadInput as fault:
        raise BadInput(f"{path}: {fault}") from fault


def read_yaml(path: str | os.PathLike[str]) -> DictConfig:
    """The mapping that a YAML file holds, whatever its keys; BadInput for anything else."""
    text = read_plain_yaml(Path(path), "give the config.yaml of a run")
    try:
        content = OmegaConf.load(io.StringIO(text))
    except (YAMLError, ValueError, OmegaConfBaseException) as error:  # ValueError: of int()
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
    OmegaConf.save(OmegaConf.structured(config), aside)
    os.replace(aside, path)


def differences(saved: Config, now: Config) -> list[str]:
    """`key: saved -> now` for every leaf in which two configurations differ."""
    before, after = (OmegaConf.to_container(OmegaConf.structured(config)) for config in (saved, now))
    return leaf_differences(before, after)


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

    Raises BadInput naming the checkpoint for an unknown key, a missing one or a wrong type.
    """
    try:
        node = OmegaConf.merge(OmegaConf.structured(ModelConfig), saved.get("model", {}))
        return cast(ModelConfig, OmegaConf.to_object(node))
    except (OmegaConfBaseException, TypeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise BadInput(f"{checkpoint} describes no model that is known here: {reason}.") from error


def elsewhere(saved: dict[str, object], overrides: Sequence[str]) -> Config:
    """The configuration of a checkpoint for another use of it: on one process, unless overrides say more.

    overrides: `key=value`, the value in YAML. Raises BadInput for what is no setting.
    """
    trained = saved.get("layout", {})
    if not isinstance(trained, dict):
        raise BadInput(f"layout is {type(trained).__name__}, and no settings.")
    names = ("global_batch", "micro_batch")
    layout: dict[str, object] = {name: trained[name] for name in names if name in trained}
    layout["processes"] = 0
    return resolve({**saved, "layout": layout}, overrides)


def resolve(tree: object, overrides: Sequence[str] = ()) -> Config:
    """A Config from a tree that may lack values with defaults, and `key=value` overrides of it.

    Raises BadInput for unknown keys and wrong types.
    """
    try:
        dotlist = OmegaConf.from_dotlist(list(overrides))
        node = cast(DictConfig, OmegaConf.merge(OmegaConf.structured(Config), tree, dotlist))
        if node.layout.processes == 0:
            node.layout.processes = smallest_world(cast(LayoutConfig, OmegaConf.to_object(node.layout)))
        OmegaConf.resolve(node)
        return cast(Config, OmegaConf.to_object(node))
    except MissingMandatoryValue as error:
        key = getattr(error, "full_key", None) or "a value"
        raise BadInput(f"{key} is not set: choose an experiment, for example `experiment=demo`.") from None
    except (OmegaConfBaseException, YAMLError) as error:
        raise BadInput(_first_line(error)) from error


def _own_configs() -> list[str]:
    """What makes hydra look into the user's folder after the package's; nothing without a folder.

    BadInput for a file with the name of one of the package's, which hydra would not read.
    """
    own = Path(OWN_CONFIG_DIR).resolve()
    if not own.is_dir() or own == CONFIG_DIR:
        return []
    for path in sorted(own.glob("*/**/*.yaml")):
        name = path.relative_to(own)
        if (CONFIG_DIR / name).is_file():
            raise BadInput(f"{path} has the name of a file of llada_megatron's own: rename it.")
    return [f"hydra.searchpath=['file://{own}']"]


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _first_line(error: Exception) -> str:
    """What hydra or omegaconf say, without their dump of the configuration's types."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    key = getattr(error, "full_key", None)
    return line if not key or key in line else f"{line} (in {key})"
