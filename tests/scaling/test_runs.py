"""Points come from the ends of runs that may be compared; `llada fit` says, writes and draws what follows."""

import json
import re
import shutil
from pathlib import Path

import pytest

from llada_megatron import cli
from llada_megatron.config.compose import load, save
from llada_megatron.config.errors import BadInput
from llada_megatron.config.parameters import active_parameters, total_parameters
from llada_megatron.scaling.laws import DLCM
from llada_megatron.scaling.points import Counting, read_runs, remarks_on
from tests.scaling.ladder import chinchilla, make_dlcm_ladder, make_dlcm_run, make_ladder, make_run

OLD = Path(__file__).parents[1] / "old_run" / "run"


def test_a_ladder_of_runs_predicts_a_larger_one(tmp_path, capsys):
    larger = make_run(tmp_path / "larger", 256, 2**23)
    output, picture = tmp_path / "law.json", tmp_path / "law.png"
    command = ["fit", *map(str, make_ladder(tmp_path / "ladder")), "--hold-out", str(larger)]
    assert cli.main([*command, "--bootstrap", "30", "--json", str(output), "--plot", str(picture)]) == 0
    found = json.loads(output.read_text())
    assert found["loss"] == "ar" and len(found["points"]) == 9
    assert found["parameters"]["alpha"]["value"] == pytest.approx(0.4, abs=0.02)
    (held_out,) = found["held_out"]
    assert held_out["N"] == total_parameters(load(larger / "config.yaml").model)
    assert held_out["predicted"] == pytest.approx(held_out["loss"], rel=2e-3)
    assert [round(one["times_largest"]) for one in found["optima"]] == [1, 10, 100]
    printed = capsys.readouterr().out
    assert "Held out" in printed and "What a budget buys" in printed
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_what_training_recorded_gives_a_point_once_it_has_ended(tmp_path):
    with pytest.raises(BadInput, match="no evaluation at the end of its 768 tokens"):
        read_runs([OLD], "", Counting())
    config = load(OLD / "config.yaml")
    config.schedule.stages = config.schedule.stages[:2]
    config.schedule.stages[1].tokens = 128  # where it stopped
    shutil.copyfile(OLD / "evaluations.jsonl", tmp_path / "evaluations.jsonl")
    save(config, tmp_path / "config.yaml")
    _, loss, (point,) = read_runs([tmp_path], "", Counting())
    last = json.loads((OLD / "evaluations.jsonl").read_text().splitlines()[-1])
    assert loss == f"bound:{last['block_size']}"
    assert point.loss == last["bound"][str(last["block_size"])]["mean"] and point.error > 0
    assert point.variables["D"] == last["consumed_tokens"] and point.flops_per_token > 0


REFUSED = {
    "vocabulary": {"record": {"vocab_size": 300}},
    "held-out text": {"record": {"baselines": {"unigram": 3.3, "bigram": 2.5}}},
    "at the end of its 131.1k tokens": {"end": 0.5},
    "no loss ar at its end, but bound:4": {"record": {"ar": None, "bound": {"4": {"mean": 2.0}}}},
}


@pytest.mark.parametrize("said", REFUSED)
def test_a_run_that_must_not_be_compared_is_refused(tmp_path, said):
    runs = [make_run(tmp_path / "first", 32, 2**17), make_run(tmp_path / "other", 64, 2**17, **REFUSED[said])]
    with pytest.raises(BadInput, match=f"other.*{said}"):
        read_runs(runs, "", Counting())


def test_what_makes_runs_less_comparable_is_said(tmp_path):
    first = make_run(tmp_path / "first", 32, 2**17)
    undecayed = make_run(tmp_path / "undecayed", 64, 2**17, lr_at_end=9e-4)
    sparser = make_run(tmp_path / "sparser", 64, 2**18, experts=16)
    *_, points = read_runs([first, undecayed, sparser], "ar", Counting())
    lr, experts = remarks_on(points)
    assert "undecayed: the learning rate ended at 90%" in lr and "differ in experts" in experts


