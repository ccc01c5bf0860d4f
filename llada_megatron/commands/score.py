"""`llada score`: what a preference's reference thinks of every text of a corpus, once, in any layout."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

    from llada_megatron.config.schema import Config

EXAMPLE = "llada score runs/sft data/pairs --block-size 32"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="the reference: a checkpoint or a run")
    parser.add_argument("data", metavar="PREFIX", help="of `llada data prepare --format preference`")
    parser.add_argument(
        "--block-size", metavar="B", help="of the stage to be trained; default: of the reference's last one"
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="KEY=VALUE",
        help="settings of that training, such as preference.draws=4 run.seed=2, and a layout",
    )


def run(args: argparse.Namespace) -> int:
    """Score and write beside the corpus: 0; BadInput for a checkpoint, corpus or layout that do not fit."""
    import numpy as np

    from llada_megatron.commands.generate import predicts_next
    from llada_megatron.config import compose
    from llada_megatron.config.errors import BadInput
    from llada_megatron.config.families import require_masks
    from llada_megatron.config.layout_rules import check_layout
    from llada_megatron.config.schedule import block_size_of
    from llada_megatron.data.fingerprint import fingerprint
    from llada_megatron.objectives.reference import check_pairs, scored_under, weights_digest, write_scores
    from llada_megatron.record.manifest import find

    checkpoint = find(args.checkpoint)
    settings = [f"data.path={json.dumps([args.data])}", "data.weights=[]", "data.split=1,0"]
    config = compose.elsewhere(checkpoint.manifest.config_of_weights, settings + args.overrides)
    require_masks(config.model, "A score by the bound")
    if predicts_next(checkpoint):
        raise BadInput(
            f"{checkpoint.path} is of stage {checkpoint.manifest.stage} and predicts next tokens, while the"
            " bound fills masks: name the checkpoint that the preference's stage starts from."
        )
    draws = config.preference.draws
    check_layout(config)
    check_pairs(args.data)
    length = config.data.sequence_length
    block_size = block_size_of(args.block_size or str(checkpoint.manifest.block_size), length, "--block-size")
    said = {
        "checkpoint": str(checkpoint.path),
        "weights": weights_digest(checkpoint),
        "tokens": fingerprint(config.data)["corpora"][0],
        **scored_under(config, block_size),
    }
    bounds = score(config, checkpoint.path, block_size)
    path = write_scores(args.data, bounds, said)
    texts = int(np.isfinite(bounds).all(axis=1).sum())
    print(f"{texts} of {len(bounds)} texts scored by {draws} draws at block {block_size}: {path}")
    return 0


def score(config: Config, checkpoint: Path, block_size: int) -> np.ndarray:
    """Bounds of all texts, from as many processes of this machine as the layout asks for."""
    from llada_megatron.runtime.launch import launch

    return launch(
        _on_this_rank,
        config,
        checkpoint,
        block_size,
        processes=config.layout.processes,
        preload="llada_megatron.evaluate.score",
    )[0]


def _on_this_rank(config: Config, checkpoint: Path, block_size: int) -> np.ndarray:
    from llada_megatron.evaluate.score import score_checkpoint

    return score_checkpoint(config, checkpoint, block_size)
