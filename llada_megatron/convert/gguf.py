"""A GGUF file of the llama architecture into a Hugging Face Llama folder: weights, configuration, tokenizer.

GGUF (github.com/ggml-org/ggml, docs/gguf.md) holds one model and its tokenizer in one file, most matrices
quantised. They are dequantised here, one at a time: what is converted is the quantised model, not the one
that was published before.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llada_megatron.checkpoint import publish
from llada_megatron.checkpoint.shards import Part, whole
from llada_megatron.config.errors import BadInput
from llada_megatron.convert import config_json
from llada_megatron.convert.certificate import Certificate, Ledger
from llada_megatron.convert.conversion import written_aside
from llada_megatron.convert.families import llama
from llada_megatron.convert.gguf_file import GgufFile, GgufTensor
from llada_megatron.convert.gguf_tokenizer import write_tokenizer
from llada_megatron.convert.loaded import model_tensors
from llada_megatron.convert.safetensors_files import SafetensorsReader, SafetensorsWriter, write_json

ARCHITECTURE = "llama"
(BECOMES,) = llama.FAMILY.architectures
MAX_FILE_BYTES = 5_000_000_000
READ = (
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "vocab_size",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "attention.layer_norm_rms_epsilon",
    "rope.dimension_count",
    "rope.freq_base",
    "tensor_data_layout",
)
"""Keys of the architecture; any other one that says something is refused."""


@dataclass(frozen=True)
class GgufEntry:
    """A tensor of the file and the Hugging Face tensor that it becomes."""

    source: Part
    target: Part
    rotated_heads: int = 0
    """Heads of a projection whose rows are ordered for rotation in neighbouring pairs; 0: any other."""

    def to_theirs(self, values: Tensor) -> Tensor:
        """Row 2i + j of a head becomes row i + j D/2: rotation pairs neighbours there, halves here."""
        if not self.rotated_heads:
            return values
        return values.unflatten(0, (self.rotated_heads, -1, 2)).transpose(1, 2).flatten(0, 2)

    def to_gguf(self, values: Tensor) -> Tensor:
        """The inverse of `to_theirs`."""
        if not self.rotated_heads:
            return values
        return values.unflatten(0, (self.rotated_heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def gguf_to_hf(
    source: Path, target: Path, *, dtype: torch.dtype = torch.float32, layers: int | None = None
) -> Certificate:
    """Write the Hugging Face folder of a GGUF file, with its first `layers` layers (None: all).

    Nothing appears at `target` unless the certificate passes. Needs process groups of one process. Raises
    BadInput for a file that cannot be read or is of a kind that is not served, and a target that exists.
    """
    file, described = read_description(source, layers)
    described["torch_dtype"] = str(dtype).removeprefix("torch.")
    entries = list(llama_entries(described))
    held = {name: tensor.shape for name, tensor in file.tensors.items()}
    certificate = Certificate("gguf-to-hf", str(source), BECOMES)
    certificate.dropped = {name: f"after the first {layers} layers" for name in held if _is_cut(name, layers)}
    model = config_json.model_config(described, 0, str(source))
    used = {name: shape for name, shape in held.items() if name not in certificate.dropped}
    certificate.compare(str(source), used, {entry.source.name: entry.source.shape for entry in entries})
    if not certificate.passed:
        return certificate
    certificate.parameters["architecture"] = model_tensors(model)[1]
    with written_aside(target) as aside, named(source):
        _convert(certificate, entries, file, aside, dtype)
        if certificate.passed:
            write_json(aside / "config.json", described)
            write_json(aside / "generation_config.json", config_json.generation_config({}, described, -1))
            write_tokenizer(file.fields, aside)
            certificate.write(aside)
            publish.give_name(aside, target)
    return certificate


def read_description(source: Path, layers: int | None) -> tuple[GgufFile, dict[str, Any]]:
    """A file and its config.json; BadInput naming the file."""
    file = _open(source)
    with named(source):
        described = describe(file.fields, {*file.tensors}, layers)
        if described["num_hidden_layers"] > len(file.tensors):
            raise BadInput(
                f"The GGUF speaks of {described['num_hidden_layers']} layers and holds {len(file.tensors)}"
                " tensors: it is damaged."
            )
    return file, described


@contextmanager
def named(source: Path) -> Iterator[None]:
    """Puts the file before what is said of its content."""
    try:
        yield
    except BadInput as fault:
        raise BadInput(f"{source}: {fault}") from None


def describe(fields: dict[str, Any], tensors: set[str], layers: int | None) -> dict[str, Any]:
    """config.json of a GGUF's metadata; BadInput for what it cannot express."""
    _require_known(fields, tensors)

    def get(key: str, otherwise: Any = None) -> Any:
        """A positive number, whole but for an epsilon and a base."""
        kinds = (int, float) if key.endswith(("epsilon", "freq_base")) else (int,)
        value = fields.get(f"{ARCHITECTURE}.{key}", otherwise)
        if value is None:
            raise BadInput(f"The GGUF has no '{ARCHITECTURE}.{key}'.")
        if type(value) not in kinds or not 0 < value < math.inf:
            raise BadInput(
                f"The GGUF sets {ARCHITECTURE}.{key}={str(value)[:80]}: it must be a positive number."
            )
        return value

    hidden, heads = get("embedding_length"), get("attention.head_count")
    head_dim = get("attention.key_length", hidden // heads or None)
    tokens = fields.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or get("vocab_size", len(tokens)) != len(tokens):
        raise BadInput("The GGUF has no list of as many tokens as its vocabulary: tokenizer.ggml.tokens.")
    if get("attention.value_length", head_dim) != head_dim:
        raise BadInput(
            f"The GGUF has values of {get('attention.value_length')} channels and keys of {head_dim}:"
            " only equal ones are served."
        )
    if get("rope.dimension_count") != head_dim:
        raise BadInput(
            f"The GGUF rotates {get('rope.dimension_count')} of {head_dim} channels: only all are served."
        )
    if layers is not None and not 0 < layers <= get("block_count"):
        raise BadInput(f"--layers {layers} is not between 1 and the GGUF's {get('block_count')} layers.")
    if not isinstance(fields.get("tokenizer.ggml.tokens"), list):
        raise BadInput("The GGUF has no 'tokenizer.ggml.tokens'.")
    ids = {
        f"{name}_token_id": fields.get(f"tokenizer.ggml.{key}_token_id")
        for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
    }
    return {
        "architectures": [BECOMES],
        **llama.FAMILY.architectures[BECOMES],
        **llama.FAMILY.fixed,
        "vocab_size": len(tokens),
        "hidden_size": hidden,
        "intermediate_size": get("feed_forward_length"),
        "num_hidden_layers": layers or get("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": get("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": get("context_length"),
        "rope_theta": get("rope.freq_base", 10000.0),
        # The file holds a float32, where 1e-5 is 9.999999747378752e-06.
        "rms_norm_eps": float(f"{get('attention.layer_norm_rms_epsilon'):.6g}"),
        "tie_word_embeddings": "output.weight" not in tensors,
    } | {key: value for key, value in ids.items() if value is not None}


def _require_known(fields: dict[str, Any], tensors: set[str]) -> None:
    """Raise BadInput for another architecture, and what would act and is not read."""
    if fields.get("general.architecture") != ARCHITECTURE:
        found = fields.get("general.architecture")
        raise BadInput(f"The GGUF is of architecture {found}: only {ARCHITECTURE} is served.")
    for key, value in fields.items():
        acts = key.startswith(f"{ARCHITECTURE}.") and value not in (0, 0.0, "none", "")
        if acts and key.removeprefix(f"{ARCHITECTURE}.") not in READ:
            raise BadInput(f"The GGUF sets {key}={str(value)[:80]}, which is not served.")
    if "rope_freqs.weight" in tensors:
        raise BadInput(
            "The GGUF holds rope_freqs.weight, factors of scaled frequencies, which are not served."
        )


def llama_entries(described: dict[str, Any]) -> Iterator[GgufEntry]:
    """Every tensor of a GGUF whose config.json is `described`."""
    H, D, W = described["hidden_size"], described["head_dim"], described["intermediate_size"]
    V, heads, kv_heads = (
        described[key] for key in ("vocab_size", "num_attention_heads", "num_key_value_heads")
    )

    def entry(source: str, target: str, *shape: int, rotated_heads: int = 0) -> GgufEntry:
        parts = whole(f"{source}.weight", *shape), whole(f"{target}.weight", *shape)
        return GgufEntry(*parts, rotated_heads)

    yield entry("token_embd", "model.embed_tokens", V, H)
    for layer in range(described["num_hidden_layers"]):
        source, target = f"blk.{layer}", f"model.layers.{layer}"
        yield entry(f"{source}.attn_norm", f"{target}.input_layernorm", H)
        attention = f"{target}.self_attn"
        yield entry(f"{source}.attn_q", f"{attention}.q_proj", heads * D, H, rotated_heads=heads)
        yield entry(f"{source}.attn_k", f"{attention}.k_proj", kv_heads * D, H, rotated_heads=kv_heads)
        yield entry(f"{source}.attn_v", f"{attention}.v_proj", kv_heads * D, H)
        yield entry(f"{source}.attn_output", f"{attention}.o_proj", H, heads * D)
        yield entry(f"{source}.ffn_norm", f"{target}.post_attention_layernorm", H)
        yield entry(f"{source}.ffn_gate", f"{target}.mlp.gate_proj", W, H)
        yield entry(f"{source}.ffn_up", f"{target}.mlp.up_proj", W, H)
        yield entry(f"{source}.ffn_down", f"{target}.mlp.down_proj", H, W)
    yield entry("output_norm", "model.norm", H)
    if not described["tie_word_embeddings"]:
        yield entry("output", "lm_head", V, H)


def _open(source: Path) -> GgufFile:
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise BadInput("Reading GGUF files needs the package gguf: install it, `pip install gguf`.") from None
    if not source.is_file():
        raise BadInput(f"{source} does not exist: give a .gguf file.")
    return GgufFile(source)


def dequantised(tensor: GgufTensor) -> Tensor:
    from gguf import dequantize
    from gguf.quants import quant_shape_to_byte_shape

    rows = tensor.data.reshape(quant_shape_to_byte_shape(tensor.shape, tensor.kind))
    try:
        values = dequantize(rows, tensor.kind)
    except NotImplementedError:
        raise BadInput(
            f"{tensor.name} is of type {tensor.kind.name}, which gguf cannot dequantise: choose another file."
        ) from None
    return torch.from_numpy(values.reshape(tensor.shape).copy()).float()


def _is_cut(name: str, layers: int | None) -> bool:
    layer = re.match(r"blk\.(\d{1,9})\.", name)
    return layers is not None and layer is not None and int(layer[1]) >= layers


def _convert(
    certificate: Certificate, entries: list[GgufEntry], file: GgufFile, aside: Path, dtype: torch.dtype
) -> None:
    """Write tensor by tensor, then read the folder and convert it back to compare hashes."""
    tensors = file.tensors
    source, target, again = (Ledger(side) for side in ("source", "target", "the result"))
    writer = SafetensorsWriter(
        aside, {entry.target.name: (dtype, entry.target.shape) for entry in entries}, MAX_FILE_BYTES
    )
    for entry in entries:
        values = dequantised(tensors[entry.source.name])
        source.record(entry.source, values)
        converted = entry.to_theirs(values).to(dtype).contiguous()
        target.record(entry.target, converted)
        writer.write(entry.target, converted)
    writer.finish()
    result, convert_back = SafetensorsReader(aside), dtype is torch.float32
    for entry in entries:
        values = result.read(entry.target)
        if convert_back:
            again.record(entry.source, entry.to_gguf(values))
        else:
            again.record(entry.target, values)
    certificate.gguf, certificate.hugging_face = source.as_json(), target.as_json()
    for ledger in (source, target, again):
        certificate.problems += ledger.problems
    if convert_back:
        certificate.same_hashes("the result, read and converted back,", again, source)
    else:
        certificate.same_hashes("the result, read again,", again, target)
    certificate.count_parameters(sum(math.prod(shape) for shape in target.shapes().values()))
    kinds = sorted({tensors[entry.source.name].kind.name for entry in entries})
    reason = f"the numbers were dequantised from {', '.join(kinds)}"
    certificate.logits = {"compared": False, "reason": reason}
