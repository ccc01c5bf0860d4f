"""`llada generate`: what a model writes after prompts, with a cache, in batches, in any layout of one
pp_stage."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llada_megatron.commands import full_attention, opened
from llada_megatron.config.errors import BadInput
from llada_megatron.config.foreign import parse_json, read_bytes
from llada_megatron.config.quantities import so_many

if TYPE_CHECKING:
    from llada_megatron.config.schema import Config
    from llada_megatron.data.chat import ChatEncoder
    from llada_megatron.data.tokenizer import Tokenizer
    from llada_megatron.record.manifest import Checkpoint

PRELOAD = "llada_megatron.generate.job"
EXAMPLE = 'llada generate runs/demo --prompt "def add(a, b):" --threshold 0.9'
RULES = (
    "threshold", "quota", "factor", "hierarchical", "credit", "entropy", "klass", "joint", "indel", "soft",
    "remdm_cap", "remdm_rescale", "remdm_conf", "wino", "ar", "multibd", "d2f", "lopa",
)  # fmt: skip
"""All rules and methods (generate/methods.py), whose module takes torch along."""
NEXT_TOKENS = "ar"
"""The only rule of models that predict next tokens."""
RULE_SETTINGS = {
    "threshold": "fill where the probability is above it",
    "steps": "forwards of a block; 0: its size (quota, klass, soft, remdm_*)",
    "factor": "the n-th fill needs 1 - factor / (n + 1)",
    "accepts_last": "true: factor fills the last mask too, as public code does",
    "low_threshold": "for the best mask of each run (hierarchical)",
    "entropy_bound": "nats of those filled together (entropy)",
    "credit_alpha": "what earlier choices weigh (credit)",
    "credit_beta": "what of a credit stays (credit)",
    "credit_gamma": "power of a new credit (credit)",
    "kl_threshold": "nats that a sure position moves at most (klass)",
    "kl_history": "in so many forwards (klass)",
    "edit_threshold": "replace a token where another is above it (joint, indel)",
    "max_post_edits": "forwards without masks (joint, indel)",
    "at_least": "masks filled in a forward (joint)",
    "penalty_lambda": "off the logit of the left neighbour's token (joint)",
    "delete_id": "the token that deletes its position (indel)",
    "split_id": "the token that makes room in front of it (indel)",
    "confident_at": "done where every probability is at least this (soft)",
    "from_left": "true: fill in front of the first unsure mask alone (soft)",
    "eta": "how much is masked again (remdm_cap, remdm_rescale)",
    "verify_threshold": "mask again what is below it without its token (wino)",
    "draft_share": "of the masks at most, in a forward (wino)",
    "draft_least": "or so many (wino)",
    "draft_most": "and at most so many (wino)",
    "temperature": "above 0: tokens are drawn",
    "top_k": "of so many tokens, 0: all",
    "top_p": "of the tokens that have this probability together",
    "plain_confidence": "true: drawn tokens are judged without temperature",
    "random_order": "true: masks are filled in a drawn order",
    "buffer": "active blocks, 0: all",
    "add_at": "begin the next block when this share of the last is filled",
    "force_at": "it has to fill a mask when this share of the one before is filled",
    "branches": "tried in a forward beside what the rule fills",
    "branch_entropy": "true: branches are compared by entropy",
    "branch_lowest": "the share of least sure masks that a branch is judged by",
    "branch_memory": "what the probability of a branch's own token weighs in that",
}
"""Of all of them; their defaults, which differ, are in docs/decoding.md."""
NO_TOKENIZER = "no tokenizer.json came with the checkpoint: set data.tokenizer, or give `tokens`"
READS = "a line is an object with `prompt` (text), `messages` (a chat) or `tokens` (ids)"
DRAFT = "draft"
"""Of a line: text or ids to mend, where a rule that edits begins instead of with masks."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    opened.add_arguments(parser)
    prompts = parser.add_mutually_exclusive_group(required=True)
    prompts.add_argument("--prompt", action="append", metavar="TEXT", help="once for each prompt")
    prompts.add_argument("--input", type=Path, metavar="FILE", help=f"JSON lines: {READS}")
    parser.add_argument("--output", type=Path, metavar="FILE", help="JSON lines; default: texts are printed")
    parser.add_argument("--chat", action="store_true", help="prompts are a user's: apply the chat template")
    parser.add_argument("--batch", type=int, default=8, metavar="N", help="prompts of a forward (default 8)")
    add_decoding_arguments(parser, new_tokens=256)


