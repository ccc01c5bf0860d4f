"""Which settings a resume may change: freely, when run.allow_change names them, or never."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Collection, Iterator
from functools import cache
from typing import get_type_hints

from llada_megatron.config.errors import BadInput
from llada_megatron.config.schema import Config

FREE = (
    "run.resume",
    "run.dir",
    "run.name",
    "run.allow_change",
    "run.max_failures",
    "model.attention_backend",
    "model.layer_spec",
    "model.core",
    "model.fusions",
    "model.head_chunk_tokens",
    "model.router.rows_cap",
    "data.path",
    "data.cache_dir",
    "data.validation",
    "schedule.stages",
    "layout.micro_batch",
    "layout.processes",
    "layout.tp",
    "layout.pp",
    "layout.vpp",
    "layout.cp",
    "layout.ep",
    "layout.etp",
    "layout.pipeline",
    "layout.dispatcher",
    "layout.overlap_experts",
    "layout.delay_weight_gradients",
    "layout.overlap_shared_experts",
    "layout.overlap_tensor_parallel",
    "layout.recompute",
    "layout.recompute_modules",
    "layout.offload_modules",
    "layout.overlap_grad_reduce",
    "layout.overlap_param_gather",
    "checkpoint.*",
    "evaluation.*",
    "training.*",
    "logging.*",
    "cluster.*",
    "slurm.*",
    "precision.deterministic",
)
"""What a resume may change unasked; the fingerprint covers data.path, training/position.py trained stages."""

_PLACE = "the run's place in its data would be another one"
_SHAPE = "the checkpoint's tensors have another shape"
NEVER = {
    "run.seed": _PLACE,
    "data.sequence_length": _PLACE,
    "data.weights": _PLACE,
    "data.split": _PLACE,
    "diffusion.complementary": _PLACE,
    "training.freeze": "the optimizer has moments of what was trained alone",
    **{
        f"model.{name}": _SHAPE
        for name in (
            "family",
            "vocab_size",
            "layers",
            "hidden_size",
            "heads",
            "kv_heads",
            "head_dim",
            "mla.kv_lora_rank",
            "mla.q_lora_rank",
            "mla.qk_nope_head_dim",
            "mla.qk_rope_head_dim",
            "mla.v_head_dim",
            "ffn_hidden_size",
            "dense_layers",
            "experts",
            "expert_hidden_size",
            "shared_expert_hidden_size",
            "expert_bias",
            "qkv_bias",
            "qk_norm",
            "tied_head",
            "lora.rank",
            "lora.targets",
        )
    },
}
"""Why a setting cannot be allowed to change, by its name."""
NAMES_SHOWN = 6


def is_free(setting: str) -> bool:
    """Whether a resume may change a setting unasked."""
    return setting not in NEVER and covers(FREE, setting)


def setting_of(difference: str) -> str:
    """The setting's name in a line of `compose.differences`; of a list's item the list's."""
    return difference.partition(":")[0].partition("[")[0]


def covers(names: Collection[str], setting: str) -> bool:
    """Whether one of the names is this setting's, or its group's, spelt `group.*`."""
    return setting in names or any(name.endswith(".*") and setting.startswith(name[:-1]) for name in names)


def check_names(allowed: list[str]) -> None:
    """Raise BadInput where run.allow_change names what is no setting, or one that must stay."""
    known = _known()
    for name in allowed:
        meant = sorted(setting for setting in known if covers([name], setting))
        if never := [setting for setting in meant if setting in NEVER]:
            raise BadInput(
                f"run.allow_change cannot hold {name}: of {never[0]}, {NEVER[never[0]]}. Start a new run from"
                " this one's weights with checkpoint.init_from."
            )
        if not meant:
            offered = sorted(known - NEVER.keys())
            near = [each for each in offered if each.startswith(f"{name}.")]
            near = near or difflib.get_close_matches(name, offered, NAMES_SHOWN)
            choice = f"name one exactly, such as {', '.join(near[:NAMES_SHOWN])}" if near else "drop it"
            raise BadInput(f"run.allow_change holds {name}, which is no setting: {choice}.")


@cache
def _known() -> frozenset[str]:
    return frozenset(_settings(Config))


def _settings(group: type, prefix: str = "") -> Iterator[str]:
    hints = get_type_hints(group)
    for each in dataclasses.fields(group):
        kind, name = hints[each.name], f"{prefix}{each.name}"
        if dataclasses.is_dataclass(kind):
            yield from _settings(kind, f"{name}.")  # type: ignore[arg-type]
        else:
            yield name
