"""training.cuda_graphs: parts of layers, captured once a stage's shapes have been seen, then replayed.

megatron-core's TECudaGraphHelper captures them. It has never run here: there was no GPU.
"""

from __future__ import annotations

import importlib
from typing import Any

from megatron.core.distributed import DistributedDataParallel
from megatron.core.num_microbatches_calculator import reconfigure_num_microbatches_calculator
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.utils import get_model_config

from llada_megatron.config.schema import Config
from llada_megatron.model.router import BalancedRouter
from llada_megatron.parallel.dealing import data_parallel

STEPS_BEFORE = 3
"""Trained without graphs when shapes are new: kernels are chosen and buffers made meanwhile (cuBLAS, TE)."""


class Graphs:
    """Captures anew where the schedule changes the shapes; does nothing without parts to capture."""

    def __init__(
        self, config: Config, model: list[DistributedDataParallel], optimizer: MegatronOptimizer
    ) -> None:
        self.is_on = bool(config.training.cuda_graphs)
        self.model, self.optimizer = model, optimizer
        self.gathers_ahead = config.layout.overlap_param_gather
        self.sizes: dict[str, int] = {}
        self.steps = 0
        """Begun with these sizes."""
        self.helper: Any = None

    def begin(self, sizes: dict[str, int]) -> None:
        """Before a step's passes; sizes: what megatron-core's schedules ask of them (training/step.py)."""
        if not self.is_on:
            return
        if sizes != self.sizes:
            if self.helper is not None:
                self.helper.delete_cuda_graphs()
            self.helper, self.sizes, self.steps = None, dict(sizes), 0
        if self.steps == STEPS_BEFORE:
            self._capture()
        self.steps += 1

    def _capture(self) -> None:
        graphs = importlib.import_module("megatron.core.transformer.cuda_graphs")
        count, micro_batch = self.sizes["num_microbatches"], self.sizes["micro_batch_size"]
        replicas = data_parallel()[1]
        # From where the helper reads the number of micro-batches of a pipeline.
        reconfigure_num_microbatches_calculator(
            1, None, count * micro_batch * replicas, micro_batch, replicas
        )
        self.helper = graphs.TECudaGraphHelper(
            self.model,
            get_model_config(self.model[0]),
            self.sizes["seq_length"],
            micro_batch,
            [self.optimizer],
        )
        for chunk in self.model if self.gathers_ahead else []:
            chunk.disable_forward_pre_hook(param_sync=False)
        self.helper.create_cudagraphs()
        for chunk in self.model if self.gathers_ahead else []:
            chunk.enable_forward_pre_hook()
        self.helper.cuda_graph_set_manual_hooks()
        for router in (part for chunk in self.model for part in chunk.modules()):
            if isinstance(router, BalancedRouter) and router.local_tokens_per_expert is not None:
                router.local_tokens_per_expert.zero_()  # capturing ran routers on made-up rows
