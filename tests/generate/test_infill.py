"""The decoder against the public reference's greedy block generation (tests/golden/README.md)."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from llada_megatron.config.schema import LayoutConfig
from llada_megatron.generate.infill import infill
from llada_megatron.parallel import groups
from llada_megatron.verify import golden

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = json.loads((GOLDEN / "cases.json").read_text())
WITHOUT_END = [name for name, case in CASES["generation"].items() if case["eos_id"] >= 1_000_000]


@pytest.fixture(scope="module")
def model():
    groups.initialize(LayoutConfig())
    yield golden.load(GOLDEN, CASES["mask_token_id"]).stage
    groups.destroy()


@pytest.mark.parametrize("name", WITHOUT_END)
def test_tokens_and_forward_count_equal_the_reference(model, name):
    case = CASES["generation"][name]
    with safe_open(str(GOLDEN / "cases.safetensors"), "np") as tensors:
        prompt, expected = (tensors.get_tensor(f"gen.{name}.{part}") for part in ("prompt", "output"))
    block = case["block_length"]
    length = -(-(len(prompt) + case["gen_length"]) // block) * block
    tokens = np.full(length, CASES["mask_token_id"], dtype=np.int64)
    tokens[: len(prompt)] = prompt
    filled, forwards = infill(
        model,
        tokens,
        block_size=block,
        mask_token_id=CASES["mask_token_id"],
        threshold=case["threshold"],
        steps=case["steps"],
    )
    np.testing.assert_array_equal(filled[len(prompt) :][: len(expected)], expected)
    assert forwards == case["n_forward"]
    assert not (filled == CASES["mask_token_id"]).any()
