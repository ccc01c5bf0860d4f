"""Properties of the tokenizers."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llada_megatron.config.errors import BadInput
from llada_megatron.data.tokenizer import ByteTokenizer, load_tokenizer


def write_tokenizer(path, special_tokens):
    """A word-level tokenizer.json with the given special tokens after the words."""
    import tokenizers

    words = {word: number for number, word in enumerate(["[UNK]", "a", "b", "c"])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(special_tokens)
    tokenizer.save(str(path))
    return str(path)


@given(st.text(st.characters(codec="utf-8")))
def test_bytes_decode_to_the_text_they_encode(text):
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 <= token < 256 for token in ids)


def test_byte_tokenizer_drops_special_ids_and_replaces_broken_utf8():
    tokenizer = ByteTokenizer()
    assert tokenizer.decode([104, 257, 105, 256, 300]) == "hi"
    assert tokenizer.decode([0xC3, 104]) == "�h"
    assert (tokenizer.vocab_size, tokenizer.end_of_document_id, tokenizer.mask_token_id) == (258, 256, 257)


def test_special_tokens_of_a_file_are_found_by_name(tmp_path):
    tokenizer = load_tokenizer(write_tokenizer(tmp_path / "t.json", ["</s>", "<|mask|>"]))
    assert (tokenizer.end_of_document_id, tokenizer.mask_token_id, tokenizer.vocab_size) == (4, 5, 6)
    assert tokenizer.encode("a c") == [1, 3]
    assert tokenizer.decode([1, 3]) == "a c"


def test_a_file_without_a_mask_token_has_none(tmp_path):
    assert load_tokenizer(write_tokenizer(tmp_path / "t.json", ["<|endoftext|>"])).mask_token_id is None


def test_identity_differs_between_vocabularies(tmp_path):
    first = load_tokenizer(write_tokenizer(tmp_path / "1.json", ["</s>"]))
    second = load_tokenizer(write_tokenizer(tmp_path / "2.json", ["</s>", "<x>"]))
    again = load_tokenizer(write_tokenizer(tmp_path / "3.json", ["</s>"]))
    assert len({first.sha256, second.sha256, load_tokenizer("bytes").sha256}) == 3
    assert first.sha256 == again.sha256


def test_unusable_files_are_refused_with_their_path(tmp_path):
    with pytest.raises(BadInput, match=r"absent\.json does not exist"):
        load_tokenizer(str(tmp_path / "absent.json"))
    (tmp_path / "bad.json").write_text(json.dumps({"version": "1.0"}))
    with pytest.raises(BadInput, match=r"bad\.json is not a tokenizer\.json"):
        load_tokenizer(str(tmp_path / "bad.json"))
    with pytest.raises(BadInput, match="names no end-of-document token"):
        load_tokenizer(write_tokenizer(tmp_path / "t.json", ["<|mask|>"]))
