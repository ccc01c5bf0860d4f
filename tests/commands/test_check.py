"""`llada train --check` finds what a start would refuse, starts nothing and writes nothing."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from llada_megatron.cli import main
from llada_megatron.config.compose import compose, save
from llada_megatron.record.manifest import Manifest
from llada_megatron.record.run_dir import RunDir


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def check(corpus, *overrides):
    arguments = [f"data.path=[{corpus}]", "data.sequence_length=64", *overrides]
    return main(["train", "--check", "experiment=parity", *arguments])


def checkpoint(config, directory, step=2):
    """The record of one, without tensors."""
    from dataclasses import asdict

    from llada_megatron.data.fingerprint import fingerprint

    path = RunDir(directory).checkpoint(step)
    path.mkdir(parents=True)
    manifest = Manifest(config=json.loads(json.dumps(asdict(config))), step=step)
    manifest.data_fingerprint = fingerprint(config.data)
    manifest.write(path)
    return path


def test_a_run_that_could_start_passes_and_leaves_no_trace(corpus, here, capsys):
    before = sorted(os.listdir(os.path.dirname(corpus)))
    assert check(corpus) == 0
    printed = capsys.readouterr().out
    assert "checked      the settings, run.dir, data.tokenizer, data.path, data.split, checkpoints" in printed
    assert "not checked  GPUs" in printed
    assert list(here.iterdir()) == [] and sorted(os.listdir(os.path.dirname(corpus))) == before


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["data.path=[nowhere]"], ["nowhere.bin does not exist"]),
        (["data.path=[]"], ["data.path is empty"]),
        (["data.tokenizer=nowhere.json"], ["nowhere.json does not exist"]),
        (["model.vocab_size=256", "model.mask_token_id=255"], ["data.tokenizer has 258 ids, more than"]),
        (["data.split='1,1e-9'", "evaluation.block_sizes=['4']"], ["the validation split holds 0 of 150"]),
        (["checkpoint.init_from=nowhere"], ["nowhere is neither a checkpoint nor a run"]),
        (["run.resume=nowhere"], ["nowhere is neither a checkpoint nor a run"]),
        (["run.dir=file/run"], ["run.dir=file/run cannot be a folder: ", "/file is a file"]),
        (["model.attention_backend=cudnn_flex"], ["model.attention_backend=cudnn_flex needs"]),
        (["model.hidden_size=2000000000"], ["bytes free and one checkpoint takes"]),
        (["data.path=[nowhere]", "run.resume=gone"], ["nowhere.bin does not exist", "gone is neither"]),
    ],
)
def test_what_a_start_would_refuse_is_refused(corpus, here, capsys, overrides, words):
    (here / "file").touch()
    assert check(corpus, *overrides) == 2
    printed = capsys.readouterr()
    assert all(word in printed.err for word in words)
    assert "parity in " in printed.out  # what would run is shown all the same


def test_a_folder_that_cannot_be_written_is_found(corpus, here, capsys, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    assert check(corpus) == 2
    assert f"run.dir=runs/parity cannot be written: {here} lets" in capsys.readouterr().err


def test_a_damaged_index_is_found(corpus, here, capsys):
    for ending in ("bin", "idx"):
        shutil.copy(f"{corpus}.{ending}", here / f"cut.{ending}")
    os.truncate(here / "cut.idx", 100)
    assert check("cut") == 2
    assert "cut.idx is truncated" in capsys.readouterr().err


def test_a_checkpoint_of_another_run_is_found_before_the_start(corpus, here, capsys):
    config = compose(["experiment=parity", f"data.path=[{corpus}]", "data.sequence_length=64"])
    path = checkpoint(config, here / "runs" / "parity")
    assert check(corpus) == 0
    assert check(corpus, "optimizer.lr=0.5") == 2
    assert "optimizer.lr: 0.001 -> 0.5" in capsys.readouterr().err
    assert check(corpus, "run.resume=never") == 2
    assert "is later than step 0" in capsys.readouterr().err
    other = ["run.name=other", f"checkpoint.init_from={path}"]
    assert check(corpus, *other) == 0
    assert check(corpus, *other, "model.rotary_base=5") == 2
    assert "holds another model: model.rotary_base" in capsys.readouterr().err


def test_a_configuration_file_and_overrides_of_it_are_not_mixed_in_silence(here, capsys):
    save(compose(["experiment=parity"]), here / "config.yaml")
    assert main(["train", "--check", "--config", "config.yaml", "optimizer.lr=1"]) == 2
    assert "--config FILE is a whole configuration" in capsys.readouterr().err


def test_without_data_nothing_slow_is_imported(here):
    code = (
        "import sys\nfrom llada_megatron.cli import main\n"
        "assert main(['train', '--check', 'experiment=parity']) == 2\n"
        "print('slow:', {'torch', 'megatron'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "slow: set()" in done.stdout
