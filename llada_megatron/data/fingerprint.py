"""What a resume compares of the data: the content of the files and the settings that order them."""

from __future__ import annotations

import os
from typing import Any

from llada_megatron.config.schema import Config, DataConfig
from llada_megatron.config.stage_settings import data_of
from llada_megatron.data.blend import PERIOD
from llada_megatron.data.laid_out import WINDOW
from llada_megatron.data.shards import Corpus, survey
from llada_megatron.data.tokenizer import load_tokenizer
from llada_megatron.parallel.ranks import from_first_rank, rank


def fingerprint(data: DataConfig) -> dict[str, Any]:
    """Return what a resume compares: sizes and hashes of the files and the settings that order them.

    The .idx is hashed whole; of a .bin above 66 MiB the first, the last and 64 evenly spaced MiB are. Paths
    take no part, so a corpus may be moved. The result is plain JSON data.
    """
    corpora = survey(data)
    found: dict[str, Any] = {
        "corpora": [content_of(corpus) for corpus in corpora],
        "weights": [float(weight) for weight in data.weights],
        "split": data.split,
        "sequence_length": data.sequence_length,
        "tokenizer_sha256": load_tokenizer(data.tokenizer).sha256,
    }
    if len(corpora) > 1:
        found["blend_period"] = PERIOD
    if any(sum(shard.tokens for shard in each.shards) // data.sequence_length > WINDOW for each in corpora):
        found["shuffle_window"] = WINDOW
    return found


def of_run(config: Config) -> dict[str, Any]:
    """The fingerprint of data, and under `stages` that of each stage which reads something else."""
    own = {stage.name: data_of(config.data, stage) for stage in config.schedule.stages}
    stages = {name: fingerprint(data) for name, data in own.items() if data != config.data}
    return fingerprint(config.data) | ({"stages": stages} if stages else {})


def of_this_node(config: Config) -> dict[str, Any]:
    """The fingerprint of a run's data as a node sees them; every rank must call it.

    Rank 0 finds out, then the first rank of every other node, which has little left to do where it sees the
    same files; the others take rank 0's. BadInput, on every rank alike, where rank 0 cannot use the data.
    """
    first = from_first_rank(of_run, config)
    is_first_here = os.environ.get("LOCAL_RANK", "0") == "0"
    return of_run(config) if is_first_here and rank() else first


def content_of(corpus: Corpus) -> dict[str, Any]:
    """Sizes and digests of the files of a corpus."""
    found = {
        "bin_bytes": sum(shard.bin_bytes for shard in corpus.shards),
        "idx_bytes": sum(shard.idx_bytes for shard in corpus.shards),
        "bin_sampled_sha256": corpus.digest("bin_sampled_sha256"),
        "idx_sha256": corpus.digest("idx_sha256"),
    }
    if corpus.holds_conversations:
        found["roles_sampled_sha256"] = corpus.digest("roles_sampled_sha256")
    return found | ({"shards": len(corpus.shards)} if len(corpus.shards) > 1 else {})


def fingerprint_difference(saved: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return one sentence per difference between two fingerprints; empty when the data are the same."""
    sentences = []
    if len(saved["corpora"]) != len(now["corpora"]):
        sentences.append(f"data.path had {len(saved['corpora'])} corpora and has {len(now['corpora'])} now.")
    for number, (before, after) in enumerate(zip(saved["corpora"], now["corpora"], strict=False)):
        name = f"data.path[{number}]"
        for suffix, digest in (("bin", "bin_sampled_sha256"), ("idx", "idx_sha256")):
            size = f"{suffix}_bytes"
            if before[size] != after[size]:
                sentences.append(
                    f"The .{suffix} of {name} had {before[size]} bytes and has {after[size]} now."
                )
            elif before[digest] != after[digest]:
                sentences.append(f"The .{suffix} of {name} has the same size and other content.")
        if before.get("roles_sampled_sha256") != after.get("roles_sampled_sha256"):
            sentences.append(f"The roles of {name} are others now.")
        if before.get("shards") != after.get("shards"):
            sentences.append(
                f"{name} had {before.get('shards', 1)} shards and has {after.get('shards', 1)} now."
            )
    for setting in ("weights", "split", "sequence_length"):
        if saved[setting] != now[setting]:
            sentences.append(f"data.{setting} was {saved[setting]} and is {now[setting]} now.")
    if saved["tokenizer_sha256"] != now["tokenizer_sha256"]:
        sentences.append("data.tokenizer is another tokenizer now.")
    for stage in saved.get("stages", {}).keys() & now.get("stages", {}).keys():
        own = fingerprint_difference(of_stage(saved, stage), of_stage(now, stage))
        sentences += [f"Of stage {stage}: {each}" for each in own]
    return sentences


def of_stage(found: dict[str, Any], name: str) -> dict[str, Any]:
    """What of a run's fingerprint is about the data of a stage."""
    plain = {key: value for key, value in found.items() if key not in ("stages", "objectives")}
    return dict(found.get("stages", {}).get(name, plain))
