"""What a device achieves under a run's switches: rates of products, memory and host, and bytes of numbers."""

from __future__ import annotations

from dataclasses import dataclass

from llada_megatron.config.choices import CudaGraphPart, Fp8, LayerSpec
from llada_megatron.config.flops import peak_flops
from llada_megatron.config.quantities import GB
from llada_megatron.config.schema import Config
from llada_megatron.plan.shapes import BYTES


@dataclass(frozen=True, slots=True)
class Rates:
    """FLOP/s by kind of kernel, bytes per second of memory and host, seconds of a kernel's start."""

    gemm: float
    grouped_gemm: float
    attention: float
    memory: float
    overlap: float
    """Share of the messages beside computation that it hides."""
    b: int
    """Bytes of a weight and of an activation."""
    exchange_overlap: float = 1.0
    """Of the experts' exchange beside computation: kernels that send take multiprocessors from it."""
    host: float = 0.0
    """0: not known."""
    launch: float = 0.0
    """Seconds of the host per kernel; 0: not known, and not counted."""
    fp8: Fp8 = Fp8.none
    fp8_speedup: float = 1.0
    fused: bool = False
    """Whether weight gradients are added inside their product, and the layer's kernels are fused."""
    spreads: bool = False
    """Whether a GPU runs what fusions would join as kernels of their own (`unfused_bytes`)."""
    graphs: frozenset[CudaGraphPart] = frozenset()
    gradient_bytes: int = 4
    moment_bytes: int = 4

    def products(
        self, flops: float, weights: float, passes: float, *, grouped: bool = False, quantised: bool = False
    ) -> float:
        """Seconds of `passes` matrix products of `flops` each that read (or write) all the weights."""
        rate, size = self.grouped_gemm if grouped else self.gemm, self.b
        if quantised and self.fp8 is not Fp8.none:
            rate, size = self.fp8_speedup * rate, 1
        return passes * max(flops / rate, size * weights / self.memory)

    def quantising(self, numbers: float) -> float:
        """Seconds of making FP8 of so many numbers, by rows and by columns; 0 without FP8.

        b read and 2 written; current scaling of whole tensors reads them once more for their maximum.
        """
        if self.fp8 is Fp8.none:
            return 0.0
        read = 2 * self.b if self.fp8 is Fp8.tensorwise else self.b
        return (read + 2) * numbers / self.memory


def rates(config: Config) -> Rates:
    """Achievable rates of the cluster's devices in the run's precision."""
    cluster, precision, b = config.cluster, config.precision, BYTES[config.precision.dtype]
    peak = peak_flops(cluster, precision.dtype)
    local = config.model.layer_spec is LayerSpec.local or not cluster.has_gpus
    fused = config.model.fusions and not local
    return Rates(
        gemm=peak * cluster.gemm_efficiency,
        grouped_gemm=peak * cluster.grouped_gemm_efficiency,
        attention=peak * cluster.attention_efficiency,
        memory=cluster.memory_gb_per_sec * GB * cluster.memory_efficiency,
        overlap=cluster.message_overlap,
        b=b,
        exchange_overlap=cluster.exchange_overlap,
        host=cluster.host_gb_per_sec * GB,
        launch=1e-6 * cluster.launch_us,
        fp8=precision.fp8,
        fp8_speedup=cluster.fp8_speedup,
        fused=fused,
        spreads=cluster.has_gpus and not fused,
        graphs=frozenset(config.training.cuda_graphs),
        gradient_bytes=BYTES[precision.gradients],
        moment_bytes=BYTES[precision.moments],
    )
