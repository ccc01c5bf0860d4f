"""What came with the weights travels with every checkpoint made from them, by content."""

import json
import shutil
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from llada_megatron.cli import main
from llada_megatron.record import carried
from llada_megatron.record.manifest import Checkpoint, Manifest
from tests.convert import checkpoints
from tests.convert.test_layouts import STAGE
from tests.convert.test_round_trip import to_hf, to_mcore

FILES = {
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
}


def train(corpus: str, run_dir: Path, model: dict, *overrides: str) -> int:
    return main(
        [
            "train",
            "experiment=parity",
            *[f"model.{name}={value}" for name, value in model.items() if not isinstance(value, dict)],
            f"data.path=[{corpus}]",
            "data.sequence_length=64",
            "data.split='8,2'",
            f"run.dir={run_dir}",
            STAGE % ("bdlm", "diffusion", "16"),
            "layout.global_batch=2",
            "optimizer.warmup_tokens=0",
            *overrides,
        ]
    )


def test_a_run_that_lost_its_source_was_resumed_without_it_and_moved_exports_what_came_with_it(
    corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = checkpoints.add_tokenizer(checkpoints.write(tmp_path / "source", "llama"), {})
    (source / "chat_template.jinja").write_text("{{ messages }}")
    described = json.loads((source / "config.json").read_text()) | {"max_position_embeddings": 4096}
    (source / "config.json").write_text(json.dumps(described))
    assert to_mcore(source, tmp_path / "ours") == 0
    model = Checkpoint.read(tmp_path / "ours").manifest.config["model"]
    monkeypatch.chdir(tmp_path)
    assert train(corpus, tmp_path / "run", model, "checkpoint.init_from=ours", "training.steps=1") == 0
    first = Checkpoint.read(tmp_path / "run" / "checkpoints" / "step_00000001")
    assert {f"hf/{name}" for name in FILES} <= first.manifest.files.keys()  # hashed as all files are
    assert first.manifest.config["checkpoint"]["init_from"] == str(tmp_path / "ours")
    assert OmegaConf.load(tmp_path / "run" / "config.yaml").checkpoint.init_from == str(tmp_path / "ours")

    shutil.rmtree(tmp_path / "ours")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert train(corpus, tmp_path / "run", model, "training.steps=2", "checkpoint.keep_last=1") == 0
    assert not first.path.exists()
    shutil.move(tmp_path / "run", tmp_path / "moved")
    assert to_hf(tmp_path / "moved", tmp_path / "back") == 0
    for name in FILES - {"config.json", "generation_config.json"}:
        assert (tmp_path / "back" / name).read_bytes() == (source / name).read_bytes()
    assert json.loads((tmp_path / "back" / "config.json").read_text())["max_position_embeddings"] == 4096


def saved(path: Path, origin: Path | None = None) -> Checkpoint:
    """A checkpoint of a manifest alone, started from `origin`."""
    path.mkdir()
    Manifest(config={"checkpoint": {"init_from": str(origin)}} if origin else {}).write(path)
    return Checkpoint.read(path)


def test_a_checkpoint_of_before_finds_it_where_its_run_started(tmp_path: Path) -> None:
    content = {"tokenizer.json": b"{}", "additional_chat_templates/tools.jinja": b"x"}
    carried.write(content, saved(tmp_path / "converted").path)
    middle = saved(tmp_path / "middle", tmp_path / "converted")
    last = saved(tmp_path / "last", middle.path)
    assert carried.content_of(last) == carried.content_of(middle) == content
    shutil.rmtree(middle.path)
    assert carried.content_of(last) == {}
    carried.write({}, last.path)
    assert not (last.path / "hf").exists()
