"""Properties of the built model: size, initial weights, the head, and who can influence whom."""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from llada_megatron.attention import BlockDiffusionMask
from llada_megatron.attention.context import ContextShard
from llada_megatron.config.compose import compose
from llada_megatron.config.errors import BadInput
from llada_megatron.config.schema import Config, ModelConfig
from llada_megatron.model import initialize, specs
from llada_megatron.model.gpt import BlockDiffusionGPT
from llada_megatron.model.inputs import ModelInputs
from llada_megatron.model.normal import counter_normal
from llada_megatron.model.provider import build_model, build_stage
from llada_megatron.model.readout import CROSS_ENTROPY, LOGITS
from llada_megatron.parallel import groups

# isort: split
from megatron.core.dist_checkpointing.mapping import ShardedTensor  # after the seam of the imports above
from megatron.core.utils import get_attr_wrapped_model

L = 24
CHANGED = 1e-3
"""Smaller than any real influence at `BOLD_STD`, larger than what another order of summation changes."""
SAME = 1e-5
BOLD_STD = 0.2
STANDARD_ERRORS = 5


@pytest.fixture(scope="module")
def config() -> Iterator[Config]:
    composed = compose(["experiment=parity", "model=tiny"])
    groups.initialize(composed.layout)
    yield composed
    groups.destroy()


@pytest.fixture(scope="module")
def stage(config: Config) -> BlockDiffusionGPT:
    """With weights so large that every input shows in every output that depends on it."""
    return build_stage(replace(config, model=replace(config.model, init_std=BOLD_STD)))


