"""Held-out text: its domains, what is too short for one, and what is found out once."""

import json
import os

import pytest

from llada_megatron.data.prepare import prepare_corpus
from tests.distributed import run_ranks
from tests.evaluate.test_likelihood import SEQUENCES, config_of, every_estimate, with_evaluator
from tests.training.runs import TWO


def test_each_entry_of_data_validation_is_a_domain_with_figures_of_its_own(corpus, tmp_path):
    """They do not depend on the other domains."""
    shards = tmp_path / "held_out"
    shards.mkdir()
    for number in range(2):
        for suffix in ("bin", "idx", "json"):
            os.link(f"{corpus}.{suffix}", shards / f"part_{number}.{suffix}")
    both, alone = f"data.validation=[{shards}/part_*,{corpus}]", f"data.validation=[{corpus}]"
    apart = ["data.split='1,0'", f"data.cache_dir={tmp_path}/cache"]
    (made,) = run_ranks(with_evaluator, config_of(corpus, tmp_path, both, *apart), every_estimate)
    (one,) = run_ranks(with_evaluator, config_of(corpus, tmp_path, alone, *apart), every_estimate)
    assert made["sequences"] == 2 * SEQUENCES and one["sequences"] == SEQUENCES
    for size, bound in made["bounds"].items():
        own = bound["domains"]
        assert list(own) == ["part", "text"]
        assert own["text"] == pytest.approx(one["bounds"][size], rel=1e-5)
        assert bound["mean"] == pytest.approx((own["part"]["mean"] + own["text"]["mean"]) / 2)
        assert "domains" not in one["bounds"][size]
    assert list(made["ar"]["domains"]) == ["part", "text"]


def test_a_tail_below_one_sequence_leaves_its_corpus_out_of_evaluations_alone(corpus, tmp_path):
    texts = ["abc" * 99] * 7 + ["short"] * 2
    (tmp_path / "few.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    prepare_corpus([tmp_path / "few.jsonl"], tmp_path / "few", workers=1)
    config = config_of(f"{corpus},{tmp_path}/few", tmp_path)
    (made,) = run_ranks(with_evaluator, config, every_estimate)
    assert made["sequences"] == SEQUENCES and "domains" not in made["ar"]


def test_entropies_are_found_out_once_and_by_one_rank(corpus, tmp_path):
    config = config_of(corpus, tmp_path, TWO, f"data.cache_dir={tmp_path}/cache")
    first, again = (run_ranks(entropies_and_calls, config, processes=2) for _ in range(2))
    assert [calls for _, calls in first] == [1, 0] and [calls for _, calls in again] == [0, 0]
    assert len({str(found) for found, _ in first + again}) == 1


def entropies_and_calls(config):
    from unittest import mock

    from llada_megatron.evaluate import held_out
    from llada_megatron.parallel import groups

    groups.initialize(config.layout)
    with mock.patch.object(held_out, "entropies", wraps=held_out.entropies) as computed:
        return held_out.HeldOut(config).entropies, computed.call_count
