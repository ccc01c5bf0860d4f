"""Every layout decodes the tokens of one process; replicas share the prompts and know all results."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from llada_megatron.config.errors import BadInput
from llada_megatron.generate import Limits, Result
from llada_megatron.generate.full import FullAttention, kind_of
from llada_megatron.generate.methods import method_of
from llada_megatron.parallel import groups
from tests.distributed import run_ranks
from tests.generate.models import CONTEXT, MASK, prompt_of, settings, tiny
from tests.model.latents import MLA

LENGTHS = (13, 2, 40, 7, 30)
FIRST_IS_LONGEST = (60, 1, 3)
"""Of two replicas one has nothing to do for a long time."""


def decoded(
    lengths: tuple[int, ...], rule: str, overrides: list[str], full: FullAttention | None = None
) -> Any:
    """Of each prompt its tokens and forwards, as this rank knows them; and the forwards of this replica."""
    config = settings(*overrides)
    torch.set_num_threads(1)
    groups.initialize(config.layout)
    method = method_of(rule, {"threshold": "0.05"})
    decoder = kind_of(full)(
        tiny(config),
        method.rule,
        buffer=method.buffer,
        lookahead=method.lookahead,
        block_size=4,
        mask_token_id=MASK,
        context=CONTEXT,
        batch=2,
        max_cached_tokens=400,
        seed=3,
    )
    results = decoder.results([prompt_of(length) for length in lengths], Limits(new_tokens=14))
    events = decoder.run([prompt_of(5)], Limits(new_tokens=2))
    again = [event for event in events if isinstance(event, Result)]
    return [(r.tokens.tolist(), r.forwards) for r in [*results, *again]], decoder.counts.forwards


@pytest.mark.parametrize(
    ("processes", "overrides"),
    [
        (2, ["layout.tp=2"]),
        (2, ["layout.ep=2"]),
        pytest.param(2, [], marks=pytest.mark.slow),
        pytest.param(4, ["layout.tp=2", "layout.ep=4"], marks=pytest.mark.slow),
        pytest.param(4, ["layout.tp=2", "layout.ep=2", "layout.etp=2"], marks=pytest.mark.slow),
        pytest.param(2, ["layout.ep=2", "layout.dispatcher=allgather"], marks=pytest.mark.slow),
    ],
    ids=lambda value: "-".join(value) or "dp2" if isinstance(value, list) else f"{value}",
)
@pytest.mark.parametrize(
    "lengths",
    [
        pytest.param(LENGTHS, id="even"),
        pytest.param(FIRST_IS_LONGEST, id="uneven", marks=pytest.mark.slow),
    ],
)
def test_a_layout_decodes_the_tokens_of_one_process(processes, overrides, lengths):
    layout = [f"layout.processes={processes}", "layout.global_batch=4", *overrides]
    ((alone, _),) = run_ranks(decoded, lengths, "threshold", ["layout.global_batch=4"])
    found = run_ranks(decoded, lengths, "threshold", layout, processes=processes)
    assert all(results == alone for results, _ in found)
    assert len({forwards for _, forwards in found}) == 1  # equally often, whoever has work


@pytest.mark.slow
def test_kept_latents_that_every_rank_holds_give_the_tokens_of_one_process():
    ((alone, _),) = run_ranks(decoded, LENGTHS, "threshold", ["layout.global_batch=4", *MLA])
    layout = ["layout.processes=2", "layout.global_batch=4", "layout.tp=2", *MLA]
    for results, _ in run_ranks(decoded, LENGTHS, "threshold", layout, processes=2):
        assert results == alone


@pytest.mark.slow
def test_drawn_tokens_and_edits_are_those_of_one_process():
    for rule in ("joint", "klass", "soft"):
        ((alone, _),) = run_ranks(decoded, LENGTHS, rule, ["layout.global_batch=4"])
        for overrides in (["layout.tp=2"], ["layout.ep=2"]):
            layout = ["layout.processes=2", "layout.global_batch=4", *overrides]
            for results, _ in run_ranks(decoded, LENGTHS, rule, layout, processes=2):
                assert results == alone


@pytest.mark.slow
@pytest.mark.parametrize("overrides", [[], ["layout.tp=2"], ["layout.ep=2"]], ids=["dp2", "tp2", "ep2"])
@pytest.mark.parametrize(
    "lengths",
    [
        pytest.param(LENGTHS, id="even"),
        pytest.param(FIRST_IS_LONGEST, id="uneven", marks=pytest.mark.slow),
    ],
)
def test_full_attention_decodes_the_tokens_of_one_process(lengths, overrides):
    full = FullAttention(before=3, after=2, cfg_scale=0.5)
    ((alone, _),) = run_ranks(decoded, lengths, "threshold", ["layout.global_batch=4"], full)
    layout = ["layout.processes=2", "layout.global_batch=4", *overrides]
    found = run_ranks(decoded, lengths, "threshold", layout, full, processes=2)
    assert all(results == alone for results, _ in found)
    assert len({forwards for _, forwards in found}) == 1  # equally often, whoever has work


@pytest.mark.parametrize("axis", ["pp", "cp"])
def test_layouts_that_are_not_served_are_refused_with_the_reason(axis):
    overrides = ["layout.processes=2", "layout.global_batch=4", f"layout.{axis}=2"]
    with pytest.raises(BadInput, match=rf"Decoding serves .*: a forward .*\. Set layout.{axis}=1"):
        run_ranks(decoded, LENGTHS, "threshold", overrides, processes=2)
