"""Experts without gradients give, bit for bit, what megatron-core's own give with them."""

import pytest
import torch

from llada_megatron.attention import BlockDiffusionMask
from llada_megatron.config.compose import compose
from llada_megatron.model.adapters import is_adapter
from llada_megatron.model.experts import Experts
from llada_megatron.model.provider import build_model
from llada_megatron.parallel import groups
from tests.model.test_provider import model_inputs


@pytest.mark.parametrize("setting", ["precision=fp32", "precision=bf16", "model.lora.rank=4"])
def test_a_forward_without_gradients_equals_one_with_them(setting):
    config = compose(["experiment=parity", "model=tiny", setting, "model.init_std=0.2"])
    groups.initialize(config.layout)
    try:
        (model,) = build_model(config)
        assert any(isinstance(module, Experts) for module in model.modules())
        for name, parameter in model.named_parameters():
            if is_adapter(name):
                parameter.data.normal_(generator=torch.Generator().manual_seed(1))
        # So few rows that some experts have none.
        for rows in (3, 24):
            mask = BlockDiffusionMask([torch.tensor([0, rows])], 3, clean_copy=False, causal=True)
            inputs = model_inputs(torch.arange(rows)[None], mask, outputs=torch.arange(rows))
            learnt = model.train()(inputs)
            with torch.inference_mode():
                found = model.eval()(inputs)
            assert learnt.requires_grad and torch.equal(found, learnt)
    finally:
        groups.destroy()
