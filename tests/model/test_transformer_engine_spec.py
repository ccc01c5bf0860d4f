"""The `transformer_engine` layer spec, built without a GPU, writes the checkpoint of the `local` one.

TransformerEngine's and megatron-core's own Python run over a stand-in for the compiled extension. That is
enough for names, shapes, dtypes and weights; nothing is computed with these models.
"""

import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from tests.model import transformer_engine_stand_in
from tests.model.latents import MLA

# Not in site-packages: megatron-core would take it for an installation that can run.
FOLDER = Path(sys.prefix) / "transformer-engine"
pytestmark = pytest.mark.skipif(
    not (FOLDER / "transformer_engine").is_dir(),
    reason="needs TransformerEngine's Python, which `make test` installs",
)

LAYER_SPECS = ("local", "transformer_engine")
SWITCHES = [
    *("precision.fp8=blockwise", "layout.offload_modules=[core_attn,attn_proj,expert_fc1,moe_act,mlp_norm]"),
    *("layout.overlap_shared_experts=true", "training.cuda_graphs=[moe_router,moe_preprocess]"),
]
FROM_TRANSFORMER_ENGINE = ("transformer_engine.", "megatron.core.extensions.transformer_engine.")


@dataclass
class Built:
    """What a process reports of the model that it built."""

    entries: set[tuple[str, tuple[int, ...], str]]
    """(key, global shape, dtype) of every tensor in a checkpoint."""
    weights: dict[str, np.ndarray]
    """The global tensors, fp32, put together from their shards; NaN where no shard holds a value."""
    classes: dict[str, str]
    """Name and class of every module."""
    owners: set[str]
    """Names of the modules that hold parameters."""
    objects: set[str]
    """Keys of what a checkpoint holds besides tensors."""
    fusions: tuple[bool, ...]
    """Of permutation, router and rotary; the head's cross entropy."""


def build_switched(layer_spec: str) -> Built:
    return build(layer_spec, *SWITCHES)


def build_latents(layer_spec: str) -> Built:
    return build(layer_spec, *MLA)


def build_hybrid(layer_spec: str) -> Built:
    return build(layer_spec, "model.core=hybrid")


def build_qwen2(layer_spec: str) -> Built:
    """Qwen2's attention: biases on queries, keys and values, and no norms of heads."""
    return build(layer_spec, "model.qkv_bias=true", "model.qk_norm=false")


