"""Decoupled muP: steps move activations as far at every width, and farther without it."""

import pytest

from llada_megatron.bench import mup
from llada_megatron.config.compose import compose
from llada_megatron.model.widths import rate_divisor, width_ratio


def test_tokens_and_concepts_are_divided_by_widths_of_their_own() -> None:
    model = compose(["experiment=dlcm_parity", "model.concepts.mup_base_hidden_size=32"]).model
    assert (model.hidden_size, model.concepts.hidden_size) == (64, 128)
    divisors = {
        "encoder.layers.0.self_attention.linear_qkv.weight": 2,
        "backbone.layers.1.mlp.experts.experts.linear_fc1.weight": 4,
        "concept_proj.weight": 2,
        "boundary_q.weight": 2,
        "concept_attention.linear_kv.weight": 4,
        "concept_attention.linear_q.weight": 2,
        "embedding.word_embeddings.weight": 1,
        "output_layer.weight": 1,
        "backbone.final_layernorm.weight": 1,
        "concept_attention.start": 1,
    }
    assert {name: rate_divisor(model, name) for name in divisors} == divisors
    assert width_ratio(model, "output_layer.weight") == 2  # of the logits


@pytest.mark.slow
def test_activations_move_as_far_at_every_width_with_mup_alone() -> None:
    widths = (64, 128, 256, 512)
    changes = mup.measure(widths)
    for part, values in changes["muP"].items():
        assert max(values) < 2 * min(values), part
    for part in ("encoder", "backbone", "decoder", "logits"):
        values = changes["none"][part]
        assert values[-1] > 4 * values[0], part
