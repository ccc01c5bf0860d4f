"""Whole runs of experiment=parity on a corpus of short documents (see conftest.py)."""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from llada_megatron.config.errors import BadInput
from llada_megatron.runtime.launch import WorkerDied
from llada_megatron.verify.layouts import write_corpus
from tests.distributed import run_ranks
from tests.model.latents import MLA
from tests.training.runs import (
    LONG,
    STAGES,
    STEPS,
    TWO,
    arrays_in,
    assert_equal_within_rounding,
    checkpoint,
    comparable,
    configure,
    copy_corpus,
    records,
    train,
)


@pytest.fixture(scope="module")
def straight(corpus, tmp_path_factory) -> Path:
    """A run of one process without interruption."""
    run_dir = tmp_path_factory.mktemp("straight")
    assert train(configure(corpus, run_dir)) == [(STEPS, 0, True)]
    return run_dir


def test_a_run_goes_through_its_stages_and_keeps_a_checkpoint_of_each_end(straight):
    assert [record["step"] for record in records(straight)] == list(range(STEPS))
    assert [record["block_size"] for record in records(straight)] == [4, 4, 16, 16, 64, 64]
    assert [path.name for path in sorted((straight / "checkpoints").iterdir())] == [
        f"step_{step:08d}" for step in (2, 4, 6)
    ]


def test_a_resume_inside_a_later_stage_equals_the_uninterrupted_run_bit_for_bit(corpus, straight, tmp_path):
    assert train(configure(corpus, tmp_path, "training.steps=3"), configure(corpus, tmp_path)) == [
        (3, 0, True),
        (STEPS, 0, True),
    ]
    assert comparable(tmp_path) == comparable(straight)
    resumed, uninterrupted = run_ranks(arrays_in, [checkpoint(run, STEPS) for run in (tmp_path, straight)])[0]
    assert any("exp_avg_sq" in name for name in resumed) and any("expert_bias" in name for name in resumed)
    assert resumed == uninterrupted


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout",
    [
        ["layout.cp=2", "layout.ep=2"],
        pytest.param(["layout.tp=2"], marks=pytest.mark.full),
        pytest.param(["layout.pp=2"], marks=pytest.mark.full),
    ],
    ids=" ".join,
)
def test_a_run_goes_on_under_another_layout(corpus, straight, tmp_path, layout):
    train(configure(corpus, tmp_path, "training.steps=2"))
    train(configure(corpus, tmp_path, TWO, *layout, "training.steps=4"))
    train(configure(corpus, tmp_path))
    assert_equal_within_rounding(tmp_path, straight)


def test_evaluations_are_recorded_once_count_time_over_restarts_and_do_not_touch_training(
    corpus, straight, tmp_path
):
    evaluation = ["evaluation.block_sizes=['1', full]", "evaluation.sequences=3", "evaluation.every_steps=1"]
    train(
        configure(corpus, tmp_path, *evaluation, "training.steps=3"), configure(corpus, tmp_path, *evaluation)
    )
    evaluations = records(tmp_path, "evaluations")
    assert [record["step"] for record in evaluations] == [1, 2, 3, 4, 5, 6]
    seconds = [record["wall_sec"] for record in evaluations]
    assert seconds == sorted(seconds) and seconds[0] > 0
    manifest = json.loads((checkpoint(tmp_path, STEPS) / "manifest.json").read_text())
    assert manifest["wall_sec"] >= seconds[-1]
    assert comparable(tmp_path) == comparable(straight)


