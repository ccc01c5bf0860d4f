"""Where a run runs: what the machines of a site can do, and how Slurm is asked for them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from llada_megatron.config.choices import Container
from llada_megatron.config.ranges import (
    Amount,
    Count,
    Extent,
    Range,
    Share,
    Text,
    one_of,
)


@dataclass
class ClusterConfig:
    """What the machines can do; zero means unknown, and a question that needs the number says so."""

    name: Text = "local"
    peak_tflops: Amount = 0.0
    """Dense bf16 peak per device in TFLOP/s, for MFU."""
    peak_tflops_fp32: Amount = 0.0
    """Peak per device in TFLOP/s of fp32 matrix products as torch runs them by default (no TF32)."""
    has_gpus: bool = True
    """False: each of gpus_per_node is a process of the node's CPUs."""
    nodes: Extent = 0
    gpus_per_node: Extent = 0
    memory_gb: Amount = 0.0
    """Per device, in 10^9 bytes."""
    memory_margin: Annotated[float, Range(at_least=0, below=1)] = 0.1
    """Share of memory_gb that a plan leaves free for what it does not model."""
    memory_gb_per_sec: Amount = 0.0
    """Bandwidth of the device's memory in 10^9 bytes per second."""
    node_gb_per_sec: Amount = 0.0
    """Per device and direction, between devices of a node, in 10^9 bytes per second."""
    node_latency_us: Amount = 0.0
    network_gb_per_sec: Amount = 0.0
    """Per device and direction, between nodes, in 10^9 bytes per second."""
    network_latency_us: Amount = 0.0
    host_gb_per_sec: Amount = 0.0
    """Per device, into its node's pinned memory, in 10^9 bytes per second."""
    storage_gb_per_sec: Amount = 0.0
    """Per node to and from the file system of checkpoints, while all nodes write or read."""
    gemm_efficiency: Share = 0.0
    """Share of the peak that plain matrix products reach."""
    grouped_gemm_efficiency: Share = 0.0
    """Share of the peak that the experts' products reach."""
    attention_efficiency: Share = 0.0
    """Share of the peak that attention reaches, counted on visible pairs: hidden pairs of tiles and the
    scores that backward computes again lower it."""
    memory_efficiency: Share = 0.0
    """Share of memory_gb_per_sec that operations without matrix products reach."""
    link_efficiency: Share = 0.0
    """Share of node_gb_per_sec and network_gb_per_sec that collectives reach."""
    exchange_overlap: Share = 1.0
    """Share of the experts' exchange that computation hides where a layout lets both run at once: kernels
    that send take multiprocessors from it."""
    fp8_speedup: Annotated[float, Range(at_least=1, at_most=2)] = 1.0
    """How many times faster than in precision.dtype products run in FP8, twice the peak at best."""
    launch_us: Amount = 0.0
    """Of the host for every kernel that it starts, autograd included; 0: unknown, and not counted."""
    message_overlap: Share = 1.0
    """Share of the messages beside computation that it hides; 0 where the processor itself sends them."""
    price_per_gpu_hour: Amount = 0.0
    """In any currency; 0: no cost is given."""


@dataclass
class SlurmConfig:
    """How a run is submitted at a site; what is empty is left to the site's defaults."""

    account: Text = ""
    partition: Text = ""
    qos: Text = ""
    constraint: Text = ""
    time_limit_min: Count = 0
    """Of one attempt; the run goes on in the next one."""
    options: list[Text] = field(default_factory=list)
    """Further options of sbatch, one each: `--mem=0`."""
    setup: list[Text] = field(default_factory=list)
    """Lines of shell before the ranks start: `module load cuda`."""
    environment: Annotated[str, one_of("", "nccl", "gloo")] = ""
    """A file of jobs/env/ that the job sources: `nccl` or `gloo`; empty: `nccl` where nodes have GPUs."""
    container: Container = Container.none
    image: Text = ""
    """For a container: a name or path of its image."""
    mounts: list[Text] = field(default_factory=list)
    """For a container: `HOST:INSIDE`; the run's directory, the data and this source must be among them."""
    python: Text = ""
    """Of the ranks; empty: the one that submits, and `python` in a container."""
    signal_lead_sec: Count = 300
    """Warning before the time limit; a submission raises it to what steps and saves have taken so far."""
    min_nodes: Extent = 0
    """A run that has lost a node without a replacement goes on with fewer than cluster.nodes, at least so
    many, in the fastest layout there; 0: it waits for as many as before."""
    exclude_failed_nodes: bool = False
    """Leave nodes that fail a preflight out of the job's next start, if enough others are left for it."""
