"""What a plan says of decoding's memory is what a decoder's tensors take."""

import itertools
import json

import pytest

from llada_megatron import cli
from llada_megatron.config import rules
from llada_megatron.config.parameters import cached_token_bytes
from llada_megatron.config.schema import LayoutConfig, PrecisionConfig
from llada_megatron.generate import Decoder, Limits
from llada_megatron.generate.branches import Lookahead
from llada_megatron.generate.buffer import Buffer
from llada_megatron.generate.rules import rule_of
from llada_megatron.parallel import groups
from llada_megatron.plan.decoding import decoding_of
from llada_megatron.plan.decoding_speed import Workload, decoding_layout, forward_of
from llada_megatron.plan.planner import Planner
from tests.generate.models import MASK, prompt_of, settings, tiny


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_decoder_takes_the_bytes_that_the_plan_says(dtype):
    config = settings(f"precision.dtype={dtype}")
    stages = rules.check(config).stages
    cached = cached_token_bytes(config.model, config.precision, LayoutConfig())
    said = decoding_of(stages, cached, context=3 * stages[-1].block_size + 1, batch=3)
    assert said.block_size == stages[-1].block_size
    groups.initialize(LayoutConfig())
    try:
        decoder = Decoder(
            tiny(config), rule_of("threshold"), said.block_size, MASK, context=said.context, batch=said.batch
        )
        decoder.results([prompt_of(5)], Limits(new_tokens=1))
    finally:
        groups.destroy()
    assert decoder.cache_bytes == said.bytes > 0


def test_branches_take_the_rows_and_the_bytes_that_the_plan_of_a_forward_says():
    config = settings("cluster=h100_8")
    workload = Workload(block_size=8, context=64, branches=3, buffer=2)
    layout = decoding_layout(config, workload, tp=1, bp=1)
    said = forward_of(Planner(config), layout, workload, batch=2)
    groups.initialize(LayoutConfig())
    try:
        decoder = Decoder(
            tiny(config),
            rule_of("threshold"),
            workload.block_size,
            MASK,
            context=workload.context,
            batch=2,
            buffer=Buffer(workload.buffer, add_at=0.0),
            lookahead=Lookahead(workload.branches),
        )
        rows = [0]
        for _ in decoder.run([prompt_of(16), prompt_of(16, seed=1)], Limits(new_tokens=16)):
            rows.append(decoder.counts.rows)
    finally:
        groups.destroy()
    assert decoder.cache_bytes == said.cache_bytes > 0
    assert said.rows in [after - before for before, after in itertools.pairwise(rows)]


def test_tensor_parallelism_splits_it_and_nothing_else_does():
    model, precision = settings().model, PrecisionConfig()
    whole = cached_token_bytes(model, precision, LayoutConfig())
    assert cached_token_bytes(model, precision, LayoutConfig(tp=2)) * 2 == whole
    assert cached_token_bytes(model, precision, LayoutConfig(pp=2, ep=2, cp=2)) == whole


def test_a_plan_shows_it_where_the_last_stage_fills_masks(capsys, tmp_path):
    flash = ["plan", "experiment=llada2_mini_cpt", "cluster=h100_64", "--json", str(tmp_path / "plan.json")]
    assert cli.main(flash) == 0
    # 2 x 20 layers x 4 heads of keys x 128 channels x 2 bytes
    assert "decoding 41.0 MB of keys and values per 1,000 tokens" in capsys.readouterr().out
    said = json.loads((tmp_path / "plan.json").read_text())["decoding"]
    assert said["cached_token_bytes"] == 40_960 and said["bytes"] == 40_960 * (8 * 4096 + 1)
    stages = "schedule.stages=[{name: ar, objective: autoregressive, block_size: '1', tokens: 100000000000}]"
    assert cli.main([*flash, stages]) == 0
    assert "decoding" not in capsys.readouterr().out
    assert json.loads((tmp_path / "plan.json").read_text())["decoding"] is None
