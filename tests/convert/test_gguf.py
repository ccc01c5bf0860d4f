"""What of a GGUF can be told without a file: the order of rotated rows, and what is refused."""

from pathlib import Path

import pytest
import torch

from llada_megatron.checkpoint.shards import whole
from llada_megatron.config.errors import BadInput
from llada_megatron.convert.gguf import GgufEntry, describe
from llada_megatron.convert.gguf_tokenizer import write_tokenizer

HEADS, HEAD_DIM, HIDDEN = 3, 8, 16
FIELDS = {
    "general.architecture": "llama",
    "llama.block_count": 2,
    "llama.context_length": 64,
    "llama.embedding_length": HEADS * HEAD_DIM,
    "llama.feed_forward_length": 32,
    "llama.attention.head_count": HEADS,
    "llama.attention.layer_norm_rms_epsilon": 9.999999747378752e-06,
    "llama.rope.dimension_count": HEAD_DIM,
    "tokenizer.ggml.tokens": ["a", "b"],
}


def rotated(heads_SHD: torch.Tensor, *, neighbours: bool) -> torch.Tensor:
    """Rotation by position of pairs that are neighbours (2i, 2i+1), or halves apart (i, i + D/2)."""
    S, D = heads_SHD.shape[0], heads_SHD.shape[-1]
    angles = (torch.arange(S)[:, None] * 100.0 ** (-torch.arange(D // 2) / (D // 2)))[:, None]
    shape = (-1, 2) if neighbours else (2, -1)
    first, second = heads_SHD.unflatten(-1, shape).unbind(-1 if neighbours else -2)
    turned = first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()
    return torch.stack(turned, dim=-1 if neighbours else -2).flatten(-2)


def test_undoing_the_order_of_rotated_rows_keeps_the_scores() -> None:
    shape = (HEADS * HEAD_DIM, HIDDEN)
    entry = GgufEntry(whole("q", *shape), whole("q_proj", *shape), rotated_heads=HEADS)
    query, key = torch.randn(shape, generator=torch.Generator().manual_seed(0)), torch.randn(shape)
    hidden_SH = torch.randn(5, HIDDEN)

    def scores(query: torch.Tensor, key: torch.Tensor, *, neighbours: bool) -> torch.Tensor:
        parts = ((hidden_SH @ rows.T).unflatten(-1, (HEADS, HEAD_DIM)) for rows in (query, key))
        query_SHD, key_SHD = (rotated(part, neighbours=neighbours) for part in parts)
        return torch.einsum("shd,thd->hst", query_SHD, key_SHD)

    before = scores(query, key, neighbours=True)
    after = scores(entry.to_theirs(query), entry.to_theirs(key), neighbours=False)
    torch.testing.assert_close(after, before)
    assert not torch.allclose(scores(query, key, neighbours=False), before)
    assert torch.equal(entry.to_gguf(entry.to_theirs(query)), query)


def test_the_configuration_says_what_the_metadata_say() -> None:
    described = describe(FIELDS | {"tokenizer.ggml.eos_token_id": 1}, set(), None)
    assert described["rms_norm_eps"] == 1e-5 and described["tie_word_embeddings"]
    assert described["num_key_value_heads"] == HEADS and described["head_dim"] == HEAD_DIM
    assert described["eos_token_id"] == 1 and "bos_token_id" not in described
    assert not describe(FIELDS, {"output.weight"}, None)["tie_word_embeddings"]
    assert describe(FIELDS, set(), 1)["num_hidden_layers"] == 1


@pytest.mark.parametrize(
    ("changed", "layers", "sentence"),
    [
        ({"general.architecture": "qwen2"}, None, "architecture qwen2: only llama is served"),
        ({"llama.expert_count": 8}, None, "llama.expert_count=8"),
        ({"llama.rope.scaling.type": "yarn"}, None, "llama.rope.scaling.type=yarn"),
        ({"llama.rope.scaling.factor": 4.0}, None, "llama.rope.scaling.factor=4.0"),
        ({"llama.rope.scale_linear": 2.0}, None, "llama.rope.scale_linear=2.0"),
        ({"llama.logit_scale": 0.5}, None, "llama.logit_scale=0.5"),
        ({"llama.attention.head_count": [3, 3]}, None, "head_count=.3, 3.: it must be a positive number"),
        ({"llama.attention.head_count": 0}, None, "head_count=0: it must be a positive number"),
        ({"llama.embedding_length": 24.0}, None, "embedding_length=24.0: it must be a positive number"),
        ({"llama.rope.freq_base": float("nan")}, None, "freq_base=nan: it must be a positive number"),
        ({"llama.attention.value_length": 4}, None, "values of 4 channels and keys of 8"),
        ({"llama.vocab_size": 3}, None, "no list of as many tokens as its vocabulary"),
        ({"tokenizer.ggml.tokens": None}, None, "no list of as many tokens as its vocabulary"),
        ({"llama.rope.dimension_count": 4}, None, "rotates 4 of 8 channels"),
        ({}, 3, "--layers 3 is not between 1 and the GGUF's 2 layers"),
    ],
)
def test_what_is_not_served_is_refused(changed: dict, layers: int | None, sentence: str) -> None:
    with pytest.raises(BadInput, match=sentence):
        describe(FIELDS | changed, set(), layers)


def test_factors_of_scaled_frequencies_are_refused() -> None:
    with pytest.raises(BadInput, match="holds rope_freqs"):
        describe(FIELDS, {"rope_freqs.weight"}, None)


@pytest.mark.parametrize("kind", [("gpt2", "llama-bpe"), ("llama", "default"), ("gpt2", None)])
def test_another_tokenizer_is_refused(kind: tuple[str, str | None], tmp_path: Path) -> None:
    fields = {"tokenizer.ggml.model": kind[0], "tokenizer.ggml.pre": kind[1]}
    with pytest.raises(BadInput, match="only gpt2 with smollm is served"):
        write_tokenizer(fields, tmp_path)


TOKENS = ["<end>", "1", "2", "12", "a", "Ġ", "b", "ab", "Ġab"]
TOKENIZER = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": TOKENS,
    "tokenizer.ggml.token_type": [3, *[1] * 8],
    "tokenizer.ggml.merges": ["1 2", "a b", "Ġ ab"],
}


def test_the_tokenizer_splits_digits_and_keeps_special_tokens_whole(tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    write_tokenizer(TOKENIZER, tmp_path)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert tokenizer.encode("12 ab<end>").tokens == ["1", "2", "Ġab", "<end>"]
    assert tokenizer.decode(tokenizer.encode("ab 12 ab<end>").ids) == "ab 12 ab"


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"token_type": [1]}, "9 tokens, 9 of them different, and 1 types"),
        ({"tokens": ["a", *TOKENS[1:]]}, "9 tokens, 8 of them different"),
        ({"tokens": None}, "tokenizer.ggml.tokens is no list of str"),
        ({"tokens": list(range(9))}, "tokenizer.ggml.tokens is no list of str"),
        ({"token_type": [1.0] * 9}, "tokenizer.ggml.token_type is no list of int"),
        ({"merges": "1 2"}, "tokenizer.ggml.merges is no list of str"),
        ({"merges": ["12"]}, "merges '12', of which its vocabulary lacks a token"),
        ({"merges": ["a 1"]}, "merges 'a 1', of which its vocabulary lacks a token"),
        ({"eos_token_id": 9}, "eos_token_id is 9: it has 9 tokens"),
        ({"bos_token_id": -1}, "bos_token_id is -1"),
        ({"unknown_token_id": "<end>"}, "unknown_token_id is <end>"),
    ],
)
def test_lists_that_do_not_fit_together(changed: dict, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=sentence):
        write_tokenizer(
            TOKENIZER | {f"tokenizer.ggml.{key}": each for key, each in changed.items()}, tmp_path
        )
    assert not list(tmp_path.iterdir())
