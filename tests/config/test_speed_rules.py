"""Rules of the switches in config/speed_rules.py: each sentence, and that its remedy works."""

import re
from dataclasses import asdict
from functools import cache

import pytest

from llada_megatron.config import rules
from llada_megatron.config.compose import compose, elsewhere, resolve
from llada_megatron.config.errors import BadInput
from tests.model.latents import MLA

TE = "model.layer_spec=transformer_engine"
EP2 = ["layout.processes=2", "layout.ep=2", "precision.dtype=bf16"]
TP2 = ["layout.processes=2", "layout.tp=2", "precision.dtype=bf16", TE]
OVERLAP = [*EP2, "layout.overlap_experts=true"]
SELECTIVE = "layout.recompute=selective"
HYBRID, GPT = "model.core=hybrid", ["model.core=gpt"]
ONE_SIZE = "schedule.stages=[{name: a, block_size: full, tokens: 65536}]"
CASES = [
    (["layout.dispatcher=deepep", "precision.dtype=bf16"], "experts of other processes", EP2),
    (["layout.dispatcher=hybridep", *EP2[:2]], "sends bf16", ["precision.dtype=bf16"]),
    (["layout.overlap_experts=true", "precision.dtype=bf16"], "between processes of layout.ep=1", EP2),
    ([*OVERLAP, "layout.dispatcher=allgather"], "does not go with layout.dispatcher=allgather",
     ["layout.dispatcher=alltoall"]),
    ([*OVERLAP, "layout.processes=4", "layout.pp=2"], "an interleaved pipeline", ["layout.vpp=2"]),
    ([*OVERLAP, "layout.recompute=full"], "runs a layer in parts", ["layout.recompute=none"]),
    ([*OVERLAP, SELECTIVE, "layout.recompute_modules=[moe]"], "runs a layer in parts",
     ["layout.recompute_modules=[mlp]"]),
    ([*OVERLAP, "precision.dtype=fp32"], "for bf16 alone", ["precision.dtype=bf16"]),
    ([*OVERLAP, "model.expert_balance_clean_half=false"], "no marks of rows",
     ["model.expert_balance_clean_half=true"]),
    ([*OVERLAP, "model.expert_capacity=4"], "no marks of rows", ["model.expert_capacity=0"]),
    (["layout.delay_weight_gradients=true"], "fills the time of layout.overlap_experts", [*OVERLAP, TE]),
    ([*OVERLAP, "layout.delay_weight_gradients=true"], "needs TransformerEngine's layers", [TE]),
    (["layout.overlap_shared_experts=true", "model.shared_expert_hidden_size=0"], "needs a shared expert",
     ["model.shared_expert_hidden_size=64"]),
    (["layout.overlap_shared_experts=true", "layout.dispatcher=allgather"],
     "does not go with layout.dispatcher=allgather", ["layout.dispatcher=alltoall"]),
    ([*OVERLAP, "layout.overlap_shared_experts=true"], "use the same gap", ["layout.overlap_experts=false"]),
    (["layout.overlap_shared_experts=true", SELECTIVE, "layout.recompute_modules=[shared_experts]"],
     "cannot be computed again", ["layout.recompute_modules=[mlp]"]),
    (["layout.overlap_tensor_parallel=true"], "needs TransformerEngine's layers", [*TP2, ONE_SIZE]),
    (["layout.overlap_tensor_parallel=true", TE, ONE_SIZE], "hides messages of layout.tp", TP2),
    (["layout.overlap_tensor_parallel=true", *TP2], "keeps buffers of one size", [ONE_SIZE]),
    (["layout.overlap_tensor_parallel=true", *TP2, ONE_SIZE, *MLA], "meets the projections of model.mla",
     ["layout.overlap_tensor_parallel=false"]),
    (["layout.offload_modules=[core_attn]"], "needs TransformerEngine's layers", [TE]),
    (["layout.offload_modules=[expert_fc1]", TE, SELECTIVE, "layout.recompute_modules=[moe]"],
     "computes again", ["layout.recompute_modules=[mlp]"]),
    (["layout.offload_modules=[core_attn]", TE, SELECTIVE, "layout.recompute_modules=[mla_up_proj]", *MLA],
     "beside what `mla_up_proj`", ["layout.recompute_modules=[mlp]"]),
    (["layout.offload_modules=[attn_proj]", TE], "add core_attn",
     ["layout.offload_modules=[attn_proj,core_attn]"]),
    (["layout.offload_modules=[qkv_linear]", TE, "layout.recompute=full"], "nothing to move",
     ["layout.recompute=none"]),
    (["precision.gradients=bf16"], "needs precision.dtype=bf16", ["precision.dtype=bf16"]),
    (["precision.fp8=blockwise", "precision.dtype=bf16"], "needs TransformerEngine's layers", [TE]),
    (["precision.fp8=blockwise", TE], "rounds products of bf16", ["precision.dtype=bf16"]),
    (["precision.dtype=bf16", "precision.fp8=delayed", TE, SELECTIVE, "layout.recompute_modules=[layernorm]"],
     "cannot compute layernorm again", ["precision.fp8=blockwise"]),
    (["precision.dtype=bf16", "precision.fp8=blockwise", TE, "evaluation.infill_sequences=2"],
     "cannot decode between steps", ["evaluation.infill_sequences=0"]),
    (["precision.dtype=bf16", "precision.fp8=mxfp8", TE, "model.expert_hidden_size=48"],
     "model.expert_hidden_size: 48", ["precision.fp8=blockwise"]),
    (["training.cuda_graphs=[mlp]"], "needs TransformerEngine's layers", [TE]),
    (["training.cuda_graphs=[moe_preprocess]", TE], "add moe_router",
     ["training.cuda_graphs=[moe_router,moe_preprocess]"]),
    (["training.cuda_graphs=[moe_router]", TE, "model.experts=0", "model.dense_layers=4"],
     "no layer has experts", ["training.cuda_graphs=[mlp]"]),
    (["training.cuda_graphs=[mlp]", TE, "model.dense_layers=0"], "that of dense layers",
     ["training.cuda_graphs=[moe_router]"]),
    (["training.cuda_graphs=[mlp]", TE, "layout.recompute=full"], "under layout.recompute=full",
     ["layout.recompute=none"]),
    (["training.cuda_graphs=[moe_router]", TE, SELECTIVE, "layout.recompute_modules=[moe]"],
     "computes again", ["layout.recompute_modules=[mlp]"]),
    (["training.cuda_graphs=[moe_router]", TE, "model.router.rows_cap=2"], "replays a router",
     ["model.router.rows_cap=0"]),
    ([*OVERLAP, HYBRID], "needs a schedule plan", GPT),
    (["layout.offload_modules=[core_attn]", TE, HYBRID], "never run with model.core=hybrid", GPT),
    (["training.cuda_graphs=[mlp]", TE, HYBRID], "never run with model.core=hybrid", GPT),
]  # fmt: skip


@cache
def parity():
    return asdict(compose(["experiment=parity"]))


@pytest.mark.slow
@pytest.mark.parametrize(("overrides", "message", "remedy"), CASES, ids=lambda part: str(part)[:60])
def test_what_cannot_go_together_is_refused_in_a_sentence_whose_remedy_works(overrides, message, remedy):
    with pytest.raises(BadInput, match=re.escape(message)) as caught:
        rules.check(resolve(parity(), overrides))
    assert str(caught.value).endswith(".") and "\n" not in str(caught.value)
    rules.check(resolve(parity(), [*overrides, *remedy]))


def test_every_switch_is_off_by_default_and_has_no_rule_then():
    rules.check(resolve(parity()))


def test_a_model_that_is_used_elsewhere_computes_without_fp8_and_on_one_process():
    trained = resolve(parity(), ["precision.fp8=mxfp8", TE, *OVERLAP])
    config = elsewhere(asdict(trained), [])
    assert (config.precision.fp8, config.precision.dtype) == ("none", "bf16")
    assert not config.layout.overlap_experts and config.layout.ep == 1
