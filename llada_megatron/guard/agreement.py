"""Every rank must have been started for the same run: told apart by name before anything is built."""

from __future__ import annotations

from typing import Any

from llada_megatron.config.compose import differences
from llada_megatron.config.errors import BadInput
from llada_megatron.config.schema import Config
from llada_megatron.data.fingerprint import fingerprint_difference
from llada_megatron.parallel.ranks import gathered
from llada_megatron.record.manifest import versions


def check_agreement(config: Config, data_fingerprint: dict[str, Any]) -> None:
    """Raise BadInput, on every rank, when a rank's configuration, data or packages are not rank 0's.

    Needs the process group of all ranks and nothing else: ranks that disagree on the layout would wait for
    each other forever in its groups.
    """
    parts = gathered((config, data_fingerprint, versions()))
    first_config, first_data, first_versions = parts[0]
    for rank, (other_config, other_data, other_versions) in enumerate(parts[1:], start=1):
        found = differences(first_config, other_config) + fingerprint_difference(first_data, other_data)
        found += [
            f"{package} is {version} there and {first_versions[package]} on rank 0"
            for package, version in other_versions.items()
            if version != first_versions[package]
        ]
        if found:
            raise BadInput(
                f"Rank {rank} was started for another run than rank 0: {'; '.join(found)}. Nothing was"
                " trained: give every rank the same configuration, data and installation."
            )
