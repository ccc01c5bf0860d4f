"""A corpus of short documents, whose boundaries are off the block grid."""

import json
from pathlib import Path

import numpy as np
import pytest

from tests.distributed import run_ranks


def prepare(folder: Path) -> None:
    from llada_megatron.data.prepare import prepare_corpus

    random = np.random.default_rng(0)
    words = ["masked", "tokens", "of", "a", "block", "see", "the", "clean", "past"]
    texts = [" ".join(random.choice(words, random.integers(1, 25))) for _ in range(150)]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    prepare_corpus([folder / "text.jsonl"], folder / "text", workers=1)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("corpus")
    run_ranks(prepare, folder)
    return f"{folder}/text"
