"""What a start says of the machine, and what it refuses there."""

from types import SimpleNamespace

import pytest
import torch

from llada_megatron.config.compose import compose
from llada_megatron.config.errors import BadInput
from llada_megatron.model import specs
from llada_megatron.training import start

UNFUSED = dict.fromkeys(start.FUSIONS, False)


@pytest.fixture
def bare_gpu(monkeypatch):
    """A machine with a CUDA device, as far as is asked here, and neither TransformerEngine nor cuDNN."""
    monkeypatch.setattr(start.device, "on_cuda", lambda: True)
    monkeypatch.setattr(start.device, "device", lambda: torch.device("cpu"))
    monkeypatch.setattr(specs.importlib.util, "find_spec", lambda name: None)


@pytest.mark.parametrize("backend", ["auto", "portable"])
def test_portable_attention_does_not_train_on_cuda(bare_gpu, backend):
    with pytest.raises(BadInput, match=r"portable does not train on CUDA.*set model.attention_backend=auto"):
        start.training_executor(backend, torch.bfloat16, 128)


def test_a_run_says_what_it_computes_with_and_how_to_get_what_is_faster(monkeypatch):
    config = compose(["experiment=parity"])
    built = SimpleNamespace(
        **UNFUSED | {"bias_activation_fusion": True}, moe_token_dispatcher_type="alltoall"
    )
    layers, experts, optimizer, attention = start.engine_lines(config, built)
    assert layers.startswith(
        "layers    local: transformer_engine needs a CUDA device; fused: SwiGLU; not fused:"
    )
    assert experts == f"experts   {config.model.experts} over ep 1, alltoall dispatcher"
    assert optimizer == "optimizer torch's fused AdamW" and attention.startswith("attention portable: ")
    config.model.dense_layers = config.model.layers
    lines = start.engine_lines(config, built)
    assert len(lines) == 3 and "permutation" not in lines[0]


def test_a_gpu_without_transformer_engine_is_told_how_to_get_it(bare_gpu, monkeypatch):
    monkeypatch.setattr(start.adamw, "in_use", lambda: start.adamw.NAMES["llada_megatron"])
    assert start.optimizer_line() == ("torch's fused AdamW: TransformerEngine's needs pip install '.[cuda]'")
    line = specs.layer_spec_line(compose(["experiment=parity"]).model)
    assert line == "local: transformer_engine is not installed (pip install '.[cuda]')"
    monkeypatch.setattr(start.adamw, "in_use", lambda: "TransformerEngine's FusedAdam")
    assert start.optimizer_line() == "TransformerEngine's FusedAdam"
