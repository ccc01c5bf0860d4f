"""hydra's composition of `configs/` into a resolved `Config`, and its file in the run directory."""

from __future__ import annotations

import os
from pathlib import Path
from typing import cast

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue

from llada_megatron.config.layout import smallest_world
from llada_megatron.config.schema import Config, LayoutConfig

CONFIG_DIR = Path(__file__).resolve().parents[2] / "configs"


def compose(overrides: list[str]) -> Config:
    """Compose `configs/config.yaml` with hydra overrides such as `experiment=demo run.seed=2`.

    Raises ValueError for a value that an experiment must set and does not; hydra and omegaconf raise
    their own errors for unknown keys and wrong types.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.config_store import ConfigStore

    ConfigStore.instance().store(name="schema", node=Config)
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        composed = hydra_compose("config", overrides=overrides)
    return resolve(composed)


def load(path: str | os.PathLike[str]) -> Config:
    """Read a resolved configuration that `save` wrote; an unknown key is an error."""
    return resolve(OmegaConf.load(os.fspath(path)))


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


def resolve(node: object) -> Config:
    """A Config from a tree that may lack values with defaults; an unknown key is an error."""
    node = cast(DictConfig, OmegaConf.merge(OmegaConf.structured(Config), node))
    try:
        if node.layout.processes == 0:
            node.layout.processes = smallest_world(cast(LayoutConfig, OmegaConf.to_object(node.layout)))
        OmegaConf.resolve(node)
        return cast(Config, OmegaConf.to_object(node))
    except MissingMandatoryValue as error:
        key = getattr(error, "full_key", None) or "a value"
        raise ValueError(f"{key} is not set: choose an experiment, for example `experiment=demo`.") from None
