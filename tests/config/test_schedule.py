import pytest
from hypothesis import given
from hypothesis import strategies as st

from llada_megatron.config.errors import BadInput
from llada_megatron.config.schedule import Batches, Schedule
from llada_megatron.config.schema import ScheduleConfig, StageConfig

L, GLOBAL_BATCH = 64, 4
TOKENS_PER_STEP = L * GLOBAL_BATCH


def schedule(*stages: StageConfig, batches: Batches = ((0, GLOBAL_BATCH),)) -> Schedule:
    config = ScheduleConfig(stages=list(stages))
    return Schedule(config, sequence_length=L, batches=batches, micro_batch=2)


def stage(name="a", block_size="4", tokens=TOKENS_PER_STEP, **options) -> StageConfig:
    return StageConfig(name=name, block_size=block_size, tokens=tokens, **options)


@given(budgets=st.lists(st.integers(1, 10 * TOKENS_PER_STEP), min_size=1, max_size=5))
def test_stages_tile_the_steps_and_round_their_tokens_up_to_whole_steps(budgets):
    made = schedule(*(stage(name=str(i), tokens=tokens) for i, tokens in enumerate(budgets)))
    ends = [0, *(each.end_step for each in made.stages)]
    for index, (budget, each) in enumerate(zip(budgets, made.stages, strict=True)):
        assert each.first_step == ends[index]
        assert each.tokens == each.steps * TOKENS_PER_STEP
        assert budget <= each.tokens < budget + TOKENS_PER_STEP
        assert all(made.stage_at(step) is each for step in range(each.first_step, each.end_step))
    assert made.total_steps == ends[-1]
    assert made.total_tokens == sum(each.tokens for each in made.stages)
    assert made.stage_at(made.total_steps + 5) is made.stages[-1]


@given(
    budgets=st.lists(st.integers(1, 4000), min_size=1, max_size=4),
    changes=st.lists(st.tuples(st.integers(1, 6), st.integers(1, 17)), max_size=3),
)
def test_whatever_the_global_batch_becomes_every_sample_comes_once_and_in_the_stage_of_its_tokens(
    budgets, changes
):
    batches = [(0, GLOBAL_BATCH)]
    for steps, batch in changes:
        batches.append((batches[-1][0] + steps, batch))
    made = schedule(*(stage(name=str(i), tokens=tokens) for i, tokens in enumerate(budgets)), batches=batches)
    trained, stages, step = [], [], 0  # what a loop over the steps does, one sample after the other
    for index, budget in enumerate(budgets):
        done = 0
        while done < budget:
            batch = [size for first, size in batches if first <= step][-1]
            trained += range(len(trained), len(trained) + batch)
            stages.append(index)
            done, step = done + batch * L, step + 1
        assert made.stages[index].end_step == step and made.stages[index].tokens == done
    assert [made.stage_at(each).index for each in range(step)] == stages
    ranges = [range(made.samples_before(each), made.samples_before(each + 1)) for each in range(step)]
    assert [sample for each in ranges for sample in each] == trained
    assert (made.total_steps, made.total_samples, made.total_tokens) == (step, len(trained), len(trained) * L)


def test_a_clean_copy_is_kept_exactly_while_a_block_is_shorter_than_the_sequence():
    made = schedule(
        stage("ar", "1", objective="autoregressive"),
        stage("one", "1"),
        stage("half", "32"),
        stage("full", "full"),
        stage("number", str(L)),
    )
    assert [each.clean_copy for each in made.stages] == [False, True, True, False, False]
    assert [each.block_size for each in made.stages] == [1, 1, 32, L, L]
    assert [not each.geometry.causal for each in made.stages] == [False, True, True, True, True]
    assert made.first_diffusion_step() == 1


def test_a_stage_may_have_a_micro_batch_of_its_own():
    assert [each.micro_batch for each in schedule(stage("a"), stage("b", micro_batch=4)).stages] == [2, 4]


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([], r"schedule\.stages is empty"),
        ([stage(), stage("b", "5")], r"schedule\.stages\[1\]\.block_size is 5, .*data\.sequence_length=64"),
        ([stage(block_size="128")], r"schedule\.stages\[0\]\.block_size is 128"),
        ([stage(block_size="0")], r"schedule\.stages\[0\]\.block_size is 0"),
        ([stage(block_size="all")], r"schedule\.stages\[0\]\.block_size is 'all'"),
        ([stage(objective="autoregressive")], r"schedule\.stages\[0\]\.block_size is 4"),
        ([stage(objective="difusion")], r"schedule\.stages\[0\]\.objective is difusion: choose from"),
        ([stage("a"), stage("b"), stage("a")], r"schedule\.stages has a name twice"),
    ],
)
def test_a_stage_that_cannot_be_trained_is_refused_by_its_setting(stages, message):
    with pytest.raises(BadInput, match=message):
        schedule(*stages)
