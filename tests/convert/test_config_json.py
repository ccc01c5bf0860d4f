"""What config.json says is of the right type, served or listed; what is written describes the tensors."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from llada_megatron.config.errors import BadInput
from llada_megatron.config.schema import ModelConfig, RotaryScaling, RotaryScalingConfig
from llada_megatron.convert.config_json import changes, describe, generation_config, model_config, unread
from tests.convert import checkpoints
from tests.convert.checkpoints import HEADS, HIDDEN, LLAMA, MASK, MOE
from tests.convert.test_round_trip import certificate, to_hf, to_mcore

LING, LLADA2, LLAMA_CAUSAL = "BailingMoeV2ForCausalLM", "LLaDA2MoeModelLM", "LlamaForCausalLM"
DESCRIBED = MOE | {"architectures": [LING]}
FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
YARN = RotaryScalingConfig(RotaryScaling.yarn, 8.0, 256)


def read(**changed: object) -> ModelConfig:
    return model_config(DESCRIBED | changed, MASK, "config.json")


WHOLE, NUMBER, TRUTH = "must be a whole number", "must be a number", "must be true or false"
WRONG = [
    ({"num_key_value_heads": None}, rf"num_key_value_heads=null: it {WHOLE}"),
    ({"n_group": None}, rf"n_group=null: it {WHOLE}"),
    ({"num_hidden_layers": "3"}, rf"num_hidden_layers='3': it {WHOLE}"),
    ({"num_hidden_layers": 3.0}, rf"num_hidden_layers=3.0: it {WHOLE}"),
    ({"num_hidden_layers": True}, rf"num_hidden_layers=True: it {WHOLE}"),
    ({"num_hidden_layers": -3}, rf"num_hidden_layers=-3: it {WHOLE}"),
    ({"num_hidden_layers": [3]}, rf"num_hidden_layers=\[3\]: it {WHOLE}"),
    ({"num_hidden_layers": 0}, r"cannot be built: model.layers=0"),
    ({"head_dim": "16"}, rf"head_dim='16': it {WHOLE}"),
    ({"head_dim": None, "num_attention_heads": "4"}, rf"num_attention_heads='4': it {WHOLE}"),
    ({"head_dim": None, "num_attention_heads": 0}, r"cannot be built: model.heads=0"),
    ({"num_key_value_heads": 3}, r"cannot be built: model.heads=4 is not a multiple of model.kv_heads=3"),
    ({"rms_norm_eps": None}, rf"rms_norm_eps=null: it {NUMBER}"),
    ({"rms_norm_eps": float("inf")}, rf"rms_norm_eps=inf: it {NUMBER}"),
    ({"routed_scaling_factor": True}, rf"routed_scaling_factor=True: it {NUMBER}"),
    ({"tie_word_embeddings": 1}, rf"tie_word_embeddings=1: it {TRUTH}"),
    ({"moe_router_enable_expert_bias": "true"}, rf"moe_router_enable_expert_bias='true': it {TRUTH}"),
    ({"num_shared_experts": "1"}, rf"num_shared_experts='1': it {WHOLE}"),
    ({"num_nextn_predict_layers": 0.5}, rf"num_nextn_predict_layers=0.5: it {WHOLE}"),
    ({"max_position_embeddings": "4096"}, rf"max_position_embeddings='4096': it {WHOLE}"),
    ({"eos_token_id": "3"}, r"eos_token_id='3': it must be a token id, a list of them, or null"),
    ({"pad_token_id": [1, 2.5]}, r"pad_token_id=\[1, 2.5\]: it must be a token id"),
    ({"quantization_config": "fp8"}, r"quantization_config='fp8': it must be an object"),
    ({"use_sliding_window": True}, r"use_sliding_window=True: only False is served"),
    ({"layer_types": ["full_attention", "sliding_attention"]}, r"only full_attention is served"),
    ({"rope_interleave": True}, r"rope_interleave=True, which changes the computation"),
    ({"final_logit_softcapping": 30.0}, r"final_logit_softcapping=30.0, which changes the computation"),
    ({"architectures": LING}, r"of architecture none, which is not served"),
    ({"architectures": [7]}, r"of architecture none, which is not served"),
    ({"rope_scaling": {"type": "linear", "factor": 0.5}}, r"rotary_scaling.factor=0.5 is out of range"),
]


@pytest.mark.parametrize("changed, sentence", WRONG, ids=range(len(WRONG)))
def test_a_wrong_value_is_a_sentence(changed: dict, sentence: str) -> None:
    with pytest.raises(BadInput, match=sentence):
        read(**changed)


def test_null_is_derived_where_the_public_code_does() -> None:
    assert read(head_dim=None).head_dim == HIDDEN // HEADS
    assert read(num_shared_experts=None).shared_expert_hidden_size == 0
    assert read(use_bias=None, use_sliding_window=None, rope_interleave=None, layer_types=None) == read()
    llama = model_config(LLAMA | {"num_key_value_heads": None, "head_dim": None}, MASK, "config.json")
    assert (llama.kv_heads, llama.head_dim) == (HEADS, HIDDEN // HEADS)


def test_what_is_absent_is_what_the_public_code_of_that_architecture_takes() -> None:
    for architecture, factor, fraction in ((LING, 1.0, 1.0), (LLADA2, 2.5, 0.5)):
        absent = {k: v for k, v in MOE.items() if k not in ("routed_scaling_factor", "partial_rotary_factor")}
        model = model_config(absent | {"architectures": [architecture]}, MASK, "config.json")
        assert (model.routed_scaling_factor, model.rotary_fraction) == (factor, fraction)


def test_numbers_of_the_other_kind_become_floats() -> None:
    model = read(routed_scaling_factor=2, rope_theta=10000)
    assert isinstance(model.routed_scaling_factor, float) and isinstance(model.rotary_base, float)


def test_keys_that_nobody_reads_are_listed() -> None:
    strange = {"z_loss": 0.1, "attention_dropout": 0.1, "sliding_window": 4096, "nothing": None}
    assert unread(DESCRIBED | strange, "config.json") == ["attention_dropout", "z_loss"]
    assert unread(LLAMA | strange | {"auto_map": {}}, "config.json") == [
        "attention_dropout",
        "auto_map",
        "sliding_window",
        "z_loss",
    ]
    harmless = {"attention_dropout": 0.0, "use_cache": True, "router_dtype": "fp32", "pad_token_id": -1}
    assert unread(DESCRIBED | harmless, "config.json") == []


def test_unread_keys_are_in_the_certificate_and_on_the_terminal(tmp_path: Path, capsys) -> None:
    source = changed_source(tmp_path, zloss=1.0, other={"a": 1})
    assert to_mcore(source, tmp_path / "ours") == 0
    assert "unread     2 keys of config.json: other, zloss" in capsys.readouterr().out
    assert certificate(tmp_path / "ours")["unread"] == ["other", "zloss"]


def changed_source(folder: Path, **changed: object) -> Path:
    source = checkpoints.write(folder / "source", "bailing")
    described = json.loads((source / "config.json").read_text()) | changed
    (source / "config.json").write_text(json.dumps(described))
    return source


@pytest.mark.parametrize("architecture", [LING, LLADA2])
def test_a_leftover_quantization_config_is_said_and_not_written(architecture, tmp_path: Path, capsys) -> None:
    source = changed_source(tmp_path, quantization_config=FP8)
    assert to_mcore(source, tmp_path / "ours") == 0
    said = "config.json has quantization_config and no tensor is quantised"
    assert said in capsys.readouterr().out and said in " ".join(certificate(tmp_path / "ours")["notes"])
    assert to_hf(tmp_path / "ours", tmp_path / "back", "--architecture", architecture) == 0
    assert "quantization_config is left out" in capsys.readouterr().out
    assert "quantization_config" not in json.loads((tmp_path / "back" / "config.json").read_text())


def test_every_spelling_of_the_dtype_is_that_of_the_tensors() -> None:
    carried = DESCRIBED | {"dtype": "float8_e4m3fn", "torch_dtype": "float8_e4m3fn"}
    for architecture in (LING, LLADA2):
        written = describe(read(), architecture, carried, "float32", None)
        assert written["dtype"] == written["torch_dtype"] == "float32"


def test_ids_that_end_a_text_are_kept_without_the_mask() -> None:
    carried = DESCRIBED | {"eos_token_id": [3, MASK], "pad_token_id": 5, "bos_token_id": None}
    for architecture in (LING, LLADA2):
        written = describe(read(), architecture, carried, "bfloat16", None)
        assert written["eos_token_id"] == [3] and written["pad_token_id"] == 5
        assert written["mask_token_id"] == MASK
        assert generation_config({}, written, MASK) == {"eos_token_id": [3], "pad_token_id": 5}


def test_the_longest_position_is_the_sources_else_the_runs_and_said() -> None:
    carried = DESCRIBED | {"max_position_embeddings": 4096}
    for architecture in (LING, LLADA2):
        written = describe(read(), architecture, carried, "bfloat16", 512)
        assert written["max_position_embeddings"] == 4096 and changes(carried, written, 512) == []
        (sentence,) = changes(carried, written, 8192)
        assert "is the source's; the run trained sequences of 8192 tokens" in sentence
    written = describe(read(), LLADA2, {}, "bfloat16", 512)
    assert written["max_position_embeddings"] == 512
    assert changes({}, written, 512) == ["max_position_embeddings=512 is new: the model came without one."]
    written = describe(read(), LLADA2, {}, "bfloat16", None)
    assert "max_position_embeddings" not in written
    assert changes({}, written, None) == [
        "max_position_embeddings is not written: neither the source nor a run says it."
    ]


def test_a_scaling_that_came_in_training_is_written_and_said() -> None:
    carried = DESCRIBED | {"max_position_embeddings": 256, "rope_scaling": None}
    for architecture in (LING, LLADA2):
        written = describe(replace(read(), rotary_scaling=YARN), architecture, carried, "bfloat16", 512)
        assert written["rope_scaling"]["rope_type"] == "yarn" and written["rope_theta"] == 600000
        assert written["max_position_embeddings"] == 2048
        assert model_config(written, MASK, "config.json").rotary_scaling == YARN
        assert changes(carried, written, 512) == [
            "rope_scaling changed to what the model computes.",
            "max_position_embeddings changed from 256 to 2048, as far as the rotary scaling reaches.",
        ]


def test_a_scaling_that_an_earlier_version_overlooked_is_not_written_again() -> None:
    for scaling in ({"type": "yarn", "factor": 4.0}, {"type": "dynamic"}):
        carried = {k: v for k, v in DESCRIBED.items() if k != "rope_theta"} | {
            "rope_parameters": scaling | {"rope_theta": 600000}
        }
        written = describe(read(), LING, carried, "bfloat16", None)
        assert "rope_parameters" not in written and not written.get("rope_scaling")
        assert read() == model_config(written, MASK, "config.json")


def test_the_same_config_stays_the_same_object_by_value() -> None:
    for spelt in ({}, {"head_dim": None}, {"rope_scaling": {"type": "default"}}):
        carried = DESCRIBED | {"eos_token_id": 3, "strange": 1} | spelt
        model = model_config(carried, MASK, "config.json")
        assert describe(model, LING, carried, "bfloat16", 64) == carried


def test_pools_of_experts_come_and_go_with_the_size_of_their_blocks() -> None:
    pooled = read(expert_capacity=6, block_size=16, n_group=8, topk_group=1)  # groups are not used
    assert pooled.expert_capacity == 6 and read(expert_capacity=None).expert_capacity == 0
    written = describe(pooled, LLADA2, {}, "bfloat16", None, block_size=8)
    assert (written["expert_capacity"], written["block_size"]) == (6, 8)
    came_with = MOE | {"architectures": [LLADA2], "expert_capacity": 6, "block_size": 16}
    assert describe(pooled, LLADA2, came_with, "bfloat16", None)["block_size"] == 16
    assert describe(pooled, LLADA2, came_with, "bfloat16", None, block_size=8)["block_size"] == 8
    without = describe(read(), LLADA2, came_with, "bfloat16", None)
    assert without["expert_capacity"] == 0
    assert "expert_capacity" not in describe(read(), LLADA2, {}, "bfloat16", None, block_size=8)
    with pytest.raises(BadInput, match=r"knows no pools of experts .* choose --architecture LLaDA2"):
        describe(pooled, LING, {}, "bfloat16", None)
    with pytest.raises(BadInput, match=r"model\.expert_capacity=3 must be from the 4 experts"):
        read(expert_capacity=3)
