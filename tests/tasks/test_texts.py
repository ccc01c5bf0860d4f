"""Likelihoods of a user's text through lm-eval, with a model whose likelihoods are known."""

import math
from pathlib import Path
from typing import Any

import pytest

from llada_megatron.config.errors import BadInput
from llada_megatron.harness import tasks
from llada_megatron.tasks import texts, trivia
from llada_megatron.tasks.data_packages import FOLDER


def evaluate(name: str) -> dict[str, Any]:
    """lm-eval's results with a model that gives each byte a bit, and each z one more."""
    import lm_eval
    from lm_eval.api.model import LM

    class Counting(LM):
        def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
            return [self._nats(request.args[0]) for request in requests]

        def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
            return [(self._nats(request.args[1]), False) for request in requests]

        def generate_until(self, requests: list[Any]) -> list[str]:
            raise NotImplementedError

        def _nats(self, text: str) -> float:
            return -math.log(2) * (len(text.encode()) + text.count("z"))

    loaded: Any = tasks.load([name], [], fewshot=None)
    return lm_eval.evaluate(Counting(), loaded, bootstrap_iters=2)["results"][name]


def test_bits_per_byte_and_its_error_are_those_of_all_documents_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "abcd ü"}\n\n{"text": ""}\n{"text": "z zz", "id": 3}\n')
    (tmp_path / "b.txt").write_text("{{not}} a template")
    (tmp_path / "c.md").write_text("no document")
    monkeypatch.setenv(texts.VARIABLE, str(tmp_path))
    found = evaluate("perplexity")
    sizes, bits = [7, 4, 18], [7, 7, 18]
    ratio = sum(bits) / sum(sizes)
    assert found["bits_per_byte,none"] == pytest.approx(ratio)
    assert found["byte_perplexity,none"] == pytest.approx(2**ratio)
    assert found["word_perplexity,none"] == pytest.approx(2 ** (sum(bits) / 7))
    spread = sum((bit - ratio * size) ** 2 for bit, size in zip(bits, sizes, strict=True))
    assert found["bits_per_byte_stderr,none"] == pytest.approx(math.sqrt(3 / 2 * spread) / sum(sizes))


def test_the_error_of_a_ratio_is_that_of_a_mean_where_documents_are_equally_long() -> None:
    bits = [10.0, 12.0, 17.0, 9.0]
    items = [(-math.log(2) * bit, 10) for bit in bits]
    mean = sum(bits) / 4
    deviation = math.sqrt(sum((bit - mean) ** 2 for bit in bits) / 3)
    assert texts.bits_per_byte_stderr(items) == pytest.approx(deviation / math.sqrt(4) / 10)
    assert texts.bits_per_byte_stderr(items[:1]) == "N/A"


def test_text8_is_cut_into_equal_pieces_and_has_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "text8"
    path.write_text("a" * 256 + "z" * 256 + "ab" * 100)
    monkeypatch.setenv(texts.VARIABLE, str(path))
    found = evaluate("text8_bpc")
    assert found["bits_per_character,none"] == pytest.approx(1.5)
    assert found["bits_per_character_stderr,none"] == pytest.approx(0.5)


def test_of_text8_itself_the_last_part_is_the_test_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(texts, "TEXT8_LENGTH", 1000)
    monkeypatch.setattr(texts, "TEXT8_TEST", 300)
    path = tmp_path / "text8"
    path.write_text("a" * 700 + "b" * 300)
    assert texts.text8(data=str(path), length=150)["test"]["text"] == ["b" * 150, "b" * 150]


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.jsonl", '{"texts": "a"}', r"line 1, has no 'text'"),
        ("a.jsonl", '{"text": "a"}\n{"text"', r"line 2, is not JSON"),
        ("a.jsonl", '{"text": ""}', r"holds no document"),
    ],
)
def test_text_that_cannot_be_read_is_named(tmp_path: Path, name: str, content: str, sentence: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(BadInput, match=sentence):
        texts.documents(data=str(tmp_path / name))


def test_without_text_a_task_says_where_it_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(texts.VARIABLE, raising=False)
    with pytest.raises(BadInput, match=r"needs your text: let LLADA_EVAL_TEXT be a \.jsonl file"):
        texts.documents()
    with pytest.raises(BadInput, match="does not exist"):
        texts.documents(data=str(tmp_path / "none.txt"))
    (tmp_path / "text8").write_text("Upper case")
    with pytest.raises(BadInput, match="holds 'U': text8 is lower-case"):
        texts.text8(data=str(tmp_path / "text8"))
    (tmp_path / "text8").write_text("short\n")
    with pytest.raises(BadInput, match="has 5 characters: a piece has 256"):
        texts.text8(data=str(tmp_path / "text8"))


@pytest.mark.skipif(not FOLDER.is_dir(), reason="needs the packages that `make eval-data` installs")
def test_of_four_answers_one_is_right_and_likelihoods_choose() -> None:
    rows = trivia.documents()["test"].to_list()
    assert len(rows) == 289
    asked: dict[str, set[str]] = {}
    for row in rows:
        asked.setdefault(row["question"].casefold(), set()).add(row["choices"][row["gold"]].casefold())
    for row in rows:
        folded = [choice.casefold() for choice in row["choices"]]
        assert len({*folded}) == 4
        assert sum(choice in asked[row["question"].casefold()] for choice in folded) == 1
    assert {row["gold"] for row in rows} == {0, 1, 2, 3}
    assert rows == trivia.documents()["test"].to_list()
    shortest = [min(range(4), key=lambda at, row=row: len(row["choices"][at].encode())) for row in rows]
    right = sum(at == row["gold"] for at, row in zip(shortest, rows, strict=True))
    assert evaluate("arc_like")["acc,none"] == pytest.approx(right / len(rows), abs=0.02)  # but for the z


def test_another_right_answer_is_never_among_the_wrong_ones() -> None:
    pairs = [("Who?", "one"), ("who?", "two"), ("b", "ONE"), ("b", "three"), ("c", "four"), ("d", "five")]
    for topic in map(str, range(20)):  # that many draws
        item = trivia._item(topic, 0, pairs)
        assert {*item["choices"]} == {"one", "three", "four", "five"}
        assert item["choices"][item["gold"]] == "one"