def random_tokens(config: Config, count: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(config.model.mask_token_id, (count,), generator=torch.Generator().manual_seed(seed))


def model_inputs(tokens_BS: torch.Tensor, mask: BlockDiffusionMask, **chosen: Any) -> ModelInputs:
    positions = torch.arange(mask.length)[None]
    return ModelInputs(
        tokens=tokens_BS,
        positions=torch.cat([positions, positions], dim=1) if mask.clean_copy else positions,
        keys=ContextShard(mask),
        **({"outputs": torch.arange(tokens_BS.numel()), "readout": LOGITS} | chosen),
    )


@torch.no_grad()
def logits(stage: BlockDiffusionGPT, tokens_S: torch.Tensor, mask: BlockDiffusionMask) -> torch.Tensor:
    return stage(model_inputs(tokens_S[None], mask))


def one_document(block_size: int, **options: Any) -> BlockDiffusionMask:
    return BlockDiffusionMask([torch.tensor([0, L])], block_size, **options)


# Size


@pytest.mark.parametrize(
    ("model", "parameters"),
    [
        ("llada2_mini", 16_255_643_392),
        ("llada2_flash", 102_889_705_216),
        pytest.param("qwen3_30b_a3b", 30_532_122_624, marks=pytest.mark.slow),
        pytest.param("dream_7b", 7_615_616_512, marks=pytest.mark.slow),
    ],
)
def test_parameters_and_expert_biases_add_up_to_the_published_model(
    config: Config, model: str, parameters: int
) -> None:
    with FakeTensorMode():
        stage = build_stage(compose(["experiment=parity", f"model={model}"]), initialize=False)
    biases = [buffer for name, buffer in stage.named_buffers() if name.endswith("expert_bias")]
    assert sum(tensor.numel() for tensor in [*stage.parameters(), *biases]) == parameters


# Rotary


def test_bf16_rotates_by_the_same_angles_as_fp32(config: Config) -> None:
    positions = torch.arange(4096)[None]
    angles = []
    for precision in ("fp32", "bf16"):
        (stage,) = build_model(compose(["experiment=parity", f"precision={precision}"]), initialize=False)
        rotary = get_attr_wrapped_model(stage, "rotary_pos_emb")
        angles.append(rotary(positions))
    assert torch.equal(*angles)


# Initial weights


def is_norm(name: str) -> bool:
    return "norm" in name


def test_the_same_seed_builds_the_same_weights_and_another_seed_changes_every_matrix(config: Config) -> None:
    first, again, other = (
        dict(build_stage(replace(config, run=replace(config.run, seed=seed))).named_parameters())
        for seed in (1, 1, 2)
    )
    for name, weight in first.items():
        assert torch.equal(weight, again[name]), name
        if not is_norm(name):
            assert (weight != other[name]).float().mean() > 0.99, name


def test_no_two_matrices_are_alike(config: Config) -> None:
    rows = [
        tuple(parameter.flatten()[:8].tolist())
        for name, parameter in build_stage(config).named_parameters()
        if not is_norm(name)
    ]
    assert len(set(rows)) == len(rows)


def test_initial_weights_have_the_standard_deviation_that_was_asked(config: Config) -> None:
    std, layers = 0.03, config.model.layers
    asked = replace(config, model=replace(config.model, init_std=std))
    for name, weight in build_stage(asked).named_parameters():
        if is_norm(name):
            assert (weight == 1).all(), name
            continue
        into_residual = name.endswith(("linear_proj.weight", "linear_fc2.weight"))
        expected = std / math.sqrt(2 * layers) if into_residual else std
        assert weight.std().item() == pytest.approx(
            expected, rel=STANDARD_ERRORS / math.sqrt(2 * weight.numel())
        ), name
        assert abs(weight.mean().item()) < STANDARD_ERRORS * expected / math.sqrt(weight.numel()), name


def test_expert_biases_start_at_zero(config: Config) -> None:
    biases = {n: buffer for n, buffer in build_stage(config).named_buffers() if n.endswith("expert_bias")}
    assert len(biases) == config.model.layers - config.model.dense_layers
    assert all((bias == 0).all() for bias in biases.values())


def test_a_parameter_without_an_entry_in_the_sharded_state_is_an_error(config: Config) -> None:
    stage = build_stage(config, initialize=False)
    core_attention = stage.decoder.layers[1].self_attention.core_attention
    core_attention.register_parameter("sink", torch.nn.Parameter(torch.zeros(2)))
    with pytest.raises(RuntimeError, match=r"layers\.1\.self_attention\.core_attention\.sink"):
        initialize.initialize_weights(stage, seed=1, std=0.02, layers=4)


def test_counter_normal_has_the_moments_of_a_standard_normal() -> None:
    n = 1 << 20
    x = counter_normal(torch.arange(n), seed=7, name="decoder.weight")
    assert abs(x.mean()) < STANDARD_ERRORS / math.sqrt(n)
    assert abs(x.std() - 1) < STANDARD_ERRORS / math.sqrt(2 * n)
    assert abs((x**3).mean()) < STANDARD_ERRORS * math.sqrt(15 / n)
    assert abs((x**4).mean() - 3) < STANDARD_ERRORS * math.sqrt(96 / n)  # Var(x^4) = 105 - 9
    beyond = (x.abs() > 4).double().mean()
    expected = math.erfc(4 / math.sqrt(2))
    assert abs(beyond - expected) < STANDARD_ERRORS * math.sqrt(expected / n)


@pytest.mark.parametrize("other", ["next index", "other name", "other seed"])
def test_counter_normal_is_uncorrelated_with(other: str) -> None:
    index = torch.arange(1 << 18)
    x = counter_normal(index, seed=7, name="a")
    y = {
        "next index": counter_normal(index + 1, seed=7, name="a"),
        "other name": counter_normal(index, seed=7, name="b"),
        "other seed": counter_normal(index, seed=8, name="a"),
    }[other]
    assert abs((x * y).mean()) < STANDARD_ERRORS / math.sqrt(len(index))


@pytest.mark.parametrize("elements_per_call", [1 << 21, 10], ids=["one_call", "row_by_row"])
@pytest.mark.parametrize(
    ("shape", "axis", "own_axes"),
    [
        ((12, 6), 0, 0),
        ((12, 6), 1, 0),
        ((12,), 0, 0),
        ((4, 6, 8), 2, 0),
        ((4, 6, 8), 0, 1),
        ((4, 6, 8), 1, 1),
    ],
)
def test_a_shard_holds_its_slice_of_the_whole_tensor(
    shape: tuple[int, ...], axis: int, own_axes: int, elements_per_call: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(initialize, "ELEMENTS_PER_CALL", elements_per_call)

    def filled(data: torch.Tensor, *offsets: tuple[int, int, int]) -> torch.Tensor:
        shard = ShardedTensor.from_rank_offsets("weight", data, *offsets, prepend_axis_num=own_axes)
        initialize._fill_normal(shard, seed=3, std=0.5)
        return data

    index = torch.arange(math.prod(shape)).view(shape)
    whole = (0.5 * counter_normal(index, seed=3, name="weight")).float()
    experts = range(shape[0]) if own_axes else [None]
    for expert in experts:
        of_expert = whole if expert is None else whole[expert]
        local_axis = axis - own_axes
        parts = of_expert.chunk(2, dim=local_axis) if local_axis >= 0 else [of_expert]
        for rank, part in enumerate(parts):
            offsets = [] if expert is None else [(0, expert, shape[0])]
            offsets += [(axis, rank, len(parts))] if local_axis >= 0 else []
            assert torch.equal(filled(torch.empty_like(part), *offsets), part)


# The output head


def loss_and_gradients(stage: BlockDiffusionGPT, loss: torch.Tensor) -> tuple[float, dict[str, torch.Tensor]]:
    stage.zero_grad(set_to_none=True)
    loss.backward()
    return loss.item(), {name: parameter.grad for name, parameter in stage.named_parameters()}


def assert_same(ours: tuple[float, dict], expected: tuple[float, dict]) -> None:
    assert ours[0] == pytest.approx(expected[0], rel=1e-6)
    for name, gradient in expected[1].items():
        assert (ours[1][name] - gradient).norm() <= 1e-5 * gradient.norm(), name


@pytest.mark.parametrize("chunk_tokens", [1000, 7, 1])
def test_the_head_on_chosen_rows_in_chunks_equals_full_logits_in_loss_and_gradient(
    config: Config, stage: BlockDiffusionGPT, chunk_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage, "head_chunk_tokens", chunk_tokens)
    B = 2
    mask = BlockDiffusionMask([torch.tensor([0, L]), torch.tensor([0, 5, L])], block_size=8)
    tokens = random_tokens(config, B * 2 * L).view(B, 2 * L)
    chosen = torch.randperm(2 * L * B, generator=torch.Generator().manual_seed(1))[:31]
    labels, weights = (
        random_tokens(config, 31, seed=2),
        torch.rand(31, generator=torch.Generator().manual_seed(3)),
    )

    every_row = stage(model_inputs(tokens, mask)).view(2 * L * B, -1)
    full = F.cross_entropy(every_row[chosen], labels, reduction="none")
    expected = loss_and_gradients(stage, (full * weights).sum())
    inputs = model_inputs(tokens, mask, outputs=chosen, labels=labels, readout=CROSS_ENTROPY)
    few = stage(inputs)
    assert_same(loss_and_gradients(stage, (few * weights).sum()), expected)


def test_rows_of_the_head_are_flattened_position_first(config: Config, stage: BlockDiffusionGPT) -> None:
    mask = BlockDiffusionMask([torch.tensor([0, L])] * 2, L, clean_copy=False)
    tokens = random_tokens(config, 2 * L).view(2, L)
    with torch.no_grad():
        both = stage(model_inputs(tokens, mask)).view(L, 2, -1)
    for b in range(2):
        alone = logits(stage, tokens[b], one_document(L, clean_copy=False))
        torch.testing.assert_close(both[:, b], alone, atol=SAME, rtol=0)


def test_without_any_chosen_row_the_loss_is_zero_and_has_gradients(
    config: Config, stage: BlockDiffusionGPT
) -> None:
    none = torch.zeros(0, dtype=torch.int64)
    chosen = {"outputs": none, "labels": none, "readout": CROSS_ENTROPY}
    inputs = model_inputs(random_tokens(config, 2 * L)[None], one_document(8), **chosen)
    loss, gradients = loss_and_gradients(stage, stage(inputs).sum())
    assert loss == 0
    assert all(gradient is not None and (gradient == 0).all() for gradient in gradients.values())


# Who can influence whom


def influenced(
    stage: BlockDiffusionGPT, tokens: torch.Tensor, where: slice, mask: BlockDiffusionMask
) -> torch.Tensor:
    """bool [S]: rows whose logits change when other tokens stand at `where`."""
    changed = tokens.clone()
    changed[where] = (changed[where] + 17) % 400
    difference = (logits(stage, tokens, mask) - logits(stage, changed, mask)).abs().amax(-1)
    assert not ((difference > SAME) & (difference < CHANGED)).any(), "neither the same nor changed"
    return difference > SAME


@pytest.mark.parametrize("block_size", [1, 4, 8])
def test_x_t_of_a_block_sees_x_0_of_earlier_blocks_alone(
    config: Config, stage: BlockDiffusionGPT, block_size: int
) -> None:
    tokens, mask = random_tokens(config, 2 * L), one_document(block_size)
    for start in (0, 8, L - block_size):
        stop = start + block_size
        of_clean = influenced(stage, tokens, slice(L + start, L + stop), mask)
        assert not of_clean[:stop].any()  # x_t of blocks <= k
        assert of_clean[stop:L].all()  # x_t of blocks > k
        assert not of_clean[L : L + start].any() and of_clean[L + start :].all()
        of_noisy = influenced(stage, tokens, slice(start, stop), mask)
        assert of_noisy[start:stop].all() and of_noisy.sum() == block_size


@pytest.mark.parametrize("block_grid", ["sequence", "document"])
@pytest.mark.parametrize(("block_size", "clean_copy"), [(4, True), (16, True), (L, False)])
def test_changing_document_a_leaves_document_b_unchanged(
    config: Config, stage: BlockDiffusionGPT, block_size: int, clean_copy: bool, block_grid: str
) -> None:
    cut = 10
    mask = BlockDiffusionMask(
        [torch.tensor([0, cut, L])], block_size, block_grid=block_grid, clean_copy=clean_copy
    )
    halves = [0, L] if clean_copy else [0]
    tokens = random_tokens(config, len(halves) * L)
    for a, b in ((slice(0, cut), slice(cut, L)), (slice(cut, L), slice(0, cut))):
        for half in halves:
            rows = influenced(stage, tokens, slice(half + a.start, half + a.stop), mask).view(len(halves), L)
            assert not rows[:, b].any() and rows[:, a].any()


def test_one_block_over_the_sequence_is_masked_diffusion_without_a_clean_copy(
    config: Config, stage: BlockDiffusionGPT
) -> None:
    tokens = random_tokens(config, 2 * L)
    with_copy = logits(stage, tokens, one_document(L))[:L]
    torch.testing.assert_close(
        with_copy, logits(stage, tokens[:L], one_document(L, clean_copy=False)), atol=SAME, rtol=0
    )


# Layer specs


def test_auto_takes_transformer_engine_on_cuda_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for cuda, installed, expected in (
        (True, True, "transformer_engine"),
        (True, False, "local"),
        (False, True, "local"),
    ):
        monkeypatch.setattr(specs.device, "on_cuda", lambda cuda=cuda: cuda)
        monkeypatch.setattr(
            specs.importlib.util, "find_spec", lambda name, found=installed: name if found else None
        )
        assert specs.resolve_layer_spec(ModelConfig(layer_spec="auto")) == expected


def test_a_layer_spec_that_cannot_be_served_is_an_error_that_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(specs.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BadInput, match="layer_spec=transformer_engine needs the package"):
        specs.resolve_layer_spec(ModelConfig(layer_spec="transformer_engine"))
