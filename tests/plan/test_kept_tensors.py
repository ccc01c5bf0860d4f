"""The formulas of the head and of SwiGLU against the tensors that the real modules save."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch

from llada_megatron.config.compose import compose
from llada_megatron.config.objectives import OBJECTIVES
from llada_megatron.config.schema import Config
from llada_megatron.model.head import head_output
from llada_megatron.model.inputs import ModelInputs
from llada_megatron.model.provider import build_stage
from llada_megatron.model.readout import CONFIDENCE, CROSS_ENTROPY
from llada_megatron.parallel import groups
from llada_megatron.plan.activations import head_bytes, layer_parts
from tests.plan.flash import balanced_shape

S, B, CHUNK = 32, 2, 16


@pytest.fixture(scope="module")
def config() -> Iterator[Config]:
    overrides = ["experiment=parity", "precision=bf16", f"model.head_chunk_tokens={CHUNK}"]
    composed = compose(overrides)
    groups.initialize(composed.layout)
    yield composed
    groups.destroy()


@pytest.fixture(scope="module")
def stage(config: Config) -> torch.nn.Module:
    return build_stage(config)


def saved_bytes(run: Callable[[], torch.Tensor], *inputs: torch.Tensor, module: torch.nn.Module) -> int:
    """Bytes of the storages that autograd saves while `run` does, without parameters and inputs."""
    known = {tensor.untyped_storage().data_ptr() for tensor in (*inputs, *module.parameters())}
    saved: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage().data_ptr()
        if storage not in known:
            saved[storage] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(tensor.untyped_storage().nbytes() for tensor in saved.values())


def hidden(config: Config) -> torch.Tensor:
    return torch.randn(S, B, config.model.hidden_size, dtype=torch.bfloat16, requires_grad=True)


READOUTS = {"diffusion": CROSS_ENTROPY, "confidence": CONFIDENCE}


@pytest.mark.parametrize("objective", READOUTS)
@pytest.mark.parametrize("supervised", [CHUNK - 3, CHUNK, 2 * CHUNK + 5])
def test_the_head_saves_what_the_formula_says(config: Config, stage, supervised: int, objective: str) -> None:
    states, rows = hidden(config), torch.arange(supervised)
    inputs = ModelInputs(tokens=rows, positions=rows, keys=None, outputs=rows, labels=rows.clone())
    inputs.readout = READOUTS[objective]

    def run() -> torch.Tensor:
        return head_output(
            hidden_states=states,
            output_layer=stage.output_layer,
            output_weight=None,
            context=(inputs, CHUNK),
            config=stage.config,
        )

    saved = saved_bytes(run, states, rows, inputs.labels, module=stage)
    row = OBJECTIVES[objective].row_bytes
    shape = replace(balanced_shape(tp=1, cp=1, rows=S, micro_batch=B), supervised=supervised, row_bytes=row)
    # the final norm's input and 1/rms; weights and metrics of the loss; places and labels, known here already
    outside = (
        S * B * (2 * config.model.hidden_size + 4)
        + 8 * shape.sums
        + supervised * (row.kept + 8 * (supervised > CHUNK))
    )
    assert saved == head_bytes(config.model, shape, config.layout, b=2) - outside


def test_a_dense_mlp_saves_what_the_formula_says(config: Config, stage) -> None:
    states = hidden(config)
    mlp = stage.decoder.layers[0].mlp
    shape = balanced_shape(tp=1, cp=1, rows=S, micro_batch=B)
    parts = layer_parts(config.model, shape, config.layout, moe=False, b=2)
    assert saved_bytes(lambda: mlp(states)[0], states, module=stage) == parts["mlp"]


def test_the_provider_fuses_swiglu_as_the_formulas_assume(stage) -> None:
    assert stage.config.bias_activation_fusion
