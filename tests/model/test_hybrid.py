"""model.core=hybrid is the model of model.core=gpt: the same names, and the same numbers bit for bit."""

from collections.abc import Iterator, Sequence

import pytest
import torch

from llada_megatron.attention import BlockDiffusionMask
from llada_megatron.attention.context import ContextShard
from llada_megatron.config.compose import compose
from llada_megatron.model.core_attention import BlockDiffusionCoreAttention
from llada_megatron.model.gpt import BlockDiffusionStage, layers_of
from llada_megatron.model.hybrid import pattern
from llada_megatron.model.initialize import SHARDING_METADATA, named_parameters
from llada_megatron.model.inputs import EmbeddingNoise, ModelInputs
from llada_megatron.model.provider import build_stage
from llada_megatron.parallel import groups
from tests.model.latents import FULL_QUERIES, MLA

# isort: split
from megatron.core.dist_checkpointing.dict_utils import nested_values  # after the seam of the imports above
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from megatron.core.models.hybrid.hybrid_model import HybridModel

L = 12
CORES = ("gpt", "hybrid")
CASES = {
    "dense_first": [],
    "dense": ["model.experts=0", "model.dense_layers=4"],
    "marked": ["model.expert_balance_clean_half=false", "model.head_chunk_tokens=8"],
    "pools": ["model.expert_capacity=4"],
    "tied": ["model.tied_head=true"],
    "adapted": ["model.lora.rank=2"],
    "recomputed": ["layout.recompute=full"],
    "latents": [*MLA],
    "latents_recomputed": [*MLA, "layout.recompute=selective"],
    "full_queries": [*MLA, FULL_QUERIES, "model.experts=0", "model.dense_layers=4"],
    "mlp_recomputed": ["layout.recompute=selective", "layout.recompute_modules=[core_attn,mlp]"],
}


@pytest.fixture(scope="module", autouse=True)
def one_process() -> Iterator[None]:
    groups.initialize(compose(["experiment=parity"]).layout)
    yield
    groups.destroy()


def stages(*overrides: str) -> list[BlockDiffusionStage]:
    composed = (
        compose(["experiment=parity", "model=tiny", f"model.core={core}", *overrides]) for core in CORES
    )
    gpt, hybrid = (build_stage(config) for config in composed)
    assert isinstance(hybrid, HybridModel) and not isinstance(gpt, HybridModel)
    return [gpt, hybrid]


def inputs() -> ModelInputs:
    positions = torch.arange(L)
    return ModelInputs(
        tokens=torch.randint(256, (1, 2 * L), generator=torch.Generator().manual_seed(0)),
        positions=torch.cat([positions, positions])[None],
        keys=ContextShard(BlockDiffusionMask([torch.tensor([0, 7, L])], 4)),
        outputs=torch.arange(0, 2 * L, 2),
        labels=torch.arange(L),
        noise=EmbeddingNoise(sigma=0.1, seeds=[0], drawn=[2], rows=[torch.tensor([1, 3])]),
    )


def computed(stage: BlockDiffusionStage) -> list[tuple[str, torch.Tensor]]:
    """Losses, each layer's output, and gradients by the names that weights have in a checkpoint."""
    found: list[tuple[str, torch.Tensor]] = []
    for layer in layers_of(stage):
        layer.register_forward_hook(lambda _, given, output: found.append(("layer", output[0].detach())))
    losses = stage(inputs())
    found.append(("losses", losses.detach()))
    losses.sum().backward()
    return [*found, *((name, p.grad) for name, p in named_parameters(stage) if p.grad is not None)]


@pytest.mark.parametrize(
    "name", ["dense_first", *(pytest.param(n, marks=pytest.mark.slow) for n in CASES if n != "dense_first")]
)
def test_losses_layers_and_gradients_are_those_of_gpt_to_the_bit(name: str) -> None:
    gpt, hybrid = (computed(stage) for stage in stages(*CASES[name]))
    assert [key for key, _ in gpt] == [key for key, _ in hybrid]
    assert sum(key == "layer" for key, _ in gpt) >= 4
    different = [
        key for (key, ours), (_, theirs) in zip(gpt, hybrid, strict=True) if not torch.equal(ours, theirs)
    ]
    assert not different


def entries(stage: BlockDiffusionStage) -> list[tuple[str, tuple[int, ...], str]]:
    sharded = stage.sharded_state_dict(metadata=SHARDING_METADATA)
    apply_factories(sharded)
    shards = [entry for entry in nested_values(sharded) if isinstance(entry, ShardedTensor)]
    return [(shard.key, tuple(shard.global_shape), str(shard.dtype)) for shard in shards]


def weights(stage: BlockDiffusionStage) -> dict[str, torch.Tensor]:
    return {name: weight.detach() for name, weight in named_parameters(stage)}


@pytest.mark.parametrize("overrides", [["model.lora.rank=2"], MLA], ids=["adapted", "latents"])
def test_tensors_have_the_same_names_and_layers_the_same_numbers(overrides: Sequence[str]) -> None:
    gpt, hybrid = stages(*overrides)
    assert entries(gpt) == entries(hybrid)
    theirs = weights(gpt)
    assert all(torch.equal(weight, theirs[name]) for name, weight in weights(hybrid).items())
    names = {name for name, _, _ in entries(hybrid)}
    assert {"decoder.final_layernorm.weight", "decoder.layers.3.mlp.router.weight"} <= names
    attention = [m.layer_number for m in hybrid.modules() if isinstance(m, BlockDiffusionCoreAttention)]
    assert attention == [layer.layer_number for layer in layers_of(hybrid)] == [1, 2, 3, 4]


def test_the_pattern_has_the_dense_layers_first_and_a_bar_between_stages() -> None:
    assert pattern([4], dense_layers=1) == "*-*E*E*E"
    assert pattern([0, 1, 2], dense_layers=2) == "|*-|*-*E"
    assert pattern([1, 1], dense_layers=0) == "*E|*E"
