"""The benchmark of decoding fails where a cache changes a token, and its figures belong together."""

import json
from pathlib import Path

import pytest

from llada_megatron import cli
from llada_megatron.bench import decode
from tests.distributed import run_ranks

FEW = ["--prompt-tokens", "20", "--new-tokens", "12", "--batch", "2", "--block-size", "8"]
SMALL = ["model=tiny", "data.sequence_length=64"]


def measured(json_file: Path, change: int, *options: str) -> int:
    """The exit code of the verb, where the loop without a cache says another last token by `change`."""

    def changed(*arguments):
        tokens = uncached(*arguments)
        tokens[11] += change
        return tokens

    uncached, decode.uncached = decode.uncached, changed
    rules = ["--rule", "threshold,lopa"] if not options else ["--rule", "threshold,factor"]
    return cli.main(["bench", "decode", *rules, *FEW, *options, "--json", str(json_file), *SMALL])


@pytest.mark.parametrize("change", [0, 1])
def test_equal_tokens_come_first(tmp_path, change):
    assert run_ranks(measured, tmp_path / "decode.json", change) == [change]
    record = json.loads((tmp_path / "decode.json").read_text())
    assert (record["block_size"], record["prompt_tokens"], record["new_tokens"]) == (8, 20, 12)
    assert [one["name"] for one in record["rules"]] == ["threshold", "lopa"]
    for one in record["rules"]:
        assert one["tokens_equal"] is not bool(change)
        assert 1 <= one["tokens_per_forward"] <= 8
        assert one["speedup"] == pytest.approx(one["tokens_per_sec"] / one["uncached_tokens_per_sec"])
        assert one["batch_speedup"] == pytest.approx(one["batch_tokens_per_sec"] / one["tokens_per_sec"])
        assert one["batch"] == 2 and one["share_of_bound"] > 0


@pytest.mark.parametrize(("options", "code"), [([], 1), (["--cache", "dual"], 0)], ids=["exact", "dual"])
def test_tokens_of_a_cache_that_is_an_approximation_may_differ(tmp_path, options, code):
    file = tmp_path / "decode.json"
    assert run_ranks(measured, file, 1, "--full-attention", *options) == [code]
    record = json.loads(file.read_text())
    assert record["is_exact"] is bool(code)
    agreement = record["rules"][0]["agreement"]
    assert agreement == pytest.approx(11 / 12) if code else 0 <= agreement < 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--rule", "best"], "There is no rule 'best': give threshold"),
        (["--new-tokens", "60"], "20 tokens of a prompt and 60 new ones are more than the context of 64"),
        (["--batch", "0"], "--batch 0: give at least 1."),
    ],
)
def test_what_cannot_be_measured_is_one_sentence(capsys, arguments, said):
    assert cli.main(["bench", "decode", *FEW, *arguments, *SMALL]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
