"""Tiny Hugging Face checkpoints, written with the library under names spelt out here, not by the tables."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

LAYERS, HIDDEN, HEADS, KV_HEADS, HEAD_DIM = 3, 64, 4, 2, 16
EXPERTS, WIDTH, DENSE_WIDTH, VOCABULARY = 8, 32, 96, 288
MASK = 257
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
QUANTISED = (*PROJECTIONS, "query_key_value", "dense", "q_proj", "k_proj", "v_proj", "o_proj")
MOE = {
    "model_type": "bailing_moe",
    "hidden_act": "silu",
    "use_bias": False,
    "use_qkv_bias": False,
    "score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "routed_scaling_factor": 2.5,
    "partial_rotary_factor": 0.5,
    "rope_theta": 600000,
    "rms_norm_eps": 1e-6,
    "first_k_dense_replace": 1,
    "num_hidden_layers": LAYERS,
    "hidden_size": HIDDEN,
    "intermediate_size": DENSE_WIDTH,
    "moe_intermediate_size": WIDTH,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "num_experts": EXPERTS,
    "num_experts_per_tok": 4,
    "num_shared_experts": 1,
    "n_group": 4,
    "topk_group": 2,
    "vocab_size": VOCABULARY,
    "torch_dtype": "bfloat16",
}
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "num_hidden_layers": LAYERS,
    "hidden_size": HIDDEN,
    "intermediate_size": DENSE_WIDTH,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "vocab_size": VOCABULARY,
    "torch_dtype": "bfloat16",
}


class Weights(dict):
    """Random tensors, each drawn from its name."""

    def add(self, name: str, *shape: int, dtype: torch.dtype = torch.bfloat16) -> None:
        generator = torch.Generator().manual_seed(len(self) + 1)
        values = torch.randn(shape, generator=generator) * (0.3 if len(shape) > 1 else 0.2)
        self[name] = (values + (1.0 if "norm" in name else 0.0)).to(dtype)

    def feed_forward(self, name: str, width: int) -> None:
        for projection in PROJECTIONS:
            self.add(f"{name}.{projection}.weight", *matrix(projection, width))


def matrix(projection: str, width: int) -> tuple[int, int]:
    return (HIDDEN, width) if projection == "down_proj" else (width, HIDDEN)


def moe_weights(*, stacked: bool, prediction_layer: bool) -> Weights:
    weights = Weights()
    weights.add("model.word_embeddings.weight", VOCABULARY, HIDDEN)
    for layer in range(LAYERS):
        name = f"model.layers.{layer}"
        weights.add(f"{name}.input_layernorm.weight", HIDDEN)
        rows = (HEADS + 2 * KV_HEADS) * HEAD_DIM
        weights.add(f"{name}.attention.query_key_value.weight", rows, HIDDEN)
        weights.add(f"{name}.attention.query_layernorm.weight", HEAD_DIM)
        weights.add(f"{name}.attention.key_layernorm.weight", HEAD_DIM)
        weights.add(f"{name}.attention.dense.weight", HIDDEN, HEADS * HEAD_DIM)
        weights.add(f"{name}.post_attention_layernorm.weight", HIDDEN)
        if layer == 0:
            weights.feed_forward(f"{name}.mlp", DENSE_WIDTH)
            continue
        weights.add(f"{name}.mlp.gate.weight", EXPERTS, HIDDEN)
        weights.add(f"{name}.mlp.gate.expert_bias", EXPERTS, dtype=torch.float32)
        if stacked:
            for projection in PROJECTIONS:
                weights.add(f"{name}.mlp.experts.{projection}", EXPERTS, *matrix(projection, WIDTH))
        else:
            for expert in range(EXPERTS):
                weights.feed_forward(f"{name}.mlp.experts.{expert}", WIDTH)
        weights.feed_forward(f"{name}.mlp.shared_experts", WIDTH)
    weights.add("model.norm.weight", HIDDEN)
    weights.add("lm_head.weight", VOCABULARY, HIDDEN)
    if prediction_layer:
        weights.add(f"model.layers.{LAYERS}.eh_proj.weight", HIDDEN, 2 * HIDDEN)
        weights.feed_forward(f"model.layers.{LAYERS}.mlp.experts.0", WIDTH)
    return weights


def llama_weights(*, tied: bool) -> Weights:
    weights = Weights()
    weights.add("model.embed_tokens.weight", VOCABULARY, HIDDEN)
    for layer in range(LAYERS):
        name = f"model.layers.{layer}"
        weights.add(f"{name}.input_layernorm.weight", HIDDEN)
        for projection, heads in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
            weights.add(f"{name}.self_attn.{projection}_proj.weight", heads * HEAD_DIM, HIDDEN)
        weights.add(f"{name}.self_attn.o_proj.weight", HIDDEN, HEADS * HEAD_DIM)
        weights.add(f"{name}.post_attention_layernorm.weight", HIDDEN)
        weights.feed_forward(f"{name}.mlp", DENSE_WIDTH)
    weights.add("model.norm.weight", HIDDEN)
    if not tied:
        weights.add("lm_head.weight", VOCABULARY, HIDDEN)
    return weights


def described(kind: str) -> tuple[dict, Weights]:
    """config.json and tensors of bailing, bailing_mtp, llada2, llada2_stacked, llada2_pools, llama or
    llama_untied."""
    if kind.startswith("llama"):
        tied = kind == "llama"
        return LLAMA | {"tie_word_embeddings": tied}, llama_weights(tied=tied)
    weights = moe_weights(stacked=kind == "llada2_stacked", prediction_layer=kind == "bailing_mtp")
    if kind.startswith("llada2"):
        pools = {"expert_capacity": 6, "block_size": 16} if kind == "llada2_pools" else {}
        return MOE | {"architectures": ["LLaDA2MoeModelLM"], "model_type": "llada2_moe"} | pools, weights
    extra = {"num_nextn_predict_layers": 1} if kind == "bailing_mtp" else {}
    return MOE | {"architectures": ["BailingMoeV2ForCausalLM"]} | extra, weights


def write(folder: Path, kind: str) -> Path:
    """A checkpoint of a kind in a new folder."""
    config, weights = described(kind)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "generation_config.json").write_text('{"eos_token_id": [3, 257]}\n')
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def add_tokenizer(folder: Path, special: dict[int, str]) -> Path:
    """A tokenizer.json whose ids are words, but for the special tokens at the given ids."""
    vocabulary = {special.get(token, f"word{token}"): token for token in range(max([100, *special]) + 1)}
    content = {
        "version": "1.0",
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "word0"},
        "added_tokens": [],
    }
    (folder / "tokenizer.json").write_text(json.dumps(content))
    (folder / "tokenizer_config.json").write_text("{}\n")
    return folder


def quantise(folder: Path, *, block: int = 128) -> Path:
    """The folder's projections in e4m3 with a scale per block, as DeepSeek-V3 publishes them."""
    weights, config = (
        load_file(folder / "model.safetensors"),
        json.loads((folder / "config.json").read_text()),
    )
    for name in [name for name in weights if name.split(".")[-2] in QUANTISED]:
        matrix = weights[name].float()
        R, C = matrix.shape
        blocks = torch.zeros(-(-R // block) * block, -(-C // block) * block)
        blocks[:R, :C] = matrix
        blocks = blocks.unflatten(1, (-1, block)).unflatten(0, (-1, block))  # [R / 128, 128, C / 128, 128]
        scales = blocks.abs().amax((1, 3)) / torch.finfo(torch.float8_e4m3fn).max
        scaled = (blocks / scales[:, None, :, None]).flatten(2).flatten(0, 1)[:R, :C]
        weights[name] = scaled.to(torch.float8_e4m3fn).contiguous()
        weights[f"{name}_scale_inv"] = scales
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    how = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [block, block]}
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": how}, indent=2) + "\n")
    return folder
