from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from llada_megatron.attention.intervals import endpoints, endpoints_on
from llada_megatron.attention.mask import block_starts
from llada_megatron.config.choices import BadSamples
from llada_megatron.config.compose import compose
from llada_megatron.config.errors import BadInput
from llada_megatron.config.flops import supervised_per_sequence
from llada_megatron.config.rules import schedule_of
from llada_megatron.config.schema import BlockGrid, DiffusionConfig, RatePer
from llada_megatron.data.packed import BadSample, PackedSample
from llada_megatron.objectives.autoregressive import autoregressive_batch
from llada_megatron.objectives.batch import flat_outputs, read_sample
from llada_megatron.objectives.corruption import corrupt
from llada_megatron.objectives.diffusion import POSITION_BINS, RATE_BINS, Diffusion
from llada_megatron.objectives.registry import objective_of

L, MASK, SEED = 128, 257, 3
STAGES = {stage.name: stage for stage in schedule_of(compose(["experiment=parity"])).stages}
CUTS = [[0, 5, 77, L], [0, L], [0, 1, 2, 64, L], [0, 127, L]]
SAMPLES = [
    PackedSample(np.random.default_rng(index).integers(0, 256, L), np.array(cuts, dtype=np.int32))
    for index, cuts in enumerate(CUTS)
]
INDICES = [8, 9, 10, 11]
BOTH_STAGES = pytest.mark.parametrize("stage", [STAGES["bdlm_4"], STAGES["mdlm"]], ids=lambda s: s.name)


def batch_of(chosen, stage, diffusion=None, noise_sigma=0.0):
    config = compose(["experiment=parity", f"run.seed={SEED}", f"model.mask_token_id={MASK}"])
    config.diffusion = diffusion or DiffusionConfig(t_per=RatePer.block)
    objective = Diffusion("diffusion", config, schedule_of(config))
    data = {INDICES[index]: SAMPLES[index] for index in range(4)}
    return objective.batch(data, [INDICES[index] for index in chosen], stage, noise_sigma=noise_sigma)


