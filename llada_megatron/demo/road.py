"""The road of `make demo-chat` beside its training runs, as `llada` commands: data, reference, scores.

runs/demo_chat holds the runs base (next tokens, then blocks), sft, cap and dpo, each from the one before, the
questions, and eval.
"""

from __future__ import annotations

from pathlib import Path

from llada_megatron.demo.pretrained import Step
from llada_megatron.demo.questions import TASKS

EXPERIMENT = "demo_chat"
STAGES = ("base", "sft", "cap", "dpo")
"""Runs, and what follows demo_chat_ in the names of their experiments."""
SAYS = {
    "base": "a small Mixture-of-Experts model learns the text: next tokens, then blocks that grow",
    "sft": "it learns to answer",
    "cap": "and to be sure of what is right, for more tokens a forward",
    "dpo": "and to prefer right answers to near misses",
}
DATA = {"base": "text", "sft": "chats", "cap": "chats", "dpo": "pairs"}
THRESHOLDS = ("0.5", "0.7", "0.9", "0.95")
RULES = ("factor", "entropy", "hierarchical", "credit", "klass", "quota")
"""Of the last model, beside `threshold`."""


def preparation(questions: Path) -> list[Step]:
    """From lines of JSON to what training reads."""

    def step(name: str, kind: str) -> Step:
        source, target = f"{questions / name}.jsonl", str(questions / name)
        return Step(
            questions / f"{name}.idx",
            ["data", "prepare", "--format", kind, "--input", source, "--output", target],
        )

    return [step("text", "text"), step("chats", "chat"), step("pairs", "preference")]


def reference(base: Path, questions: Path, processes: int) -> Step:
    """The bounds of both answers of each pair, under the model that DPO starts from."""
    pairs = questions / "pairs"
    command = ["score", str(base / "cap"), str(pairs), "--block-size", "32", f"layout.processes={processes}"]
    return Step(Path(f"{pairs}.scores.safetensors"), command)


def evaluations(base: Path, questions: Path, processes: int, *, limit: int | None = None) -> list[Step]:
    """Each model that answers at several thresholds, and the last one under the other rules."""
    asked = [
        "--tasks",
        ",".join(TASKS),
        "--include-path",
        str(questions / "tasks"),
        "--chat",
        "--batch",
        "32",
    ]
    asked += [] if limit is None else ["--limit", str(limit)]
    asked.append(f"layout.processes={processes}")

    def step(name: str, model: str, last: str, *rule: str) -> Step:
        file = base / "eval" / f"{name}.json"
        command = ["eval", str(base / model), *asked, *rule, "--json", str(file)]
        return Step(file.with_name(f"{name}.{last}.json"), command)

    compared = base / "comparison"
    thresholds = ["--threshold", ",".join(THRESHOLDS)]
    models = [
        step(model, model, f"threshold,threshold={THRESHOLDS[-1]}", *thresholds) for model in STAGES[1:]
    ]
    rules = step("rules", STAGES[-1], RULES[-1], "--rule", ",".join(RULES))
    page = ["report", "--compare", str(base / "eval"), "--out", str(compared)]
    return [*models, rules, Step(compared / "index.html", page)]
