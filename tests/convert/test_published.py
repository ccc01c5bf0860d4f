"""Converted checkpoints of public layouts compute what their descriptions say, and broken tables are seen."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llada_megatron.attention import BlockDiffusionMask
from llada_megatron.attention.context import ContextShard
from llada_megatron.cli import main
from llada_megatron.config.compose import model_of
from llada_megatron.config.errors import BadInput
from llada_megatron.config.schema import LayoutConfig, ModelConfig
from llada_megatron.convert import families
from llada_megatron.convert.config_json import describe, model_config, unread
from llada_megatron.convert.conversion import architecture_for, hf_to_mcore
from llada_megatron.convert.families import ExpertLayout
from llada_megatron.convert.loaded import load_model
from llada_megatron.convert.mapping import Entry
from llada_megatron.model.inputs import ModelInputs
from llada_megatron.model.readout import LOGITS
from llada_megatron.parallel import groups
from llada_megatron.record.manifest import Manifest, find
from tests.convert import checkpoints, published_deepseek, published_forward
from tests.convert.test_round_trip import to_hf, to_mcore

S = 24
TOLERANCES = {torch.float64: 2e-6, torch.float32: 1e-5}
"""Of the model in a dtype, over the largest logit; in fp32 the description itself is up to 6.8e-6 off."""
KINDS = ["qwen3_moe_dense", "llada", "deepseek_v3"]
BLOCKS = {"schedule": {"stages": [{"name": "blocks", "objective": "diffusion"}]}}
REST = [kind for kind in checkpoints.RELATIVES if kind not in KINDS]


def ours(folder: Path, tokens: torch.Tensor, *, causal: bool, dtype: torch.dtype) -> torch.Tensor:
    """[S, V] of the model that a checkpoint becomes; router, angles and attention compute in fp32."""
    checkpoint = find(str(folder))
    model = model_of(checkpoint.path, checkpoint.manifest.config_of_weights)
    stage = load_model(checkpoint.path, model, sequence_length=S).to(dtype)
    mask = BlockDiffusionMask([torch.tensor([0, S])], 1 if causal else S, clean_copy=False, causal=causal)
    rows = torch.arange(S)
    inputs = ModelInputs(tokens[None], rows[None], ContextShard(mask), rows, readout=LOGITS)
    with torch.no_grad():
        return stage(inputs)


@pytest.mark.parametrize("kind", [*KINDS, *(pytest.param(kind, marks=pytest.mark.slow) for kind in REST)])
def test_the_model_gives_the_logits_of_the_description(kind: str, tmp_path: Path) -> None:
    source = checkpoints.write(tmp_path / "source", kind)
    tokens = torch.randint(checkpoints.VOCABULARY, (S,), generator=torch.Generator().manual_seed(3))
    config, _ = checkpoints.described(kind)
    layout = published_forward.LLADA if kind == "llada" else published_forward.STANDARD
    weights = load_file(source / "model.safetensors")
    groups.initialize(LayoutConfig())
    try:
        hf_to_mcore(source, tmp_path / "ours", mask_token_id=checkpoints.MASK).require()
        for causal in (True, False):
            if kind.startswith("deepseek"):
                expected_SV = published_deepseek.logits(weights, config, tokens, causal=causal)
            else:
                expected_SV = published_forward.logits(weights, config, tokens, causal=causal, layout=layout)
            for dtype, tolerance in TOLERANCES.items():
                found_SV = ours(tmp_path / "ours", tokens, causal=causal, dtype=dtype)
                difference = (found_SV - expected_SV).abs().max() / expected_SV.abs().max()
                assert found_SV.dtype is dtype and difference <= tolerance, (dtype, difference)
    finally:
        groups.destroy()


Entries = Iterator[Entry]


def renamed(entries: Entries, exchanged: dict[str, str]) -> Entries:
    """Entries that take the other one's numbers where a name of theirs holds a word of a pair."""
    words = exchanged | {there: here for here, there in exchanged.items()}
    for entry in entries:
        parts = []
        for part in entry.theirs:
            word = next((word for word in words if word in part.name), None)
            parts.append(replace(part, name=part.name.replace(word, words[word])) if word else part)
        yield replace(entry, theirs=tuple(parts))


def norms_of_heads_are_exchanged(entries: Entries) -> Entries:
    return renamed(entries, {"q_norm": "k_norm"})


def gate_and_up_of_experts_are_exchanged(entries: Entries) -> Entries:
    return renamed(entries, {"experts.2.gate_proj": "experts.2.up_proj"})


def gate_and_up_are_exchanged(entries: Entries) -> Entries:
    return renamed(entries, {"1.ff_proj": "1.up_proj"})


def norms_of_heads_are_missing(entries: Entries) -> Entries:
    return (entry for entry in entries if "q_norm" not in entry.theirs[0].name)


def biases_are_not_grouped(entries: Entries) -> Entries:
    return (replace(e, heads=None) if e.ours.name.endswith(".bias") else e for e in entries)


