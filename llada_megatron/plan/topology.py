"""Process groups on nodes, and how long a message takes in them.

Ranks fill nodes in order, so a group of ranks that are `stride` apart has min(size, ceil(gpus_per_node /
stride)) of them on rank 0's node. Groups are those of config/layout.py's two grids:

    tp  stride 1        cp  tp        dp  tp (with cp inside: gradients are reduced over both)    pp  last
    bp  tp: neighbours in dp, of decoding
    etp stride 1        ep  etp       expert dp  etp ep
"""

from __future__ import annotations

from dataclasses import dataclass

from llada_megatron.config.errors import BadInput
from llada_megatron.config.flops import PEAK_SETTING
from llada_megatron.config.layout import data_parallel_size, expert_data_parallel_size
from llada_megatron.config.quantities import GB
from llada_megatron.config.schema import ClusterConfig, Config, LayoutConfig


@dataclass(frozen=True, slots=True)
class Group:
    """A process group as one of its ranks sees it; rates in bytes per second, latencies in seconds."""

    ranks: int
    on_node: int
    """Ranks of the group on one node."""
    node_rate: float
    network_rate: float
    node_latency: float
    network_latency: float

    def seconds(self, operation: str, payload: float, network: float = 0.0) -> float:
        """Time of one message.

        all_gather and reduce_scatter go round a ring: payload (R-1)/R bytes leave each rank, where payload is
        the gathered tensor; between nodes every rank on a node has its own network link, so a ring with
        several ranks there uses several. all_reduce is both. all_to_all sends payload/R to every rank, inside
        the node and outside at the same time. exchange likewise, `payload` inside and `network` outside. send
        goes to one neighbour.
        """
        if self.ranks == 1:
            return 0.0
        if operation == "all_reduce":
            return 2 * self.seconds("all_gather", payload)
        across = self.on_node < self.ranks
        if operation == "send":
            rate = self.network_rate if self.on_node == 1 else self.node_rate
            return payload / rate + (self.network_latency if self.on_node == 1 else self.node_latency)
        if operation == "exchange":
            latency = self.network_latency if across else self.node_latency
            return max(payload / self.node_rate, network / self.network_rate if across else 0.0) + latency
        if operation == "all_to_all":
            inside = payload * (self.on_node - 1) / self.ranks / self.node_rate
            if not across:
                return inside + self.node_latency
            outside = payload * (self.ranks - self.on_node) / self.ranks / self.network_rate
            return max(inside, outside) + self.network_latency
        rate = min(self.node_rate, self.on_node * self.network_rate) if across else self.node_rate
        nodes = -(-self.ranks // self.on_node)
        latency = (self.on_node - 1) * self.node_latency + (nodes - 1) * self.network_latency
        return payload * (self.ranks - 1) / self.ranks / rate + latency


def groups(layout: LayoutConfig, cluster: ClusterConfig) -> dict[str, Group]:
    """Every process group that carries traffic, by name."""
    dp, expert_dp = data_parallel_size(layout), expert_data_parallel_size(layout)
    sizes_and_strides = {
        "tp": (layout.tp, 1),
        "cp": (layout.cp, layout.tp),
        "bp": (layout.bp, layout.tp),
        "etp": (layout.etp, 1),
        "ep": (layout.ep, layout.etp),
        "ep*etp": (layout.ep * layout.etp, 1),
        "pp": (layout.pp, layout.processes // layout.pp),
        "dp": (dp * layout.cp, layout.tp),
        "tp*cp": (layout.tp * layout.cp, 1),
        "tp*dp": (layout.tp * dp * layout.cp, 1),
        "embedding": (min(2, layout.pp), layout.processes // layout.pp),
        "expert dp": (expert_dp, layout.etp * layout.ep),
    }
    node_rate = cluster.node_gb_per_sec * GB * cluster.link_efficiency
    network_rate = cluster.network_gb_per_sec * GB * cluster.link_efficiency
    return {
        name: Group(
            ranks=ranks,
            on_node=min(ranks, -(-cluster.gpus_per_node // stride)),
            node_rate=node_rate,
            network_rate=network_rate,
            node_latency=cluster.node_latency_us * 1e-6,
            network_latency=cluster.network_latency_us * 1e-6,
        )
        for name, (ranks, stride) in sizes_and_strides.items()
    }


def gpus(cluster: ClusterConfig) -> int:
    """Devices of the cluster."""
    return cluster.nodes * cluster.gpus_per_node


def check_cluster(config: Config) -> None:
    """Raise BadInput, naming the setting, for a cluster whose description lacks what a plan needs."""
    cluster = config.cluster
    needed = ["nodes", "gpus_per_node", "memory_gb", "memory_gb_per_sec"]
    needed += [PEAK_SETTING[config.precision.dtype]]
    needed += ["gemm_efficiency", "attention_efficiency", "memory_efficiency"]
    needed += ["grouped_gemm_efficiency"] if config.model.has_experts else []
    needed += ["node_gb_per_sec", "link_efficiency"] if gpus(cluster) > 1 else []
    needed += ["network_gb_per_sec"] if cluster.nodes > 1 else []
    for name in needed:
        if getattr(cluster, name) <= 0:
            raise BadInput(
                f"cluster.{name} is not known (cluster={cluster.name}): set it, or choose a cluster that is"
                " described, for example cluster=h100_8."
            )


def check_processes(config: Config) -> None:
    """Raise BadInput when the layout and the cluster do not have the same number of devices."""
    cluster, processes = config.cluster, config.layout.processes
    if gpus(cluster) != processes:
        raise BadInput(
            f"layout.processes={processes}, but cluster {cluster.name} has nodes*gpus_per_node="
            f"{gpus(cluster)} GPUs: set layout.processes={gpus(cluster)}, or another cluster.nodes."
        )
