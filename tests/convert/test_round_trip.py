"""Out comes what went in, for every family and both layouts of experts, and the certificate says so."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llada_megatron.cli import main
from llada_megatron.record.manifest import find
from tests.convert import checkpoints
from tests.convert.checkpoints import MASK

KINDS = ["bailing", "llada2", "llada2_stacked", "llada2_pools", "llama", "llama_untied", "sdar_moe"]
REST = [kind for kind in checkpoints.RELATIVES if kind not in KINDS]
BLOCKS = {"llada2_pools": 16, "sdar": 4, "sdar_moe": 4}


def to_mcore(source: Path, target: Path, *options: str) -> int:
    stated = [] if "--mask-token-id" in options else ["--mask-token-id", str(MASK)]
    return main(["convert", "hf-to-mcore", "--from", str(source), "--to", str(target), *stated, *options])


def to_hf(source: Path, target: Path, *options: str) -> int:
    return main(["convert", "mcore-to-hf", "--from", str(source), "--to", str(target), *options])


def certificate(folder: Path) -> dict:
    return json.loads((folder / "certificate.json").read_text())


@pytest.mark.parametrize("kind", [*KINDS, *(pytest.param(kind, marks=pytest.mark.slow) for kind in REST)])
def test_there_and_back_gives_the_same_files(kind: str, tmp_path: Path) -> None:
    source = checkpoints.write(tmp_path / "source", kind)
    layout = ["--expert-layout", "stacked"] if kind == "llada2_stacked" else []
    assert to_mcore(source, tmp_path / "ours") == 0
    assert to_hf(tmp_path / "ours", tmp_path / "back", *layout) == 0
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (source / name).read_bytes()
    inward, outward = certificate(tmp_path / "ours"), certificate(tmp_path / "back")
    assert inward["hugging_face"] == outward["hugging_face"] and inward["megatron"] == outward["megatron"]
    for name, tensor in load_file(source / "model.safetensors").items():
        digest = hashlib.sha256(tensor.view(torch.uint8).numpy().tobytes()).hexdigest()
        assert inward["hugging_face"][name]["sha256"] == digest
    for held in (inward, outward):
        assert held["passed"] and held["parameters"]["written"] == held["parameters"]["architecture"]
        assert held["logits"]["max_difference"] < 1e-5 * held["logits"]["max_logit"]
    assert find(str(tmp_path / "ours")).manifest.block_size == BLOCKS.get(kind, 0)


def test_what_a_hybrid_model_saved_leaves_by_the_same_table(tmp_path: Path) -> None:
    source = checkpoints.write(tmp_path / "source", "llada2")
    assert to_mcore(source, tmp_path / "ours") == 0
    held = find(str(tmp_path / "ours"))
    held.manifest.config["model"]["core"] = "hybrid"
    held.manifest.write(held.path)
    assert to_hf(tmp_path / "ours", tmp_path / "back") == 0
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (source / name).read_bytes()
    assert certificate(tmp_path / "back")["logits"]["compared"]


def test_prediction_layers_are_left_out_listed_and_gone_from_the_configuration(
    tmp_path: Path, capsys
) -> None:
    source = checkpoints.write(tmp_path / "source", "bailing_mtp")
    assert to_mcore(source, tmp_path / "ours") == 0
    assert "left out   4 tensors" in capsys.readouterr().out
    dropped = certificate(tmp_path / "ours")["dropped"]
    assert {name.split(".")[2] for name in dropped} == {"3"} and len(dropped) == 4
    assert to_hf(tmp_path / "ours", tmp_path / "back") == 0
    before, after = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "back"))
    assert after.keys() == before.keys() - dropped.keys()
    assert all(torch.equal(before[name], after[name]) for name in after)
    assert json.loads((tmp_path / "back" / "config.json").read_text())["num_nextn_predict_layers"] == 0


def test_a_ling_checkpoint_leaves_as_llada2_with_its_tokenizer_and_without_the_mask_as_an_end(tmp_path: Path):
    source = checkpoints.add_tokenizer(checkpoints.write(tmp_path / "source", "bailing_mtp"), {3: "<eos>"})
    (source / "modeling_bailing_moe_v2.py").write_text("raise SystemExit\n")
    assert to_mcore(source, tmp_path / "ours") == 0
    assert to_hf(tmp_path / "ours", tmp_path / "back", "--architecture", "LLaDA2MoeModelLM") == 0
    described = json.loads((tmp_path / "back" / "config.json").read_text())
    assert described["architectures"] == ["LLaDA2MoeModelLM"] and described["model_type"] == "llada2_moe"
    assert described["mask_token_id"] == MASK and described["use_qk_norm"] is True
    assert described["use_bias"] is described["use_qkv_bias"] is False  # its class takes True where absent
    assert "num_nextn_predict_layers" not in described
    assert json.loads((tmp_path / "back" / "generation_config.json").read_text()) == {"eos_token_id": [3]}
    names = {path.name for path in (tmp_path / "back").iterdir()}
    assert {"tokenizer.json", "tokenizer_config.json"} <= names and "modeling_bailing_moe_v2.py" not in names


def test_experts_change_their_layout_and_nothing_else(tmp_path: Path) -> None:
    assert to_mcore(checkpoints.write(tmp_path / "source", "llada2"), tmp_path / "ours") == 0
    assert to_hf(tmp_path / "ours", tmp_path / "stacked", "--expert-layout", "stacked") == 0
    separate, stacked = (load_file(tmp_path / name / "model.safetensors") for name in ("source", "stacked"))
    name = "model.layers.2.mlp.experts"
    for projection in checkpoints.PROJECTIONS:
        each = [separate[f"{name}.{expert}.{projection}.weight"] for expert in range(checkpoints.EXPERTS)]
        assert torch.equal(stacked[f"{name}.{projection}"], torch.stack(each))
    assert to_mcore(tmp_path / "stacked", tmp_path / "again") == 0
    assert certificate(tmp_path / "again")["megatron"] == certificate(tmp_path / "ours")["megatron"]


def test_shards_have_an_index_that_the_way_back_reads(tmp_path: Path) -> None:
    source = checkpoints.write(tmp_path / "source", "llada2")
    assert to_mcore(source, tmp_path / "ours") == 0
    assert to_hf(tmp_path / "ours", tmp_path / "shards", "--max-shard-gb", "0.0001") == 0
    index = json.loads((tmp_path / "shards" / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors" and len(files) > 3
    read = {name: tensor for file in files for name, tensor in load_file(tmp_path / "shards" / file).items()}
    before = load_file(source / "model.safetensors")
    assert read.keys() == before.keys() and all(torch.equal(read[name], before[name]) for name in read)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in read.values())
    assert to_mcore(tmp_path / "shards", tmp_path / "again") == 0
    assert to_hf(tmp_path / "again", tmp_path / "same", "--max-shard-gb", "0.0001") == 0
    for path in sorted((tmp_path / "shards").glob("model*")):
        assert path.read_bytes() == (tmp_path / "same" / path.name).read_bytes()


def test_rounding_spares_the_expert_bias_and_is_said(tmp_path: Path, capsys) -> None:
    source = checkpoints.write(tmp_path / "source", "llada2")
    weights = {
        name: tensor.float() * 1.001 for name, tensor in load_file(source / "model.safetensors").items()
    }
    save_file(weights, source / "model.safetensors")
    assert to_mcore(source, tmp_path / "ours") == 0
    assert to_hf(tmp_path / "ours", tmp_path / "back", "--dtype", "bf16") == 0
    assert "not compared: the numbers were rounded" in capsys.readouterr().out
    back = load_file(tmp_path / "back" / "model.safetensors")
    for name, tensor in weights.items():
        kept = tensor if name.endswith("expert_bias") else tensor.bfloat16()
        assert back[name].dtype == kept.dtype and torch.equal(back[name], kept)
    assert json.loads((tmp_path / "back" / "config.json").read_text())["torch_dtype"] == "bfloat16"
