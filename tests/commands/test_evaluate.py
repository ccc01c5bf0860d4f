"""`llada evaluate`: the same figures in any layout, from weights alone; what does not fit is a sentence."""

import json
import shutil
from pathlib import Path

import pytest

from llada_megatron import cli
from llada_megatron.config import compose
from llada_megatron.record.manifest import find
from tests.distributed import run_ranks

OLD = Path(__file__).parents[1] / "old_run"


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[str, str]:
    """A run's directory, and its text as an override."""
    folder = tmp_path_factory.mktemp("evaluate") / "old"
    shutil.copytree(OLD, folder)
    return str(folder / "run"), f"data.path=[{folder}/corpus/text]"


def evaluated(run, tmp_path, *arguments: str) -> dict:
    assert cli.main(["evaluate", *run, "--json", str(tmp_path / "found.json"), *arguments]) == 0
    return json.loads((tmp_path / "found.json").read_text())


@pytest.mark.parametrize("layout", [["layout.pp=2"], pytest.param(["layout.cp=2"], marks=pytest.mark.slow)])
def test_any_layout_gives_the_figures_of_one_process(run, tmp_path, layout):
    options = ["--block-sizes", "1,4,full", "--ar", "--sequences", "4", "--draws", "2"]
    alone, found = evaluated(run, tmp_path, *options), evaluated(run, tmp_path, *options, *layout)
    assert alone["sequences"] == 4 and list(alone["bound"]) == ["1", "4", "32"]
    assert found["ar"]["nll"] == pytest.approx(alone["ar"]["nll"], rel=2e-6)
    for size, bound in alone["bound"].items():
        assert found["bound"][size]["mean"] == pytest.approx(bound["mean"], rel=2e-6)


def test_other_text_is_held_out_whole(run, tmp_path, capsys):
    prefix = run[1].removeprefix("data.path=[").removesuffix("]")
    options = ["--block-sizes", "4", "--draws", "1", "--sequences", "1000"]
    assert cli.main(["evaluate", run[0], "--data", prefix, *options]) == 0
    printed = capsys.readouterr().out
    assert "bound, block 4" in printed and "AR" not in printed and "bigram entropy" in printed
    whole = evaluated(run, tmp_path, *options, "data.split='0,1'")["sequences"]
    assert f"on {whole} held-out sequences" in printed


def loaded(config, checkpoint) -> list[str]:
    """Parameters that have a gradient, and wrappers with buffers for gradients."""
    from megatron.core.distributed import DistributedDataParallel

    from llada_megatron.checkpoint.load import load_model
    from llada_megatron.parallel import groups

    groups.initialize(config.layout)
    stages = load_model(config, checkpoint.path)
    trainable = [name for stage in stages for name, p in stage.named_parameters() if p.requires_grad]
    wrapped = [stage for stage in stages if isinstance(stage, DistributedDataParallel) or stage.training]
    return trainable + [str(type(stage)) for stage in wrapped]


def test_a_model_for_inference_has_no_gradients_and_is_in_eval_mode(run):
    checkpoint = find(run[0])
    config = compose.elsewhere(checkpoint.manifest.config, [run[1]])
    assert run_ranks(loaded, config, checkpoint) == [[]]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--block-sizes", "5"], "--block-sizes is 5, which does not divide"),
        (["--block-sizes", "", "--no-ar"], "nothing to evaluate"),
        (["--sequences", "0"], "--sequences 0: give at least 1"),
        (["data.path=[nowhere]"], "nowhere"),
        (["layout.tp=3"], "layout.tp=3 does not divide"),
        (["layout.tpp=2"], "tpp"),
    ],
)
def test_what_does_not_fit_is_one_sentence(run, capsys, arguments, said):
    assert cli.main(["evaluate", *run, *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