@pytest.mark.parametrize(
    ("number", "layout"),
    [(signal.SIGINT, []), pytest.param(signal.SIGUSR1, [TWO], marks=pytest.mark.slow)],
)
def test_a_signal_saves_and_stops_and_the_same_command_goes_on(corpus, tmp_path, number, layout):
    def signal_once_it_trains():
        metrics = tmp_path / "metrics.jsonl"  # whose last line may be on its way
        while not metrics.exists() or metrics.read_text().count("\n") < 2:
            time.sleep(0.05)
        os.kill(os.getpid(), number)

    threading.Thread(target=signal_once_it_trains, daemon=True).start()
    [(step, received, finished)] = train(configure(corpus, tmp_path, LONG, *layout))
    assert received == number and not finished and step >= 2
    assert (checkpoint(tmp_path, step) / "manifest.json").is_file()
    assert train(configure(corpus, tmp_path, LONG, *layout, f"training.steps={step + 1}")) == [
        (step + 1, 0, True)
    ]
    assert [record["step"] for record in records(tmp_path)] == list(range(step + 1))


def press_twice_then_later():
    from llada_megatron.guard.signals import StopRequest
    from llada_megatron.runtime.interrupts import ONE_KEYPRESS_SEC

    stop, presses = StopRequest(lambda: None), 0
    try:
        for pause_sec in (0.0, ONE_KEYPRESS_SEC + 0.1, 0.0):  # the terminal's, the launcher's, another one
            signal.raise_signal(signal.SIGINT)
            presses += 1
            time.sleep(pause_sec)
    except KeyboardInterrupt:
        return stop.number, presses
    finally:
        stop.release()


def test_one_keypress_that_arrives_twice_stops_gently_and_another_interrupts():
    assert run_ranks(press_twice_then_later) == [(signal.SIGINT, 2)]


REFUSED = [
    (["run.seed=2"], "run.seed: 1 -> 2; run.seed must stay, since"),
    (["model.layers=2"], "model.layers: 4 -> 2; model.layers must stay, since"),
    (["diffusion.weight=flat"], "diffusion.weight: inverse -> flat"),
    (["optimizer.lr=0.5"], "set run.allow_change=[optimizer.lr],"),
    (["layout.global_batch=8"], "set run.allow_change=[layout.global_batch],"),
    ([STAGES.replace("'16'", "'32'")], "schedule.stages[1] (bdlm_16) has been trained and is another now"),
    (["data.split='9,1'"], "data.split: 8,2 -> 9,1; data.split must stay, since"),
    (["data.sequence_length=32"], "data.sequence_length must stay, since the run's place in its data"),
    (
        ["run.allow_change=[data.sequence_length]"],
        "run.allow_change cannot hold data.sequence_length: of data.sequence_length, the run's",
    ),
    (
        ["run.allow_change=[optimizer]"],
        "run.allow_change holds optimizer, which is no setting: name one exactly",
    ),
    (["run.allow_change=[optimizer.l]", "optimizer.lr=0.5"], "such as optimizer.lr"),
    (["run.allow_change=[data]"], "such as data.cache_dir, data.pad_to, data.path"),
    (["run.allow_change=[optimizer.min_lr]", "optimizer.lr=0.5"], "optimizer.lr: 0.001 -> 0.5"),
]


def refusals(configs) -> list[str]:
    from llada_megatron.training import loop

    found = []
    for config in configs:
        try:
            loop.run(config)
            found.append("went on")
        except BadInput as error:
            found.append(str(error))
    return found


def test_a_resume_of_another_run_is_refused_and_the_difference_named(corpus, straight, tmp_path):
    shutil.copytree(straight, tmp_path / "run")
    shutil.rmtree(checkpoint(tmp_path / "run", STEPS))
    configs = [configure(corpus, tmp_path / "run", *overrides) for overrides, _ in REFUSED]
    (messages,) = run_ranks(refusals, configs)
    for (_, difference), message in zip(REFUSED, messages, strict=True):
        assert difference in message and "\n" not in message
    later = STAGES.replace("mdlm, block_size: full", "half, block_size: '32'")
    assert train(configure(corpus, tmp_path / "run", later, "training.steps=5")) == [(5, 0, True)]


