"""Filled-in samples: what was shown stays, what was masked is what the loop without a cache fills in."""

import numpy as np
import pytest

from llada_megatron.config.compose import compose
from llada_megatron.data.packed import PackedSample
from llada_megatron.evaluate.samples import MASK_CHARACTER, infilled
from llada_megatron.generate.reference_loop import Canvas, reference_loop
from llada_megatron.generate.rules import rule_of
from llada_megatron.model.provider import build_model
from llada_megatron.parallel import groups

L = 32
BLOCK = 4


@pytest.fixture(scope="module")
def config():
    composed = compose(["experiment=parity", f"data.sequence_length={L}", "model.init_std=0.2"])
    groups.initialize(composed.layout)
    yield composed
    groups.destroy()


@pytest.mark.parametrize("block_size", [BLOCK, L], ids=["blocks", "full"])
def test_each_document_is_filled_as_by_itself_and_the_models_mode_stays(config, block_size):
    """With one block of the whole sequence every position of a document sees every other."""
    (model,) = build_model(config)
    tokens = np.frombuffer(b"one document of a sequence, and more", np.uint8)[:L].astype(np.int64)
    samples = [
        PackedSample(tokens, np.array([0, 13, L])),
        PackedSample(tokens[::-1].copy(), np.array([0, L])),
    ]
    assert model.training
    for sample, found in zip(samples, infilled(config, model, samples, block_size), strict=True):
        original, masked, filled = (found[name] for name in ("original", "masked", "filled"))
        assert original == bytes(sample.tokens.tolist()).decode()
        hidden = np.array([character == MASK_CHARACTER for character in masked])
        assert hidden.any() and not hidden[: L // 2].any()
        assert "".join(np.where(hidden, MASK_CHARACTER, list(original))) == masked
        mask = config.model.mask_token_id
        expected = []
        for document in np.split(np.where(hidden, mask, sample.tokens), sample.cu_seqlens[1:-1]):
            model.eval()
            canvas = Canvas(document, block_size, mask, full_from=0 if block_size == L else None)
            expected += reference_loop(model, canvas, rule_of("threshold"))[0].tolist()
            model.train()
        shown = [
            MASK_CHARACTER if decided_at else piece
            for piece, decided_at in zip(found["pieces"], found["decided_at"], strict=True)
        ]
        assert "".join(shown) == masked and max(found["decided_at"]) > 1
        assert filled == bytes(token for token in expected if token < 256).decode(errors="replace")
    assert model.training
