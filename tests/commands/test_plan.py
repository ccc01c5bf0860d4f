"""`llada plan` as a user meets it: a verdict first, one sentence per mistake, never torch."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from llada_megatron import cli

SLOW = ("torch", "numpy", "megatron", "matplotlib")
FLASH = ["plan", "experiment=llada2_flash_cpt", "cluster=h100_512"]


def test_a_plan_begins_with_its_verdict(capsys, tmp_path: Path) -> None:
    assert cli.main([*FLASH, "--json", str(tmp_path / "plan.json")]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("llada2_flash_cpt fits on h100_512 (512 GPUs)")
    assert "Assumed" in printed and "Not modelled" in printed
    figures = json.loads((tmp_path / "plan.json").read_text())
    assert figures["fits"] and len(figures["ranks"]) == 4 and len(figures["stages"]) == 9


def test_what_does_not_fit_exits_1(capsys) -> None:
    assert cli.main([*FLASH, "cluster.memory_gb=40"]) == 1
    assert capsys.readouterr().out.startswith("llada2_flash_cpt does not fit")


def test_a_search_prints_overrides_that_plan_accepts(capsys, tmp_path: Path) -> None:
    arguments = ["plan", "experiment=llada2_mini_cpt", "cluster=h100_64"]
    assert cli.main([*arguments, "--search", "--top", "3", "--json", str(tmp_path / "search.json")]) == 0
    printed = capsys.readouterr().out
    best = next(line for line in printed.splitlines() if "layout.processes=64" in line)
    assert cli.main([*arguments, *best.split()]) == 0
    search = json.loads((tmp_path / "search.json").read_text())
    assert search["candidates"][0]["layout"]["processes"] == 64


def test_decoding_says_what_fits_what_is_best_and_what_is_assumed(capsys, tmp_path: Path) -> None:
    asked = ["--decode", "--branches", "3", "--tokens-per-forward", "3", "--batch", "1,8"]
    assert cli.main([*FLASH, *asked, "--json", str(tmp_path / "decode.json")]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("llada2_flash_cpt decodes: 18 of 18 layouts and batches fit on h100_512")
    assert "fastest for a sequence" in printed and "Assumed" in printed and "Not modelled" in printed
    forwards = json.loads((tmp_path / "decode.json").read_text())["forwards"]
    assert [(one["tp"], one["bp"], one["batch"]) for one in forwards[:4]] == [
        (1, 1, 1), (1, 1, 8), (1, 2, 1), (1, 2, 8)
    ]  # fmt: skip
    assert cli.main([*FLASH, *asked, "layout.ep=2"]) == 1
    assert "no room" in capsys.readouterr().out


def test_the_picture_is_a_png(capsys, tmp_path: Path) -> None:
    assert cli.main([*FLASH, "--plot", str(tmp_path / "new" / "plan.png")]) == 0
    assert (tmp_path / "new" / "plan.png").read_bytes().startswith(b"\x89PNG")


def test_the_dry_run_begins_with_its_verdict_and_finds_what_was_computed(capsys, tmp_path: Path) -> None:
    small = ["experiment=parity", "precision=bf16", "cluster=h100_8", "layout.processes=8", "layout.tp=2"]
    sizes = ["model.head_dim=64", "model.layers=2", "data.sequence_length=64", "layout.global_batch=16"]
    files = ["--json", str(tmp_path / "exact.json"), "--plot", str(tmp_path / "exact.png")]
    arguments = ["plan", "--exact", "--stage", "bdlm_4", "--ranks", "3", *files]
    assert cli.main([*arguments, *small, *sizes]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("parity fits on h100_8 (8 GPUs), dry run of bdlm_4")
    assert "as computed, to the byte" in printed and "Assumed" in printed and "Not in it" in printed
    (rank,) = json.loads((tmp_path / "exact.json").read_text())["ranks"]
    assert rank["rank"] == 3 and rank["kept"] == rank["closed_form"]["kept"] and rank["peak_origins"]
    assert rank["messages_of_a_step"] == rank["closed_form"]["messages"]
    assert (tmp_path / "exact.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["cluster=h100"], "cluster.nodes is not known"),
        (["cluster=h100_64"], "layout.processes=512, but cluster h100_64 has nodes*gpus_per_node=64 GPUs"),
        (["cluster.memory_gb=0"], "cluster.memory_gb is not known"),
        (["cluster.network_gb_per_sec=0"], "cluster.network_gb_per_sec is not known"),
        (
            ["layout=h100_512x_pp4_vpp8_cp2_ep8", "precision=fp32", "cluster.peak_tflops_fp32=0"],
            "cluster.peak_tflops_fp32 is not known",
        ),
        (["cluster.memory_margin=1"], "cluster.memory_margin=1.0 is out of range"),
        (["layout.tp=8"], "layout.tp=8 does not divide model.kv_heads=4"),
        (["layout.global_batch=1000"], "layout.global_batch=1000 is not a multiple"),
        (["--expert-imbalance", "0.5"], "--expert-imbalance 0.5 is a maximum over a mean"),
        (["--search", "--plot", "x.png"], "--plot draws one layout"),
        (["--top", "3"], "--top N lists"),
        (["--search", "cluster=h100"], "cluster.nodes is not known"),
        (["--exact", "--search"], "--exact dry-runs one layout"),
        (["--stage", "stable"], "--stage, --ranks and --all-coordinates belong to --exact"),
        (["--exact", "--ranks", "0,512"], "--ranks 0,512: give ranks from 0 to 511"),
        (["--exact", "--ranks", "0,x"], "--ranks 0,x: give ranks from 0 to 511"),
        (["--exact", "--document-tokens", "665"], "--exact runs balanced experts and sequences of"),
        (["--document-tokens", "many"], "Document lengths 'many': give MEDIAN,SIGMA"),
        (["--exact", "--stage", "warm"], "--stage warm is not in schedule.stages: choose from warmup_1,"),
        (["--exact", "--expert-imbalance", "1.3"], "--exact runs balanced experts"),
        (["--decode", "--search"], "--decode plans forwards of decoding: leave out --search"),
        (["--batch", "1"], "--tp, --bp belong to --decode: add it"),
        (["--decode", "--batch", "1,0"], "--batch 1,0: give whole numbers of at least 1"),
        (["--decode", "--bp", "2"], "--bp 2 does not divide branches + 1 = 1, the anchor among them: give"),
        (["--decode", "--bp", "2,3", "--branches", "3"], "--bp 3 does not divide branches + 1 = 4"),
        (
            ["--decode", "--tp", "3"],
            "layout.tp=3 does not divide model.heads=32: use a layout.tp of 1, 2, 4.",
        ),
        (["--decode", "--tp", "16"], "--tp 16 is out of range: tensor parallelism stays on a node"),
        (["--decode", "--context", "8"], "--buffer 1 of blocks of 32 does not fit into --context 8"),
        (["--decode", "--branches", "33"], "--branches 33 is out of range: a block has 32 tokens"),
        (["--decode", "--tokens-per-forward", "nan"], "--tokens-per-forward nan is out of range"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_sentence_and_exits_2(capsys, arguments: list[str], words: str) -> None:
    overrides = [] if any(word.startswith("cluster=") for word in arguments) else FLASH[2:]
    options = arguments if arguments[0].startswith("--") else []
    values = [] if options else arguments
    if "cluster=h100" in options:
        options, values = options[:-1], options[-1:]
    assert cli.main(["plan", *options, FLASH[1], *overrides, *values]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1 and error.rstrip().endswith(".")


@pytest.mark.parametrize("mode", [[], ["--search", "--top", "1"], ["--decode"]])
def test_planning_imports_no_torch(mode: list[str]) -> None:
    code = (
        "import sys\n"
        "from llada_megatron import cli\n"
        f"cli.main({['plan', 'experiment=llada2_mini_cpt', 'cluster=h100_64', *mode]})\n"
        f"print('slow:', [name for name in {SLOW} if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "slow: []" in result.stdout


@pytest.mark.parametrize(
    "name", ["h100_8", "h100_64", "h100_128", "h100_512", "h100_1024", "h200_8", "b200_8"]
)
def test_described_clusters_have_the_gpus_that_their_name_says(capsys, name: str) -> None:
    gpus = name.rpartition("_")[2]
    overrides = ["layout=h100_8x_ep8", f"layout.processes={gpus}", "layout.global_batch=2048"]
    assert cli.main(["plan", "experiment=llada2_mini_cpt", f"cluster={name}", *overrides]) in (0, 1)
    assert f"on {name} ({gpus} GPUs)" in capsys.readouterr().out
