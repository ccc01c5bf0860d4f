"""The loop without a cache against the public reference's block generation (tests/golden/README.md)."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from llada_megatron.config.schema import BlockGrid, LayoutConfig
from llada_megatron.generate.reference_loop import Canvas, reference_loop
from llada_megatron.generate.rules import rule_of
from llada_megatron.parallel import groups
from llada_megatron.verify import golden_set

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = json.loads((GOLDEN / "cases.json").read_text())
WITHOUT_END = [name for name, case in CASES["generation"].items() if case["eos_id"] >= 1_000_000]


@pytest.fixture(scope="module")
def model():
    groups.initialize(LayoutConfig())
    try:
        yield golden_set.load(GOLDEN, GOLDEN, CASES["mask_token_id"]).stage
    finally:  # else every later test of this process would find groups
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
    rule = rule_of("quota", {"threshold": case["threshold"], "steps": case["steps"]})
    filled, forwards = reference_loop(model, Canvas(tokens, block, CASES["mask_token_id"]), rule)
    np.testing.assert_array_equal(filled[len(prompt) :][: len(expected)], expected)
    assert forwards == case["n_forward"]
    assert not (filled == CASES["mask_token_id"]).any()


def masked_twice():
    """Documents of 5 and 7 tokens, off any grid of 4 that counts from the sequence's start; 8 masked."""
    tokens = np.arange(12, dtype=np.int64) + 20
    tokens[[1, 3, 4, 6, 7, 8, 9, 11]] = CASES["mask_token_id"]
    return tokens, np.array([0, 5, 12])


def decode(model, tokens, *, grid=BlockGrid.document, threshold=0.0, **options):
    canvas = Canvas(tokens.copy(), 4, CASES["mask_token_id"], grid, **options)
    return reference_loop(model, canvas, rule_of("threshold", {"threshold": threshold}))


def test_on_the_documents_grid_packed_documents_are_filled_as_each_alone(model):
    tokens, boundaries = masked_twice()
    packed, forwards = decode(model, tokens, cu_seqlens=boundaries)
    alone = [decode(model, part) for part in np.split(tokens, boundaries[1:-1])]
    np.testing.assert_array_equal(packed, np.concatenate([filled for filled, _ in alone]))
    assert forwards == sum(count for _, count in alone) == 4  # blocks of 4, 1, 4 and 3


@pytest.mark.usefixtures("model")
@pytest.mark.parametrize("grid", BlockGrid)
def test_no_forward_cuts_a_block_of_its_mask_or_changes_the_models_mode(grid):
    class Recorder(torch.nn.Module):
        def forward(self, inputs):
            seen.append((inputs.keys.mask, inputs.outputs, self.training))
            return torch.tensor([[7.0, 0.5]]).expand(len(inputs.outputs), 2)

    seen = []
    tokens, boundaries = masked_twice()
    whole_end = {
        BlockGrid.document: [4, 4, 4, 4, 5, 9, 9, 9, 9, 12, 12, 12],
        BlockGrid.sequence: [4] * 4 + [8] * 4 + [12] * 4,
    }
    for training in (True, False):
        recorder = Recorder().train(training)
        decode(recorder, tokens, cu_seqlens=boundaries, grid=grid)
        assert recorder.training is training and {mode for *_, mode in seen} == {training}
        for mask, outputs, _ in seen:
            assert {whole_end[grid][position] for position in outputs.tolist()} == {mask.length}
        seen.clear()
