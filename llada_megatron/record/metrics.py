"""metrics.jsonl and evaluations.jsonl: the records that every picture and table is made from.

One JSON object per line, in the order of the steps, each step once even after a resume.
"""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from llada_megatron.config.errors import BadInput
from llada_megatron.config.foreign import parse_json, read_bytes

Record = dict[str, Any]
_NUMBER, _OPTIONAL_LIST, _OPTIONAL_DICT = (int, float, type(None)), (list, type(None)), (dict, type(None))
FIELDS: dict[str, type | tuple[type, ...]] = {
    "step": int, "stage": str, "block_size": int, "consumed_samples": int, "consumed_tokens": int,
    "loss": _NUMBER, "grad_norm": _NUMBER, "lr": _NUMBER, "tokens_per_sec": _NUMBER, "mfu": _NUMBER,
    "load_max_over_mean": _NUMBER, "loss_by_t": _OPTIONAL_LIST, "loss_by_block_position": _OPTIONAL_LIST,
    "bound": dict, "ar": _OPTIONAL_DICT, "block1_views": _OPTIONAL_DICT, "baselines": _OPTIONAL_DICT,
    "grad_norm_by_layer": list, "weight_norm_by_layer": list, "activation_rms_by_layer": list,
    "router_entropy_by_layer": list, "router_z_by_layer": list, "dead_experts_by_layer": list,
    "router_unevenness_by_layer": list,
    "largest_logit": _NUMBER, "expert_rows_max_over_mean": _NUMBER,
    "peak_memory_bytes": _NUMBER, "reserved_memory_bytes": _NUMBER, "pieces": list, "decided_at": list,
}  # fmt: skip
"""Kinds of the values that are read back, in any of the files; NaN was written as null."""
STEP_FIELDS = ("step", "stage", "consumed_tokens", "tokens_per_sec")
"""What every line of metrics.jsonl has."""


class MetricsFile:
    """Appends records to a JSONL file in which every step stays unique across resumes.

    Opening drops what a resume repeats: records with `step >= first_step`, and a last line that a
    crash left torn. `first_step` is the step that the run does next.
    """

    def __init__(self, path: Path, first_step: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            _drop_repeated(path, first_step)
        self._file = path.open("a", encoding="utf-8")

    def write(self, record: Record) -> None:
        """Append one record, which needs the key `step`; NaN and infinities become null."""
        self._file.write(_to_line(record))
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_jsonl(path: Path, *needed: str) -> list[Record]:
    """Records of a JSONL file that may be in use: a torn last line is left out, a missing file is empty.

    Raises BadInput for a broken line before the last one, a record without one of the keys `needed`, and a
    value of another kind than FIELDS says.
    """
    if not path.exists():
        return []
    remedy = "delete that line"
    lines = read_bytes(path, remedy).decode(errors="replace").split("\n")
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = parse_json(line)
        except ValueError:
            if any(lines[number:]):
                raise BadInput(f"line {number} of {path} is not JSON; {remedy}") from None
            continue
        if fault := _fault(record, needed):
            raise BadInput(f"line {number} of {path} {fault}; {remedy}")
        records.append(record)
    return records


def _fault(record: Any, needed: tuple[str, ...]) -> str | None:
    if not isinstance(record, dict):
        return "holds no record"
    if absent := [key for key in needed if key not in record]:
        return f"has no {absent[0]!r}"
    for key, kinds in FIELDS.items():
        if key in record and not isinstance(record[key], kinds):
            return f"has {key}={json.dumps(record[key])[:40]}"
    return None


def step_seconds(record: Record) -> float:
    """How long a step of metrics.jsonl took; 0 where it does not say."""
    tokens, speed = record["consumed_tokens"], record["tokens_per_sec"]
    if "sequence_length" in record:
        tokens = record["global_batch"] * record["sequence_length"]
    elif "global_batch" in record:  # of an earlier version, which had one length
        tokens *= record["global_batch"] / record["consumed_samples"]
    else:  # of a version before, which never changed its global batch
        tokens /= record["step"] + 1
    return tokens / speed if speed else 0.0


def by_stage(records: Iterable[Record]) -> list[tuple[str, list[Record]]]:
    """Consecutive records grouped by their `stage`, in the order of the run."""
    return [(name, list(group)) for name, group in itertools.groupby(records, key=lambda r: r["stage"])]


def _drop_repeated(path: Path, first_step: int) -> None:
    kept = "".join(_to_line(record) for record in read_jsonl(path, "step") if record["step"] < first_step)
    if kept.encode() == path.read_bytes():
        return
    aside = path.with_name(path.name + ".tmp")
    with aside.open("w", encoding="utf-8") as file:
        file.write(kept)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)


def _to_line(record: Record) -> str:
    return json.dumps(_finite(record), allow_nan=False, ensure_ascii=False) + "\n"


def _finite(value: Any) -> Any:
    """`value` with null for NaN and infinities, which strict JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
