"""Hugging Face checkpoints of Ling 2.0 and LLaDA2, read into one process.

Legend: H hidden size, D head dim, G key-value heads, Q query heads of one key-value head.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from llada_megatron.config.schema import ModelConfig
from llada_megatron.model.gpt import BlockDiffusionGPT

ARCHITECTURES = ("LLaDA2MoeModelLM", "BailingMoeV2ForCausalLM")
FIXED = {
    "hidden_act": "silu",
    "use_bias": False,
    "use_qkv_bias": False,
    "rope_scaling": None,
    "use_sliding_window": False,
    "score_function": "sigmoid",
}
"""What the model computes in one way only; an absent key means the same."""
NAMES_SHOWN = 8


class Entry(NamedTuple):
    """One tensor of the model: `convert(*source tensors)` gives what is stored under `ours`."""

    ours: str
    theirs: tuple[str, ...]
    convert: Callable[..., Tensor]


def model_config(directory: Path, mask_token_id: int) -> ModelConfig:
    """The architecture in `config.json`, which names no mask token.

    Defaults are those of the published model code: without `partial_rotary_factor` the whole head is
    rotated. Raises ValueError for another architecture, a missing key or a setting that is not served.
    """
    config = _read_json(directory / "config.json")
    architecture = (config.get("architectures") or ["none"])[0]
    if architecture not in ARCHITECTURES:
        raise ValueError(
            f"{directory}/config.json is of architecture {architecture}, which is not served: only"
            f" {' and '.join(ARCHITECTURES)} are."
        )
    for key, served in FIXED.items():
        if config.get(key, served) != served:
            raise ValueError(f"{directory}/config.json sets {key}={config[key]}: only {served} is served.")
    try:
        return ModelConfig(
            vocab_size=config["vocab_size"],
            mask_token_id=mask_token_id,
            layers=config["num_hidden_layers"],
            hidden_size=config["hidden_size"],
            heads=config["num_attention_heads"],
            kv_heads=config["num_key_value_heads"],
            head_dim=config["head_dim"],
            ffn_hidden_size=config["intermediate_size"],
            dense_layers=config["first_k_dense_replace"],
            experts=config["num_experts"],
            experts_per_token=config["num_experts_per_tok"],
            expert_hidden_size=config["moe_intermediate_size"],
            shared_expert_hidden_size=config["moe_intermediate_size"] * config["num_shared_experts"],
            expert_groups=config["n_group"],
            expert_groups_per_token=config["topk_group"],
            routed_scaling_factor=config.get("routed_scaling_factor", 1.0),
            expert_bias=config["moe_router_enable_expert_bias"],
            qk_norm=config.get("use_qk_norm", True),
            rotary_fraction=config.get("partial_rotary_factor", 1.0),
            rotary_base=float(config["rope_theta"]),
            norm_eps=config["rms_norm_eps"],
            tied_head=config.get("tie_word_embeddings", False),
            init_std=config.get("initializer_range", 0.02),
        )
    except KeyError as error:
        raise ValueError(f"{directory}/config.json has no {error}.") from None


def correspondence(model: ModelConfig) -> Iterator[Entry]:
    """Every tensor of the model in the `local` layer spec, and where it comes from.

    Source rows of query_key_value are all queries, all keys, all values; ours are grouped by key-value head.
    """

    def copy(ours: str, theirs: str) -> Entry:
        return Entry(ours, (theirs,), lambda tensor: tensor)

    def feed_forward(ours: str, theirs: str) -> Iterator[Entry]:
        gate_up = (f"{theirs}.gate_proj.weight", f"{theirs}.up_proj.weight")
        yield Entry(f"{ours}.linear_fc1.weight", gate_up, lambda gate, up: torch.cat([gate, up]))
        yield copy(f"{ours}.linear_fc2.weight", f"{theirs}.down_proj.weight")

    def group_heads(qkv: Tensor) -> Tensor:
        G, D = model.kv_heads, model.head_dim
        query, key, value = qkv.unflatten(0, (-1, D)).split([model.heads, G, G])
        groups = torch.cat([query.unflatten(0, (G, -1)), key[:, None], value[:, None]], dim=1)
        return groups.flatten(0, 2)  # [G, Q + 2, D, H] -> rows

    yield copy("embedding.word_embeddings.weight", "model.word_embeddings.weight")
    for layer in range(model.layers):
        ours, theirs = f"decoder.layers.{layer}", f"model.layers.{layer}"
        attention, theirs_attention = f"{ours}.self_attention", f"{theirs}.attention"
        yield copy(f"{ours}.input_layernorm.weight", f"{theirs}.input_layernorm.weight")
        qkv = f"{theirs_attention}.query_key_value.weight"
        yield Entry(f"{attention}.linear_qkv.weight", (qkv,), group_heads)
        if model.qk_norm:
            yield copy(f"{attention}.q_layernorm.weight", f"{theirs_attention}.query_layernorm.weight")
            yield copy(f"{attention}.k_layernorm.weight", f"{theirs_attention}.key_layernorm.weight")
        yield copy(f"{attention}.linear_proj.weight", f"{theirs_attention}.dense.weight")
        yield copy(f"{ours}.pre_mlp_layernorm.weight", f"{theirs}.post_attention_layernorm.weight")
        mlp, theirs_mlp = f"{ours}.mlp", f"{theirs}.mlp"
        if layer < model.dense_layers:
            yield from feed_forward(mlp, theirs_mlp)
            continue
        yield copy(f"{mlp}.router.weight", f"{theirs_mlp}.gate.weight")
        if model.expert_bias:
            yield copy(f"{mlp}.router.expert_bias", f"{theirs_mlp}.gate.expert_bias")
        for expert in range(model.experts):
            yield from feed_forward(f"{mlp}.experts.local_experts.{expert}", f"{theirs_mlp}.experts.{expert}")
        if model.shared_expert_hidden_size:
            yield from feed_forward(f"{mlp}.shared_experts", f"{theirs_mlp}.shared_experts")
    yield copy("decoder.final_layernorm.weight", "model.norm.weight")
    if not model.tied_head:
        yield copy("output_layer.weight", "lm_head.weight")


class Tensors:
    """The tensors of `model.safetensors` or of the index's shards, read one at a time; a context manager."""

    def __init__(self, directory: Path) -> None:
        index = directory / "model.safetensors.index.json"
        shards = ["model.safetensors"]
        if index.exists():
            shards = sorted(set(_read_json(index)["weight_map"].values()))
        with ExitStack() as stack:
            self._shard_of: dict[str, Any] = {}
            for shard in shards:
                if not (directory / shard).is_file():
                    raise ValueError(
                        f"{directory} holds no {shard}: give the directory of a complete checkpoint."
                    )
                opened = stack.enter_context(safe_open(directory / shard, framework="pt"))
                self._shard_of |= dict.fromkeys(opened.keys(), opened)
            self._open = stack.pop_all()

    def __enter__(self) -> Tensors:
        return self

    def __exit__(self, *failure: Any) -> None:
        self._open.close()

    def names(self) -> set[str]:
        """Names of all tensors."""
        return set(self._shard_of)

    def __getitem__(self, name: str) -> Tensor:
        return self._shard_of[name].get_tensor(name)


