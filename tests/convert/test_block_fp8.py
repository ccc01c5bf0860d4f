"""fp8 with a scale per block becomes the numbers it stands for, or the certificate fails."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from llada_megatron.checkpoint.shards import Part, whole
from llada_megatron.convert import block_fp8
from llada_megatron.convert.reference_files import ReferenceFiles
from llada_megatron.convert.safetensors_files import SafetensorsReader
from tests.convert import checkpoints
from tests.convert.test_round_trip import certificate, to_hf, to_mcore

GATE = "model.layers.0.mlp.gate_proj.weight"


def write_matrix(folder: Path, rows: int, columns: int) -> Tensor:
    """A quantised matrix alone, and the numbers that it stands for, one by one."""
    generator = torch.Generator().manual_seed(0)
    stored = torch.randn(rows, columns, generator=generator).to(torch.float8_e4m3fn)
    scales = torch.rand(-(-rows // 128), -(-columns // 128), generator=generator) + 0.1
    folder.mkdir(exist_ok=True)
    save_file({"w": stored, "w_scale_inv": scales}, folder / "model.safetensors")
    expected = torch.empty(rows, columns)
    for row in range(rows):
        for column in range(0, columns, 128):
            part = stored[row, column : column + 128].float()
            expected[row, column : column + 128] = part * scales[row // 128, column // 128]
    return expected


@pytest.mark.parametrize("shape", [(128, 128), (64, 300), (300, 64), (257, 129), (1, 1)])
def test_every_element_has_the_scale_of_its_block(shape: tuple[int, int], tmp_path: Path) -> None:
    expected = write_matrix(tmp_path, *shape)
    reader = SafetensorsReader(tmp_path)
    assert reader.shapes() == {"w": shape} and reader.quantised() == ["w"]
    for dtype in (torch.float32, torch.bfloat16):
        reader.dequantised = dtype
        assert torch.equal(reader.read(whole("w", *shape)), expected.to(dtype))
        assert torch.equal(ReferenceFiles(tmp_path, dtype).read(whole("w", *shape)), expected.to(dtype))


def test_rows_in_the_middle_of_a_block(tmp_path: Path) -> None:
    expected = write_matrix(tmp_path, 300, 200)
    reader = SafetensorsReader(tmp_path)
    reader.dequantised = torch.float32
    part = Part("w", (300, 200), (100, 0), (170, 200))
    assert torch.equal(reader.read(part), expected[100:270])
    assert torch.equal(ReferenceFiles(tmp_path, torch.float32).read(part), expected[100:270])


def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Matrices of several blocks, the last ones smaller."""
    monkeypatch.setattr(checkpoints, "DENSE_WIDTH", 160)
    monkeypatch.setattr(checkpoints, "HIDDEN", 192)
    changed = {"hidden_size": 192, "intermediate_size": 160}
    monkeypatch.setattr(checkpoints, "MOE", checkpoints.MOE | changed)
    monkeypatch.setattr(checkpoints, "DEEPSEEK_V3", checkpoints.DEEPSEEK_V3 | changed)
    monkeypatch.setattr(checkpoints, "LLAMA", checkpoints.LLAMA | changed | {"head_dim": 16})


