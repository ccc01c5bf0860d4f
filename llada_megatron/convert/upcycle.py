"""Upcycling (Komatsuzaki et al., arXiv 2212.05055): a dense checkpoint becomes a Mixture of Experts.

Every expert is a copy of the dense feed-forward layer. The weights of a token's experts add up to one, so
whatever the router chooses, the output is the dense model's at the start.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from llada_megatron.checkpoint import publish, store
from llada_megatron.checkpoint.shards import Part, ShardsReader, ShardsWriter, whole
from llada_megatron.config.compose import model_of
from llada_megatron.config.errors import BadInput
from llada_megatron.config.schema import ModelConfig
from llada_megatron.convert.certificate import Certificate, Ledger, tensors_digest
from llada_megatron.convert.conversion import written_aside
from llada_megatron.convert.loaded import (
    PROMPT_TOKENS,
    causal_logits,
    load_model,
    logits_difference,
    model_tensors,
)
from llada_megatron.convert.mapping import expert_rows
from llada_megatron.model.normal import counter_normal
from llada_megatron.record import carried
from llada_megatron.record.manifest import Manifest, find
from llada_megatron.record.run_dir import SHARDS

MAX_PARAMETERS = 1_000_000_000
"""Of the MoE: larger ones are not run to compare their logits with the dense model's."""


def upcycle(
    source: str,
    target: Path,
    *,
    experts: int,
    experts_per_token: int,
    dense_layers: int = 0,
    seed: int = 1,
) -> Certificate:
    """Write a checkpoint in which layers from `dense_layers` on have `experts` copies of their FFN.

    Router weights are N(0, init_std^2) of `seed`, so that tokens spread over the experts; expert biases are
    zero. The source is a checkpoint or a run's newest; weights alone are taken. Nothing appears at `target`
    unless the certificate passes. Needs process groups of one process. Raises BadInput for a source that
    has experts already, numbers that make no MoE, and a target that exists.
    """
    checkpoint = store.verified(find(source), weights_alone=True)
    path = checkpoint.path
    dense = model_of(checkpoint.path, checkpoint.manifest.config_of_weights)
    moe = upcycled_config(dense, experts, experts_per_token, dense_layers)
    shards = ShardsReader(path / SHARDS)
    certificate = Certificate("upcycle", str(path), "upcycled", moe.mask_token_id)
    built, certificate.parameters["architecture"] = model_tensors(moe)
    certificate.compare(str(path), shards.shapes(), model_tensors(dense)[0])
    if not certificate.passed:
        return certificate
    with written_aside(target) as aside:
        source_ledger, written, read = Ledger("source"), Ledger("target"), Ledger("result")
        writer = ShardsWriter(aside / SHARDS)
        parts = []
        for part, values in _parts(moe, shards, source_ledger, seed):
            written.record(part, values)
            writer.write(part, values)
            parts.append(part)
        writer.finish()
        result = ShardsReader(aside / SHARDS)
        for part in parts:
            read.record(part, result.read(part))
        certificate.megatron = written.as_json()
        certificate.problems += source_ledger.problems + written.problems + read.problems
        certificate.same_hashes("the result, read again,", read, written)
        certificate.compare("what was written", written.shapes(), built)
        parameters = (
            math.prod(s) for name, s in written.shapes().items() if not name.endswith("expert_bias")
        )
        certificate.count_parameters(sum(parameters))
        _check_output(certificate, path, dense, aside, moe)
        if certificate.passed:
            carried.write(carried.content_of(checkpoint), aside)
            certificate.write(aside)
            lineage = {
                "kind": "upcycle",
                "source": str(path.resolve()),
                "tensors_sha256": tensors_digest(source_ledger.as_json()),
                "router_seed": seed,
            }
            publish.finish(aside, target, Manifest(config={"model": asdict(moe)}, lineage=lineage))
    return certificate


def upcycled_config(
    dense: ModelConfig, experts: int, experts_per_token: int, dense_layers: int
) -> ModelConfig:
    """The architecture of the MoE; BadInput for numbers that make none, or outputs that would differ."""
    if dense.has_experts:
        raise BadInput(
            f"The source has {dense.experts} experts already: only dense checkpoints are upcycled."
        )
    if not 2 <= experts_per_token <= experts:
        raise BadInput(
            f"--experts-per-token {experts_per_token} must lie between 2 and --experts {experts}: with one"
            " expert its weight is not normalised to 1, and the output would change."
        )
    if not 0 <= dense_layers < dense.layers:
        raise BadInput(f"--dense-layers {dense_layers} leaves none of {dense.layers} layers to upcycle.")
    return replace(
        dense,
        dense_layers=dense_layers,
        experts=experts,
        experts_per_token=experts_per_token,
        expert_hidden_size=dense.ffn_hidden_size,
        shared_expert_hidden_size=0,
        expert_groups=1,
        expert_groups_per_token=1,
        routed_scaling_factor=1.0,
        expert_bias=True,
    )


def _parts(
    moe: ModelConfig, shards: ShardsReader, source: Ledger, seed: int
) -> Iterator[tuple[Part, Tensor]]:
    """Every part of the MoE with its numbers, reading one tensor of the dense model at a time."""

    def read(name: str) -> Tensor:
        part = whole(name, *shards.shapes()[name])
        values = shards.read(part)
        source.record(part, values)
        return values

    layers = tuple(f"decoder.layers.{layer}.mlp." for layer in range(moe.dense_layers, moe.layers))
    for name in shards.shapes():
        if not name.startswith(layers):
            values = read(name)
            yield whole(name, *values.shape), values
    E, H, W = moe.experts, moe.hidden_size, moe.expert_hidden_size
    for mlp in layers:
        norm = read(f"{mlp}linear_fc1.layer_norm_weight")
        yield whole(f"{mlp.removesuffix('mlp.')}pre_mlp_layernorm.weight", H), norm
        router = whole(f"{mlp}router.weight", E, H)
        normal = counter_normal(torch.arange(E * H), seed, router.name).reshape(E, H)
        yield router, (moe.init_std * normal).to(norm.dtype)
        yield whole(f"{mlp}router.expert_bias", E), torch.zeros(E)
        fc1_2WH, fc2_HW = read(f"{mlp}linear_fc1.weight"), read(f"{mlp}linear_fc2.weight")
        for expert in range(E):
            for first in (0, W):  # gate, up: what a tensor-parallel rank reads comes from each
                part = expert_rows(f"{mlp}experts.experts.linear_fc1.weight", (E, 2 * W, H), expert, first, W)
                yield part, fc1_2WH[None, first : first + W].contiguous()
        for expert in range(E):
            yield (
                expert_rows(f"{mlp}experts.experts.linear_fc2.weight", (E, H, W), expert, 0, H),
                fc2_HW[None],
            )


def _check_output(
    certificate: Certificate, checkpoint: Path, dense: ModelConfig, result: Path, moe: ModelConfig
) -> None:
    """Compare the logits of both models, where they are small enough to run."""
    if not certificate.passed:
        return
    if certificate.parameters["architecture"] > MAX_PARAMETERS:
        certificate.logits = {"compared": False, "reason": f"more than {MAX_PARAMETERS:,} parameters"}
        return
    before, after = (
        partial(causal_logits, load_model(path, model, sequence_length=PROMPT_TOKENS))
        for path, model in ((checkpoint, dense), (result, moe))
    )
    certificate.compare_logits(logits_difference(before, after, dense.vocab_size))
