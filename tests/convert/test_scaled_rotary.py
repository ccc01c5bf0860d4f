"""Scaled rotary frequencies go in and out with a certificate, which fails when either side overlooks them."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from llada_megatron.config.schema import RotaryScaling, RotaryScalingConfig
from llada_megatron.convert import rope_json
from llada_megatron.convert.families.rotation import Rotation
from llada_megatron.record.manifest import Checkpoint
from tests.convert import checkpoints
from tests.convert.test_round_trip import certificate, to_hf, to_mcore

YARN = {"factor": 4.0, "original_max_position_embeddings": 64, "rope_type": "yarn"}
LLAMA3 = {
    "factor": 8.0,
    "original_max_position_embeddings": 32,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "type": "llama3",
}
LINEAR = {"factor": 2.0, "type": "linear"}
SCALINGS = {"yarn": YARN, "llama3": LLAMA3, "linear": LINEAR}
ROTARY = ("rope_theta", "partial_rotary_factor", "rope_scaling", "rope_parameters", "max_position_embeddings")


def checkpoint(folder: Path, kind: str, **rotary: object) -> Path:
    """A checkpoint of a kind whose rotary keys are these."""
    source = checkpoints.write(folder, kind)
    kept = {k: v for k, v in json.loads((source / "config.json").read_text()).items() if k not in ROTARY}
    (source / "config.json").write_text(json.dumps(kept | rotary, indent=2) + "\n")
    return source


def spelt(kind: str, scaling: dict, spelling: str) -> dict:
    beside: dict = {"rope_theta": 10000.0} | (
        {} if kind.startswith("llama_") else {"partial_rotary_factor": 0.5}
    )
    if spelling == "rope_scaling":
        return beside | {"rope_scaling": scaling, "max_position_embeddings": 256}
    return {"rope_parameters": beside | scaling, "max_position_embeddings": 256}


def settings(folder: Path) -> dict:
    model = Checkpoint.read(folder).manifest.config["model"]
    return {key: model[key] for key in ("rotary_base", "rotary_fraction", "rotary_scaling")}


KINDS, SPELLINGS = ("bailing", "llama_untied"), ("rope_scaling", "rope_parameters")


@pytest.mark.parametrize(
    ("scaling", "kind", "spelling"),
    [
        # Every pair of two of the three is quick.
        pytest.param(scaling, kind, spelling, marks=[pytest.mark.full] if (a + b + c) % 2 else [])
        for a, scaling in enumerate(SCALINGS)
        for b, kind in enumerate(KINDS)
        for c, spelling in enumerate(SPELLINGS)
    ],
)
def test_in_and_out_gives_the_same_config_and_the_same_logits(
    scaling: str, kind: str, spelling: str, tmp_path: Path
) -> None:
    source = checkpoint(tmp_path / "source", kind, **spelt(kind, SCALINGS[scaling], spelling))
    assert to_mcore(source, tmp_path / "ours") == 0
    assert settings(tmp_path / "ours")["rotary_scaling"]["factor"] == SCALINGS[scaling]["factor"]
    assert to_hf(tmp_path / "ours", tmp_path / "back") == 0
    assert (tmp_path / "back" / "config.json").read_bytes() == (source / "config.json").read_bytes()
    for name in ("ours", "back"):
        logits = certificate(tmp_path / name)["logits"]
        assert logits["compared"] and logits["max_difference"] < 2e-5 * logits["max_logit"]


@pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS)
def test_under_another_architecture_the_settings_are_spelt_as_all_its_versions_read_them(
    scaling: dict, tmp_path: Path
) -> None:
    source = checkpoint(tmp_path / "source", "bailing", **spelt("bailing", scaling, "rope_parameters"))
    assert to_mcore(source, tmp_path / "ours") == 0
    assert to_hf(tmp_path / "ours", tmp_path / "back", "--architecture", "LLaDA2MoeModelLM") == 0
    written = json.loads((tmp_path / "back" / "config.json").read_text())
    assert "rope_parameters" not in written and written["rope_theta"] == 10000.0
    assert written["partial_rotary_factor"] == 0.5 and written["max_position_embeddings"] == 256
    assert written["rope_scaling"]["factor"] == scaling["factor"]
    assert to_mcore(tmp_path / "back", tmp_path / "again") == 0
    assert settings(tmp_path / "again") == settings(tmp_path / "ours")
    assert certificate(tmp_path / "again")["megatron"] == certificate(tmp_path / "ours")["megatron"]


def overlooked_by_the_reader(**fields: object) -> Callable:
    def plant(monkeypatch: pytest.MonkeyPatch) -> None:
        right = rope_json.read
        monkeypatch.setattr(rope_json, "read", lambda *given: right(*given)._replace(**fields))

    return plant


def overlooked_by_the_reference(name: str, value: object) -> Callable:
    def plant(monkeypatch: pytest.MonkeyPatch) -> None:
        right = Rotation.__init__

        def wrong(self: Rotation, config: dict, head_dim: int) -> None:
            right(self, config, head_dim)
            setattr(self, name, value)

        monkeypatch.setattr(Rotation, "__init__", wrong)

    return plant


UNSCALED = RotaryScalingConfig()
BARE_YARN = RotaryScalingConfig(RotaryScaling.yarn, 4.0, 64, attention_factor=1.0)
OVERLOOKED = [
    (YARN, overlooked_by_the_reader(rotary_scaling=UNSCALED)),
    (YARN, overlooked_by_the_reader(rotary_scaling=BARE_YARN)),
    (YARN, overlooked_by_the_reference("_type", "default")),
    (YARN, overlooked_by_the_reference("_stretch", lambda: 1.0)),
    (LLAMA3, overlooked_by_the_reader(rotary_scaling=UNSCALED)),
    (LLAMA3, overlooked_by_the_reference("_type", "default")),
    (LINEAR, overlooked_by_the_reader(rotary_scaling=UNSCALED)),
    (LINEAR, overlooked_by_the_reference("_type", "default")),
    ({}, overlooked_by_the_reader(rotary_fraction=1.0)),
    ({}, overlooked_by_the_reference("_width", 16)),
    ({}, overlooked_by_the_reader(rotary_base=500000.0)),
    ({}, overlooked_by_the_reference("_base", 500000.0)),
]
PLANTED = [
    "yarn_by_the_reader", "attention_factor_by_the_reader", "yarn_by_the_reference",
    "attention_factor_by_the_reference", "llama3_by_the_reader", "llama3_by_the_reference",
    "linear_by_the_reader", "linear_by_the_reference", "fraction_by_the_reader", "fraction_by_the_reference",
    "theta_by_the_reader", "theta_by_the_reference",
]  # fmt: skip


@pytest.mark.parametrize("scaling, plant", OVERLOOKED, ids=PLANTED)
def test_what_one_side_overlooks_fails_the_certificate(
    scaling: dict, plant: Callable, tmp_path: Path, monkeypatch, capsys
) -> None:
    source = checkpoint(tmp_path / "source", "bailing", **spelt("bailing", scaling, "rope_parameters"))
    plant(monkeypatch)
    assert to_mcore(source, tmp_path / "ours") == 1
    assert "logits differ" in capsys.readouterr().out and not (tmp_path / "ours").exists()


def test_settings_of_one_kind_of_layer_leave_flat_and_are_said(tmp_path: Path, capsys) -> None:
    nested = {"full_attention": {"rope_type": "default", "rope_theta": 500000.0}}
    source = checkpoint(tmp_path / "source", "llama_untied", rope_parameters=nested)
    assert to_mcore(source, tmp_path / "ours") == 0
    assert settings(tmp_path / "ours")["rotary_base"] == 500000.0
    assert "rope_parameters.full_attention is taken for all layers" in capsys.readouterr().out
    assert to_hf(tmp_path / "ours", tmp_path / "back") == 0
    written = json.loads((tmp_path / "back" / "config.json").read_text())
    assert written["rope_theta"] == 500000.0 and "rope_parameters" not in written
    assert "rope_parameters, rope_theta changed to what the model computes" in capsys.readouterr().out
