"""What the page of a device day shows of its steps, read from what they wrote, if anything."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

from llada_megatron.observe.parts import Facts, Paragraph, Part, Table

OPERATORS = 12


def content(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text()) if file.exists() else {}


def tests(folder: Path) -> list[Part]:
    """Outcomes, what failed, what was left out and why, and what was not reached."""
    file = folder / "tests.jsonl"
    if not file.exists():
        return []
    chosen, *results = map(json.loads, file.read_text().splitlines())
    outcomes = Counter(each["outcome"] for each in results)
    not_reached = set(chosen["chosen"]) - {each["test"] for each in results}
    rows = [(outcome, str(outcomes[outcome])) for outcome in ("passed", "failed", "skipped")]
    parts: list[Part] = [Facts([*rows, ("not reached", str(len(not_reached)))])]
    failed = [[short(each["test"]), each["why"].strip()] for each in results if each["outcome"] == "failed"]
    left_out = Counter(each["why"] for each in results if each["outcome"] == "skipped")
    functions = Counter(short(test).split("[")[0] for test in not_reached)
    tables = (("failed", "why", failed), ("left out", "why", counted(left_out)))
    tables += (("not reached", "of", counted(functions)),)
    parts += [Table([first, second], cells) for first, second, cells in tables if cells]
    return parts


def short(test: str) -> str:
    return test.split("::", 1)[-1]


def counted(counter: Counter[str]) -> list[list[str]]:
    return [[str(count), text] for text, count in counter.most_common()]


def machine(folder: Path) -> list[Part]:
    found = content(folder / "doctor.json")
    rows = [[each["name"], each["state"], each["text"]] for each in found.get("findings", [])]
    return [Table(["", "", ""], rows)] if rows else []


def resume(folder: Path) -> list[Part]:
    found = content(folder / "resume.json")
    names = ("bitwise", "max_rel", "same_samples", "same_noise", "steps")
    return [Facts([(name, str(found[name])) for name in names])] if found else []


def attention(folder: Path) -> list[Part]:
    found = content(folder / "attention.json")
    if not found:
        return []
    right = {True: "yes", False: "NO"}
    rows = [
        [each["case"], each["executor"], right[each["correct"]], *times(each), each["refusal"] or ""]
        for each in found["results"]
    ]
    machine = found["machine"]
    reached = f"{machine['matmul_flops_per_sec'] / 1e12:.0f} TFLOP/s in a product of two matrices of 1024"
    header = ["case", "executor", "right", "ms", "TFLOP/s on visible pairs", "peak MiB", "why not"]
    return [Paragraph(f"{machine['device']}, {machine['dtype']}: {reached}."), Table(header, rows)]


def times(result: dict[str, Any]) -> list[str]:
    seconds, rate, peak = (result[name] for name in ("seconds", "flops_per_sec", "peak_bytes"))
    return [
        f"{seconds * 1e3:.2f}" if seconds else "-",
        f"{rate / 1e12:.0f}" if rate else "-",
        f"{peak / 2**20:.0f}" if peak else "-",
    ]


def measured(folder: Path) -> list[Part]:
    """Plan against measurement, and the operators of the profile."""
    found = content(folder / "measured.json")
    if not found:
        return []
    rows = [
        [name, f"{planned:.4g}", f"{was:.4g}", f"{was / planned:.2f}"]
        for name, (planned, was) in found["compared"].items()
    ]
    parts: list[Part] = [Paragraph(found["assumed"]), Table(["", "planned", "measured", "ratio"], rows)]
    operators = found["operators"]
    total = sum(each["ms"] for each in operators) or 1
    if operators:
        parts.append(
            Table(
                ["operator", "calls", "ms", "share"],
                [
                    [each["name"], str(each["calls"]), f"{each['ms']:.1f}", f"{each['ms'] / total:.1%}"]
                    for each in operators[:OPERATORS]
                ],
            )
        )
    return parts


def decoding(folder: Path) -> list[Part]:
    found = content(folder / "decode.json")
    if not found:
        return []
    names = ("agreement", "tokens_per_forward", "forward_sec", "tokens_per_sec", "uncached_tokens_per_sec")
    names += ("share_of_bound", "batch", "batch_tokens_per_sec")
    rows = [[each["name"], *(f"{each[name]:.4g}" for name in names)] for each in found["rules"]]
    return [Table(["rule", *names], rows)]
