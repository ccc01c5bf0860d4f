"""Adding a family of Hugging Face checkpoints: the worked example of docs/extending.md, with its certificate.

`Parrot` is a Llama under other names: `lm.wte`, `lm.blocks.N.attn.wq` and so on, and no `rope_theta`. FAMILY
is what its file `convert/families/parrot.py` would define; a place in SERVED of that package serves it.
"""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llada_megatron.checkpoint.shards import whole
from llada_megatron.config.errors import BadInput
from llada_megatron.config.schema import ModelConfig
from llada_megatron.convert import families
from llada_megatron.convert.config_json import describe, model_config
from llada_megatron.convert.families import ExpertLayout, Family
from llada_megatron.convert.families.family import Row
from llada_megatron.convert.mapping import Entry, HeadGroups, rows, same
from tests.convert import checkpoints
from tests.convert.test_round_trip import certificate, to_hf, to_mcore

# convert/families/parrot.py, from here ...


def table(model: ModelConfig, layout: ExpertLayout) -> Iterator[Entry]:
    """Entries in the order in which tensors are written: a part of ours, and theirs with the same numbers."""
    H, D, W = model.hidden_size, model.head_dim, model.ffn_hidden_size
    heads = HeadGroups(model.heads, model.kv_heads, D)
    counts = {"wq": model.heads * D, "wk": model.kv_heads * D, "wv": model.kv_heads * D}
    yield same("embedding.word_embeddings.weight", "lm.wte", model.vocab_size, H)
    for layer in range(model.layers):
        ours, theirs = f"decoder.layers.{layer}", f"lm.blocks.{layer}"
        attention = f"{ours}.self_attention"
        yield same(f"{attention}.linear_qkv.layer_norm_weight", f"{theirs}.norm1", H)
        parts = tuple(whole(f"{theirs}.attn.{name}", count, H) for name, count in counts.items())
        yield Entry(whole(f"{attention}.linear_qkv.weight", sum(counts.values()), H), parts, heads)
        yield same(f"{attention}.linear_proj.weight", f"{theirs}.attn.wo", H, model.heads * D)
        yield same(f"{ours}.mlp.linear_fc1.layer_norm_weight", f"{theirs}.norm2", H)
        for first, name in ((0, "gate"), (W, "up")):
            part = rows(f"{ours}.mlp.linear_fc1.weight", (2 * W, H), first, W)
            yield Entry(part, (whole(f"{theirs}.{name}", W, H),))
        yield same(f"{ours}.mlp.linear_fc2.weight", f"{theirs}.down", H, W)
    yield same("decoder.final_layernorm.weight", "lm.norm", H)
    yield same("output_layer.weight", "lm.head", model.vocab_size, H)


