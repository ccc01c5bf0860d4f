"""Properties of the tokenizers."""

import json

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from llada_megatron.config.errors import BadInput
from llada_megatron.data.tokenizer import ByteTokenizer, load_tokenizer


def write_tokenizer(path, special_tokens):
    """A word-level tokenizer.json with the given special tokens after the words."""
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
    words = json.loads((tmp_path / write_tokenizer(tmp_path / "t.json", ["</s>"])).read_text())
    words["added_tokens"], words["model"]["vocab"] = [], {}
    for content, message in [
        (b"[" * 100_000, "is not a tokenizer"),
        (b"\xff\xfe", "is not a tokenizer"),
        (json.dumps(words).encode(), "has an empty vocabulary"),
        (json.dumps(words).replace('"vocab": {}', '"vocab": {"a": 2147483648}').encode(), "has an id above"),
    ]:
        (tmp_path / "bad.json").write_bytes(content)
        with pytest.raises(BadInput, match=rf"bad\.json {message}"):
            load_tokenizer(str(tmp_path / "bad.json"))


def test_an_end_of_document_that_nobody_knows_is_none_until_it_is_named(tmp_path):
    path = write_tokenizer(tmp_path / "t.json", ["<|stop|>"])
    assert load_tokenizer(path).end_of_document_id is None  # a run that reads token files needs none
    named = load_tokenizer(path, "<|stop|>")
    assert (named.end_of_document, named.end_of_document_id) == ("<|stop|>", 4)
    assert named.sha256 == load_tokenizer(path).sha256
    with pytest.raises(BadInput, match=r"t\.json has no token '<\|end\|>': choose another --end-of-document"):
        load_tokenizer(path, "<|end|>")
    with pytest.raises(BadInput, match="--end-of-document belongs to a tokenizer"):
        load_tokenizer("bytes", "<|end|>")


def byte_level(path, **settings):
    """A BPE over bytes without merges, with the settings of a file that was saved for another use."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: number for number, character in enumerate(alphabet)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>", "<|mask|>", "<|im_start|>"])
    tokenizer.save(str(path))
    content = json.loads(path.read_text())
    content["model"].update(settings.pop("model", {}))
    path.write_text(json.dumps(content | settings))
    return str(path)


TEMPLATE = {
    "type": "TemplateProcessing",
    "single": [
        {"SpecialToken": {"id": "<|im_start|>", "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
        {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}},
    ],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
    "special_tokens": {
        name: {"id": name, "ids": [number], "tokens": [name]}
        for name, number in (("<|endoftext|>", 256), ("<|im_start|>", 258))
    },
}
PADDING = {"direction": "Right", "pad_to_multiple_of": None, "pad_id": 258, "pad_type_id": 0}
SETTINGS = {
    "truncation": (
        {"truncation": {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}},
        "its truncation at 4 tokens is switched off",
    ),
    "padding": (
        {"padding": PADDING | {"strategy": {"Fixed": 50}, "pad_token": "<|im_start|>"}},
        "its padding to 50 tokens is switched off",
    ),
    "padding of batches": (
        {"padding": PADDING | {"strategy": "BatchLongest", "pad_token": "<|im_start|>"}},
        "its padding is switched off",
    ),
    "dropout": ({"model": {"dropout": 0.5}}, "its dropout of merges (0.5) is switched off"),
    "post-processor": (
        {"post_processor": TEMPLATE},
        "its post-processor's 2 special tokens a text are left out",
    ),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_what_a_file_asks_for_beside_its_vocabulary_is_switched_off_and_said(tmp_path, name):
    settings, note = SETTINGS[name]
    plain = load_tokenizer(byte_level(tmp_path / "plain.json"))
    other = load_tokenizer(byte_level(tmp_path / "other.json", **settings))
    text = "a text of more than four tokens"
    assert (plain.notes, other.notes) == ((), (note,))
    assert other.encode(text) == plain.encode(text)
    assert len(plain.encode(text)) == len(text)


def test_a_special_tokens_name_in_a_text_is_text_unless_it_is_asked_for(tmp_path):
    tokenizer = load_tokenizer(byte_level(tmp_path / "t.json"))
    text = "a <|endoftext|><|im_start|> b<|mask|>"
    ids = tokenizer.encode(text)
    assert max(ids) < 256
    assert tokenizer.decode(ids) == text
    parsed = tokenizer.encode(text, parse_special=True)
    assert [token for token in parsed if token >= 256] == [256, 258, 257]
    assert tokenizer.encode(text) == ids  # asking once leaves nothing behind
    assert tokenizer.special_strings(text) == 3
    assert tokenizer.special_strings("<|endoftext> <|mask |>") == 0


def test_the_mask_in_the_plain_vocabulary_is_still_seen(tmp_path):
    words = {"[UNK]": 0, "a": 1, "</s>": 2, "[MASK]": 3}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(tmp_path / "t.json"))
    loaded = load_tokenizer(str(tmp_path / "t.json"))
    assert loaded.encode("a [MASK] </s> b") == [1, 3, 2, 0]
    assert loaded.special_strings("a [MASK] </s> b") == 2
    assert (loaded.mask_token_id, loaded.end_of_document_id, loaded.unknown_token_id) == (3, 2, 0)


def test_a_text_that_the_file_cannot_express_is_a_sentence(tmp_path):
    path = tmp_path / "tokenizer.json"
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"</s>": 0, "a": 1}, unk_token="[UNK]"))
    tokenizer.save(str(path))
    with pytest.raises(BadInput, match=rf"{path} cannot encode a text: "):
        load_tokenizer(str(path)).encode("b")