def add_decoding_arguments(parser: argparse.ArgumentParser, *, new_tokens: int | None) -> None:
    """How it is decoded, whatever is: limits, the cache, the rule and settings.

    new_tokens: by default; None: a task says how many.
    """
    parser.add_argument("--chat-template", metavar="NAME", help="llada2, plain or a file; default: its own")
    for name, default, what in (
        ("max-new-tokens", new_tokens, "of a prompt"),
        ("max-forwards", 0, "of a prompt, 0: no limit"),
        ("max-cached-tokens", 0, "of all prompts at hand, 0: as many as they can have"),
        ("seed", 0, "of draws"),
    ):
        parser.add_argument(
            f"--{name}",
            type=int,
            default=default,
            metavar="N",
            help=f"{what} (default {'as a task says' if default is None else default})",
        )
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="the text ends before it")
    parser.add_argument("--block-size", type=int, metavar="B", help="default: of the checkpoint's last stage")
    full_attention.add_arguments(parser)
    add_graphs_argument(parser)
    rules = parser.add_argument_group("rule", "which tokens a forward changes; defaults: docs/decoding.md")
    names = f"{', '.join(RULES[:-1])} or {RULES[-1]} (default threshold, of next tokens {NEXT_TOKENS})"
    rules.add_argument("--rule", metavar="NAME", help=names)
    for name, what in RULE_SETTINGS.items():
        rules.add_argument(f"--{name.replace('_', '-')}", dest=name, metavar="X", help=what)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings, such as layout.tp=2")


def add_graphs_argument(parser: argparse.ArgumentParser) -> None:
    """The switch of generate/graphs.py."""
    text = "run the forwards within a block as CUDA graphs"
    parser.add_argument("--cuda-graphs", action="store_true", help=text)


def run(args: argparse.Namespace) -> int:
    """Decode and write: 0; BadInput for a checkpoint, prompts, rule or layout that do not fit."""
    from llada_megatron.runtime.launch import launch

    with opened.opened(args) as checkpoint:
        config, job = prepare(args, checkpoint)
        lines, figures = launch(
            _on_this_rank, config, job, processes=config.layout.processes, preload=PRELOAD
        )[0]
    for number, line in enumerate(lines):
        said = json.loads(line)
        print("\n" * bool(number) + (said["text"] if said["text"] is not None else str(said["tokens"])))
    count = figures["prompts"]
    print(
        f"{so_many(count, 'prompt')}, {figures['tokens']} tokens in {figures['seconds']:.1f} s"
        f" ({figures['tokens'] / figures['seconds']:.1f} tokens/s, {figures['tokens_per_forward']:.2f} a"
        f" forward), cache {figures['cache_bytes'] / 2**20:.1f} MiB per rank",
        file=sys.stderr,
    )
    return 0


def _on_this_rank(config: Config, job: dict[str, Any]) -> tuple[list[str], dict[str, float]]:
    from llada_megatron.generate.job import Job, decode

    return decode(config, Job(**job))


def prepare(args: argparse.Namespace, checkpoint: Checkpoint) -> tuple[Config, dict[str, Any]]:
    """The configuration and the arguments of Job; BadInput for what cannot be served.

    Job itself takes torch along, which the ranks' parent has imported already.
    """
    config, job, encoder = decoding(args, checkpoint, as_chat=args.chat)
    records = [{"prompt": text} for text in args.prompt] if args.prompt else _records(args.input)
    tokenizer = encoder.tokenizer if encoder else _tokenizer(job["tokenizer"])
    prompts = [_tokens(number, each, tokenizer, encoder, config) for number, each in enumerate(records)]
    drafts = [_draft(number, each, tokenizer, config) for number, each in enumerate(records)]
    job |= {"drafts": drafts} if any(drafts) else {}
    return config, job | {"records": records, "prompts": prompts, "output": args.output, "batch": args.batch}