def test_a_resume_on_other_text_in_the_same_places_is_refused_unless_it_is_allowed(
    corpus, straight, tmp_path
):
    shutil.copytree(straight, tmp_path / "run")
    shutil.rmtree(checkpoint(tmp_path / "run", STEPS))
    mine = copy_corpus(corpus, tmp_path)
    tokens = np.memmap(f"{mine}.bin", np.uint16, "r+")
    tokens[5] = 65 if tokens[5] != 65 else 66
    tokens.flush()
    with pytest.raises(
        BadInput, match=r"The data changed since the checkpoint: .*run\.allow_change=\[data\.path\]"
    ):
        train(configure(mine, tmp_path / "run"))
    allowed = configure(mine, tmp_path / "run", "run.allow_change=[data.path]", "training.steps=5")
    assert train(allowed) == [(5, 0, True)]


def test_a_resume_on_documents_of_other_lengths_is_refused_for_good(corpus, straight, tmp_path):
    shutil.copytree(straight, tmp_path / "run")
    shutil.rmtree(checkpoint(tmp_path / "run", STEPS))
    texts = write_corpus(tmp_path)
    with pytest.raises(BadInput, match=r"The run's place in them would be another one: .*init_from"):
        train(configure(texts, tmp_path / "run", "run.allow_change=[data.path]"))


def train_and_say(configs, folders) -> list[list[int]]:
    """The samples of each run in the order in which they were trained."""
    from llada_megatron.verify.journal import train_and_record

    found = []
    for config, folder in zip(configs, folders, strict=True):
        train_and_record(config, folder)
        [file] = folder.iterdir()
        found.append([json.loads(line)["sample"] for line in file.read_text().splitlines()])
    return found


def test_another_global_batch_goes_on_at_the_same_sample_stage_and_learning_rate(corpus, tmp_path):
    """4, then 3 in the middle of a stage and over its end, then 16: which divide neither place nor stages."""
    settings = [
        "optimizer.decay_style=linear",
        "diffusion.embedding_noise.sigma_over_rms=0.5",
        STAGES.replace("mdlm,", "mdlm, learning_rate: rewarm,"),
        "schedule.rewarm_tokens=640",
        "run.allow_change=[layout.global_batch]",
    ]
    parts = [("4", "1"), ("3", "4"), ("16", "0"), ("16", "0")]
    configs = [
        configure(
            corpus, tmp_path / "run", *settings, f"layout.global_batch={batch}", f"training.steps={end}"
        )
        for batch, end in parts
    ]
    folders = [tmp_path / str(index) for index in range(len(parts) - 1)]
    (samples,) = run_ranks(train_and_say, configs[:-1], folders)
    # stages of 8 samples: 4 3 3 | 3 16 | 16
    assert samples == [[*range(4)], [*range(4, 13)], [*range(13, 45)]]
    metrics = records(tmp_path / "run")
    assert [record["consumed_samples"] for record in metrics] == [4, 7, 10, 13, 29, 45]
    assert [record["consumed_tokens"] for record in metrics] == [64 * n for n in (4, 7, 10, 13, 29, 45)]
    assert [record["block_size"] for record in metrics] == [4, 4, 4, 16, 16, 64]
    # The schedule's length in tokens is known for the present batch: each part's decay aims at its own end.
    totals = [24, *[4 + 6 + 9 + 9] * 3, 45, 45]
    for record, total in zip(metrics, totals, strict=True):
        tokens, whole = record["consumed_tokens"], total * 64
        rate = 1e-3 * (tokens / 512 if tokens <= 512 else (whole - tokens) / (whole - 512))
        rewarmed = min(1.0, (tokens - 29 * 64) / 640) if record["stage"] == "mdlm" else 1.0
        assert record["lr"] == pytest.approx(max(rate, 0.0) * rewarmed, abs=1e-9)
    faded = [max(0.0, 1 - tokens / 1024) for tokens in (0, 256, 448, 640, 832, 1856)]
    ratios = [record["embedding_noise_sigma"] / metrics[0]["embedding_noise_sigma"] for record in metrics]
    assert ratios == pytest.approx(faded, rel=0.05)  # the embeddings' norm moves a little
    changed = [line for line in records(tmp_path / "run", "events") if line["event"] == "global_batch"]
    assert [(line["step"], line["sample"], line["now"]) for line in changed] == [(1, 4, 3), (4, 13, 16)]
    manifest = json.loads((checkpoint(tmp_path / "run", 6) / "manifest.json").read_text())
    assert manifest["global_batches"] == [[0, 4], [1, 3], [4, 16]]
    shutil.rmtree(checkpoint(tmp_path / "run", 6))
    assert train(configs[-1]) == [(6, 0, True)]  # of one batch from the same place: bit for bit
    assert [record["loss"] for record in records(tmp_path / "run")] == [record["loss"] for record in metrics]


