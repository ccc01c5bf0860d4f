"""The road of `make demo-chat` beside its training runs, as `llada` commands: data, reference, scores.

runs/demo_chat holds the runs base (next tokens, then blocks), sft, cap and dpo, each from the one before, the
questions, and the comparison.
"""

from __future__ import annotations

from pathlib import Path

from llada_megatron.demo.pretrained import Step
from llada_megatron.demo.questions import LONGEST, TASKS
from llada_megatron.record.run_dir import PAGE

EXPERIMENT = "demo_chat"
STAGES = ("base", "sft", "cap", "dpo")
"""Runs, and what follows demo_chat_ in the names of their experiments."""
SAYS = {
    "base": "a small Mixture-of-Experts model learns the text: next tokens, then blocks that grow",
    "sft": "it learns to answer",
    "cap": "and to be sure of what is right, for more tokens a forward",
    "dpo": "and to prefer right answers to its own mistakes",
}
DATA = {"base": "text", "sft": "chats", "cap": "chats", "dpo": "pairs"}
THRESHOLDS = ("0.5", "0.7", "0.9", "0.95")
RULES = ("factor", "entropy", "hierarchical", "credit", "klass", "quota", "joint")
"""Of the last model, beside `threshold`."""


def preparation(questions: Path, name: str, kind: str) -> Step:
    """From lines of JSON to what training reads."""
    source, target = f"{questions / name}.jsonl", str(questions / name)
    command = ["data", "prepare", "--format", kind, "--input", source, "--output", target]
    return Step(questions / f"{name}.idx", command)


def tries(base: Path, questions: Path, processes: int) -> Step:
    """What the model that DPO starts from answers when it draws."""
    output = questions / "tried.jsonl"
    asked = ["--chat", "--temperature", "1", "--batch", "32", "--max-new-tokens", str(LONGEST)]
    files = ["--input", str(questions / "tries.jsonl"), "--output", str(output)]
    command = ["generate", str(base / "cap"), *asked, *files, f"layout.processes={processes}"]
    return Step(output, command)


def reference(base: Path, questions: Path, processes: int) -> Step:
    """The bounds of both answers of each pair, under the model that DPO starts from."""
    pairs = questions / "pairs"
    command = ["score", str(base / "cap"), str(pairs), "--block-size", "32", f"layout.processes={processes}"]
    return Step(Path(f"{pairs}.scores.safetensors"), command)


def evaluations(base: Path, questions: Path, processes: int, *, limit: int | None = None) -> list[Step]:
    """Each model that answers at several thresholds, and the last one under the other rules."""
    asked = ["--chat", "--batch", "32", "--tasks", ",".join(TASKS)]
    asked += ["--include-path", str(questions / "tasks")]
    asked += [] if limit is None else ["--limit", str(limit)]
    asked.append(f"layout.processes={processes}")

    def step(model: str, name: str, last: str, *rule: str) -> Step:
        file = base / model / "eval" / f"{name}.json"
        command = ["eval", str(base / model), *asked, *rule, "--json", str(file)]
        return Step(file.with_name(f"{name}.{last}.json"), command)

    compared = base / "comparison"
    thresholds = ["--threshold", ",".join(THRESHOLDS)]
    models = [
        step(model, "threshold", f"threshold,threshold={THRESHOLDS[-1]}", *thresholds) for model in STAGES[1:]
    ]
    rules = step(STAGES[-1], "rules", RULES[-1], "--rule", ",".join(RULES))
    page = ["report", "--compare", *(str(base / stage) for stage in STAGES), "--out", str(compared)]
    return [*models, rules, Step(compared / PAGE, page)]
