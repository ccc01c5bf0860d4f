"""config.json and generation_config.json in both directions, as a family's rows say."""

from __future__ import annotations

from typing import Any, get_type_hints

from llada_megatron.config.errors import BadInput
from llada_megatron.config.families import formulas_of
from llada_megatron.config.ranges import check_values
from llada_megatron.config.schema import ModelConfig
from llada_megatron.convert import block_fp8, rope_json
from llada_megatron.convert.families import family_of
from llada_megatron.convert.families.family import REQUIRED, Family, architecture_of
from llada_megatron.convert.families.shared import ANOTHER_MODEL, BLOCK_SIZE, IDLE, IDLE_AT
from llada_megatron.convert.rope_json import is_number

QUANTIZATION = "quantization_config"
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
ORDERS = ("delete_token_id", "split_token_id")
"""Keys of ours, for rows that text never holds (docs/levenshtein.md); both, or the model has none."""
FULL_ATTENTION = "full_attention"
_TYPES = get_type_hints(ModelConfig)


def model_config(described: dict[str, Any], mask_token_id: int, where: str) -> ModelConfig:
    """The architecture that a config.json describes, which names no mask token.

    Raises BadInput for another architecture, a missing key, a value of a wrong type, or a setting that is not
    served.
    """
    architecture = architecture_of(described)
    family = family_of(architecture, where)
    _require_served(described, family, where)
    values: dict[str, Any] = {"family": family.builds, **family.always}
    for row in family.rows:
        value = row.read(described)
        if value is REQUIRED:
            raise BadInput(f"{where} has no '{row.theirs}'.")
        values[row.ours] = _typed(value, _TYPES[row.ours], row.theirs, where)
    if family.rotary is not None:
        values |= rope_json.read(described, family.rotary, architecture, where)._asdict()
    try:
        values |= family.fields(described, values)
    except BadInput as fault:
        raise BadInput(f"{where}: {fault}") from None
    model = ModelConfig(mask_token_id=mask_token_id, **values)
    if not 0 <= mask_token_id < model.vocab_size:
        raise BadInput(
            f"--mask-token-id {mask_token_id} is outside the vocabulary of {model.vocab_size} in {where}."
        )
    try:
        check_values(model, "model")
        formulas_of(model).check(model)
    except BadInput as error:
        raise BadInput(f"{where} describes a model that cannot be built: {error}") from None
    if family.experts and not model.has_experts:
        raise BadInput(f"{where} describes no layer with experts: {architecture} is served with some.")
    return model


def orders_of(described: dict[str, Any], vocab_size: int, where: str) -> dict[str, int]:
    """The ids of ORDERS that a config.json says, or none; raises BadInput for one that is no row."""
    if all(described.get(key) is None for key in ORDERS):
        return {}
    found = {key: _typed(described.get(key), int, key, where) for key in ORDERS}
    if max(found.values()) >= vocab_size:
        said = " and ".join(f"{key}={value}" for key, value in found.items())
        raise BadInput(f"{where} sets {said}: both must be below vocab_size={vocab_size}.")
    return found


def mask_token_id(described: dict[str, Any]) -> int | None:
    """As a config.json names it."""
    said = described.get("mask_token_id")
    return said if type(said) is int else None


def unread(described: dict[str, Any], where: str) -> list[str]:
    """Keys of a config.json with a value that nothing reads, neither here nor in the public code."""
    family = family_of(architecture_of(described), where)
    known = {*IDLE, *ANOTHER_MODEL, *family.idle, *family.fixed, *family.counts, "layer_types"}
    known |= {row.theirs for row in family.rows} | (rope_json.KEYS if family.rotary else set())
    at = IDLE_AT | family.also_written
    names = [
        key
        for key, value in described.items()
        if value is not None and key not in known and not (key in at and value == at[key])
    ]
    return sorted(names) + (rope_json.unread(described, where) if family.rotary else [])