def test_only_a_whole_checkpoint_of_this_run_is_picked_up(corpus, straight, tmp_path):
    shutil.copytree(straight, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(checkpoint(tmp_path, STEPS))
    whole = checkpoint(tmp_path, 4)
    shutil.copytree(whole, checkpoint(tmp_path, 50))
    (checkpoint(tmp_path, 50) / "manifest.json").unlink()
    shutil.copytree(whole, whole.with_name(".step_00000060.partial"))
    assert train(configure(corpus, tmp_path)) == [(STEPS, 0, True)]
    assert comparable(tmp_path) == comparable(straight)
    assert not whole.with_name(".step_00000060.partial").exists()


def test_a_start_before_checkpoints_that_exist_is_refused(corpus, straight):
    for resume, step in (("never", 0), (str(checkpoint(straight, 2)), 2)):
        with pytest.raises(BadInput, match=rf"later than step {step}, .*run\.dir"):
            train(configure(corpus, straight, f"run.resume={resume}"))


def flip_a_bit(checkpoint: Path) -> None:
    shard = max(checkpoint.rglob("*.distcp"), key=lambda path: path.stat().st_size)
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)


def cut_a_shard_short(checkpoint: Path) -> None:
    shard = max(checkpoint.rglob("*.distcp"), key=lambda path: path.stat().st_size)
    os.truncate(shard, shard.stat().st_size - 1)


def remove_a_file(checkpoint: Path) -> None:
    (checkpoint / "shards" / ".metadata").unlink()


def change_the_manifest(checkpoint: Path) -> None:
    text = (checkpoint / "manifest.json").read_text()
    (checkpoint / "manifest.json").write_text(text.replace('"step": 6', '"step": 5'))


def train_with_a_slow_writer(configs) -> None:
    """Runs whose background writer starts when two more steps have changed the weights."""
    from llada_megatron.checkpoint import store
    from llada_megatron.training import loop

    write = store.Save._write

    def write_late(self, *arguments):
        time.sleep(1.5)
        write(self, *arguments)

    for config in configs:
        store.Save._write = write_late if config.checkpoint.in_background else write
        loop.run(config)


@pytest.mark.parametrize("layout", [[], pytest.param([TWO, "layout.tp=2"], marks=pytest.mark.slow)])
def test_a_background_save_holds_the_weights_of_its_own_step(corpus, straight, tmp_path, layout):
    overrides = ["checkpoint.in_background=true", *layout]
    configs = [configure(corpus, tmp_path, *overrides), configure(corpus, tmp_path / "again", *layout)]
    run_ranks(train_with_a_slow_writer, configs, processes=configs[0].layout.processes)
    assert [path.name for path in sorted((tmp_path / "checkpoints").iterdir())] == [
        f"step_{step:08d}" for step in (2, 4, 6)
    ]
    both = [checkpoint(run, step) for run in (tmp_path, tmp_path / "again") for step in (2, 4, 6)]
    arrays = run_ranks(arrays_in, both)[0]
    assert arrays[:3] == arrays[3:]


