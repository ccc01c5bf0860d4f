"""A router that sends everything to one rank's experts: it is seen, said once, and kept within a bound."""

from pathlib import Path
from typing import Any

import pytest

from llada_megatron.config import rules
from llada_megatron.config.schema import Config
from llada_megatron.record import events
from tests.distributed import run_ranks
from tests.training.runs import TWO, configure, records

EP2 = [
    TWO,
    "layout.ep=2",
    "schedule.stages=[{name: bdlm_4, block_size: '4', tokens: 1024}]",
    "training.steps=2",
]


def favour(trainer: Any, experts: int) -> None:
    """Let every token choose among the first experts."""
    for router in trainer.balance.routers:
        router.expert_bias[:experts] = 100.0


def steps_of(cases: list[tuple[Config, int]]) -> list[list[dict[str, Any]]]:
    """Two steps of each configuration whose routers favour so many experts."""
    from llada_megatron.parallel import groups
    from llada_megatron.training.expert_rows import RowsAlarm
    from llada_megatron.training.loop import build_trainer
    from llada_megatron.training.step import pass_sizes, train_step

    found = []
    for config, favoured in cases:
        groups.initialize(config.layout)
        trainer = build_trainer(config, rules.schedule_of(config))
        favour(trainer, favoured)
        mean = trainer.rows.mean(pass_sizes(trainer.schedule.stages[0]))
        alarm = RowsAlarm(config.training.expert_rows_alarm)
        steps = []
        for step in range(2):
            result = train_step(trainer, step)
            raised = alarm.raised(trainer.rows, result.expert_rows_max_over_mean, step)
            steps.append(
                {
                    "numbers": (result.loss, result.grad_norm, result.load_max_over_mean),
                    "peak": result.expert_rows_max_over_mean,
                    "dropped": result.expert_rows_dropped,
                    "here": {layer: most / mean for layer, most in trainer.rows.most.items()},
                    "mean": mean,
                    "alarm": raised and raised[1],
                }
            )
        found.append(steps)
        groups.destroy()
    return found


def in_each_rank(corpus: str, tmp_path: Path, favoured: int, *overrides: list[str]) -> list[Any]:
    """For each set of overrides the two steps of rank 0, and of the last rank."""
    cases = [(configure(corpus, tmp_path, *each), favoured) for each in overrides]
    ranks = run_ranks(steps_of, cases, processes=cases[0][0].layout.processes)
    return list(zip(ranks[0], ranks[-1], strict=True))


def test_a_hot_rank_is_seen_and_said_once(corpus, tmp_path):
    experts = configure(corpus, tmp_path, *EP2).model.experts
    alarmed = [*EP2, "training.expert_rows_alarm=1.5", "layout.micro_batch=2"]
    (first, last), (said, heard) = in_each_rank(corpus, tmp_path, experts // 2, EP2, alarmed)
    for step in (0, 1):
        assert set(first[step]["here"].values()) == {2.0}  # all rows of two ranks
        assert set(last[step]["here"].values()) == {0.0}
        assert first[step]["peak"] == last[step]["peak"] == 2.0
        assert first[step]["dropped"] is None
    assert first[0]["alarm"] is first[1]["alarm"] is None  # the default alarm is passed above 2, not at it
    assert said[0]["alarm"] == heard[0]["alarm"]
    assert said[0]["alarm"]["rank"] == 0
    assert said[0]["alarm"]["rows"] == 2 * said[0]["mean"]
    assert said[1]["alarm"] is heard[1]["alarm"] is None


def test_the_cap_bounds_rows_and_drops_what_is_beyond(corpus, tmp_path):
    experts = configure(corpus, tmp_path, *EP2).model.experts
    capped = [*EP2, "model.router.rows_cap=1.25"]
    results = in_each_rank(
        corpus, tmp_path, experts // 2, capped, [*capped, "layout.dispatcher=allgather"], EP2
    )
    (a, _), (b, _), (free, _) = results
    for step in (*a, *b):
        assert set(step["here"].values()) == {1.25}
        assert step["peak"] == 1.25
        assert step["dropped"] == 1 - 1.25 / 2
    assert a[0]["numbers"][0] == pytest.approx(b[0]["numbers"][0], rel=1e-6)
    assert a[0]["numbers"][0] != free[0]["numbers"][0]
    assert a[0]["numbers"][2] == free[0]["numbers"][2]  # the balance sees what wanted to come


def test_a_cap_that_does_not_bind_changes_no_bit(corpus, tmp_path):
    [(free, _), (capped, _)] = in_each_rank(corpus, tmp_path, 0, EP2, [*EP2, "model.router.rows_cap=1.9"])
    assert max(step["peak"] for step in free) < 1.9
    assert [step["numbers"] for step in capped] == [step["numbers"] for step in free]
    assert [step["dropped"] for step in capped] == [0.0, 0.0]


@pytest.mark.slow
def test_recompute_drops_the_same_and_counts_it_once(corpus, tmp_path):
    capped = [*EP2, "model.router.rows_cap=1.25"]
    modules = ["layout.recompute=selective", "layout.recompute_modules=[moe]"]
    results = in_each_rank(
        corpus, tmp_path, 8, capped, [*capped, *modules], [*capped, "layout.recompute=full"]
    )
    expected = results[0][0]
    for first, _ in results[1:]:
        assert [step["numbers"] for step in first] == [step["numbers"] for step in expected]
        assert [step["dropped"] for step in first] == [step["dropped"] for step in expected]


def run_rigged(config: Config) -> None:
    from llada_megatron.training import loop

    build = loop.assemble

    def rigged(*given: Any) -> Any:
        trainer = build(*given)
        favour(trainer, config.model.experts // 2)
        return trainer

    loop.assemble = rigged
    loop.run(config)


@pytest.mark.slow
def test_a_run_records_the_peak_of_every_step_and_one_event(corpus, tmp_path):
    config = configure(corpus, tmp_path, *EP2, "training.expert_rows_alarm=1.5")
    run_ranks(run_rigged, config, processes=2)
    assert [record["expert_rows_max_over_mean"] for record in records(tmp_path)] == [2.0, 2.0]
    assert [record["expert_rows_dropped"] for record in records(tmp_path)] == [None, None]
    [event] = [each for each in events.read(tmp_path) if each["event"] == "hot_experts"]
    assert (event["step"], event["rank"], event["over_mean"]) == (0, 0, 2.0)


def test_without_experts_there_is_nothing_to_see(corpus, tmp_path):
    config = configure(corpus, tmp_path, "model.dense_layers=4")
    [[steps]] = run_ranks(steps_of, [(config, 0)])
    assert [(step["peak"], step["dropped"], step["alarm"]) for step in steps] == [(None, None, None)] * 2


SHARED = {
    "experts cut, all here": (["layout.tp=2", "layout.etp=2"], 1.0),
    "beside tensor parallelism": (["layout.tp=2", "layout.ep=2"], 2.0),
    "beside context parallelism": (["layout.cp=2", "layout.ep=2", "layout.micro_batch=2"], 2.0),
    "gathered tokens": (["layout.ep=2", "layout.dispatcher=allgather"], 2.0),
}


@pytest.mark.slow
def test_the_mean_is_that_of_every_way_to_share_experts(corpus, tmp_path):
    overrides = [[TWO, *EP2[2:], *layout] for layout, _ in SHARED.values()]
    for (first, last), (name, (_, peak)) in zip(
        in_each_rank(corpus, tmp_path, 4, *overrides), SHARED.items(), strict=True
    ):
        assert [step["peak"] for step in (*first, *last)] == [peak] * 4, name