def decoding(
    args: argparse.Namespace, checkpoint: Checkpoint, *, as_chat: bool
) -> tuple[Config, dict[str, Any], ChatEncoder | None]:
    """The configuration, the arguments of Job that prompts have no part in, and what renders chats."""
    from llada_megatron.data.tokenizer import check_vocabulary

    for option in ("max_new_tokens", "batch", "max_forwards", "max_cached_tokens"):
        least = int(option in ("max_new_tokens", "batch"))
        if getattr(args, option, least) < least:
            raise BadInput(f"--{option.replace('_', '-')} {getattr(args, option)}: give at least {least}.")
    config = configuration(checkpoint, args.overrides)
    name = tokenizer_of(checkpoint, config, args.overrides)
    if name is not None:
        check_vocabulary(name, config.model.vocab_size)
    tokenizer = _tokenizer(name)
    encoder = chat_encoder(args.chat_template, name, tokenizer) if as_chat else None
    ends = [tokenizer.end_of_document_id] if tokenizer else []
    if encoder:
        ends.append(encoder.end_of_answer([{"role": "user", "content": "."}]))
    rule, full, block_size = way_of(args, checkpoint, config)
    job = dict(
        checkpoint=checkpoint.path,
        origin=opened.origin_of(args.checkpoint, checkpoint),
        rule=rule,
        settings={key: value for key in RULE_SETTINGS if (value := getattr(args, key)) is not None},
        new_tokens=args.max_new_tokens,
        end_tokens=[end for end in ends if end is not None],
        strings=args.stop,
        max_forwards=args.max_forwards,
        block_size=block_size,
        full=full,
        tokenizer=name,
        max_cached_tokens=args.max_cached_tokens,
        seed=args.seed,
        cuda_graphs=args.cuda_graphs,
    )
    return config, job, encoder


def _tokenizer(name: str | None) -> Tokenizer | None:
    from llada_megatron.data.tokenizer import load_tokenizer

    return None if name is None else load_tokenizer(name)


def configuration(checkpoint: Checkpoint, overrides: list[str]) -> Config:
    """The checkpoint's configuration on one process, or in the layout that the overrides ask for."""
    from llada_megatron.config import compose
    from llada_megatron.config.layout_rules import check_layout

    saved = checkpoint.manifest.config_of_weights
    if "data" not in saved:  # no run wrote it, and its model alone is known
        saved |= {"run": {"name": "generate"}, "optimizer": {"lr": 0.0}, "data": _context(checkpoint)}
        if not saved["data"] and not any(each.startswith("data.sequence_length=") for each in overrides):
            raise BadInput(
                "Neither a run nor config.json says how many positions the model was trained for: set"
                " data.sequence_length."
            )
    config = compose.elsewhere(saved, overrides)
    for axis in ("pp", "cp"):
        if getattr(config.layout, axis) > 1:
            raise BadInput(f"Decoding serves tp, ep and dp, not {axis}: set layout.{axis}=1.")
    check_layout(config)
    return config


def _context(checkpoint: Checkpoint) -> dict[str, Any]:
    """As many positions as config.json says that the model was trained for, under its family's key."""
    from llada_megatron.convert.families import FAMILIES
    from llada_megatron.convert.families.family import architecture_of
    from llada_megatron.record.carried import folder_of

    folder = folder_of(checkpoint)
    path = folder / "config.json" if folder else None
    described = parse_json(read_bytes(path, "mend it")) if path and path.is_file() else {}
    family = FAMILIES.get(architecture_of(described)) if isinstance(described, dict) else None
    positions = described.get(family.longest) if family else None
    return {"sequence_length": positions} if isinstance(positions, int) else {}


def tokenizer_of(checkpoint: Checkpoint, config: Config, overrides: list[str]) -> str | None:
    """The tokenizer.json that came with the weights, unless a setting names another one; else the run's.

    None where no run was, and none came.
    """
    from llada_megatron.record.carried import folder_of

    carried = (folder_of(checkpoint) or Path()) / "tokenizer.json"
    is_named = any(each.startswith("data.tokenizer=") for each in overrides)
    if carried.is_file() and not is_named:
        return str(carried)
    return config.data.tokenizer if is_named or "data" in checkpoint.manifest.config else None


