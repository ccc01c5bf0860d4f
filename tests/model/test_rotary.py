"""Rotary frequencies under each scaling are those of the public code, and so is the attention factor."""

import pytest
import torch

from llada_megatron.config.schema import ModelConfig, RotaryScaling, RotaryScalingConfig
from llada_megatron.model.rotary import attention_factor, inverse_frequencies

YARN = RotaryScalingConfig(RotaryScaling.yarn, 4.0, 8192)
YARN_UNROUNDED = RotaryScalingConfig(
    RotaryScaling.yarn, 40.0, 4096, beta_fast=16.0, beta_slow=2.0, truncate=False
)
LLAMA3 = RotaryScalingConfig(RotaryScaling.llama3, 8.0, 8192)
LINEAR = RotaryScalingConfig(RotaryScaling.linear, 4.0)
NAMES = ["yarn", "unrounded", "llama3", "linear"]
# By transformers 4.57.1 and 5.23.0: head_dim 32, partial_rotary_factor 0.5, rope_theta 500000.
PUBLIC = [
    (
        YARN,
        1.138629436111989,
        [1.0, 0.193922758, 0.0376060307, 0.00546949822, 0.000707106723,
         6.85620471e-05, 1.32957393e-05, 2.57834631e-06],
    ),
    (
        YARN_UNROUNDED,
        1.3688879454113936,
        [1.0, 0.193922758, 0.0376060307, 0.00314298389, 3.53553369e-05,
         6.85620444e-06, 1.32957393e-06, 2.57834614e-07],
    ),
    (
        LLAMA3,
        1.0,
        [1.0, 0.193922758, 0.0376060307, 0.00729266508, 0.000524846022,
         3.42810235e-05, 6.64786967e-06, 1.28917316e-06],
    ),
    (
        LINEAR,
        1.0,
        [0.25, 0.0484806895, 0.00940150768, 0.00182316627, 0.000353553361,
         6.85620471e-05, 1.32957393e-05, 2.57834631e-06],
    ),
]  # fmt: skip


def model(scaling: RotaryScalingConfig) -> ModelConfig:
    return ModelConfig(head_dim=32, rotary_fraction=0.5, rotary_base=500000.0, rotary_scaling=scaling)


@pytest.mark.parametrize(
    "scaling, factor, frequencies", PUBLIC, ids=["yarn", "unrounded", "llama3", "linear"]
)
def test_frequencies_and_the_attention_factor_are_those_of_the_public_code(
    scaling: RotaryScalingConfig, factor: float, frequencies: list[float]
) -> None:
    found = inverse_frequencies(model(scaling), torch.device("cpu"))
    torch.testing.assert_close(found, torch.tensor(frequencies), rtol=1e-6, atol=0)
    assert attention_factor(scaling) == pytest.approx(factor, rel=1e-12)


def test_without_scaling_frequencies_are_bit_for_bit_what_checkpoints_were_trained_with() -> None:
    exponents = torch.arange(0, 16, 2, dtype=torch.float32) / 16
    found = inverse_frequencies(model(RotaryScalingConfig()), torch.device("cpu"))
    assert torch.equal(found, 1.0 / 500000.0**exponents)