def biases_are_missing(entries: Entries) -> Entries:
    return (entry for entry in entries if not entry.ours.name.endswith(".bias"))


def norms_of_latents_are_missing(entries: Entries) -> Entries:
    return (entry for entry in entries if "kv_a_layernorm" not in entry.theirs[0].name)


def latents_of_layers_are_exchanged(entries: Entries) -> Entries:
    return renamed(entries, {"layers.1.self_attn.kv_b_proj": "layers.2.self_attn.kv_b_proj"})


MUTATIONS = [
    pytest.param("qwen3_moe", norms_of_heads_are_exchanged, "logits differ", id="exchanged norms"),
    *(
        pytest.param(*case, id=case[1].__name__, marks=pytest.mark.slow)
        for case in (
            ("qwen3_moe", gate_and_up_of_experts_are_exchanged, "logits differ"),
            ("qwen3", norms_of_heads_are_missing, "the mapping table lacks"),
            ("qwen2", biases_are_not_grouped, "logits differ"),
            ("qwen2", biases_are_missing, "the mapping table lacks"),
            ("llada", gate_and_up_are_exchanged, "logits differ"),
            ("llada_moe", gate_and_up_of_experts_are_exchanged, "logits differ"),
            ("deepseek_v3", gate_and_up_of_experts_are_exchanged, "logits differ"),
            ("deepseek_v3", latents_of_layers_are_exchanged, "logits differ"),
            ("deepseek_v3", norms_of_latents_are_missing, "the mapping table lacks"),
        )
    ),
]


@pytest.mark.parametrize("kind, mutation, sentence", MUTATIONS)
def test_an_error_in_the_table_fails_both_ways(
    kind: str, mutation: Callable[[Entries], Entries], sentence: str, tmp_path: Path, monkeypatch, capsys
) -> None:
    source = checkpoints.write(tmp_path / "source", kind)
    assert to_mcore(source, tmp_path / "ours") == 0
    architecture = checkpoints.described(kind)[0]["architectures"][0]
    right = families.FAMILIES[architecture]

    def table(model: ModelConfig, layout: ExpertLayout) -> Entries:
        return mutation(right.table(model, layout))

    monkeypatch.setitem(families.FAMILIES, architecture, replace(right, table=table))
    capsys.readouterr()
    for convert, start in ((to_mcore, source), (to_hf, tmp_path / "ours")):
        assert convert(start, tmp_path / "result") == 1
        assert sentence in capsys.readouterr().out
        assert not (tmp_path / "result").exists()


def read(kind: str, **changed: object) -> ModelConfig:
    return model_config(checkpoints.described(kind)[0] | changed, checkpoints.MASK, "config.json")


