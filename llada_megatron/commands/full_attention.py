"""Options of verbs that decode for models in which every position sees every other (generate/full.py)."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from llada_megatron.config.errors import BadInput

if TYPE_CHECKING:
    from llada_megatron.record.manifest import Checkpoint

BLOCK = 32
"""Positions that are filled before the next ones, by default: Fast-dLLM's (arXiv 2505.22618)."""
OPTIONS = {
    "cache": ("NAME", "none (default, exact), prefix, dual or vicinity"),
    "before": ("N", "positions in front of a block that its forwards read anew"),
    "after": ("N", "positions behind it"),
    "warmup": ("N", "forwards of a block that read everything"),
    "cfg_scale": ("W", "classifier-free guidance, default 0: none"),
}
"""Settings of `full_attention_of`, whose module takes torch along."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options; each is None where it is not given."""
    group = parser.add_argument_group(
        "full attention", "models in which every position sees every other, docs/decoding.md"
    )
    group.add_argument(
        "--full-attention", action="store_true", help="where no stage of the checkpoint says that it is one"
    )
    for name, (value, what) in OPTIONS.items():
        group.add_argument(option(name), dest=name, metavar=value, help=what)


def option(name: str) -> str:
    """What a setting of a command is called there."""
    is_cache = name in OPTIONS and not name.startswith("c")
    return f"--{'cache-' * is_cache}{name}".replace("_", "-")


def is_full(checkpoint: Checkpoint) -> bool:
    """Whether the stage that trained the weights last had one block of the whole sequence (`full`), or, where
    none of ours did, their architecture is one of such models.
    """
    from llada_megatron.convert.families import FAMILIES

    architecture = checkpoint.manifest.lineage.get("architecture")
    if not checkpoint.manifest.block_size and architecture in FAMILIES:
        return FAMILIES[architecture].blocks.get(architecture) == 0
    data = checkpoint.manifest.config_of_weights.get("data", {})
    return 0 < data.get("sequence_length", 0) <= checkpoint.manifest.block_size


def settings_for(args: argparse.Namespace, checkpoint: Checkpoint | None) -> dict[str, str] | None:
    """The settings of full attention, or None for a model that sees no later block.

    Warns where the checkpoint says another thing than `--full-attention`; raises BadInput for options that
    such a model does not serve. Without a checkpoint only `--full-attention` says what it is.
    """
    given = {name: value for name in OPTIONS if (value := getattr(args, name)) is not None}
    if checkpoint and is_full(checkpoint):
        return given
    trained = checkpoint.manifest.block_size if checkpoint else 0
    if args.full_attention:
        if trained:
            print(
                f"warning: --full-attention: the model was trained with blocks of {trained} last, which see"
                " no later one",
                file=sys.stderr,
            )
        return given
    if given:
        options = ", ".join(map(option, given))
        raise BadInput(
            f"{options}: blocks of this model see no later one, so what is kept of them is exact: leave such"
            " options out, or give --full-attention if it has learnt to see everything."
        )
    return None
