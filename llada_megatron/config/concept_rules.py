"""Rules of the family `dlcm` across groups: what it does not serve, and why."""

from __future__ import annotations

from dataclasses import fields

from llada_megatron.config.layout_rules import require
from llada_megatron.config.schedule import Schedule
from llada_megatron.config.schema import Config, ModelConfig

NAME = "dlcm"


def check_concepts(config: Config, schedule: Schedule) -> None:
    """Raises BadInput with one sentence; of other families for what is this one's alone."""
    is_dlcm = config.model.family == NAME
    for index, stage in enumerate(schedule.stages):
        require(
            is_dlcm == (stage.objective == "concepts"),
            f"schedule.stages[{index}].objective={stage.objective}, and model.family={config.model.family}"
            f" needs {'concepts' if is_dlcm else 'another'}: concepts is what the family dlcm learns, and it"
            " learns nothing else.",
        )
    if not is_dlcm:
        _refuse_concepts(config.model)
        return
    check_layout_of_concepts(config)
    layout, training = config.layout, config.training
    for setting, isset, instead in (
        (
            "layout.overlap_experts",
            layout.overlap_experts,
            "false: its plan of a forward is the gpt family's",
        ),
        ("layout.overlap_shared_experts", layout.overlap_shared_experts, "false"),
        ("layout.overlap_tensor_parallel", layout.overlap_tensor_parallel, "false: concepts vary in number"),
        ("layout.offload_modules", layout.offload_modules, "[]"),
        ("training.cuda_graphs", training.cuda_graphs, "[]: the number of concepts is a shape"),
        ("evaluation.infill_sequences", config.evaluation.infill_sequences, "0: it fills no masks"),
        ("evaluation.planted_share", config.evaluation.planted_share, "0: it mends no tokens"),
    ):
        require(not isset, f"{setting} is set, and model.family=dlcm needs {instead}.")


def _refuse_concepts(model: ModelConfig) -> None:
    for each in fields(model.concepts):
        value = getattr(model.concepts, each.name)
        require(
            value == each.default,
            f"model.concepts.{each.name}={value} means nothing with model.family={model.family}: leave it"
            f" out, or set model.family={NAME}.",
        )


def refuse_masks(config: Config, what: str) -> None:
    """Raise BadInput where a model of the family is asked for what fills masks."""
    require(
        config.model.family != NAME,
        f"{what} fills masks, and the model is of the family dlcm, which predicts next tokens:"
        " `llada evaluate --ar` gives its likelihood.",
    )


def check_layout_of_concepts(config: Config) -> None:
    """Raises BadInput for a layout that the family cannot be split by; others' pass."""
    if config.model.family != NAME:
        return
    layout, concepts = config.layout, config.model.concepts
    require(
        layout.pp == 1,
        f"layout.pp={layout.pp} sends tensors of one shape from stage to stage, and concepts have another"
        " than tokens and vary in number: model.family=dlcm needs layout.pp=1.",
    )
    require(
        layout.cp == 1,
        f"layout.cp={layout.cp} deals a sequence's tokens over processes, which would cut concepts:"
        " model.family=dlcm needs layout.cp=1.",
    )
    for field in ("heads", "kv_heads", "ffn_hidden_size"):
        size = getattr(concepts, field)
        require(
            size % layout.tp == 0,
            f"layout.tp={layout.tp} does not divide model.concepts.{field}={size}: choose another.",
        )