def load_weights(directory: Path, stage: BlockDiffusionGPT, model: ModelConfig) -> None:
    """Fill every parameter and expert bias of a single-process model of the `local` layer spec, in its dtype.

    Raises ValueError, naming tensors, unless each is written once and each source tensor is read once.
    """
    targets = dict(stage.named_parameters()) | {
        name: buffer for name, buffer in stage.named_buffers() if name.endswith("expert_bias")
    }
    entries = list(correspondence(model))
    with Tensors(directory) as source, torch.no_grad():
        _require_pairs((entry.ours for entry in entries), targets.keys(), "the model")
        _require_pairs((name for entry in entries for name in entry.theirs), source.names(), str(directory))
        for entry in entries:
            target, value = targets[entry.ours], entry.convert(*(source[name] for name in entry.theirs))
            if target.shape != value.shape:
                raise ValueError(
                    f"{' + '.join(entry.theirs)} gives shape {tuple(value.shape)}, but by config.json"
                    f" {entry.ours} has {tuple(target.shape)}."
                )
            target.copy_(value)


def _require_pairs(used: Iterable[str], present: Iterable[str], holder: str) -> None:
    counts, present = Counter(used), set(present)
    problems = {
        f"{holder} lacks": counts.keys() - present,
        f"{holder} also holds": present - counts.keys(),
        f"{holder} would be used twice for": {name for name, count in counts.items() if count > 1},
    }
    said = [f"{what} {_listed(names)}" for what, names in problems.items() if names]
    if said:
        raise ValueError(f"The checkpoint and its config.json do not fit: {'; '.join(said)}.")


def _listed(names: set[str]) -> str:
    shown = ", ".join(sorted(names)[:NAMES_SHOWN])
    return shown if len(names) <= NAMES_SHOWN else f"{shown} and {len(names) - NAMES_SHOWN} more"


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist: give the directory of a Hugging Face checkpoint.") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}.") from None