def build(layer_spec: str, *switches: str) -> Built:
    """Build `tiny` in a process that has imported neither megatron-core nor TransformerEngine."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the same test on a machine with a GPU
    if layer_spec == "transformer_engine":
        transformer_engine_stand_in.install(FOLDER)
    import torch

    from llada_megatron.config.compose import compose
    from llada_megatron.model.initialize import initialize_weights
    from llada_megatron.model.provider import build_stage
    from llada_megatron.parallel import groups
    from llada_megatron.runtime import device

    # bf16 also shows norms that are kept in another dtype than the parameters'.
    config = compose(
        ["experiment=parity", "model=tiny", "precision=bf16", f"model.layer_spec={layer_spec}", *switches]
    )
    groups.initialize(config.layout)
    # Its modules refuse to be made without CUDA; ours are made on the CPU, which they really have.
    pretend = mock.patch.object(torch.cuda, "is_available", return_value=True)
    ours = mock.patch.object(device, "on_cuda", return_value=False)
    with ours, pretend if layer_spec == "transformer_engine" else nullcontext():
        stage = build_stage(config, initialize=False)
    # Raises when a parameter has no entry in the sharded state.
    initialize_weights(stage, seed=config.run.seed, std=config.model.init_std, layers=config.model.layers)
    weights = {name: tensor for name, tensor in stage.state_dict().items() if "_extra_state" not in name}
    stage.load_state_dict(weights)  # raises when it asks for more than a checkpoint holds
    return report(stage)


def report(stage) -> Built:
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, apply_factories

    from llada_megatron.model.initialize import SHARDING_METADATA

    sharded = stage.sharded_state_dict(metadata=SHARDING_METADATA)
    apply_factories(sharded)
    shards = [value for value in nested_values(sharded) if isinstance(value, ShardedTensor)]
    weights: dict[str, np.ndarray] = {}
    for shard in shards:
        whole = weights.setdefault(shard.key, np.full(shard.global_shape, np.nan, np.float32))
        whole[shard.global_slice()] = shard.data.detach().float().numpy()
    modules = dict(stage.named_modules())
    return Built(
        entries={(shard.key, tuple(shard.global_shape), str(shard.dtype)) for shard in shards},
        weights=weights,
        classes={name: f"{type(m).__module__}.{type(m).__qualname__}" for name, m in modules.items()},
        owners={name for name, m in modules.items() if next(m.parameters(recurse=False), None) is not None},
        objects={value.key for value in nested_values(sharded) if isinstance(value, ShardedObject)},
        fusions=(
            *(
                stage.config.moe_permute_fusion,
                stage.config.moe_router_fusion,
                stage.config.apply_rope_fusion,
            ),
            stage.fuses_cross_entropy,
        ),
    )


@pytest.fixture(scope="module")
def built() -> dict[str, Built]:
    """Each spec in an interpreter of its own: what is imported first decides what megatron-core does."""
    return dict(zip(LAYER_SPECS, in_processes_of_their_own(build, LAYER_SPECS), strict=True))


def in_processes_of_their_own(make, layer_specs):
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(len(layer_specs), context, max_tasks_per_child=1) as pool:
        return list(pool.map(make, layer_specs))


def test_both_layer_specs_write_the_same_keys_shapes_and_dtypes(built: dict[str, Built]) -> None:
    local, transformer_engine = (built[name].entries for name in LAYER_SPECS)
    assert sorted(transformer_engine - local) == sorted(local - transformer_engine) == []
    assert any(key.endswith("mlp.experts.experts.linear_fc1.weight") for key, _, _ in local)


@pytest.mark.slow
def test_both_layer_specs_write_the_same_tensors_of_latent_attention() -> None:
    local, transformer_engine = in_processes_of_their_own(build_latents, LAYER_SPECS)
    assert transformer_engine.entries == local.entries
    for name, weight in local.weights.items():
        np.testing.assert_array_equal(transformer_engine.weights[name], weight, err_msg=name)
    attention = "decoder.layers.0.self_attention"
    assert transformer_engine.classes[attention] == "llada_megatron.model.mla.LatentAttention"
    for name in ("linear_q_down_proj", "linear_kv_up_proj", "kv_layernorm"):
        assert transformer_engine.classes[f"{attention}.{name}"].startswith(FROM_TRANSFORMER_ENGINE)


def test_checkpoints_hold_only_tensors_so_that_either_layer_spec_finds_all_it_asks_for(
    built: dict[str, Built],
) -> None:
    # TransformerEngine's norms keep an `_extra_state` for fp8, the local spec's norms do not.
    assert [built[name].objects for name in LAYER_SPECS] == [set(), set()]


def test_both_layer_specs_start_from_the_same_weights(built: dict[str, Built]) -> None:
    local, transformer_engine = (built[name].weights for name in LAYER_SPECS)
    # Not equal where NaN: every element is also held by some shard.
    different = [key for key in local if not np.array_equal(local[key], transformer_engine.get(key))]
    assert not different


def test_the_layers_are_transformer_engines_and_attention_and_router_ours(built: dict[str, Built]) -> None:
    classes, owners = built["transformer_engine"].classes, built["transformer_engine"].owners
    # The embedding and the head are megatron-core's in either spec.
    layers = {name for name in owners if name.startswith("decoder.") and not name.endswith(".router")}
    assert not [name for name in layers if not classes[name].startswith(FROM_TRANSFORMER_ENGINE)]
    norms = {name.rpartition(".")[2] for name in layers if name.endswith("layernorm")}
    assert norms == {"q_layernorm", "k_layernorm", "pre_mlp_layernorm", "final_layernorm"}
    assert any(name.endswith(".TEGroupedMLP") for name in classes.values())
    attention = {kind for name, kind in classes.items() if name.endswith(".core_attention")}
    assert attention == {"llada_megatron.model.core_attention.BlockDiffusionCoreAttention"}
    routers = {kind for name, kind in classes.items() if name.endswith(".router")}
    assert routers == {"llada_megatron.model.router.BalancedRouter"}


def test_the_local_spec_holds_nothing_of_transformer_engine(built: dict[str, Built]) -> None:
    classes = built["local"].classes.values()
    assert not [kind for kind in classes if kind.startswith(FROM_TRANSFORMER_ENGINE)]


def test_fusions_are_on_where_the_layers_are_transformer_engines(built: dict[str, Built]) -> None:
    assert [built[name].fusions for name in LAYER_SPECS] == [(False,) * 4, (True,) * 4]


@pytest.mark.slow
def test_switches_change_nothing_in_a_checkpoint(built: dict[str, Built]) -> None:
    (switched,) = in_processes_of_their_own(build_switched, ["transformer_engine"])
    assert switched.entries == built["local"].entries
    assert switched.objects == set()


@pytest.mark.slow
def test_a_hybrid_model_has_the_same_layers_and_checkpoint(built: dict[str, Built]) -> None:
    (hybrid,) = in_processes_of_their_own(build_hybrid, ["transformer_engine"])
    gpt = built["transformer_engine"]
    assert hybrid.entries == gpt.entries and hybrid.objects == set()
    assert sorted(map(hybrid.classes.get, hybrid.owners)) == sorted(map(gpt.classes.get, gpt.owners))


@pytest.mark.slow
def test_biases_of_queries_keys_and_values_are_the_same_tensors_in_both() -> None:
    local, engine = in_processes_of_their_own(build_qwen2, LAYER_SPECS)
    assert engine.entries == local.entries and engine.objects == set()
    biases = [key for key, _, _ in engine.entries if key.endswith("self_attention.linear_qkv.bias")]
    assert len(biases) == 4 and not any(key.endswith(".bias") for key in engine.weights if key not in biases)
    assert all(np.array_equal(local.weights[key], engine.weights[key]) for key in local.weights)
    assert not any(engine.weights[key].any() for key in biases)