@pytest.mark.full
def test_twenty_kills_at_random_moments_lose_nothing_but_the_steps_since_a_save(corpus, straight, tmp_path):
    """Kill -9 of a random rank, during set-up, steps and saves; the run must still equal the straight one."""
    moments, kills = np.random.default_rng(0), 0
    every = configure(corpus, tmp_path, "checkpoint.every_steps=1", "checkpoint.keep_last=50")
    life_sec = measured_life_sec(corpus, tmp_path / "timed")

    def kill() -> None:
        for child in multiprocessing.active_children():
            os.kill(child.pid, signal.SIGKILL)

    saved_before: list[str] = []
    while kills < 20:
        if len(saved_before) >= STEPS:  # it got to its end: begin again, with another history of kills
            assert comparable(tmp_path) == comparable(straight)
            shutil.rmtree(tmp_path / "checkpoints")
            (tmp_path / "metrics.jsonl").unlink()
        killer = threading.Timer(float(moments.uniform(0, life_sec)), kill)
        killer.start()
        try:
            train(every)
        except WorkerDied:
            kills += 1
        finally:
            killer.cancel()
        saved = [path.name for path in sorted((tmp_path / "checkpoints").glob("step_*"))]
        assert set(saved_before) <= set(saved) or len(saved_before) >= STEPS
        saved_before = saved
    train(every)
    assert comparable(tmp_path) == comparable(straight)
    resumed, uninterrupted = run_ranks(arrays_in, [checkpoint(run, STEPS) for run in (tmp_path, straight)])[0]
    assert resumed == uninterrupted


def measured_life_sec(corpus: str, run_dir: Path) -> float:
    began = time.monotonic()
    train(configure(corpus, run_dir, "checkpoint.every_steps=1"))
    return time.monotonic() - began


