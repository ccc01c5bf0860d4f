"""Switches that change time, memory or rounding, and not the model, in megatron-core's names.

What goes together is decided in config/speed_rules.py; what this machine can serve, in `refuse_here`.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

from megatron.core.transformer.enums import CudaGraphModule

from llada_megatron.config.choices import Fp8
from llada_megatron.config.errors import BadInput
from llada_megatron.config.schedule import Schedule
from llada_megatron.config.schema import Config
from llada_megatron.config.speed_rules import rows_of
from llada_megatron.runtime import device

FORMATS = {Fp8.tensorwise: "hybrid", Fp8.delayed: "hybrid", Fp8.blockwise: "e4m3", Fp8.mxfp8: "e4m3"}
"""`hybrid` has E5M2 for gradients; scales of blocks need no wider range than E4M3's."""
EXPERT_PACKAGE = "deep_ep"
"""Of both backends of the flex dispatcher; HybridEP is a branch of DeepEP."""


def fused(config: Config, *, layer_spec: str) -> bool:
    """Whether TransformerEngine's fused kernels take the place of several of torch's."""
    return config.model.fusions and layer_spec == "transformer_engine"


def options(config: Config, *, layer_spec: str) -> dict[str, Any]:
    """Fields of TransformerConfig; with every switch off, those of a plain layout."""
    layout, model, graphs = config.layout, config.model, config.training.cuda_graphs
    fuses = fused(config, layer_spec=layer_spec)
    chosen: dict[str, Any] = {
        "moe_token_dispatcher_type": "flex" if layout.dispatcher.is_flex else layout.dispatcher.value,
        "moe_permute_fusion": fuses and model.has_experts,
        "moe_router_fusion": fuses and model.has_experts,
        "apply_rope_fusion": fuses and _positions_are_shared(config) and not model.mla.is_used,
        "moe_shared_expert_overlap": layout.overlap_shared_experts,
        "overlap_moe_expert_parallel_comm": layout.overlap_experts,
        "delay_wgrad_compute": layout.delay_weight_gradients,
        "tp_comm_overlap": layout.overlap_tensor_parallel,
        "fine_grained_activation_offloading": bool(layout.offload_modules),
        "offload_modules": [module.value for module in layout.offload_modules],
    }
    if layout.dispatcher.is_flex:
        chosen["moe_flex_dispatcher_backend"] = layout.dispatcher.value
    if config.precision.fp8 is not Fp8.none:
        chosen |= {"fp8": FORMATS[config.precision.fp8], "fp8_recipe": config.precision.fp8.value}
    if graphs:
        modules = [CudaGraphModule[part.value] for part in graphs]
        chosen |= {"cuda_graph_impl": "transformer_engine", "cuda_graph_modules": modules}
    return chosen


def refuse_here(config: Config) -> None:
    """Raise BadInput where this machine lacks what a switch needs."""
    dispatcher, fp8 = config.layout.dispatcher, config.precision.fp8
    if dispatcher.is_flex:
        if not device.on_cuda():
            raise BadInput(
                f"layout.dispatcher={dispatcher} needs a CUDA device: set layout.dispatcher=alltoall."
            )
        if importlib.util.find_spec(EXPERT_PACKAGE) is None:
            raise BadInput(
                f"layout.dispatcher={dispatcher} needs the package {EXPERT_PACKAGE}: install DeepEP (for"
                " HybridEP its branch hybrid-ep), or set layout.dispatcher=alltoall."
            )
    if fp8 is not Fp8.none and device.on_cuda():
        available, reason = _fp8_support(fp8)
        if not available:
            raise BadInput(f"precision.fp8={fp8} cannot be served here: {reason}; take another recipe.")


def open_buffers(config: Config, schedule: Schedule) -> None:
    """Make the buffers through which layout.overlap_tensor_parallel sends, before a model is built."""
    layout = config.layout
    if not layout.overlap_tensor_parallel:
        return
    base = importlib.import_module("transformer_engine.pytorch.module.base")
    mode = base.UserBufferQuantizationMode
    rows = max(rows_of(config, stage) for stage in schedule.stages)
    base.initialize_ub(
        shape=[rows, config.model.hidden_size],
        tp_size=layout.tp,
        quantization_modes=[mode.NONE if config.precision.fp8 is Fp8.none else mode.FP8],
        dtype=device.DTYPES[config.precision.dtype],
        ub_cfgs={},
        bootstrap_backend="nccl",
    )


def _fp8_support(fp8: Fp8) -> tuple[bool, str]:
    """Whether TransformerEngine has kernels for this device, and why not."""
    quantization = importlib.import_module("transformer_engine.pytorch.quantization")
    name = {Fp8.mxfp8: "is_mxfp8_available", Fp8.blockwise: "is_fp8_block_scaling_available"}
    return getattr(quantization, name.get(fp8, "is_fp8_available"))(return_reason=True)


def _positions_are_shared(config: Config) -> bool:
    """Whether a micro-batch's samples share a row of positions, as TransformerEngine's fused rotary wants.

    Context parallelism deals each sample's tokens by its own documents.
    """
    stages = [stage.micro_batch or config.layout.micro_batch for stage in config.schedule.stages]
    return config.layout.cp == 1 or max(stages, default=config.layout.micro_batch) == 1
