"""Tiny Hugging Face checkpoints, written with the library under names spelt out here, not by the tables."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

LAYERS, HIDDEN, HEADS, KV_HEADS, HEAD_DIM = 3, 64, 4, 2, 16
EXPERTS, WIDTH, DENSE_WIDTH, VOCABULARY = 8, 32, 96, 288
MASK = 257
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
QUANTISED = (
    *(*PROJECTIONS, "query_key_value", "dense", "q_proj", "k_proj", "v_proj", "o_proj"),
    *("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj"),
)
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
QWEN = {
    "hidden_act": "silu",
    "num_hidden_layers": LAYERS,
    "hidden_size": HIDDEN,
    "intermediate_size": DENSE_WIDTH,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "rope_scaling": None,
    "sliding_window": None,
    "use_sliding_window": False,
    "max_window_layers": LAYERS,
    "tie_word_embeddings": False,
    "vocab_size": VOCABULARY,
    "torch_dtype": "bfloat16",
}
QWEN2 = QWEN | {"use_mrope": False}
QWEN3_HEAD_DIM = 32
"""More than HIDDEN / HEADS, as in small Qwen3s."""
QWEN3 = QWEN | {"attention_bias": False, "head_dim": QWEN3_HEAD_DIM}
QWEN3_MOE = QWEN3 | {
    "num_experts": EXPERTS,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": WIDTH,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "router_aux_loss_coef": 0.001,
}
SDAR = {"block_size": 4, "mask_token_id": MASK, "fuse_cross_entropy": True}
QWENS: dict[str, dict] = {
    "qwen2": QWEN2 | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"},
    "dream": QWEN2 | {"architectures": ["DreamModel"], "model_type": "Dream", "mask_token_id": MASK},
    "qwen3": QWEN3 | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"},
    "qwen3_tied": QWEN3
    | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "tie_word_embeddings": True},
    "sdar": QWEN3 | SDAR | {"architectures": ["SDARForCausalLM"], "model_type": "sdar"},
    "qwen3_moe": QWEN3_MOE | {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe"},
    "qwen3_moe_dense": QWEN3_MOE
    | {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "mlp_only_layers": [0]},
    "sdar_moe": QWEN3_MOE
    | SDAR
    | {"architectures": ["SDARMoeForCausalLM"], "model_type": "sdar_moe", "norm_topk_prob": False},
}
LLADA = {
    "architectures": ["LLaDAModelLM"],
    "model_type": "llada",
    **dict(activation_type="silu", alibi=False, alibi_bias_max=8.0, attention_dropout=0.0),
    **dict(attention_layer_norm=False, attention_layer_norm_with_affine=True, bias_for_layer_norm=False),
    **dict(block_group_size=1, block_type="llama", d_model=HIDDEN, embedding_dropout=0.0),
    **dict(embedding_size=VOCABULARY, eos_token_id=3, flash_attention=False, include_bias=False),
    **dict(include_qkv_bias=False, init_cutoff_factor=None, init_device="meta", init_fn="mitchell"),
    **dict(init_std=0.02, input_emb_norm=False, layer_norm_type="rms", layer_norm_with_affine=True),
    **dict(mask_token_id=MASK, max_sequence_length=64, mlp_hidden_size=DENSE_WIDTH, mlp_ratio=4),
    **dict(multi_query_attention=None, n_heads=HEADS, n_kv_heads=HEADS, n_layers=LAYERS),
    **dict(pad_token_id=3, precision="amp_bf16", residual_dropout=0.0, rms_norm_eps=1e-5, rope=True),
    **dict(rope_full_precision=True, rope_theta=500000.0, scale_logits=False, use_cache=False),
    **dict(vocab_size=VOCABULARY, weight_tying=False, torch_dtype="bfloat16"),
}
LLADA_MOE = {
    "architectures": ["LLaDAMoEModelLM"],
    "model_type": "llada",
    **dict(attention_bias=False, attention_dropout=0.0, dense_intermediate_size=DENSE_WIDTH),
    **dict(expert_intermediate_size=WIDTH, hidden_act="silu", hidden_size=HIDDEN, initializer_range=0.02),
    **dict(max_position_embeddings=64, moe_layer_freq=[1] * LAYERS, moe_router_enable_expert_bias=False),
    **dict(moe_router_score_function="softmax", norm_topk_prob=None, num_attention_heads=HEADS),
    **dict(num_experts=EXPERTS, num_experts_per_tok=3, num_hidden_layers=LAYERS),
    **dict(num_key_value_heads=HEADS, partial_rotary_factor=1, qk_layernorm=True, rms_norm_eps=1e-5),
    **dict(rope_scaling=None, rope_theta=50000, routed_scaling_factor=1, router_aux_loss_coef=0.01),
    **dict(router_num_group=None, router_topk_group=None, shared_expert_intermediate_size=None),
    **dict(tie_word_embeddings=False, vocab_size=VOCABULARY, torch_dtype="bfloat16", use_cache=False),
}
DEEPSEEK_V3 = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    **dict(attention_bias=False, attention_dropout=0.0, ep_size=1, first_k_dense_replace=1),
    **dict(hidden_act="silu", hidden_size=HIDDEN, initializer_range=0.02, intermediate_size=DENSE_WIDTH),
    **dict(kv_lora_rank=24, q_lora_rank=20, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=12),
    **dict(max_position_embeddings=64, moe_intermediate_size=WIDTH, moe_layer_freq=1, n_group=4),
    **dict(n_routed_experts=EXPERTS, n_shared_experts=1, norm_topk_prob=True, topk_group=2),
    **dict(num_attention_heads=HEADS, num_experts_per_tok=4, num_hidden_layers=LAYERS),
    **dict(num_key_value_heads=HEADS, num_nextn_predict_layers=0, rms_norm_eps=1e-6, rope_theta=10000),
    "rope_scaling": {
        **dict(beta_fast=32, beta_slow=1, factor=4, mscale=1.0, mscale_all_dim=1.0),
        **dict(original_max_position_embeddings=16, type="yarn"),
    },
    **dict(routed_scaling_factor=2.5, scoring_func="sigmoid", tie_word_embeddings=False),
    **dict(topk_method="noaux_tc", vocab_size=VOCABULARY, torch_dtype="bfloat16", use_cache=True),
}
RELATIVES = QWENS | {
    "deepseek_v3": DEEPSEEK_V3,
    "deepseek_v3_full_queries": DEEPSEEK_V3 | {"q_lora_rank": None, "rope_scaling": None},
    "deepseek_v3_all_experts": DEEPSEEK_V3
    | {"first_k_dense_replace": 0, "n_shared_experts": 2, "tie_word_embeddings": True}
    | {"n_group": 1, "topk_group": 1, "num_experts_per_tok": 3},
    "deepseek_v3_none_shared": DEEPSEEK_V3 | {"first_k_dense_replace": 2, "n_shared_experts": None},
    "llada": LLADA,
    "llada_moe": LLADA_MOE,
    "llada_moe_dense": LLADA_MOE | {"moe_layer_freq": [0] + [1] * (LAYERS - 1)},
}
"""Kinds of checkpoint by name, beside those of MOE and LLAMA."""


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


def llada_weights() -> Weights:
    weights = Weights()
    weights.add("model.transformer.wte.weight", VOCABULARY, HIDDEN)
    for layer in range(LAYERS):
        name = f"model.transformer.blocks.{layer}"
        for projection in ("q_proj", "k_proj", "v_proj", "attn_out"):
            weights.add(f"{name}.{projection}.weight", HIDDEN, HIDDEN)
        weights.add(f"{name}.ff_proj.weight", DENSE_WIDTH, HIDDEN)
        weights.add(f"{name}.up_proj.weight", DENSE_WIDTH, HIDDEN)
        weights.add(f"{name}.ff_out.weight", HIDDEN, DENSE_WIDTH)
        weights.add(f"{name}.attn_norm.weight", HIDDEN)
        weights.add(f"{name}.ff_norm.weight", HIDDEN)
    weights.add("model.transformer.ln_f.weight", HIDDEN)
    weights.add("model.transformer.ff_out.weight", VOCABULARY, HIDDEN)
    return weights


def qwen_weights(described: dict) -> Weights:
    """Of Qwens and LLaDA-MoE."""
    weights, D = Weights(), described.get("head_dim", HIDDEN // HEADS)
    kv_heads, is_qwen2 = described["num_key_value_heads"], "use_mrope" in described
    has_experts = [bool(number) for number in described.get("moe_layer_freq", [])] or [
        "num_experts" in described and layer not in described["mlp_only_layers"] for layer in range(LAYERS)
    ]
    weights.add("model.embed_tokens.weight", VOCABULARY, HIDDEN)
    for layer in range(LAYERS):
        name = f"model.layers.{layer}"
        weights.add(f"{name}.input_layernorm.weight", HIDDEN)
        for projection, heads in (("q", HEADS), ("k", kv_heads), ("v", kv_heads)):
            weights.add(f"{name}.self_attn.{projection}_proj.weight", heads * D, HIDDEN)
            if is_qwen2:
                weights.add(f"{name}.self_attn.{projection}_proj.bias", heads * D)
            elif projection != "v":
                weights.add(f"{name}.self_attn.{projection}_norm.weight", D)
        weights.add(f"{name}.self_attn.o_proj.weight", HIDDEN, HEADS * D)
        weights.add(f"{name}.post_attention_layernorm.weight", HIDDEN)
        if not has_experts[layer]:
            weights.feed_forward(f"{name}.mlp", DENSE_WIDTH)
            continue
        weights.add(f"{name}.mlp.gate.weight", EXPERTS, HIDDEN)
        for expert in range(EXPERTS):
            weights.feed_forward(f"{name}.mlp.experts.{expert}", WIDTH)
    weights.add("model.norm.weight", HIDDEN)
    if not described["tie_word_embeddings"]:
        weights.add("lm_head.weight", VOCABULARY, HIDDEN)
    return weights


def deepseek_weights(described: dict) -> Weights:
    """With the layers that predict further tokens, of which some tensors are enough."""
    weights, latent, rope = Weights(), described["kv_lora_rank"], described["qk_rope_head_dim"]
    plain, value = described["qk_nope_head_dim"], described["v_head_dim"]
    weights.add("model.embed_tokens.weight", VOCABULARY, HIDDEN)
    for layer in range(LAYERS + described["num_nextn_predict_layers"]):
        name = f"model.layers.{layer}"
        weights.add(f"{name}.input_layernorm.weight", HIDDEN)
        if rank := described["q_lora_rank"]:
            weights.add(f"{name}.self_attn.q_a_proj.weight", rank, HIDDEN)
            weights.add(f"{name}.self_attn.q_a_layernorm.weight", rank)
            weights.add(f"{name}.self_attn.q_b_proj.weight", HEADS * (plain + rope), rank)
        else:
            weights.add(f"{name}.self_attn.q_proj.weight", HEADS * (plain + rope), HIDDEN)
        weights.add(f"{name}.self_attn.kv_a_proj_with_mqa.weight", latent + rope, HIDDEN)
        weights.add(f"{name}.self_attn.kv_a_layernorm.weight", latent)
        weights.add(f"{name}.self_attn.kv_b_proj.weight", HEADS * (plain + value), latent)
        weights.add(f"{name}.self_attn.o_proj.weight", HIDDEN, HEADS * value)
        weights.add(f"{name}.post_attention_layernorm.weight", HIDDEN)
        if layer >= LAYERS:
            weights.add(f"{name}.eh_proj.weight", HIDDEN, 2 * HIDDEN)
            continue
        if layer < described["first_k_dense_replace"]:
            weights.feed_forward(f"{name}.mlp", DENSE_WIDTH)
            continue
        weights.add(f"{name}.mlp.gate.weight", EXPERTS, HIDDEN)
        weights.add(f"{name}.mlp.gate.e_score_correction_bias", EXPERTS, dtype=torch.float32)
        for expert in range(EXPERTS):
            weights.feed_forward(f"{name}.mlp.experts.{expert}", WIDTH)
        if shared := described["n_shared_experts"]:
            weights.feed_forward(f"{name}.mlp.shared_experts", shared * WIDTH)
    weights.add("model.norm.weight", HIDDEN)
    if not described["tie_word_embeddings"]:
        weights.add("lm_head.weight", VOCABULARY, HIDDEN)
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
    """config.json and tensors of bailing, bailing_mtp, llada2, llada2_stacked, llada2_pools, llama,
    llama_untied, deepseek_v3_mtp or one of RELATIVES."""
    if kind == "deepseek_v3_mtp":
        config = DEEPSEEK_V3 | {"num_nextn_predict_layers": 2}
        return config, deepseek_weights(config)
    if kind in RELATIVES:
        config = RELATIVES[kind]
        if kind.startswith("deepseek"):
            return config, deepseek_weights(config)
        return config, llada_weights() if kind == "llada" else qwen_weights(config)
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
