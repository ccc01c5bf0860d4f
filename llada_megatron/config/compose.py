"""hydra's composition of `configs/` into a resolved `Config`, and its file in the run directory."""

from __future__ import annotations

import os
from pathlib import Path
from typing import cast

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException
from yaml import YAMLError

from llada_megatron.config.errors import BadInput
from llada_megatron.config.layout import smallest_world
from llada_megatron.config.schema import Config, LayoutConfig

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
    return resolve(composed)


def load(path: str | os.PathLike[str]) -> Config:
    """Read a resolved configuration that `save` wrote; BadInput for an unknown key or what is no YAML."""
    try:
        return resolve(OmegaConf.load(os.fspath(path)))
    except (YAMLError, UnicodeDecodeError) as error:
        raise BadInput(f"{path} is not YAML: {' '.join(str(error).split())}.") from error


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


def elsewhere(saved: dict[str, object], overrides: list[str]) -> Config:
    """The configuration of a checkpoint for another use of it: on one process, unless overrides say more.

    overrides: `key=value`, the value in YAML. Raises BadInput for what is no setting.
    """
    trained = cast(dict[str, object], saved.get("layout", {}))
    names = ("global_batch", "micro_batch")
    layout: dict[str, object] = {name: trained[name] for name in names if name in trained}
    for override in overrides:
        if "=" not in override:
            raise BadInput(f"{override} is no override: write key=value, such as layout.tp=2.")
    layout["processes"] = 0
    tree = OmegaConf.create({**saved, "layout": layout})
    return resolve(OmegaConf.merge(tree, OmegaConf.from_dotlist(overrides)))


def resolve(node: object) -> Config:
    """A Config from a tree that may lack values with defaults; BadInput for unknown keys, wrong types."""
    try:
        node = cast(DictConfig, OmegaConf.merge(OmegaConf.structured(Config), node))
        if node.layout.processes == 0:
            node.layout.processes = smallest_world(cast(LayoutConfig, OmegaConf.to_object(node.layout)))
        OmegaConf.resolve(node)
        return cast(Config, OmegaConf.to_object(node))
    except MissingMandatoryValue as error:
        key = getattr(error, "full_key", None) or "a value"
        raise BadInput(f"{key} is not set: choose an experiment, for example `experiment=demo`.") from None
    except OmegaConfBaseException as error:
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


def _first_line(error: Exception) -> str:
    """What hydra or omegaconf say, without their dump of the configuration's types."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    key = getattr(error, "full_key", None)
    return line if not key or key in line else f"{line} (in {key})"