def doubts(described: dict[str, Any]) -> list[str]:
    """What of a config.json others read otherwise, a sentence each."""
    said = []
    architecture = architecture_of(described)
    if architecture in family_of(architecture, "config.json").shifted:
        said.append(
            f"{architecture} reads the logits before a mask, which training here does not: to it this is an"
            " autoregressive model."
        )
    if nested := rope_json.by_layer(described):
        said.append(
            f"{nested} is taken for all layers; the public code of this architecture reads no such key."
        )
    scaling = described.get("rope_scaling") or described.get("rope_parameters") or {}
    factor, original = scaling.get("factor"), scaling.get("original_max_position_embeddings")
    reach = described.get(rope_json.LONGEST)
    kind = scaling.get("rope_type") or scaling.get("type")
    if kind == "yarn" and factor and original and reach and reach != factor * original:
        said.append(
            f"{rope_json.LONGEST}={reach} is not yarn's factor {factor} times {original}: the factor is"
            f" taken; some versions of transformers take {reach / original:g}."
        )
    return said


def describe(
    model: ModelConfig,
    architecture: str,
    carried: dict[str, Any],
    dtype: str,
    positions: int | None,
    block_size: int = 0,
    orders: dict[str, int] | None = None,
) -> dict[str, Any]:
    """config.json of a model under an architecture that can express it, else BadInput.

    `carried` is the config.json that the model came with, empty where there was none: under the same
    architecture only what differs is changed. `positions` is the longest sequence where it does not say;
    `block_size` that of the last stage, which some architectures say; 0: unknown.
    `orders` are the ids of ORDERS where the run says them.
    """
    family = family_of(architecture, "--architecture")
    _require_expressible(model, architecture, family)
    same = architecture_of(carried) == architecture
    values = {row.theirs: getattr(model, row.ours) for row in family.rows}
    values |= family.keys(model, carried if same else {}) | (orders or {})
    if block_size and family.says_block_size(model, architecture):
        values[BLOCK_SIZE] = block_size
    values |= dict.fromkeys(
        [key for key in ("dtype", "torch_dtype") if key in carried] or ["torch_dtype"], dtype
    )
    ends = carried.get("eos_token_id")
    if isinstance(ends, list) and model.mask_token_id in ends:
        values["eos_token_id"] = [token for token in ends if token != model.mask_token_id]
    dropped: set[str] = set()
    if family.rotary is not None and not (same and _same_rotary(model, carried, family)):
        dropped |= rope_json.KEYS
        values |= rope_json.write(model, family.rotary)
        if reach := rope_json.longest(model.rotary_scaling):
            values[family.longest] = reach
    if same:
        kept = {key: value for key, value in carried.items() if key not in dropped}
        said = kept | {row.theirs: row.read(carried) for row in family.rows}
        changed = {key: value for key, value in values.items() if said.get(key) != value}
        touched = changed or kept != carried
        return kept | changed | ({"mask_token_id": model.mask_token_id} if touched else {})
    dropped |= {*family.left_behind, "auto_map"}
    kept = {key: value for key, value in carried.items() if key not in dropped}
    defaults = {"pad_token_id": None} | ({family.longest: positions} if positions else {})
    written = {"architectures": [architecture], **family.architectures[architecture]}
    fixed = family.fixed | family.also_written
    return defaults | kept | written | fixed | values | {"mask_token_id": model.mask_token_id}


def changes(carried: dict[str, Any], described: dict[str, Any], positions: int | None) -> list[str]:
    """What a written config.json says otherwise than the one that was carried along, a sentence each.

    `positions` is the longest sequence of the run, None where no run wrote the checkpoint.
    """
    said = []
    for key in block_fp8.KEYS:
        if carried.get(key):
            said.append(f"{key} is left out: the tensors that are written are not quantised.")
    rotary = sorted(key for key in rope_json.KEYS if carried.get(key) != described.get(key))
    if carried and rotary:
        said.append(f"{', '.join(rotary)} changed to what the model computes.")
    longest = family_of(architecture_of(described), "config.json").longest
    reach, before = described.get(longest), carried.get(longest)
    if reach is None:
        said.append(f"{longest} is not written: neither the source nor a run says it.")
    elif before is None:
        said.append(f"{longest}={reach} is new: the model came without one.")
    elif before != reach:
        said.append(f"{longest} changed from {before} to {reach}, as far as the rotary scaling reaches.")
    elif positions and positions > reach:
        said.append(f"{longest}={reach} is the source's; the run trained sequences of {positions} tokens.")
    return said


