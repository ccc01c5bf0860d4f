"""Certificates of resumed runs, and that a resume which forgets something gets none."""

import json
import random
from dataclasses import replace

import pytest

from llada_megatron.config.errors import RunFailed
from llada_megatron.verify import journal, resume
from llada_megatron.verify.layouts import write_corpus
from llada_megatron.verify.resume import Certificate
from tests.model.latents import MLA

SMALL = [  # twelve steps, in four stages
    *("experiment=parity", "model.hidden_size=64", "model.head_dim=16", "model.expert_hidden_size=32"),
    *("data.sequence_length=64", "layout.global_batch=4", "optimizer.warmup_tokens=512"),
    *("diffusion.embedding_noise.fade_tokens=2048", "training.threads=1"),
    "diffusion.random_length_share=0.5",
    "schedule.stages=[{name: ar, objective: autoregressive, block_size: '1', tokens: 512},"
    " {name: bdlm_4, block_size: '4', tokens: 1024}, {name: bdlm_32, block_size: '32', tokens: 1024},"
    " {name: mdlm, block_size: full, tokens: 512}]",
]


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> list[str]:
    return [*SMALL, f"data.path=[{write_corpus(tmp_path_factory.mktemp('paragraphs'))}]"]


GOOD = Certificate(
    layout_a=["layout.tp=2"],
    layout_b=["layout.tp=2"],
    steps=2,
    losses_a=[2.0, 1.0],
    losses_b=[2.0, 1.0],
    sample_ids_sha256="",
    noise_sha256="",
    weights_sha256="",
    bitwise=True,
    max_rel=0.0,
    same_samples=True,
    same_noise=True,
    interruptions=[],
    versions={},
    git_commit="",
)


def test_one_layout_needs_equal_bits_and_another_one_rounding():
    assert GOOD.passed
    assert not replace(GOOD, bitwise=False, max_rel=1e-9).passed
    elsewhere = replace(GOOD, layout_b=["layout.pp=2"], bitwise=False)
    assert replace(elsewhere, max_rel=2e-6).passed and not replace(elsewhere, max_rel=3e-6).passed
    assert not replace(GOOD, same_samples=False).passed and not replace(GOOD, same_noise=False).passed
    assert not replace(GOOD, losses_a=[2.0]).passed
    assert json.loads(json.dumps(GOOD.as_json()))["passed"] is True


def test_a_journal_forgives_a_torn_line_and_not_a_sample_that_changed(tmp_path):
    lines = [{"sample": 0, "batch_sha256": "a"}, {"sample": 1, "batch_sha256": "b"}]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "0_1.jsonl").write_text(text + '{"sample": 2, "bat')
    whole = journal.Journal(tmp_path)
    assert whole.batches == {0: "a", 1: "b"}
    (tmp_path / "1_2.jsonl").write_text(json.dumps({"sample": 1, "batch_sha256": "c"}) + "\n")
    with pytest.raises(RunFailed, match="Sample 1 came in two ways"):
        journal.Journal(tmp_path)


PAIRS = [  # every axis is left once and arrived at once
    ([], ["layout.tp=2", "layout.etp=2"]),
    (["layout.tp=2", "layout.etp=2"], ["layout.tp=1", "layout.etp=1", "layout.pp=2", "layout.vpp=2"]),
    (["layout.pp=2", "layout.vpp=2"], ["layout.pp=1", "layout.vpp=1", "layout.cp=2", "layout.ep=2"]),
    (["layout.cp=2", "layout.ep=2"], ["layout.cp=1", "layout.ep=1", "layout.processes=2"]),
    (["layout.processes=2"], ["layout.processes=1"]),
]
IN_CI = PAIRS[1]


@pytest.mark.parametrize(
    ("before", "after"),
    [pytest.param(*pair, marks=pytest.mark.slow if pair == IN_CI else pytest.mark.full) for pair in PAIRS],
    ids=lambda layout: " ".join(layout) or "one",
)
def test_a_run_interrupted_three_times_and_resumed_in_another_layout_trains_the_same_model(
    small, before, after
):
    certificate = resume.check([*small, *before], after)
    assert certificate.passed and certificate.steps == 12, certificate.as_json()
    assert [each.kind for each in certificate.interruptions] == [
        "kill -9 in a step", "kill -9 in a save", "SIGUSR1",
    ]  # fmt: skip


@pytest.mark.full
def test_draws_of_boundaries_and_rates_by_width_are_resumed_bit_for_bit(small):
    data = [each for each in small if each.startswith("data.")]
    layout = ["layout.processes=2", "layout.tp=2", "layout.ep=2", "model.concepts.mup_base_hidden_size=32"]
    tokens = "schedule.stages=[{name: c, objective: concepts, block_size: '1', tokens: 6144}]"
    certificate = resume.check(["experiment=dlcm_parity", "training.threads=1", tokens, *data, *layout], [])
    assert certificate.passed and certificate.bitwise and len(certificate.interruptions) == 3


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout", [[], pytest.param(["layout.tp=2"], marks=pytest.mark.full)], ids=["one", "TP2"]
)
def test_a_run_interrupted_three_times_in_one_layout_is_equal_bit_for_bit(small, layout):
    certificate = resume.check([*small, *layout], [])
    assert certificate.passed and certificate.bitwise, certificate.as_json()


@pytest.mark.parametrize(
    ("before", "after", "attention"),
    [
        pytest.param("gpt", "hybrid", (), marks=pytest.mark.slow),
        pytest.param("hybrid", "gpt", (), marks=pytest.mark.full),
        pytest.param("gpt", "hybrid", MLA, marks=pytest.mark.full, id="gpt-hybrid-latents"),
    ],
)
def test_a_run_of_one_core_goes_on_with_the_other_bit_for_bit(small, before, after, attention):
    certificate = resume.check([*small, *attention, f"model.core={before}"], [f"model.core={after}"])
    assert certificate.passed and certificate.bitwise, certificate.as_json()


def without_moments(config, folder):
    from llada_megatron.checkpoint import store

    store._load_optimizer = lambda checkpoint, optimizer, *rest: optimizer.reload_model_params()
    return journal.train_and_record(config, folder)


def without_expert_bias(config, folder):
    from llada_megatron.checkpoint import store

    load = store.load

    def forgetful(checkpoint, model, optimizer, **options):
        load(checkpoint, model, optimizer, **options)
        for name, buffer in model[0].named_buffers():
            if name.endswith("expert_bias"):
                buffer.zero_()

    store.load = forgetful
    return journal.train_and_record(config, folder)


def one_sample_late(config, folder):
    from llada_megatron.parallel.dealing import sample_indices

    def late(*arguments):
        return [[index + 1 for index in part] for part in sample_indices(*arguments)]

    # An earlier attempt wrote its journal there.
    return journal.train_and_record(config, folder, deal=late if folder.exists() else None)


@pytest.mark.slow
@pytest.mark.parametrize("worker", [without_moments, without_expert_bias, one_sample_late])
def test_a_resume_that_forgets_something_gets_no_certificate(small, tmp_path, worker):
    check = resume._Check(tmp_path, small, [], random.Random(0))
    check.worker = worker
    assert not check.certificate().passed