@BOTH_STAGES
def test_a_sample_is_corrupted_alike_in_any_micro_batch_and_order(stage):
    together = batch_of([2, 0, 3, 1], stage, noise_sigma=0.5)
    for row, index in enumerate([2, 0, 3, 1]):
        alone = batch_of([index], stage, noise_sigma=0.5)
        mine = together.inputs.outputs % 4 == row
        assert torch.equal(together.inputs.tokens[row], alone.inputs.tokens[0])
        assert torch.equal(together.inputs.outputs[mine] // 4, alone.inputs.outputs)
        assert torch.equal(together.inputs.labels[mine], alone.inputs.labels)
        assert together.rows.keys() == alone.rows.keys()
        assert all(torch.equal(rows[mine], alone.rows[name]) for name, rows in together.rows.items())
        assert together.digest(row) == alone.digest(0)
        assert together.inputs.noise.seeds[row] == alone.inputs.noise.seeds[0]
        assert torch.equal(together.inputs.noise.rows[row], alone.inputs.noise.rows[0])


@BOTH_STAGES
def test_a_packed_batch_is_the_same_batch_in_one_piece_of_memory(stage):
    plain, packed = (batch_of(range(4), stage, noise_sigma=0.5) for _ in range(2))
    packed = packed.packed()
    keys, found = packed.inputs.keys, tensors_of(packed)
    memory = packed.memory.untyped_storage().data_ptr()
    assert all(tensor.untyped_storage().data_ptr() == memory for tensor in found)
    assert endpoints_on(keys.rectangle, torch.device("cpu")) is keys.endpoints
    assert np.array_equal(keys.endpoints, endpoints(plain.inputs.keys.rectangle))
    others = [tensor for tensor in found if tensor is not keys.endpoints]
    for ours, theirs in zip(others, tensors_of(plain), strict=True):
        assert torch.equal(ours, theirs) and ours.dtype == theirs.dtype


def tensors_of(batch):
    found = []
    batch.map(lambda tensor: (found.append(tensor), tensor)[1])
    return found


def test_a_stage_may_have_mask_rates_of_its_own():
    stages = (
        "schedule.stages=[{name: a, block_size: '4', tokens: 1024, mask_rate_min: 0.3, mask_rate_max: 0.4},"
        " {name: b, block_size: '8', tokens: 512, mask_rate_min: 0.7}, {name: c, block_size: '8', tokens: 1}]"
    )
    config = compose(["experiment=parity", stages, "diffusion.mask_rate_max=0.8"])
    schedule = schedule_of(config)
    objective = Diffusion("diffusion", config, schedule)
    data = {index: SAMPLES[1] for index in range(100)}
    ranges = [(0.3, 0.4), (0.7, 0.8), (0.001, 0.8)]
    for stage, (low, high) in zip(schedule.stages, ranges, strict=True):
        rates = 1 / objective.batch(data, list(range(100)), stage).rows["weights"]
        assert low <= rates.min() < low + 0.02 and high - 0.01 < rates.max() <= high + 1e-6
        assert supervised_per_sequence(config, stage) == pytest.approx(L * (low + high) / 2)


@BOTH_STAGES
def test_the_noisy_half_is_masked_where_outputs_are_and_the_clean_half_is_clean(stage):
    batch = batch_of(range(4), stage, noise_sigma=0.5)
    clean = torch.from_numpy(np.stack([sample.tokens for sample in SAMPLES]))
    tokens = batch.inputs.tokens
    assert tokens.shape == (4, 2 * L if stage.clean_copy else L)
    masked = tokens[:, :L] == MASK
    assert torch.equal(torch.where(masked, clean, tokens[:, :L]), clean)
    assert torch.equal(tokens[:, L:], clean[:, : tokens.shape[1] - L])
    diffusion = DiffusionConfig(t_per=RatePer.block)
    expected = [
        corrupt(SEED, index, sample.cu_seqlens, stage.block_size, diffusion).masked
        for index, sample in zip(INDICES, SAMPLES, strict=True)
    ]
    assert np.array_equal(masked, np.stack(expected))
    # Hidden states are [S, B, H]: outputs index them flattened over S and B.
    assert (tokens.T.flatten()[batch.inputs.outputs] == MASK).all()
    padded = torch.zeros_like(tokens)
    padded[:, :L] = clean
    assert torch.equal(padded.T.flatten()[batch.inputs.outputs], batch.inputs.labels)
    assert len(batch.inputs.outputs) == int(masked.sum()) == len(batch.rows["weights"])
    for rows, of_sample in zip(batch.inputs.noise.rows, masked, strict=True):
        assert torch.equal(rows, of_sample.nonzero()[:, 0])
    positions = torch.arange(L).repeat(tokens.shape[1] // L)
    assert torch.equal(batch.inputs.positions, positions[None])
    assert (
        batch.inputs.keys.mask.total == tokens.shape[1]
        and batch.inputs.keys.mask.block_size == stage.block_size
    )


@BOTH_STAGES
def test_weights_bins_and_count_belong_to_the_masked_positions(stage):
    diffusion = DiffusionConfig(t_per=RatePer.block)
    batch = batch_of(range(4), stage, diffusion)
    assert batch.counts == (4 * L,)
    weights, rate_bins, position_bins = [], [], []
    for index, sample in zip(INDICES, SAMPLES, strict=True):
        drawn = corrupt(SEED, index, sample.cu_seqlens, stage.block_size, diffusion)
        starts = block_starts(sample.cu_seqlens, stage.block_size, BlockGrid.sequence)
        for position in np.flatnonzero(drawn.masked):
            weights.append(1 / drawn.rate[position])
            rate_bins.append(min(int(drawn.rate[position] * RATE_BINS), RATE_BINS - 1))
            place = position - starts[position]
            position_bins.append(place * min(stage.block_size, POSITION_BINS) // stage.block_size)
    torch.testing.assert_close(batch.rows["weights"], torch.tensor(weights, dtype=torch.float32))
    assert batch.rows["loss_by_t"].tolist() == rate_bins
    assert batch.rows["loss_by_block_position"].tolist() == position_bins
    assert max(position_bins) < min(stage.block_size, POSITION_BINS)


def test_without_noise_the_model_gets_none():
    assert batch_of([0], STAGES["bdlm_4"]).inputs.noise is None


def test_autoregressive_labels_are_the_next_tokens_of_the_same_document():
    batch = autoregressive_batch(SAMPLES)
    pairs = {
        (position, row, int(SAMPLES[row].tokens[position + 1]))
        for row, cuts in enumerate(CUTS)
        for start, stop in pairwise(cuts)
        for position in range(start, stop - 1)
    }
    made = zip(batch.inputs.outputs.tolist(), batch.inputs.labels.tolist(), strict=True)
    assert {(output // 4, output % 4, label) for output, label in made} == pairs
    assert batch.counts[0] == len(batch.rows["weights"]) == len(pairs)
    assert batch.inputs.keys.mask.causal and batch.inputs.keys.mask.block_size == 1


def test_rows_of_samples_become_rows_of_flattened_hidden_states():
    hidden = torch.arange(12).reshape(4, 3)  # [S, B]
    rows = [np.array([0, 3]), np.array([], dtype=np.int64), np.array([1])]
    assert hidden.flatten()[flat_outputs(rows)].tolist() == [0, 9, 5]


def test_a_token_outside_the_vocabulary_is_refused_by_its_setting():
    largest = int(SAMPLES[0].tokens.max())
    assert read_sample(SAMPLES, 0, largest + 1) is SAMPLES[0]
    with pytest.raises(BadInput, match=f"token {largest}, outside model.vocab_size={largest}"):
        read_sample(SAMPLES, 0, largest)
    negative = replace(SAMPLES[0], tokens=SAMPLES[0].tokens - 300, corpus="c", document_ids=np.array([7] * 9))
    with pytest.raises(BadInput, match=r"c: document 7 \(counted from 0\) holds token -"):
        read_sample([negative], 0, 512)


class WithABadOne:
    """SAMPLES, of which one holds the mask token and another an id outside the vocabulary."""

    def __init__(self, mask: int, outside: int) -> None:
        self.samples = [replace(sample, tokens=sample.tokens.copy()) for sample in SAMPLES]
        self.samples[1].tokens[3], self.samples[2].tokens[5] = mask, outside
        self.mask = mask

    def __getitem__(self, index):
        sample = self.samples[index]
        if (sample.tokens == self.mask).any():
            raise BadSample("It holds the mask token.", sample)
        return sample


@pytest.mark.parametrize("denominator", ["tokens", "masked", "sequence", "batch"])
@pytest.mark.parametrize("name", ["autoregressive", "diffusion"])
def test_a_sample_that_is_left_out_supervises_nothing_and_counts_for_nothing(name, denominator):
    settings = ["experiment=parity", f"diffusion.denominator={denominator}", f"data.sequence_length={L}"]
    config = compose([*settings, "training.bad_samples=skip"])
    objective = objective_of(name, config, schedule_of(config))
    data = WithABadOne(config.model.mask_token_id, config.model.vocab_size)
    stage = STAGES["bdlm_4"]
    alone, among = (objective.batch(data, indices, stage) for indices in ([0], [0, 1, 2]))
    assert among.counts == alone.counts and sum(alone.counts) > 0
    assert torch.equal(among.rows["weights"], alone.rows["weights"])
    assert torch.equal(among.inputs.outputs, alone.inputs.outputs * 3)  # of the first sample of three
    clean = among.inputs.tokens[1:, -L:]
    assert int(clean.max()) < config.model.vocab_size and not (clean == config.model.mask_token_id).any()
    assert torch.equal(among.inputs.tokens[1:, :L], clean) and [*objective.left_out] == [1, 2]
    with pytest.raises(BadSample):
        config.training.bad_samples = BadSamples.refuse
        objective.batch(data, [1], stage)