def generation_config(
    carried: dict[str, Any], described: dict[str, Any], mask_token_id: int
) -> dict[str, Any]:
    """generation_config.json: what was carried along, without the mask among the ids that end a text."""
    source = carried or {key: described[key] for key in TOKEN_IDS if described.get(key) is not None}
    ends = source.get("eos_token_id")
    if isinstance(ends, list) and mask_token_id in ends:
        return source | {"eos_token_id": [token for token in ends if token != mask_token_id]}
    return source


def _require_served(described: dict[str, Any], family: Family, where: str) -> None:
    """Raise BadInput for a value that means another computation, or is of a wrong type."""
    for key, served in family.fixed.items():
        value = described.get(key, served)
        if value != served and not (value is None and not served):
            raise BadInput(f"{where} sets {key}={value}: only {served} is served.")
    for key, nothing in ANOTHER_MODEL.items():
        if key not in family.fixed and described.get(key) not in (None, nothing):
            raise BadInput(f"{where} sets {key}={described[key]}, which changes the computation: not served.")
    kinds = described.get("layer_types")
    if kinds is not None and (not isinstance(kinds, list) or any(kind != FULL_ATTENTION for kind in kinds)):
        raise BadInput(f"{where} sets layer_types={kinds}: only {FULL_ATTENTION} is served.")
    for key in (*family.counts, family.longest):
        if described.get(key) is not None:
            _typed(described[key], int, key, where)
    for key in TOKEN_IDS:
        ids = described.get(key)
        for one in ids if isinstance(ids, list) else [ids]:
            if one is not None and type(one) is not int:
                raise BadInput(f"{where} sets {key}={ids!r}: it must be a token id, a list of them, or null.")
    if not isinstance(described.get(QUANTIZATION) or {}, dict):
        raise BadInput(f"{where} sets {QUANTIZATION}={described[QUANTIZATION]!r}: it must be an object.")


def _typed(value: Any, kind: type, key: str, where: str) -> Any:
    """The value as `kind`: int (0 or more), float or bool; BadInput where it is another."""
    if kind is bool:
        if isinstance(value, bool):
            return value
        wanted = "true or false"
    elif kind is int:
        if type(value) is int and value >= 0:
            return value
        wanted = "a whole number of 0 or more"
    else:
        if is_number(value):
            return float(value)
        wanted = "a number"
    raise BadInput(f"{where} sets {key}={'null' if value is None else repr(value)}: it must be {wanted}.")


def _same_rotary(model: ModelConfig, carried: dict[str, Any], family: Family) -> bool:
    """Whether a config.json says the rotary settings of the model as the public code reads them."""
    assert family.rotary is not None
    if rope_json.by_layer(carried):
        return False
    try:
        said = rope_json.read(carried, family.rotary, architecture_of(carried), "config.json")
    except BadInput:  # of a checkpoint that an earlier version converted
        return False
    return said == (model.rotary_base, model.rotary_fraction, model.rotary_scaling)


def _require_expressible(model: ModelConfig, architecture: str, family: Family) -> None:
    if model.family != family.builds:
        raise BadInput(
            f"The model is of model.family={model.family}: {architecture} holds models of {family.builds},"
            " choose another --architecture."
        )
    if family.experts != model.has_experts:
        kind = "no experts" if family.experts else f"{model.experts} experts"
        raise BadInput(f"The model has {kind}: {architecture} cannot hold it, choose another --architecture.")
    if differing := family.differing(model):
        raise BadInput(
            f"{architecture} cannot hold a model of {', '.join(differing)}: choose another --architecture."
        )
    family.require(model, architecture)
