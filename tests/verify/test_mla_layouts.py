"""Latent attention (model.mla) under layouts of several processes equals one process."""

import pytest

from llada_megatron.verify import layouts
from llada_megatron.verify.comparison import compare
from tests.model.latents import FULL_QUERIES, MLA


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return layouts.write_corpus(tmp_path_factory.mktemp("paragraphs"))


@pytest.fixture(scope="module")
def reference(corpus):
    [measured] = layouts.measure_in_processes([layouts.parity_config(corpus, *MLA)], None)
    return measured


def require_equal(names, corpus, reference, *overrides):
    configs = [layouts.parity_config(corpus, *MLA, *overrides, **layouts.MATRIX[name]) for name in names]
    measured = layouts.measure_in_processes(configs, reference)
    for name, config, found in zip(names, configs, measured, strict=True):
        result = compare(name, config.layout.processes, found, reference)
        assert result.passed, (result.name, result.differences, result.worst_weight)


@pytest.mark.slow
def test_each_axis_equals_one_process(corpus, reference):
    """Gradients of the rotated key, which all heads share, are added up over tp."""
    require_equal(["TP2", "CP2 EP2", "PP2 VPP2"], corpus, reference)


HYBRID = "model.core=hybrid"


@pytest.mark.slow
def test_a_hybrid_model_equals_one_process_of_gpt(corpus, reference):
    require_equal(["TP2 EP2", "PP2 VPP2"], corpus, reference, HYBRID)
    [alone] = layouts.measure_in_processes([layouts.parity_config(corpus, *MLA, HYBRID)], reference)
    assert not any(compare("hybrid", 1, alone, reference).differences.values())


@pytest.mark.full
def test_recompute_and_several_axes_equal_one_process(corpus, reference):
    require_equal(["selective recompute"], corpus, reference)
    require_equal(["full recompute CP2", "TP2 EP2", "TP2 ETP2"], corpus, reference)
    require_equal(["TP2 CP2 EP4", "TP2 PP2"], corpus, reference)


@pytest.mark.full
def test_heads_that_are_made_again_equal_one_process_that_keeps_them(corpus, reference):
    again = "layout.recompute=selective", "layout.recompute_modules=[mla_up_proj]"
    require_equal(["TP2", "CP2 EP2", "PP2 VPP2"], corpus, reference, *again)


@pytest.mark.full
def test_a_full_projection_of_queries_under_tensor_parallelism_equals_one_process(corpus):
    [alone] = layouts.measure_in_processes([layouts.parity_config(corpus, *MLA, FULL_QUERIES)], None)
    require_equal(["TP2"], corpus, alone, FULL_QUERIES)
