"""What a plan takes for granted of a family and of switches that are on, a clause each; docs/planning.md has
the sources."""

from __future__ import annotations

from collections.abc import Iterator

from llada_megatron.config.choices import Fp8
from llada_megatron.config.schema import Config
from llada_megatron.plan import launches
from llada_megatron.plan.activations import recomputed_modules
from llada_megatron.plan.dispatch import reached
from llada_megatron.plan.estimate import StageTime
from llada_megatron.plan.families import plan_formulas_of
from llada_megatron.plan.rates import rates


def of_switches(config: Config, stage: StageTime) -> list[str]:
    """Of the run's family, and of its switches where they are on."""
    family = plan_formulas_of(config.model)
    of_family = [*family.assumed_of_shapes(config.model), *family.assumed_of_times(config.model)]
    return [*of_family, *_of_experts(config, stage), *_of_products(config)]


def _of_experts(config: Config, stage: StageTime) -> Iterator[str]:
    layout, cluster, model = config.layout, config.cluster, config.model
    ways = layout.ep * layout.etp
    if layout.dispatcher.is_flex and ways > 1:
        nodes = -(-ways // min(ways, cluster.gpus_per_node or ways))
        text = (
            f"routing is even, so a token goes to {ways * reached(model, model.experts // layout.ep):.1f} of"
        )
        text += f" {ways} processes"
        if nodes > 1:
            text += f" and {nodes * reached(model, model.experts // nodes):.1f} of {nodes} nodes"
        yield f"{text}, in bf16, with links as above"
    hidden = f"computation hides {cluster.exchange_overlap:.0%} of the exchange beside it"
    if layout.overlap_experts and ways > 1:
        yield f"{hidden}, of the {stage.paired_share:.0%} of micro-batches that run in pairs"
    elif layout.overlap_shared_experts and ways > 1:
        yield f"{hidden}, the shared expert's alone"
    if layout.overlap_tensor_parallel:
        yield f"products hide {cluster.message_overlap:.0%} of tensor parallelism's messages"


def _of_products(config: Config) -> Iterator[str]:
    cluster, at = config.cluster, rates(config)
    if at.fp8 is not Fp8.none:
        yield (
            f"products in FP8 are {at.fp8_speedup:g} times faster, quantisation passes over memory, and"
            " layers keep as much as in bf16"
        )
    if config.layout.offload_modules and at.host:
        yield f"each device moves {cluster.host_gb_per_sec:g} GB/s to its host and back, beside computation"
    if at.fused:
        yield "kernels are fused (model.fusions)"
    elif at.spreads:
        yield "what fusions would join passes over memory by itself"
    if at.launch:
        again, moe = recomputed_modules(config.layout), config.model.has_experts
        there, back = launches.kernels(config.model, config.layout, at, again, moe=moe)
        count = f"{there + back} for a layer and micro-batch"
        yield f"the host starts a kernel in {cluster.launch_us:g} us, {count}"
