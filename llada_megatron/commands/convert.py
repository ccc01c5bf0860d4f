"""`llada convert`: Hugging Face checkpoints in and out, GGUF files in, a dense checkpoint into a MoE."""

from __future__ import annotations

import argparse
import resource
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from llada_megatron.config.quantities import so_many

if TYPE_CHECKING:
    from llada_megatron.convert.certificate import Certificate

EXAMPLE = "llada convert hf-to-mcore --from Ling-mini-base-2.0 --to ckpt/ling_mini --mask-token-id 157183"
PROBLEMS_SHOWN = 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    directions = parser.add_subparsers(dest="direction", required=True, metavar="DIRECTION")
    inward = directions.add_parser("hf-to-mcore", help="a Hugging Face checkpoint into one to train from")
    outward = directions.add_parser("mcore-to-hf", help="a checkpoint, or a run's newest, to Hugging Face")
    adapters = directions.add_parser("mcore-to-peft", help="a checkpoint's adapters alone, for PEFT")
    gguf = directions.add_parser("gguf-to-hf", help="a GGUF file of the llama architecture to Hugging Face")
    upcycling = directions.add_parser("upcycle", help="a dense checkpoint into a MoE that computes the same")
    sources = {
        inward: "with config.json and safetensors",
        outward: "a checkpoint, or a run: its newest; adapters are merged",
        adapters: "a checkpoint, or a run: its newest",
        gguf: "a .gguf file",
        upcycling: "a checkpoint, or a run: its newest",
    }
    for direction, source in sources.items():
        direction.add_argument("--from", dest="source", required=True, metavar="PATH", help=source)
        direction.add_argument(
            "--to", dest="target", type=Path, required=True, metavar="DIR", help="must not exist yet"
        )
    for direction in (inward, outward):
        direction.add_argument(
            "--mask-token",
            metavar="TEXT",
            help="states which token the mask's id is, where it is another token's and that is meant",
        )
    inward.add_argument("--mask-token-id", type=int, metavar="N", help="default: the tokenizer's mask token")
    for direction in (outward, adapters):
        direction.add_argument(
            "--architecture",
            metavar="NAME",
            help="default: LLaDA2MoeModelLM for a MoE after diffusion",
        )
    outward.add_argument("--expert-layout", choices=("separate", "stacked"), default="separate")
    outward.add_argument("--dtype", choices=("bf16", "fp32"), help="default: as in the checkpoint")
    outward.add_argument("--tokenizer", type=Path, metavar="DIR", help="default: what came with the weights")
    outward.add_argument(
        "--max-shard-gb",
        type=float,
        default=5.0,
        metavar="GB",
        help="size of a file in 10^9 bytes (default 5)",
    )
    gguf.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="default: fp32")
    gguf.add_argument("--layers", type=int, metavar="N", help="the first N layers alone (default: all)")
    upcycling.add_argument(
        "--experts", type=int, required=True, metavar="E", help="copies of each layer's FFN"
    )
    upcycling.add_argument("--experts-per-token", type=int, required=True, metavar="K", help="at least 2")
    upcycling.add_argument(
        "--dense-layers", type=int, default=0, metavar="N", help="the first N layers stay dense (default: 0)"
    )
    upcycling.add_argument("--seed", type=int, default=1, metavar="N", help="of the routers (default: 1)")


def run(args: argparse.Namespace) -> int:
    """Convert: 0 when the certificate passes, 1 when it does not; raises BadInput for bad input."""
    from llada_megatron.config.schema import LayoutConfig
    from llada_megatron.parallel import groups

    groups.initialize(LayoutConfig())
    began = time.monotonic()
    try:
        certificate = _convert(args)
    finally:
        groups.destroy()
    _print(certificate, args.target, time.monotonic() - began)
    return 0 if certificate.passed else 1


def _convert(args: argparse.Namespace) -> Certificate:
    from llada_megatron.convert import conversion, gguf, peft, upcycle
    from llada_megatron.convert.families import ExpertLayout
    from llada_megatron.runtime import device

    dtype = device.DTYPES[args.dtype] if getattr(args, "dtype", None) else None
    if args.direction == "hf-to-mcore":
        return conversion.hf_to_mcore(
            Path(args.source), args.target, mask_token_id=args.mask_token_id, mask_token=args.mask_token
        )
    if args.direction == "gguf-to-hf":
        return gguf.gguf_to_hf(Path(args.source), args.target, dtype=dtype, layers=args.layers)
    if args.direction == "mcore-to-peft":
        return peft.mcore_to_peft(args.source, args.target, architecture=args.architecture)
    if args.direction == "upcycle":
        return upcycle.upcycle(
            args.source,
            args.target,
            experts=args.experts,
            experts_per_token=args.experts_per_token,
            dense_layers=args.dense_layers,
            seed=args.seed,
        )
    return conversion.mcore_to_hf(
        args.source,
        args.target,
        architecture=args.architecture,
        layout=ExpertLayout(args.expert_layout),
        dtype=dtype,
        tokenizer=args.tokenizer,
        mask_token=args.mask_token,
        max_shard_bytes=int(args.max_shard_gb * 1e9),
    )


def _print(certificate: Certificate, target: Path, seconds: float) -> None:
    for reason, count in Counter(certificate.dropped.values()).items():
        first = next(name for name, why in certificate.dropped.items() if why == reason)
        print(f"left out   {so_many(count, 'tensor')} ({first}{', ...' * (count > 1)}): {reason}")
    if certificate.unread:
        count, names = len(certificate.unread), ", ".join(certificate.unread)
        print(f"unread     {count} {'key' if count == 1 else 'keys'} of config.json: {names}")
    if not certificate.passed:
        print(f"The conversion fails its certificate, and {target} was not written:")
        for problem in certificate.problems[:PROBLEMS_SHOWN]:
            print(f"  {problem}")
        if len(certificate.problems) > PROBLEMS_SHOWN:
            print(f"  and {len(certificate.problems) - PROBLEMS_SHOWN} more")
        return
    for note in certificate.notes:
        print(f"note       {note}")
    logits, peak = certificate.logits, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(f"source     {certificate.source}")
    mask = "" if certificate.mask_token_id is None else f", mask token {certificate.mask_token_id}"
    print(f"result     {target}: {certificate.architecture}{mask}")
    sides = {
        "of the file": certificate.gguf,
        "of theirs": certificate.hugging_face,
        "of ours": certificate.megatron,
    }
    counts = ", ".join(f"{len(tensors):,} {side}" for side, tensors in sides.items() if tensors)
    print(
        f"tensors    {counts}, {certificate.parameters['written']:,} parameters:"
        " each written once and read back"
    )
    if logits["compared"]:
        print(
            f"logits     differ by {logits['max_difference']:.1e}, the largest is {logits['max_logit']:.1e}"
        )
    else:
        print(f"logits     not compared: {logits['reason']}")
    size = certificate.source_bytes()
    print(
        f"took       {seconds:.1f} s for {size / 1e9:.2f} GB ({size / 1e9 / seconds:.2f} GB/s),"
        f" at most {peak / 1e9:.2f} GB of memory"
    )
