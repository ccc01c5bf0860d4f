"""Of a micro-batch nothing of ours makes the host wait for the device.

The device is torch's `meta`: its tensors have no values, so reading one back, or a shape that depends on
values, is an error, and each copy from the host is an operation that can be counted. megatron-core's experts
read on the host how many rows go where: here others stand for them, behind our router. On a GPU: tests/gpu.
"""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llada_megatron.config import rules
from llada_megatron.config.compose import compose
from llada_megatron.data.packed import PackedSample
from tests.distributed import run_ranks

META = torch.device("meta")
L = 64
MODEL = ["experiment=parity", "model.experts=0", "model.dense_layers=2", "model.layers=2"]
RUN = [f"data.sequence_length={L}", "layout.micro_batch=2", "layout.global_batch=8"]
CP = ["layout.processes=2", "layout.cp=2"]
ORDERS = ["levenshtein.delete_token_id=300", "levenshtein.split_token_id=301"]
EXPERTS = ["model.experts=8", "model.dense_layers=1", "layout.recompute=full"]
CASES: dict[str, list[str]] = {
    "diffusion": [],
    "diffusion, recomputed": ["layout.recompute=full", "model.head_chunk_tokens=8"],
    "diffusion, context parallel": CP,
    "autoregressive": [],
    "multi_block": ["diffusion.complementary=false", *CP],
    "editing": [],
    "oput": [],
    "confidence": CP,
    "levenshtein": ORDERS,
    "preference": [],
    "diffusion, routed": [
        *EXPERTS,
        *(f"model.router.{setting}" for setting in ("z_loss=0.1", "sequence_balance=0.1", "rows_cap=1.5")),
    ],
    "diffusion, routed by block": [*EXPERTS, "model.expert_capacity=4"],
}


class Copies(TorchDispatchMode):
    """Lists what goes from the host to the device; other ranks' answers are there at once."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        from torch._C._distributed_c10d import FakeWork

        if func.namespace == "c10d":
            results = [
                FakeWork().boxed() if "Work" in str(result.type) else args[0]
                for result in func._schema.returns
            ]
            return results[0] if len(results) == 1 else tuple(results)
        result = func(*args, **(kwargs or {}))
        ends = {each.device for each in tree_leaves((args, kwargs, result)) if isinstance(each, Tensor)}
        is_copy = func.overloadpacket in (torch.ops.aten._to_copy, torch.ops.aten.copy_)
        if is_copy and len(ends) > 1:
            self.found.append(f"{func} of {[tuple(each.shape) for each in tree_leaves(args)[:2]]}")
        return result


class Numbers(TorchFunctionMode):
    """Lists the tensors that are made on the device of numbers of the host: each is a copy to wait for."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if name in ("tensor", "as_tensor", "new_tensor") and result.device == META:
            self.found.append(f"{name} of {args}")
        return result


class Sequences:
    """The same sequence at every place: two documents, with a chat's roles where a stage wants them."""

    def __init__(self) -> None:
        tokens = np.arange(L, dtype=np.int64) % 200
        supervised = np.arange(L) % 8 > 2
        edges, documents = np.array([0, 24, L], dtype=np.int32), np.array([0, 1])
        self.sample = PackedSample(tokens, edges, document_ids=documents, supervised=supervised)

    def __getitem__(self, index: int) -> PackedSample:
        return self.sample


def attends(query: Tensor, key: Tensor, value: Tensor, rectangle: Any, scale: float) -> Tensor:
    """An executor that reads what executors on a GPU read: tensors, and the endpoints of the rectangle."""
    from llada_megatron.attention.intervals import endpoints_on

    ends = endpoints_on(rectangle, query.device)
    return query * scale + key.mean() + value.mean() + ends.to(query.dtype).mean()


def keep_experts_on_device(model: torch.nn.Module) -> None:
    from megatron.core.transformer.moe.moe_layer import MoELayer

    from llada_megatron.model.experts import OwnDispatcher

    for layer in model.modules():
        if isinstance(layer, MoELayer):
            layer.token_dispatcher = OwnDispatcher(layer.config.moe_router_topk)
            layer.experts.forward = lambda rows_NH, counts, weight_N: (rows_NH * weight_N[:, None], None)


def copies_of(name: str, overrides: list[str]) -> list[str]:
    """In a forked process: the copies to the device of one micro-batch, forward and backward."""
    from llada_megatron.model.gpt import BlockDiffusionGPT
    from llada_megatron.model.provider import build_model
    from llada_megatron.objectives import passes
    from llada_megatron.objectives.batch import context_part
    from llada_megatron.objectives.reference import ReferenceScores
    from llada_megatron.objectives.registry import objective_of
    from llada_megatron.parallel import groups
    from llada_megatron.runtime import fake_world

    objective_name = name.split(",")[0]
    block_size = 1 if objective_name == "autoregressive" else 8
    stage = f"{{name: it, block_size: '{block_size}', tokens: 4096, objective: {objective_name}}}"
    config = compose([*MODEL, *RUN, f"schedule.stages=[{stage}]", *overrides])
    schedule = rules.schedule_of(config)
    (of_run,) = schedule.stages
    with fake_world.world(0, config.layout.processes):
        groups.initialize(config.layout)
        (stage_model,) = build_model(config, initialize=False, attention=attends)
        objective = objective_of(objective_name, config, schedule)
        if objective_name == "preference":
            objective.scores = ReferenceScores({"": np.zeros((2, config.preference.draws))})
        batch = objective.batch(Sequences(), [0, 1], of_run, noise_sigma=0.5)
        batch.inputs.readout = objective.readout
        batch = context_part(batch).packed()
        stage_model.to(META)
        keep_experts_on_device(stage_model)
        for module in stage_model.modules():
            if isinstance(module, BlockDiffusionGPT):
                module.rotary_pos_emb.inv_freq = module.rotary_pos_emb.inv_freq.to(META)
        # megatron-core makes what it receives on the current device.
        with pytest.MonkeyPatch.context() as patch, Copies() as copies, Numbers() as numbers:
            patch.setattr(torch.cuda, "current_device", lambda: META)
            output, loss_of = passes.forward_step(objective, None, iter([batch.to(META)]), stage_model)
            loss, _, _ = loss_of(output)
            loss.backward()
        groups.destroy()
    return copies.found + numbers.found


def of_every_case() -> dict[str, list[str]]:
    return {name: copies_of(name, overrides) for name, overrides in CASES.items()}


def test_a_micro_batch_is_one_copy_and_nothing_is_read_back() -> None:
    copies = run_ranks(of_every_case)[0]
    # The numbers of the blocks travel beside the batch: each stage of the model makes them of its mask.
    assert {name: len(found) for name, found in copies.items()} == {
        name: 1 + ("by block" in name) for name in CASES
    }
