"""Overrides that give model=parity latent attention: values narrower than keys, as in DeepSeek-V3."""

WIDTHS = "q_lora_rank: 24, kv_lora_rank: 16, qk_nope_head_dim: 16, qk_rope_head_dim: 8, v_head_dim: 20"
MLA = (
    "model.kv_heads=4",
    "model.head_dim=24",
    "model.rotary_fraction=1",
    f"model.mla={{{WIDTHS}}}",
    "model.rotary_scaling={type: yarn, factor: 4, original_positions: 64, attention_factor: 1,"
    " mscale_all_dim: 1}",
)
FULL_QUERIES = "model.mla.q_lora_rank=0"
"""One projection of queries, as in DeepSeek-V2-Lite."""
