"""A checkpoint to decode with, as a command names it: a path, a run, or `hf:DIR`, a Hugging Face folder."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llada_megatron.config.errors import BadInput

if TYPE_CHECKING:
    from llada_megatron.convert.certificate import Certificate
    from llada_megatron.record.manifest import Checkpoint

HUGGING_FACE = "hf:"


def add_arguments(parser: argparse.ArgumentParser, *, default: str = "") -> None:
    """Arguments that name a checkpoint; `default` says what is taken without one, where that is served."""
    parser.add_argument(
        "checkpoint",
        metavar="CHECKPOINT",
        nargs="?" if default else None,
        help="or a run: its newest, or hf:DIR, Hugging Face's" + (f"; default: {default}" if default else ""),
    )
    parser.add_argument(
        "--mask-token-id",
        type=int,
        metavar="N",
        help="of hf:DIR, where its files do not say",
    )
    parser.add_argument("--mask-token", metavar="TEXT", help="of hf:DIR, as in `llada convert hf-to-mcore`")


@contextmanager
def opened(args: argparse.Namespace) -> Iterator[Checkpoint]:
    """The checkpoint that `add_arguments` names; of a Hugging Face folder one that lasts as long.

    Raises BadInput for what is no checkpoint, and for a folder that does not convert with its certificate.
    """
    from llada_megatron.record.manifest import find

    if args.checkpoint.startswith(HUGGING_FACE):
        with tempfile.TemporaryDirectory(prefix="llada_hf_") as folder:
            yield _converted(args, Path(args.checkpoint.removeprefix(HUGGING_FACE)), Path(folder))
    elif args.mask_token_id is not None or args.mask_token is not None:
        raise BadInput("--mask-token-id and --mask-token are for hf:DIR: a checkpoint says its mask token.")
    else:
        yield find(args.checkpoint)


def origin_of(where: str, checkpoint: Checkpoint) -> str:
    """What a temporary checkpoint was made from, with a digest of its tensors; empty for any other one."""
    if not where.startswith(HUGGING_FACE):
        return ""
    lineage = checkpoint.manifest.lineage
    return f"{lineage['source']} {lineage['tensors_sha256']}"


def _converted(args: argparse.Namespace, source: Path, folder: Path) -> Checkpoint:
    from llada_megatron.config.schema import LayoutConfig
    from llada_megatron.convert import conversion
    from llada_megatron.parallel import groups
    from llada_megatron.record.manifest import find

    mask_token_id = _mask_token(args, source)
    groups.initialize(LayoutConfig())
    began = time.monotonic()
    try:
        certificate = conversion.hf_to_mcore(
            source, folder / "checkpoint", mask_token_id=mask_token_id, mask_token=args.mask_token
        )
    finally:
        groups.destroy()
    certificate.require()
    _say(args, certificate, time.monotonic() - began)
    return find(str(folder / "checkpoint"))


def _mask_token(args: argparse.Namespace, source: Path) -> int | None:
    """As far as the folder says it: None where the conversion shall ask for it.

    Raises BadInput for a model that has not learnt to fill masks, or that needs a block size.
    """
    from llada_megatron.commands.generate import (
        NEXT_TOKENS,
        is_diffusion,
        refuse_shifted,
        without_block_size,
    )
    from llada_megatron.convert.families import family_of
    from llada_megatron.convert.families.family import architecture_of
    from llada_megatron.convert.weight_files import REMEDY
    from llada_megatron.data.tokenizer import load_tokenizer
    from llada_megatron.record.json_files import read_json

    described: dict[str, Any] = read_json(source / "config.json", REMEDY)
    architecture = architecture_of(described)
    family_of(architecture, source)  # or that it is not served
    refuse_shifted(args.checkpoint, architecture)
    fills_masks = is_diffusion(architecture)
    known = [args.mask_token_id]
    if (source / "tokenizer.json").is_file():
        known.append(load_tokenizer(str(source / "tokenizer.json")).mask_token_id)
    known.append(described.get("mask_token_id"))
    mask_token_id = next((each for each in known if type(each) is int), None)
    if not fills_masks and mask_token_id is None and args.rule == NEXT_TOKENS:
        raise BadInput(
            f"{args.checkpoint} names no mask token, which a conversion records: give --mask-token-id, of any"
            f" token that no text has; --rule {NEXT_TOKENS} does not use it."
        )
    if not fills_masks and mask_token_id is None:
        raise BadInput(
            f"{args.checkpoint} is of architecture {architecture}, an autoregressive model, which has not"
            " learnt to fill masks: train it in a diffusion stage first, or give --mask-token-id if it was."
        )
    if args.block_size is None and not (fills_masks or args.full_attention or args.rule == NEXT_TOKENS):
        raise BadInput(without_block_size(args.checkpoint, architecture))
    return mask_token_id


def _say(args: argparse.Namespace, certificate: Certificate, seconds: float) -> None:
    logits = certificate.logits
    differ = f"differ by {logits['max_difference']:.1e}" if logits["compared"] else "were not compared"
    print(
        f"{args.checkpoint}: {certificate.architecture}, mask token {certificate.mask_token_id};"
        f" converted in {seconds:.1f} s with its certificate, logits {differ}",
        file=sys.stderr,
    )
