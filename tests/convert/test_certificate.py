"""A table with an error in it does not get its certificate, in either direction, and nothing is published."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from llada_megatron.convert import families
from llada_megatron.convert.families import ExpertLayout, bailing
from llada_megatron.convert.mapping import Entry
from tests.convert import checkpoints
from tests.convert.test_round_trip import to_hf, to_mcore

Entries = Iterator[Entry]
EXPERT = "model.layers.1.mlp.experts.3.down_proj.weight"


@dataclass(frozen=True)
class Transposed(Entry):
    """Wrong in both directions, so that it undoes itself."""

    def to_ours(self, theirs):
        return [theirs[0].T.contiguous()]

    def to_theirs(self, ours):
        return [ours[0].T.contiguous()]


@dataclass(frozen=True)
class OneWay(Entry):
    """Right on the way in alone."""

    def to_theirs(self, ours):
        return [self.heads.ungroup(ours[0]).roll(checkpoints.HEAD_DIM, 0)]


def one_expert_is_skipped(entries: Entries) -> Entries:
    return (entry for entry in entries if entry.theirs[0].name != EXPERT)


def one_expert_is_written_twice(entries: Entries) -> Entries:
    for entry in entries:
        yield entry
        if entry.theirs[0].name == EXPERT:
            yield entry


def two_experts_are_exchanged(entries: Entries) -> Entries:
    other = {EXPERT: EXPERT.replace(".3.", ".4."), EXPERT.replace(".3.", ".4."): EXPERT}
    for entry in entries:
        part = entry.theirs[0]
        yield replace(entry, theirs=(replace(part, name=other.get(part.name, part.name)), *entry.theirs[1:]))


def a_square_matrix_is_transposed(entries: Entries) -> Entries:
    for entry in entries:
        dense = entry.theirs[0].name == "model.layers.1.attention.dense.weight"
        yield Transposed(entry.ours, entry.theirs) if dense else entry


def rows_of_qkv_are_not_grouped(entries: Entries) -> Entries:
    return (replace(entry, heads=None) for entry in entries)


def rows_of_qkv_leave_in_another_order(entries: Entries) -> Entries:
    return (OneWay(entry.ours, entry.theirs, entry.heads) if entry.heads else entry for entry in entries)


def gate_and_up_are_exchanged(entries: Entries) -> Entries:
    names = {"gate_proj": "up_proj", "up_proj": "gate_proj"}
    for entry in entries:
        part = entry.theirs[0]
        word = next((word for word in names if f".shared_experts.{word}" in part.name), None)
        name = part.name.replace(word, names[word]) if word else part.name
        yield replace(entry, theirs=(replace(part, name=name), *entry.theirs[1:]))


def the_expert_bias_is_missing(entries: Entries) -> Entries:
    return (entry for entry in entries if not entry.ours.name.endswith("expert_bias"))


def a_norm_is_missing(entries: Entries) -> Entries:
    return (entry for entry in entries if not entry.ours.name.endswith("1.pre_mlp_layernorm.weight"))


MUTATIONS = [
    (one_expert_is_skipped, "3.down_proj.weight", "experts.experts.linear_fc2.weight"),
    (one_expert_is_written_twice, "after", "after"),
    (two_experts_are_exchanged, "logits differ", "logits differ"),
    (a_square_matrix_is_transposed, "logits differ", "logits differ"),
    (rows_of_qkv_are_not_grouped, "logits differ", "logits differ"),
    (rows_of_qkv_leave_in_another_order, "converted back, has other numbers", "converted back, has other"),
    (gate_and_up_are_exchanged, "logits differ", "logits differ"),
    (the_expert_bias_is_missing, "the mapping table lacks", "the mapping table lacks"),
    (a_norm_is_missing, "the mapping table lacks", "the mapping table lacks"),
]


@pytest.fixture(scope="module")
def both_sides(tmp_path_factory) -> tuple[Path, Path]:
    """A Hugging Face checkpoint, and what the right table makes of it."""
    folder = tmp_path_factory.mktemp("both")
    source = checkpoints.write(folder / "source", "llada2")
    assert to_mcore(source, folder / "ours") == 0
    return source, folder / "ours"


@pytest.mark.parametrize(
    "mutation, inward, outward", MUTATIONS, ids=lambda value: getattr(value, "__name__", "")
)
def test_an_error_in_the_table_fails_both_ways(
    mutation: Callable[[Entries], Entries],
    inward: str,
    outward: str,
    both_sides,
    tmp_path,
    monkeypatch,
    capsys,
) -> None:
    right = bailing.FAMILY

    def table(model, layout: ExpertLayout) -> Entries:
        return mutation(right.table(model, layout))

    monkeypatch.setitem(families.FAMILIES, "LLaDA2MoeModelLM", replace(right, table=table))
    source, ours = both_sides
    for convert, start, expected in ((to_mcore, source, inward), (to_hf, ours, outward)):
        assert convert(start, tmp_path / "result") == 1
        said = capsys.readouterr().out
        assert "fails its certificate" in said and expected in said, said
        assert not list(tmp_path.iterdir())


def test_a_weight_that_is_not_finite_fails(tmp_path, capsys) -> None:
    from safetensors.torch import load_file, save_file

    source = checkpoints.write(tmp_path / "source", "llama")
    weights = load_file(source / "model.safetensors")
    weights["model.norm.weight"][5] = torch.nan
    save_file(weights, source / "model.safetensors")
    assert to_mcore(source, tmp_path / "ours") == 1
    assert "model.norm.weight holds what is not finite" in capsys.readouterr().out