def fields(described: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """What every Parrot has, and config.json does not say."""
    constant = {"qk_norm": False, "rotary_fraction": 1.0, "rotary_base": 10000.0, "tied_head": False}
    return constant | {"dense_layers": values["layers"], "head_dim": values["hidden_size"] // values["heads"]}


class ParrotForward:
    """Logits from their tensors and config.json, sharing nothing with the table."""

    def __init__(self, files: Any, config: dict[str, Any]) -> None:
        self.files, self.config = files, config

    def get(self, name: str) -> torch.Tensor:
        return self.files.read(whole(name, *self.files.tensors[name].shape)).float()

    def norm(self, name: str, values: torch.Tensor) -> torch.Tensor:
        return values / (values.square().mean(-1, keepdim=True) + self.config["eps"]).sqrt() * self.get(name)

    def rotated(self, heads_HSD: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        half = heads_HSD.shape[2] // 2
        angles = positions[:, None] * 10000.0 ** (-torch.arange(half) / half)
        turned = torch.polar(torch.ones_like(angles), angles) * torch.complex(*heads_HSD.split(half, -1))
        return torch.cat([turned.real, turned.imag], dim=-1)

    def __call__(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        hidden_SH, heads = self.get("lm.wte")[tokens], self.config["n_head"]
        for layer in range(self.config["n_layer"]):
            name = f"lm.blocks.{layer}"
            normed_SH = self.norm(f"{name}.norm1", hidden_SH)
            query, key, value = (
                (normed_SH @ self.get(f"{name}.attn.{one}").T).unflatten(-1, (count, -1)).transpose(0, 1)
                for one, count in (("wq", heads), ("wk", self.config["n_kv"]), ("wv", self.config["n_kv"]))
            )
            mixed_HSD = torch.nn.functional.scaled_dot_product_attention(
                self.rotated(query, positions)[None],
                self.rotated(key, positions)[None],
                value[None],
                is_causal=True,
                enable_gqa=True,
            )[0]
            hidden_SH = hidden_SH + mixed_HSD.transpose(0, 1).flatten(1) @ self.get(f"{name}.attn.wo").T
            normed_SH = self.norm(f"{name}.norm2", hidden_SH)
            gate, up = (normed_SH @ self.get(f"{name}.{one}").T for one in ("gate", "up"))
            hidden_SH = hidden_SH + (gate * gate.sigmoid() * up) @ self.get(f"{name}.down").T
        return self.norm("lm.norm", hidden_SH) @ self.get("lm.head").T


FAMILY = Family(
    architectures={"ParrotLM": {"model_type": "parrot"}},
    experts=False,
    rows=(
        Row("n_vocab", "vocab_size"),
        Row("n_layer", "layers"),
        Row("n_embd", "hidden_size"),
        Row("n_head", "heads"),
        Row("n_kv", "kv_heads", lambda said: said["n_head"]),
        Row("n_ff", "ffn_hidden_size"),
        Row("eps", "norm_eps"),
    ),
    fixed={"bias": False},
    fields=fields,
    table=table,
    drop_reason=lambda name, model, described: None,
    reference=ParrotForward,
)

# ... to here


NAMES = {
    "model.embed_tokens.weight": "lm.wte",
    "model.norm.weight": "lm.norm",
    "lm_head.weight": "lm.head",
    "model.layers.": "lm.blocks.",
    ".input_layernorm.weight": ".norm1",
    ".post_attention_layernorm.weight": ".norm2",
    ".self_attn.": ".attn.",
    "_proj.weight": "",
    ".mlp.": ".",
}
LETTERS = {"attn.q": "attn.wq", "attn.k": "attn.wk", "attn.v": "attn.wv", "attn.o": "attn.wo"}
DESCRIBED = {
    "architectures": ["ParrotLM"],
    "model_type": "parrot",
    "n_vocab": checkpoints.VOCABULARY,
    "n_layer": checkpoints.LAYERS,
    "n_embd": checkpoints.HIDDEN,
    "n_head": checkpoints.HEADS,
    "n_kv": checkpoints.KV_HEADS,
    "n_ff": checkpoints.DENSE_WIDTH,
    "eps": 1e-5,
    "torch_dtype": "bfloat16",
}


def parrot_checkpoint(folder: Path, **changed: object) -> Path:
    weights = {}
    for name, tensor in checkpoints.llama_weights(tied=False).items():
        for theirs, parrots in (NAMES | LETTERS).items():
            name = name.replace(theirs, parrots)
        weights[name] = tensor
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(DESCRIBED | changed, indent=2) + "\n")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture
def registered(monkeypatch) -> None:
    """As the line `SERVED = (..., parrot.FAMILY)` would do."""
    monkeypatch.setitem(families.FAMILIES, "ParrotLM", FAMILY)


def test_a_new_family_goes_in_and_out_with_a_certificate(registered, tmp_path: Path) -> None:
    source = parrot_checkpoint(tmp_path / "source")
    assert to_mcore(source, tmp_path / "ours") == 0
    assert certificate(tmp_path / "ours")["logits"]["compared"]
    # Its own config.json travels along, so it leaves as what it came as.
    assert to_hf(tmp_path / "ours", tmp_path / "back") == 0
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (source / name).read_bytes()
    held = certificate(tmp_path / "back")
    assert held["architecture"] == "ParrotLM" and held["logits"]["compared"]


def test_its_models_leave_as_another_family_that_holds_them(registered, tmp_path: Path) -> None:
    assert to_mcore(parrot_checkpoint(tmp_path / "source"), tmp_path / "ours") == 0
    assert to_hf(tmp_path / "ours", tmp_path / "llama", "--architecture", "LlamaForCausalLM") == 0
    expected = checkpoints.llama_weights(tied=False)
    found = load_file(tmp_path / "llama" / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_what_its_model_computes_in_one_way_only_is_refused(registered, tmp_path: Path, capsys) -> None:
    source = parrot_checkpoint(tmp_path / "source", bias=True)
    assert to_mcore(source, tmp_path / "ours") == 2
    assert "sets bias=True: only False is served" in capsys.readouterr().err


def test_a_reference_that_computes_otherwise_fails(monkeypatch, tmp_path: Path, capsys) -> None:
    class Unrotated(ParrotForward):
        def rotated(self, heads_HSD: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
            return heads_HSD

    monkeypatch.setitem(families.FAMILIES, "ParrotLM", replace(FAMILY, reference=Unrotated))
    assert to_mcore(parrot_checkpoint(tmp_path / "source"), tmp_path / "ours") == 1
    assert "logits differ" in capsys.readouterr().out


def test_a_model_of_another_model_family_is_not_written_as_one_of_gpt(registered) -> None:
    model = replace(model_config(DESCRIBED, checkpoints.MASK, "config.json"), family="other")
    with pytest.raises(BadInput, match="ParrotLM holds models of gpt"):
        describe(model, "ParrotLM", {}, dtype="bfloat16", positions=64)