WRONG = [
    ("qwen3", {"attention_bias": True}, "attention_bias=True: only False is served"),
    ("qwen3", {"use_sliding_window": True}, "use_sliding_window=True: only False is served"),
    ("qwen2", {"layer_types": ["sliding_attention"]}, "only full_attention is served"),
    ("qwen3", {"partial_rotary_factor": 0.5}, "rotates whole heads"),
    ("qwen3", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic"),
    ("dream", {"use_mrope": True}, "use_mrope=True: only False is served"),
    ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step=2: only 1 is served"),
    ("qwen3_moe", {"mlp_only_layers": 1}, "mlp_only_layers=1: only the first layers"),
    ("llada", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "does not read: take it out"),
    ("qwen3_moe", {"mlp_only_layers": [1]}, "only the first layers, counted from 0, can be without experts"),
    ("qwen3_moe", {"num_experts_per_tok": 1}, "of one expert per token is always 1"),
    ("qwen3_moe", {"norm_topk_prob": None}, "norm_topk_prob=null: it must be true or false"),
    ("llada", {"include_qkv_bias": True}, "include_qkv_bias=True: only False is served"),
    ("llada", {"block_type": "sequential"}, "block_type=sequential: only llama is served"),
    ("llada", {"multi_query_attention": True}, "multi_query_attention=True: only None is served"),
    ("llada", {"max_sequence_length": 1.5}, "max_sequence_length=1.5: it must be a whole number"),
    ("llada_moe", {"moe_layer_freq": [1, 0, 1]}, "moe_layer_freq=[1, 0, 1]: served are 3 numbers"),
    ("llada_moe", {"moe_layer_freq": 1}, "moe_layer_freq=1: served are 3 numbers"),
    ("llada_moe", {"moe_router_enable_expert_bias": True}, "only False is served"),
    ("llada_moe", {"shared_expert_intermediate_size": 32}, "only None is served"),
    ("deepseek_v3", {"rope_interleave": False}, "rope_interleave=False: only True is served"),
    ("deepseek_v3", {"topk_method": "greedy"}, "topk_method=greedy: only noaux_tc is served"),
    ("deepseek_v3", {"num_key_value_heads": 2}, "model.kv_heads=2 must be 4 with model.mla"),
    ("deepseek_v3", {"num_experts_per_tok": 6}, "only 4 experts per token, two per group, are served"),
    ("deepseek_v3", {"kv_lora_rank": 0}, "kv_lora_rank=0 must be above 0"),
    ("deepseek_v3", {"first_k_dense_replace": 3}, "describes no layer with experts: DeepseekV3ForCausalLM"),
    ("deepseek_v3", {"moe_layer_freq": 2}, "moe_layer_freq=2: only 1 is served"),
    ("deepseek_v3", {"scoring_func": "softmax"}, "scoring_func=softmax: only sigmoid is served"),
    ("deepseek_v3", {"n_group": None}, "n_group=null: it must be a whole number"),
    ("sdar", {"block_size": "4"}, "block_size='4': it must be a whole number"),
]


@pytest.mark.parametrize("kind, changed, sentence", WRONG)
def test_what_is_not_served_is_a_sentence(kind: str, changed: dict, sentence: str) -> None:
    with pytest.raises(BadInput, match=re.escape(sentence)):
        read(kind, **changed)


def test_every_key_is_read_or_named() -> None:
    for kind in checkpoints.RELATIVES:
        described = checkpoints.described(kind)[0]
        assert unread(described, "config.json") == []
        assert unread(described | {"z": 1}, "config.json") == ["z"]


def test_what_config_json_leaves_out_is_what_qwens_code_takes() -> None:
    def without(kind: str, *keys: str) -> ModelConfig:
        described = {k: v for k, v in checkpoints.described(kind)[0].items() if k not in keys}
        return model_config(described | {"num_attention_heads": 32}, checkpoints.MASK, "config.json")

    assert without("qwen3", "head_dim", "num_key_value_heads").head_dim == 128
    assert without("qwen3", "num_key_value_heads").kv_heads == 32
    assert without("qwen3_moe", "head_dim").head_dim == checkpoints.HIDDEN // 32
    assert not without("qwen3_moe", "norm_topk_prob").normalize_expert_weights
    assert read("qwen2", num_key_value_heads=None).kv_heads == checkpoints.HEADS


def test_a_model_leaves_as_what_can_hold_it_or_is_refused() -> None:
    for kind, others in (("qwen2", "Qwen3ForCausalLM"), ("qwen3", "LlamaForCausalLM")):
        with pytest.raises(BadInput, match=f"{others} cannot hold a model of .*: choose another"):
            describe(read(kind), others, {}, "bfloat16", None)
    with pytest.raises(BadInput, match=r"cannot hold a model of model.expert_score=softmax"):
        describe(read("qwen3_moe"), "LLaDA2MoeModelLM", {}, "bfloat16", None)
    with pytest.raises(BadInput, match=r"cannot hold a model of model.expert_groups=2"):
        describe(replace(read("llada_moe"), expert_groups=2), "LLaDAMoEModelLM", {}, "bfloat16", None)
    leaves_as = {"qwen2": "Qwen2ForCausalLM", "dream": "Qwen2ForCausalLM", "qwen3": "SDARForCausalLM"}
    leaves_as |= {"qwen3_moe": "SDARMoeForCausalLM", "llada": "LLaDAModelLM", "llada_moe": "LLaDAMoEModelLM"}
    for kind, expected in leaves_as.items():
        model, trained = read(kind), Manifest(config=BLOCKS, block_size=8, stage="blocks")
        came_as = checkpoints.described(kind)[0]
        assert architecture_for(trained, model, came_as) == expected
        written = describe(model, expected, came_as, "bfloat16", 64, block_size=8)
        assert written.get("block_size") == (8 if expected.startswith("SDAR") else None)
        for described in (written, describe(model, expected, {}, "bfloat16", 64)):
            assert model_config(described, checkpoints.MASK, "config.json") == model
    assert architecture_for(trained, read("llada"), {}) == "LLaDAModelLM"  # from nothing


@pytest.mark.slow
def test_experts_of_these_families_are_not_stacked(tmp_path: Path, capsys) -> None:
    assert to_mcore(checkpoints.write(tmp_path / "source", "qwen3_moe"), tmp_path / "ours") == 0
    assert to_hf(tmp_path / "ours", tmp_path / "back", "--expert-layout", "stacked") == 2
    assert "Qwen3MoeForCausalLM holds a matrix per expert" in capsys.readouterr().err


@pytest.mark.slow
def test_logits_before_a_mask_are_not_what_is_trained_here(tmp_path: Path, capsys) -> None:
    source = checkpoints.write(tmp_path / "source", "dream")
    assert to_mcore(source, tmp_path / "ours") == 0
    assert "DreamModel reads the logits before a mask" in capsys.readouterr().out
    assert main(["generate", f"hf:{source}", "--prompt", "a"]) == 2
    assert "which reads the logits before a mask: decoding here" in capsys.readouterr().err