@pytest.mark.slow  # 36 runs read, twelve descents of eleven parameters and a picture
def test_a_ladder_of_dlcm_predicts_another_run_and_what_budgets_buy(tmp_path, capsys):
    held_out = make_dlcm_run(tmp_path / "held_out", 256, 384, 2**22, R=6)
    output, picture = tmp_path / "law.json", tmp_path / "law.png"
    command = ["fit", *map(str, make_dlcm_ladder(tmp_path / "ladder")), "--hold-out", str(held_out)]
    command += ["--bootstrap", "20", "--shape", "4", "0.5", "--json", str(output), "--plot", str(picture)]
    assert cli.main(command) == 0
    found = json.loads(output.read_text())
    assert found["law"] == "dlcm" and found["loss"] == "ar"
    (held_out,) = found["held_out"]
    assert held_out["predicted"] == pytest.approx(held_out["loss"], rel=2e-3)
    assert [(one["R"], one["P"]) for one in found["optima"]] == [(4, 0.5)] * 3
    assert "lowest loss, R = 4, P = 0.5" in capsys.readouterr().out
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_dlcm_run_has_its_target_and_its_backbones_share(tmp_path):
    run = make_dlcm_run(tmp_path / "run", 64, 128, 2**17, R=4, opened=6)
    law, loss, (point,) = read_runs([run], "", Counting())
    model = load(run / "config.yaml").model
    assert (law, loss, point.variables["R"]) == (DLCM, "ar", 4)
    attention = 3 * 128**2 + 2 * 32  # 4 heads of 32 and half as many of keys and values; norms of a head
    dense, experts = 3 * 128 * 512, 9 * 3 * 128 * 64 + 8 * 128 + 8  # 8 and one that is shared, router, bias
    backbone = 2 * (attention + 2 * 128) + dense + experts + 128  # two layers and the last norm
    assert point.variables["P"] == pytest.approx(backbone / total_parameters(model), rel=1e-9)
    in_training, on_text = remarks_on([point])
    assert "its concepts ended 6.0 tokens long, and the law takes R = 4" in in_training
    assert "On held-out text concepts are 1.5 to 1.5 times as long as R" in on_text
    (other,) = read_runs([run], "", Counting(active=True, embedding=False))[2]
    idle = total_parameters(model) - active_parameters(model)
    counted = [p.variables["N"] * p.variables["P"] for p in (point, other)]
    assert counted[0] - counted[1] == pytest.approx(idle) and idle > 0


def test_a_law_of_dlcm_takes_no_plain_baseline(tmp_path):
    runs = [make_dlcm_run(tmp_path / "dlcm", 64, 128, 2**17, R=4), make_run(tmp_path / "plain", 64, 2**17)]
    with pytest.raises(BadInput, match=r"plain differs from .*dlcm in its family.* in N, D, R, P alone"):
        read_runs(runs, "ar", Counting())


def test_parameters_are_counted_as_asked(tmp_path):
    model = load(make_run(tmp_path / "run", 64, 2**17) / "config.yaml").model
    tables = 2 * model.vocab_size * model.hidden_size
    assert Counting()(model) - Counting(embedding=False)(model) == tables
    assert Counting(active=True)(model) < Counting()(model)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ({"N": 1e8, "D": 2e9}, "line 2 of .* has no loss"),
        ({"N": -1, "D": 2e9, "loss": 3.0}, "has -1 as N"),
        ({"N": 1e8, "D": 2e9, "R": 4, "loss": 3.0}, "line 1 of .* has no P"),
        ({"N": 1e300, "D": 2e9, "loss": 3.0}, r"has 1e\+300 as N"),
        (
            {"N": 1e8, "D": 2e9, "P": 0.5, "loss": 3.0},
            "line 2 of .* has P, and the lines before have none",
        ),
        ({"N": 1e8, "D": 2e9, "loss": 3.0, "heldout": True}, "line 2 of .* has 'heldout'"),
        ({"N": 1e8, "D": 2e9, "loss": 3.0, "held_out": "yes"}, "line 2 of .* has held_out='yes'"),
        ('{"N": 1e8', "line 2 of .* holds no JSON object"),
    ],
)
def test_a_line_that_is_no_point_is_refused(tmp_path, capsys, line, said):
    file = tmp_path / "points.jsonl"
    lines = [{"N": 1e7, "D": 2e8, "loss": chinchilla(1e7, 2e8)}, line]
    lines = lines[:: -1 if "R" in line else 1]
    file.write_text("".join((each if isinstance(each, str) else json.dumps(each)) + "\n" for each in lines))
    assert cli.main(["fit", "--points", str(file)]) == 2
    assert re.search(said, capsys.readouterr().err)