DAMAGES = {
    flip_a_bit: "has another SHA-256",
    cut_a_shard_short: "bytes of",
    remove_a_file: "shards/.metadata is missing",
    change_the_manifest: "it was changed after it was written",
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_checkpoint_is_named_and_kept_and_the_run_goes_on_from_the_one_before(
    corpus, straight, tmp_path, damage
):
    shutil.copytree(straight, tmp_path, dirs_exist_ok=True)
    damage(checkpoint(tmp_path, STEPS))
    with pytest.raises(BadInput, match=DAMAGES[damage]):
        train(configure(corpus, tmp_path, f"run.resume={checkpoint(tmp_path, STEPS)}"))
    assert train(configure(corpus, tmp_path)) == [(STEPS, 0, True)]
    assert checkpoint(tmp_path, STEPS).with_name("damaged_step_00000006").is_dir()
    assert comparable(tmp_path) == comparable(straight)


@pytest.mark.parametrize("layout", [[], pytest.param([TWO, "layout.tp=2"], marks=pytest.mark.slow)])
def test_tokens_outside_the_model_s_vocabulary_are_refused(corpus, tmp_path, layout):
    small = ["model.vocab_size=256", "model.mask_token_id=255"]
    with pytest.raises(BadInput, match=r"data\.tokenizer has 258 ids, more than model\.vocab_size=256"):
        train(configure(corpus, tmp_path / "run", *small, *layout))
    mine = copy_corpus(corpus, tmp_path)
    os.remove(f"{mine}.json")  # a corpus from elsewhere, of unknown tokenizer
    np.memmap(f"{mine}.bin", np.uint16, "r+")[:] = 600
    with pytest.raises(BadInput, match=r"holds the id 600 at its token 0.*outside 0\.\.511"):
        train(configure(mine, tmp_path / "run", *layout))


def test_the_weights_of_another_run_start_a_conversion_at_step_zero(corpus, tmp_path):
    ar = "schedule.stages=[{name: ar, objective: autoregressive, block_size: '1', tokens: 512}]"
    first = configure(corpus, tmp_path / "ar", ar, "optimizer.warmup_tokens=0")
    evaluation = ["evaluation.block_sizes=['4']", "evaluation.sequences=2"]
    init = [f"checkpoint.init_from={tmp_path / 'ar'}", *evaluation]
    half = configure(corpus, tmp_path / "bd", *init, "training.steps=2")
    assert train(first, half) == [(2, 0, True), (2, 0, True)]
    evaluated = records(tmp_path / "bd", "evaluations")
    assert [record["stage"] for record in evaluated] == ["init", "bdlm_4"]
    assert evaluated[0]["ar"]["tokens"] == 512
    assert records(tmp_path / "bd")[0]["step"] == 0
    manifest = json.loads((checkpoint(tmp_path / "bd", 2) / "manifest.json").read_text())
    assert manifest["autoregressive_tokens"] == 512
    other = configure(corpus, tmp_path / "other", *init, "model.rotary_base=1000", "model.mask_token_id=300")
    with pytest.raises(BadInput, match=r"another model: model\.mask_token_id: .*model\.rotary_base: "):
        train(other)
    last, converted = run_ranks(arrays_in, [checkpoint(tmp_path / "ar", 2), checkpoint(tmp_path / "bd", 2)])[
        0
    ]
    assert last.keys() == converted.keys()


RELATIVES = {
    "tied head": ["model.tied_head=true"],
    "Llama-like experts": [
        "model.qk_norm=false",
        "model.rotary_fraction=1",
        "model.shared_expert_hidden_size=0",
    ],
    "latent attention": list(MLA),
    "dense": ["model.dense_layers=4", "model.experts=0", "model.qk_norm=false", "model.rotary_fraction=1"],
}


@pytest.mark.parametrize(
    "relative",
    [pytest.param(name, marks=[pytest.mark.slow] if "latent" in name else []) for name in RELATIVES],
)
def test_relatives_of_the_architecture_are_data_they_learn_and_resume(corpus, tmp_path, relative):
    run_dirs = tmp_path / "straight", tmp_path / "resumed"
    train(configure(corpus, run_dirs[0], *RELATIVES[relative], "optimizer.lr=0.003"))
    for stop in ("training.steps=3", "training.steps=0"):
        train(configure(corpus, run_dirs[1], *RELATIVES[relative], "optimizer.lr=0.003", stop))
    assert comparable(run_dirs[0]) == comparable(run_dirs[1])
    losses = [record["loss"] for record in records(run_dirs[0])]
    assert np.isfinite(losses).all() and min(losses[3:]) < losses[0]


@pytest.mark.slow
def test_the_command_shows_only_our_own_lines(corpus, tmp_path):
    overrides = ["data.sequence_length=64", "layout.global_batch=4", "optimizer.warmup_tokens=0", STAGES]
    command = [sys.executable, "-m", "llada_megatron", "train", "experiment=parity", TWO, "layout.tp=2"]
    command += [f"data.path=[{corpus}]", f"run.dir={tmp_path}", *overrides]
    for step in ("0", "1"):  # the second one resumes
        done = subprocess.run(
            [*command, f"training.steps={int(step) + 1}"], capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0 and done.stderr == ""
        said = ["layers", "experts", "optimizer", "attention", "step", step]
        assert [line.split()[0] for line in done.stdout.splitlines()] == said


def train_with_small_files(config, limit_bytes: int) -> str:
    """What `loop.run` says when no file of this process may grow past a limit, as on a full disk."""
    import resource

    from llada_megatron.training import loop

    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):  # which may be files of the test run's that are longer already
        os.dup2(nowhere, stream)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, resource.RLIM_INFINITY))
    try:
        loop.run(config)
    except OSError as error:
        return str(error)
    return "saved"


def test_a_save_that_cannot_be_written_names_its_path_and_leaves_the_last_checkpoint_whole(
    corpus, straight, tmp_path
):
    train(configure(corpus, tmp_path, "training.steps=2"))
    said = run_ranks(train_with_small_files, configure(corpus, tmp_path), 50_000)[0]
    assert str(checkpoint(tmp_path, 4)) in said
    assert [path.name for path in (tmp_path / "checkpoints").glob("step_*")] == ["step_00000002"]
    train(configure(corpus, tmp_path))
    assert comparable(tmp_path) == comparable(straight)
