"""config.json and generation_config.json in both directions, as a family's rows say."""

from __future__ import annotations

from typing import Any

from llada_megatron.config.errors import BadInput
from llada_megatron.config.schema import ModelConfig
from llada_megatron.convert.families import family_of
from llada_megatron.convert.families.family import REQUIRED, Family


def architecture_of(described: dict[str, Any]) -> str:
    """The first of `architectures`; `none` where there is none."""
    return (described.get("architectures") or ["none"])[0]


def model_config(described: dict[str, Any], mask_token_id: int, where: str) -> ModelConfig:
    """The architecture that a config.json describes, which names no mask token.

    Raises BadInput for another architecture, a missing key or a setting that is not served.
    """
    family = family_of(architecture_of(described), where)
    described = _with_rope_theta(described, where)
    for key, served in family.fixed.items():
        if described.get(key, served) != served:
            raise BadInput(f"{where} sets {key}={described[key]}: only {served} is served.")
    values: dict[str, Any] = {"family": family.builds}
    for row in family.rows:
        values[row.ours] = row.read(described)
        if values[row.ours] is REQUIRED:
            raise BadInput(f"{where} has no '{row.theirs}'.")
        if not isinstance(values[row.ours], int | float):  # a truth value is an int
            raise BadInput(f"{where} sets {row.theirs}={values[row.ours]!r}: it must be a number.")
    try:
        values |= family.fields(described, values)
    except BadInput as fault:
        raise BadInput(f"{where}: {fault}") from None
    values["rotary_base"] = float(values["rotary_base"])
    model = ModelConfig(mask_token_id=mask_token_id, **values)
    if not 0 <= mask_token_id < model.vocab_size:
        raise BadInput(
            f"--mask-token-id {mask_token_id} is outside the vocabulary of {model.vocab_size} in {where}."
        )
    return model


def describe(
    model: ModelConfig, architecture: str, carried: dict[str, Any], dtype: str, positions: int
) -> dict[str, Any]:
    """config.json of a model under an architecture that can express it, else BadInput.

    `carried` is the config.json that the model came with, empty where there was none: under the same
    architecture only what differs is changed. `positions` is the longest sequence where it does not say.
    """
    family = family_of(architecture, "--architecture")
    _require_expressible(model, architecture, family)
    same = architecture_of(carried) == architecture
    values = {row.theirs: getattr(model, row.ours) for row in family.rows}
    values |= family.keys(model, carried if same else {})
    values["dtype" if "dtype" in carried else "torch_dtype"] = dtype
    if same:
        said = {row.theirs: row.missing(carried) for row in family.rows}
        said |= _with_rope_theta(carried, "config.json")
        changed = {key: value for key, value in values.items() if said.get(key) != value}
        return carried | changed | ({"mask_token_id": model.mask_token_id} if changed else {})
    kept = {key: value for key, value in carried.items() if key not in family.left_behind | {"auto_map"}}
    defaults = {"max_position_embeddings": positions, "pad_token_id": None}
    written = {"architectures": [architecture], **family.architectures[architecture]}
    fixed = family.fixed | family.also_written
    return defaults | kept | written | fixed | values | {"mask_token_id": model.mask_token_id}


def generation_config(
    carried: dict[str, Any], described: dict[str, Any], mask_token_id: int
) -> dict[str, Any]:
    """generation_config.json: what was carried along, without the mask among the ids that end a text."""
    source = carried or {
        key: described[key]
        for key in ("bos_token_id", "eos_token_id", "pad_token_id")
        if described.get(key) is not None
    }
    ends = source.get("eos_token_id")
    if isinstance(ends, list) and mask_token_id in ends:
        return source | {"eos_token_id": [token for token in ends if token != mask_token_id]}
    return source


def _with_rope_theta(described: dict[str, Any], where: str) -> dict[str, Any]:
    """With `rope_theta` where newer configurations put it into `rope_parameters`."""
    parameters = described.get("rope_parameters")
    if not parameters:
        return described
    if parameters.get("rope_type", "default") != "default":
        raise BadInput(f"{where} sets rope_type={parameters['rope_type']}: only default is served.")
    return described | {key: value for key, value in parameters.items() if key != "rope_type"}


def _require_expressible(model: ModelConfig, architecture: str, family: Family) -> None:
    if model.family != family.builds:
        raise BadInput(
            f"The model is of model.family={model.family}: {architecture} holds models of {family.builds},"
            " choose another --architecture."
        )
    if family.experts != model.has_experts:
        kind = "no experts" if family.experts else f"{model.experts} experts"
        raise BadInput(f"The model has {kind}: {architecture} cannot hold it, choose another --architecture.")
    family.require(model, architecture)
