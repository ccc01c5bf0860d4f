"""Prompts decoded with a checkpoint, on every rank of a layout; rank 0 writes each result when it is there.

OUT.partial holds what is done, in the order of completion, until all is: a job that was interrupted goes on
from it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from llada_megatron.checkpoint.load import load_model
from llada_megatron.config.foreign import parse_json
from llada_megatron.config.schema import Config
from llada_megatron.data.tokenizer import load_tokenizer
from llada_megatron.generate.decoder import Decoder
from llada_megatron.generate.full import full_attention_of, kind_of
from llada_megatron.generate.methods import method_of
from llada_megatron.generate.partial import PartialFile
from llada_megatron.generate.prompt import Limits, Prompt, Result
from llada_megatron.parallel import groups, ranks
from llada_megatron.runtime import device


@dataclass(frozen=True)
class Job:
    """What is decoded, and how."""

    checkpoint: Path
    rule: str
    settings: Mapping[str, str]
    block_size: int
    """0: the model predicts next tokens."""
    tokenizer: str | None
    """Without one there are no texts."""
    new_tokens: int
    full: Mapping[str, str] | None = None
    """Settings of `full_attention_of`; None: blocks see no later one."""
    end_tokens: Sequence[int] = ()
    strings: Sequence[str] = ()
    max_forwards: int = 0
    output: Path | None = None
    """JSON lines; without it the lines are returned."""
    batch: int = 8
    max_cached_tokens: int = 0
    seed: int = 0
    cuda_graphs: bool = False
    origin: str = ""
    """What a temporary checkpoint was made from."""
    records: Sequence[Mapping[str, Any]] = ()
    """What was asked for each prompt, which comes back with its result."""
    prompts: Sequence[Sequence[int]] = ()
    drafts: Sequence[Sequence[int]] = ()
    """What stands behind each prompt at first, for a rule that edits; without any there are masks."""

    @property
    def limits(self) -> Limits:
        """Where each prompt ends."""
        return Limits(self.new_tokens, self.end_tokens, self.strings, self.max_forwards)

    @property
    def asked(self) -> list[Prompt]:
        """The prompts with their drafts."""
        drafts = self.drafts or [()] * len(self.prompts)
        pairs = enumerate(zip(self.prompts, drafts, strict=True))
        return [Prompt(tokens, number=number, draft=draft) for number, (tokens, draft) in pairs]

    @property
    def identity(self) -> str:
        """What decides the results, as far as a command says it: not the batch, its memory and graphs."""
        said = asdict(replace(self, output=None, batch=0, max_cached_tokens=0))
        del said["cuda_graphs"]
        text = json.dumps(said, sort_keys=True, default=str)
        if self.origin:  # the next command has it elsewhere
            text = text.replace(str(self.checkpoint), "")
        return hashlib.sha256(text.encode()).hexdigest()


def decode(config: Config, job: Job) -> tuple[list[str], dict[str, float]]:
    """Lines of JSON in the order of the prompts, on rank 0 (none where they were written), and figures of
    all.

    For every rank of config.layout. Raises BadInput before the first forward for whatever cannot be decoded.
    """
    device.seed_everything(job.seed, config.precision.deterministic)
    groups.initialize(config.layout, threads=config.training.threads)
    try:
        decoder = decoder_of(config, job)
        for number, prompt in enumerate(job.asked):
            decoder.check(number, prompt, job.limits)
        lines = ranks.from_first_rank(Lines, job)
        waiting = [prompt for prompt in job.asked if prompt.number not in lines.done]
        return _decode(decoder, job, waiting, lines)
    finally:
        groups.destroy()


def decoder_of(config: Config, job: Job) -> Decoder:
    """The decoder that a job asks for, in the process groups of config.layout."""
    # Before the weights, which take longer.
    method = method_of(job.rule, job.settings, config.levenshtein.orders)
    full = None if job.full is None else full_attention_of(job.full)
    (model,) = load_model(config, job.checkpoint)
    return kind_of(full, next_tokens=not job.block_size)(
        model,
        method.rule,
        block_size=job.block_size,
        mask_token_id=config.model.mask_token_id,
        context=config.data.sequence_length,
        buffer=method.buffer,
        lookahead=method.lookahead,
        batch=job.batch,
        max_cached_tokens=job.max_cached_tokens,
        seed=job.seed,
        cuda_graphs=job.cuda_graphs,
        text=None if job.tokenizer is None else load_tokenizer(job.tokenizer).decode,
    )


def _decode(
    decoder: Decoder, job: Job, prompts: list[Prompt], lines: Lines
) -> tuple[list[str], dict[str, float]]:
    began = device.seconds()
    tokens = denoised = 0
    for event in decoder.run(prompts, job.limits):
        if isinstance(event, Result):
            tokens += len(event.tokens)
            denoised += event.forwards["denoise"] + event.forwards["store"]
            if ranks.rank() == 0:
                lines.add(event)
    figures = {
        "prompts": len(prompts),
        "tokens": tokens,
        "tokens_per_forward": tokens / max(1, denoised),
        "forwards": decoder.counts.forwards,
        "seconds": device.seconds() - began,
        "cache_bytes": decoder.cache_bytes,
        "shared_tokens": decoder.counts.shared_tokens,
        "put_back": decoder.counts.put_back,
    }
    return (lines.finish() if ranks.rank() == 0 else []), figures


class Lines:
    """The results of a job as lines of JSON, written as they come and put in order at the end.

    Raises BadInput where OUT.partial is another job's.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        self.partial: PartialFile | None = None
        if job.output is not None:
            path = job.output.with_name(f"{job.output.name}.partial")
            self.partial = PartialFile(path, job.identity, "--output")
        written = self.partial.lines if self.partial else []
        self.done = {int(parse_json(line)["index"]): line for line in written}

    def add(self, result: Result) -> None:
        """One prompt is done."""
        record = dict(self.job.records[result.prompt])
        said = {
            "index": result.prompt,
            **record,
            "text": result.text,
            "tokens": result.tokens.tolist(),
            "decided_at": result.decided_at.tolist(),
            "stop": result.stop.value,
            "forwards": result.forwards,
            "tokens_per_forward": result.tokens_per_forward,
            "seconds": round(result.seconds, 4),
        }
        self.done[result.prompt] = json.dumps(said, ensure_ascii=False)
        if self.partial is not None:
            self.partial.append(self.done[result.prompt])

    def finish(self) -> list[str]:
        """All lines in the order of the prompts; or none, where they are in the file that was asked for."""
        in_order = [self.done[number] for number in sorted(self.done)]
        if self.partial is None or self.job.output is None:
            return in_order
        self.partial.become(self.job.output, in_order)
        return []
