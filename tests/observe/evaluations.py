"""Results as `llada eval` writes them, for tests of what reads them."""

from pathlib import Path
from typing import Any

from llada_megatron.record.json_files import write_json


def results(
    model: str, rule: str, setting: str, *, accuracy: float, speed: float, task: str = "gsm8k"
) -> dict[str, Any]:
    """One model under one decoding, on one task of two filters."""
    return {
        "results": {
            task: {
                "alias": task,
                "exact_match,strict-match": accuracy,
                "exact_match_stderr,strict-match": 0.01,
                "exact_match,flexible-extract": min(1.0, accuracy + 0.05),
                "exact_match_stderr,flexible-extract": "N/A",
            }
        },
        "higher_is_better": {task: {"exact_match": True}},
        "n-samples": {task: {"original": 1319, "effective": 100}},
        "llada": {
            "checkpoint": model,
            "step": 10,
            "decoding": {
                "name": f"{rule},threshold={setting}",
                "rule": rule,
                "settings": {"threshold": setting},
            },
            "cost": {
                task: {
                    "texts": 100,
                    "tokens_per_forward": speed,
                    "forwards": {"prefill": 3, "denoise": 40, "store": 0},
                    "ms_per_forward": 7.25,
                    "tokens_per_second": 120.0,
                }
            },
        },
    }


def likelihoods(model: str) -> dict[str, Any]:
    """A model on a task of likelihoods: no decoding, no forwards."""
    return {
        "results": {
            "perplexity": {"bits_per_byte,none": 1.25, "bits_per_byte_stderr,none": "N/A", "alias": "p"}
        },
        "higher_is_better": {"perplexity": {"bits_per_byte": False}},
        "n-samples": {"perplexity": {"original": 5, "effective": 5}},
        "llada": {
            "checkpoint": model,
            "decoding": {"name": "", "rule": None, "settings": {}},
            "cost": {"perplexity": {"likelihoods": 5}},
        },
    }


def write(folder: Path, *contents: dict[str, Any]) -> list[Path]:
    """Files of these results."""
    paths = [folder / f"{index}.json" for index in range(len(contents))]
    for path, content in zip(paths, contents, strict=True):
        write_json(path, content)
    return paths