def chat_encoder(
    template: str | None, tokenizer_name: str | None, tokenizer: Tokenizer | None
) -> ChatEncoder:
    """What renders messages, by the template of that name or the one that came with the tokenizer."""
    if tokenizer_name is None or tokenizer is None:
        raise BadInput(f"--chat needs a tokenizer: {NO_TOKENIZER}.")
    from llada_megatron.data.chat import ChatEncoder
    from llada_megatron.data.chat_template import load_template

    return ChatEncoder(load_template(template, tokenizer_name, tokenizer), tokenizer, only_last=False)


def way_of(
    args: argparse.Namespace, checkpoint: Checkpoint, config: Config
) -> tuple[str, dict[str, str] | None, int]:
    """The rule, the settings of full attention, and the block size to decode with.

    0 where a model predicts next tokens; raises BadInput for options that it does not serve.
    """
    if predicts_next(checkpoint, args.rule):
        refuse_blocks(args, str(checkpoint.path), config)
        return NEXT_TOKENS, None, 0
    full = full_attention.settings_for(args, checkpoint)
    size = block_size_for(checkpoint, args.block_size, is_full=full is not None)
    return args.rule or "threshold", full, size


def predicts_next(checkpoint: Checkpoint, rule: str | None = None) -> bool:
    """Whether the last stage of the weights predicts next tokens, or their family has no other.

    Weights that no stage of ours trained, of an architecture that fills no masks, do so where `rule` says it.
    """
    from llada_megatron.config.families import formulas_named
    from llada_megatron.config.objectives import OBJECTIVES
    from llada_megatron.config.schema import ModelConfig

    manifest = checkpoint.manifest
    stages = manifest.config.get("schedule", {}).get("stages", [])
    objective = next((s.get("objective") for s in stages if s.get("name") == manifest.stage), None)
    family = manifest.config_of_weights.get("model", {}).get("family", ModelConfig.family)
    if not formulas_named(family).FILLS_MASKS or (objective in OBJECTIVES and OBJECTIVES[objective].causal):
        return True
    is_untold = not (manifest.block_size or is_diffusion(manifest.lineage.get("architecture")))
    return rule == NEXT_TOKENS and is_untold


def refuse_blocks(args: argparse.Namespace, name: str, config: Config) -> None:
    """Raise BadInput for options that are for models which fill masks, where the one of this name predicts
    next tokens.
    """
    options = ("block_size", "full_attention", "cuda_graphs", *full_attention.OPTIONS)
    given = [full_attention.option(name) for name in options if getattr(args, name)]
    if args.rule not in (None, NEXT_TOKENS):
        given.append(f"--rule {args.rule}")
    if config.layout.bp > 1:
        given.append(f"layout.bp={config.layout.bp}")
    if given:
        drawing = "; --temperature, --top-k and --top-p draw" if hasattr(args, "temperature") else ""
        raise BadInput(
            f"{', '.join(given)}: {name} predicts next tokens, one a forward: leave that out{drawing}."
        )


def block_size_for(checkpoint: Checkpoint, asked: int | None, *, is_full: bool = False) -> int:
    """The block size to decode with; warns about one that the model was not trained with last.

    is_full: every position sees every other, and a block is only what is filled before the next one.
    """
    manifest = checkpoint.manifest
    architecture = manifest.lineage.get("architecture") if not manifest.block_size else None
    trained = manifest.block_size or published_block(architecture)
    refuse_shifted(str(checkpoint.path), architecture)
    if asked is not None and asked < 1:
        raise BadInput(f"--block-size {asked}: give at least 1.")
    if is_full:
        length = manifest.config_of_weights.get("data", {}).get("sequence_length", full_attention.BLOCK)
        return asked or min(full_attention.BLOCK, length)
    if not trained and asked is None:
        raise BadInput(without_block_size(str(checkpoint.path), architecture))
    if architecture and not trained:
        print(
            f"warning: {manifest.lineage.get('source', checkpoint.path)} is of architecture {architecture},"
            " that of autoregressive models: what follows means little unless it has learnt to fill masks",
            file=sys.stderr,
        )
    if trained and asked not in (None, trained):
        print(
            f"warning: --block-size {asked} is not the {trained} that the model was trained with last",
            file=sys.stderr,
        )
    return asked or trained