@pytest.mark.parametrize(
    "kind", ["bailing_mtp", "llama", pytest.param("deepseek_v3_mtp", marks=pytest.mark.slow)]
)
def test_a_quantised_checkpoint_gets_its_certificate_and_leaves_without_a_word_of_fp8(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wide(monkeypatch)
    source = checkpoints.quantise(checkpoints.write(tmp_path / "source", kind))
    assert to_mcore(source, tmp_path / "ours") == 0
    stored = load_file(source / "model.safetensors")
    quantised = [name for name in stored if name.endswith("_scale_inv")]
    assert (
        f"{len(quantised)} matrices in fp8 with a scale per 128 x 128 became bfloat16"
        in capsys.readouterr().out
    )
    found = certificate(tmp_path / "ours")
    assert found["passed"] and found["logits"]["compared"]
    assert not any(name.endswith("_scale_inv") for name in found["hugging_face"])
    assert to_hf(tmp_path / "ours", tmp_path / "back") == 0
    back, plain = load_file(tmp_path / "back" / "model.safetensors"), ReferenceFiles(source)
    assert back.keys() == stored.keys() - {*quantised} - found["dropped"].keys()
    for name, tensor in back.items():
        assert torch.equal(tensor, plain.read(whole(name, *tensor.shape))), name
    described = json.loads((tmp_path / "back" / "config.json").read_text())
    assert "quantization_config" not in described and described["torch_dtype"] == "bfloat16"


def test_the_type_is_the_one_that_config_json_states(tmp_path: Path) -> None:
    source = checkpoints.quantise(checkpoints.write(tmp_path / "source", "llama"))
    described = json.loads((source / "config.json").read_text())
    del described["torch_dtype"]
    (source / "config.json").write_text(json.dumps(described | {"dtype": "float32"}))
    assert to_mcore(source, tmp_path / "ours") == 0
    assert certificate(tmp_path / "ours")["hugging_face"][GATE]["dtype"] == "F32"


def scales_transposed(values: Tensor, scales: Tensor, first_row: int, dtype: torch.dtype) -> Tensor:
    if scales.shape[0] == scales.shape[1]:  # of another shape the reader refuses them
        scales = scales.T.contiguous()
    factors = torch.kron(scales, torch.ones(128, 128))[: len(values), : values.shape[1]]
    return (values.float() * factors).to(dtype)


def scales_divided(values: Tensor, scales: Tensor, first_row: int, dtype: torch.dtype) -> Tensor:
    return block_fp8_dequantised(values, 1 / scales, first_row, dtype)


def scales_forgotten(values: Tensor, scales: Tensor, first_row: int, dtype: torch.dtype) -> Tensor:
    return values.to(dtype)


block_fp8_dequantised = block_fp8.dequantised


@pytest.mark.parametrize("error", [scales_transposed, scales_divided, scales_forgotten])
def test_an_error_in_dequantising_fails_the_certificate(
    error: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wide(monkeypatch)
    source = checkpoints.quantise(checkpoints.write(tmp_path / "source", "llama"))
    monkeypatch.setattr(block_fp8, "dequantised", error)
    assert to_mcore(source, tmp_path / "ours") == 1
    assert "logits differ" in capsys.readouterr().out


def edited(**changed: Callable[[Tensor], Tensor] | None) -> Callable[[Path], None]:
    """The scales (`scale`) or the numbers (`weight`) of one matrix, altered or left out."""

    def edit(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        for what, change in changed.items():
            name = GATE + ("_scale_inv" if what == "scale" else "")
            tensor = tensors.pop(name)
            if change is not None:
                tensors[name] = change(tensor).contiguous()
        save_file(tensors, folder / "model.safetensors")

    return edit


def stated(**how: object) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        described = json.loads((folder / "config.json").read_text())
        described["quantization_config"] |= how
        (folder / "config.json").write_text(json.dumps(described))

    return edit


BAD = [
    (edited(scale=lambda s: torch.cat([s, s])), f"{GATE}_scale_inv in"),
    (edited(scale=lambda s: s.T), "a matrix with a scale per block of 128 x 128 would have [2, 3]"),
    (edited(scale=lambda s: s.flatten()[0]), "would have [2, 3]"),
    (edited(scale=None), f"without {GATE}_scale_inv: only fp8 with a scale per block"),
    (edited(weight=lambda w: w.bfloat16()), f"{GATE} is BF16: a tensor with scales must be F8_E4M3"),
    (edited(weight=lambda w: w.reshape(2, -1, w.shape[1])), "only matrices are served"),
    (edited(weight=lambda w: w.float().to(torch.float8_e5m2)), "is of type F8_E5M2"),
    (edited(scale=lambda s: s * torch.nan), f"{GATE}_scale_inv in"),
    (edited(scale=lambda s: -s), "holds a factor that is no finite one"),
    (stated(weight_block_size=[64, 64]), "weight_block_size=[64, 64], and its tensors are fp8"),
    (stated(quant_method="gptq"), "quant_method='gptq', and its tensors are fp8: only fp8 is served"),
    (stated(fmt="e5m2"), "fmt='e5m2'"),
]


@pytest.mark.parametrize("damage, sentence", BAD, ids=[sentence[:40] for _, sentence in BAD])
def test_fp8_that_is_not_what_it_should_be(
    damage: Callable[[Path], None],
    sentence: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    wide(monkeypatch)
    monkeypatch.setattr(checkpoints, "HIDDEN", 288)
    monkeypatch.setattr(checkpoints, "LLAMA", checkpoints.LLAMA | {"hidden_size": 288})
    source = checkpoints.quantise(checkpoints.write(tmp_path / "source", "llama"))
    monkeypatch.undo()
    damage(source)
    assert to_mcore(source, tmp_path / "ours") == 2
    said = capsys.readouterr().err
    assert sentence in said and said.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
