"""Layouts against one process, and that the comparison sees every way in which a layout can be wrong."""

import json
from contextlib import contextmanager
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest

from llada_megatron.config.errors import BadInput
from llada_megatron.verify import layouts
from llada_megatron.verify.comparison import TOLERANCES, LayoutReport, LayoutResult, compare
from tests.distributed import run_ranks

FAST = ["TP2", "CP2 EP2", "PP2 VPP2"]
SLOW = {  # every axis, with another one or more
    1: ["selective recompute"],
    2: ["TP2 ETP2", "EP2 all-gather", "full recompute CP2"],
    4: ["TP2 CP2 EP4", "PP2 VPP2 EP2 overlap"],
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return layouts.write_corpus(tmp_path_factory.mktemp("paragraphs"))


@pytest.fixture(scope="module")
def reference(corpus):
    [measured] = layouts.measure_in_processes([layouts.parity_config(corpus)], None)
    return measured


def results_of(names, corpus, reference):
    configs = [layouts.parity_config(corpus, **layouts.MATRIX[name]) for name in names]
    processes = configs[0].layout.processes
    measured = layouts.measure_in_processes(configs, reference)
    return [compare(n, processes, m, reference) for n, m in zip(names, measured, strict=True)]


def test_the_reference_has_every_property_that_the_comparison_relies_on(reference):
    assert all(np.isfinite(reference.losses)) and all(np.isfinite(reference.grad_norms))
    assert reference.routing_margin > 0
    assert len(reference.load) == 3 and all(sum(counts[0]) > 0 for counts in reference.load.values())
    assert any(key.endswith("expert_bias") and weight.any() for key, weight in reference.weights.items())


def test_a_core_of_the_matrix_equals_one_process(corpus, reference):
    for result in results_of(FAST, corpus, reference):
        assert result.passed, (result.name, result.differences, result.worst_weight)


@pytest.mark.slow
@pytest.mark.parametrize("processes", SLOW)
def test_layouts_of_several_axes_equal_one_process(corpus, reference, processes):
    for result in results_of(SLOW[processes], corpus, reference):
        assert result.passed, (result.name, result.differences, result.worst_weight)


@pytest.mark.slow
def test_sequences_of_random_length_are_the_same_under_every_layout(corpus, reference):
    cut = "diffusion.random_length_share=0.5"
    [alone] = layouts.measure_in_processes([layouts.parity_config(corpus, cut)], None)
    assert alone.losses != reference.losses
    names = ["DP2", "CP2"]
    configs = [layouts.parity_config(corpus, cut, **layouts.MATRIX[name]) for name in names]
    for name, measured in zip(names, layouts.measure_in_processes(configs, alone), strict=True):
        result = compare(name, 2, measured, alone)
        assert result.passed, (result.name, result.differences, result.worst_weight)


HYBRID = ["TP2 EP2", "PP2 VPP2"]


def hybrid_results_of(names, corpus, reference):
    """Of model.core=hybrid, beside one process of model.core=gpt."""
    for name in names:
        config = layouts.parity_config(corpus, "model.core=hybrid", **layouts.MATRIX[name])
        [measured] = layouts.measure_in_processes([config], reference)
        yield compare(name, config.layout.processes, measured, reference)


@pytest.mark.slow
def test_a_hybrid_model_trains_as_one_process_of_gpt(corpus, reference):
    for result in hybrid_results_of(["selective recompute", *HYBRID], corpus, reference):
        assert result.passed, (result.name, result.differences, result.worst_weight)
        assert result.name in HYBRID or not any(result.differences.values())


@pytest.mark.full
def test_a_hybrid_model_trains_alike_under_every_layout(corpus, reference):
    rest = [name for name in layouts.MATRIX if name not in ["selective recompute", *HYBRID]]
    for result in hybrid_results_of(rest, corpus, reference):
        assert result.passed, (result.name, result.differences, result.worst_weight)


@pytest.mark.full
@pytest.mark.parametrize("processes", [2, 4])
def test_the_rest_of_the_matrix_equals_one_process(corpus, reference, processes):
    names = [name for name, layout in layouts.MATRIX.items() if layout["processes"] == processes]
    for result in results_of(sorted({*names} - {*FAST, *SLOW[processes]}), corpus, reference):
        assert result.passed, (result.name, result.differences, result.worst_weight)


@pytest.mark.slow
def test_a_balance_without_the_clean_half_is_the_same_under_every_split_of_the_rows(corpus, reference):
    noisy_only = "model.expert_balance_clean_half=false"
    [alone] = layouts.measure_in_processes([layouts.parity_config(corpus, noisy_only)], None)
    diffusion_step = -2  # before it as many tokens counted twice
    for layer, counts in alone.load.items():
        assert 2 * sum(counts[diffusion_step]) == sum(reference.load[layer][diffusion_step])
    for name in ("PP2 VPP2", "TP2 CP2 EP4"):
        config = layouts.parity_config(corpus, noisy_only, **layouts.MATRIX[name])
        [measured] = layouts.measure_in_processes([config], alone)
        result = compare(name, config.layout.processes, measured, alone)
        assert result.passed, (result.name, result.differences, result.worst_weight)


# Each mutation breaks one rank's arithmetic as a plausible bug would. They run in forked ranks.


@contextmanager
def wrong_context_slice():
    """Rank 1 feeds its rows to the model in another order than the mask believes."""
    from llada_megatron.attention.context import ContextShard

    rows = ContextShard.rows.fget
    wrong = property(lambda shard: np.roll(rows(shard), shard.rank, axis=1))
    with mock.patch.object(ContextShard, "rows", wrong):
        yield


@contextmanager
def key_gradients_not_reduced():
    """dK and dV of the other ranks' queries are dropped."""
    from functools import partial

    from megatron.core import tensor_parallel

    gather = tensor_parallel.gather_from_sequence_parallel_region
    wrong = partial(gather, tensor_parallel_output_grad=False)
    with mock.patch.object(tensor_parallel, "gather_from_sequence_parallel_region", wrong):
        yield


@contextmanager
def expert_load_not_reduced():
    from llada_megatron.training import balance

    alone = SimpleNamespace(all_reduce=lambda *args, **kwargs: None, ReduceOp=balance.dist.ReduceOp)
    with mock.patch.object(balance, "dist", alone):
        yield


@contextmanager
def noise_seeds_of_the_rank():
    import torch.distributed as dist

    from llada_megatron.objectives import diffusion

    seed_of = diffusion.torch_seed
    with mock.patch.object(diffusion, "torch_seed", lambda *names: seed_of(*names) + dist.get_rank()):
        yield


@contextmanager
def loss_count_not_reduced():
    """Gradients are divided by this rank's count of tokens."""
    from llada_megatron.training import balance

    finalize = balance.finalize_model_grads

    def wrong(model, num_tokens, *args, **kwargs):
        return finalize(model, num_tokens // 2, *args, **kwargs)  # the sum over two ranks is one rank's

    with mock.patch.object(balance, "finalize_model_grads", wrong):
        yield


@contextmanager
def noisy_key_leaks_from_the_next_block():
    from llada_megatron.attention.mask import KeySpans, Rectangle

    own_block = Rectangle.own_block.func

    def wrong(rectangle):
        spans = own_block(rectangle)
        return KeySpans(spans.start, np.minimum(spans.stop + 1, rectangle.noisy_keys.shape[1]))

    with mock.patch.object(Rectangle, "own_block", property(wrong)):
        yield


@contextmanager
def halo_mixed_up():
    """Of a block that spans ranks, the other ranks' noisy keys are all taken for the first that they send."""
    from llada_megatron.attention.context import ContextShard

    first = property(lambda shard: np.zeros_like(shard.owner))
    with mock.patch.object(ContextShard, "_halo_slot", first):
        yield


@contextmanager
def positions_of_the_shard():
    """Rotary positions count the rows of the rank."""
    from llada_megatron.training import step

    part_of = step.context_part

    def wrong(batch):
        part = part_of(batch)
        part.inputs.positions = part.inputs.positions.sort(dim=1).values
        return part

    with mock.patch.object(step, "context_part", wrong):
        yield


@contextmanager
def norms_not_summed_over_sequence_parallel_ranks():
    from llada_megatron.model.specs import RMSNorm

    make = RMSNorm.__init__

    def wrong(norm, *args, **kwargs):
        make(norm, *args, **kwargs)
        norm.weight.sequence_parallel = False

    with mock.patch.object(RMSNorm, "__init__", wrong):
        yield


MUTATIONS = [
    (wrong_context_slice, "CP2"),
    (key_gradients_not_reduced, "CP2"),
    (expert_load_not_reduced, "DP2"),
    (noise_seeds_of_the_rank, "DP2"),
    (loss_count_not_reduced, "DP2"),
    (noisy_key_leaks_from_the_next_block, "CP2"),
    (positions_of_the_shard, "CP2"),
    (norms_not_summed_over_sequence_parallel_ranks, "TP2"),
    (halo_mixed_up, "CP4"),
]


def measure_mutants(mutants, reference):
    from llada_megatron.verify.measure import measure

    measured = []
    for mutation, config in mutants:
        with mutation():
            measured.append(measure(config, reference))
    return measured


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_the_comparison_fails_for_every_deliberate_error(corpus, reference, processes):
    chosen = [(m, name) for m, name in MUTATIONS if layouts.MATRIX[name]["processes"] == processes]
    mutants = [(m, layouts.parity_config(corpus, **layouts.MATRIX[name])) for m, name in chosen]
    for (mutation, name), measured in zip(
        chosen, run_ranks(measure_mutants, mutants, reference, processes=processes)[0], strict=True
    ):
        result = compare(name, processes, measured, reference)
        assert not result.passed, mutation.__name__


def test_the_report_names_what_failed_and_is_written_as_json(capsys):
    from llada_megatron.commands.verify import _print_layouts

    exact = dict.fromkeys(TOLERANCES, 0.0)
    report = LayoutReport(
        [
            LayoutResult("TP2", 2, exact, "w"),
            LayoutResult("CP2", 2, exact | {"loss": float("nan")}, "w"),
        ],
        1e-4,
    )
    _print_layouts(report, TOLERANCES)
    shown = capsys.readouterr().out
    assert "1 of 2 layouts differ" in shown and "FAILED" in shown and "1.0e-04" in shown
    written = json.loads(json.dumps(report.as_json()))
    assert [entry["passed"] for entry in written["layouts"]] == [True, False] and not written["passed"]


def test_an_unknown_layout_is_refused_with_the_choices():
    with pytest.raises(BadInput, match=r"no layouts of the matrix: \['CP3'\]. Choose from DP2, DP4"):
        layouts.check(["CP3"])