def without_block_size(name: str, architecture: str | None) -> str:
    """What to do about weights that no stage of ours trained."""
    made = f" is of architecture {architecture}, that of autoregressive models, and" if architecture else ""
    return (
        f"{name}{made} does not say its block size: give --block-size if it has learnt to fill masks,"
        f" --rule {NEXT_TOKENS} if it predicts next tokens, else train it in a diffusion stage first."
    )


def refuse_shifted(name: str, architecture: str | None) -> None:
    """Raise BadInput for weights that no stage of ours trained, and whose own code reads other logits."""
    from llada_megatron.convert.families import FAMILIES

    if architecture in FAMILIES and architecture in FAMILIES[architecture].shifted:
        raise BadInput(
            f"{name} is of architecture {architecture}, which reads the logits before a mask: decoding here"
            " reads those at the mask, convert it and train it in a diffusion stage first."
        )


def is_diffusion(architecture: str | None) -> bool:
    """Whether Hugging Face's models of this architecture fill masks: LLaDA2's, not Ling's or Llama's."""
    from llada_megatron.convert.families import FAMILIES

    return architecture in FAMILIES and architecture in FAMILIES[architecture].blocks


def published_block(architecture: str | None) -> int:
    """The block size of Hugging Face's models of this architecture; 0 where they have none."""
    from llada_megatron.convert.families import FAMILIES

    return FAMILIES[architecture].blocks[architecture] if architecture and is_diffusion(architecture) else 0


def _records(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines; BadInput, with the line, for anything else."""
    records = []
    for number, line in enumerate(read_bytes(path, "give a file of prompts").split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            record = parse_json(line)
        except ValueError as error:
            raise BadInput(f"{path}, line {number} is not JSON ({error}): {READS}.") from None
        if not isinstance(record, dict) or len({"prompt", "messages", "tokens"} & record.keys()) != 1:
            raise BadInput(f"{path}, line {number} holds no prompt: {READS}.")
        records.append(record)
    if not records:
        raise BadInput(f"{path} holds no prompts: {READS}.")
    return records


def _tokens(
    number: int,
    record: dict[str, Any],
    tokenizer: Tokenizer | None,
    encoder: ChatEncoder | None,
    config: Config,
) -> list[int]:
    """A prompt's ids; BadInput, with its number, for what is none."""
    from llada_megatron.data.chat import messages_to_answer

    try:
        if "tokens" in record:
            return _ids(record, "tokens", config)
        if "messages" in record and encoder is None:
            raise BadInput("it is a chat: give --chat")
        if encoder is not None:
            return encoder.prompt(messages_to_answer(record))
        return _encoded(record, "prompt", tokenizer)
    except BadInput as fault:
        raise BadInput(f"Prompt {number}: {str(fault).removesuffix('.')}.") from None


def _draft(number: int, record: dict[str, Any], tokenizer: Tokenizer | None, config: Config) -> list[int]:
    """A draft's ids, none where there is none; BadInput, with its number, for what is no draft."""
    try:
        if isinstance(record.get(DRAFT), list):
            return _ids(record, DRAFT, config)
        return _encoded(record, DRAFT, tokenizer) if DRAFT in record else []
    except BadInput as fault:
        raise BadInput(f"Prompt {number}: {str(fault).removesuffix('.')}.") from None


def _ids(record: dict[str, Any], key: str, config: Config) -> list[int]:
    ids, limit = record[key], config.model.vocab_size
    if not isinstance(ids, list) or not all(type(each) is int and 0 <= each < limit for each in ids):
        raise BadInput(f"`{key}` is no list of ids below {limit}")
    return ids


def _encoded(record: dict[str, Any], key: str, tokenizer: Tokenizer | None) -> list[int]:
    if tokenizer is None:
        raise BadInput(NO_TOKENIZER)
    if not isinstance(record[key], str):
        raise BadInput(f"`{key}` is not text")
    return tokenizer.encode(record[key])
