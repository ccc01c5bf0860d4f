"""The seam to megatron-core on a CPU. What patches torch runs in forked ranks, so that nothing leaks."""

import logging
import sys
import warnings

import pytest
import torch

from llada_megatron.runtime import mcore_cpu, quiet
from tests.distributed import run_ranks

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the seam is for machines without CUDA")


def depth(function) -> int:
    return 1 + depth(function.__wrapped__) if hasattr(function, "__wrapped__") else 0


def install_again():
    before = depth(torch.zeros), torch.distributed.all_gather, torch.Tensor.type
    answers = [mcore_cpu.install(), mcore_cpu.install()]
    return answers, (depth(torch.zeros), torch.distributed.all_gather, torch.Tensor.type) == before


def test_installing_again_changes_nothing():
    assert run_ranks(install_again) == [([True, True], True)]


def what_nobody_calls():
    heavy = {"wandb", "torch._inductor.compile_fx"} & sys.modules.keys()
    import wandb

    return heavy, torch.compile.__module__, bool(wandb.__version__)


def test_training_starts_without_a_tracker_and_a_compiler_that_it_does_not_use():
    assert run_ranks(what_nobody_calls) == [(set(), "torch", True)]


def install_for_another_version():
    torch._llada_megatron_seam = False
    mcore_cpu.SUPPORTED_VERSION = "0.1."
    try:
        mcore_cpu.install()
    except RuntimeError as error:
        return str(error)


def test_another_version_of_megatron_core_is_refused():
    assert run_ranks(install_for_another_version)[0].endswith("install the version of requirements.txt.")


def test_a_place_that_no_longer_looks_as_expected_is_named():
    assert mcore_cpu.expect("json.decoder", "class JSONDecoder").__name__ == "json.decoder"
    with pytest.raises(RuntimeError, match=r"json\.decoder no longer contains 'class Nothing'"):
        mcore_cpu.expect("json.decoder", "class JSONDecoder", "class Nothing")


def pipeline_settings(vpp):
    from llada_megatron.config.compose import compose
    from llada_megatron.model.families.gpt import transformer_config

    config = compose(["experiment=parity", "layout.processes=2", "layout.pp=2", f"layout.vpp={vpp}"])
    made = transformer_config(config, layer_spec="local")
    return made.deallocate_pipeline_outputs, made.batch_p2p_comm


@pytest.mark.parametrize("vpp", [1, 2])
def test_pipeline_settings_that_compute_wrong_results_on_gloo_are_off(vpp):
    assert run_ranks(pipeline_settings, vpp) == [(False, False)]


def devices():
    made = [torch.zeros(1, device="cuda"), torch.tensor([1], device="cuda:0"), torch.ones(1).cuda()]
    return [str(tensor.device) for tensor in made], torch.zeros(1).type()


def test_tensors_that_are_asked_for_on_cuda_are_made_on_the_cpu():
    assert run_ranks(devices) == [(["cpu"] * 3, "torch.cuda.FloatTensor")]


def gather_and_scatter(sizes):
    import torch.distributed as dist

    from llada_megatron.config.schema import LayoutConfig
    from llada_megatron.parallel import groups

    groups.join(LayoutConfig(processes=2))
    rank = dist.get_rank()
    gathered = [torch.empty(size, 2) for size in sizes]
    dist.all_gather(gathered, torch.full((sizes[rank], 2), float(rank + 1)))
    mine = torch.empty(sizes[rank])
    parts = [torch.arange(size) + 10.0 * part + 100.0 * rank for part, size in enumerate(sizes)]
    dist.reduce_scatter(mine, parts)
    return [part.tolist() for part in gathered], mine.tolist()


@pytest.mark.parametrize("sizes", [(3, 1), (0, 2), (2, 2)])
def test_uneven_parts_are_gathered_and_reduced(sizes):
    for rank, (gathered, reduced) in enumerate(run_ranks(gather_and_scatter, sizes, processes=2)):
        assert gathered == [[[part + 1.0] * 2] * size for part, size in enumerate(sizes)]
        assert reduced == [2 * i + 20.0 * rank + 100.0 for i in range(sizes[rank])]


def test_known_messages_are_dropped_and_others_are_heard(caplog):
    for _ in range(2):
        quiet.install()
    logger, fragment = quiet.LOGGED[0]
    assert len(logging.getLogger(logger).filters) == 1
    logging.getLogger(logger).warning("%s: advice", fragment)
    logging.getLogger(logger).warning("something new")
    assert caplog.messages == ["something new"]
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        quiet.install()
        for category, message, module in quiet.WARNINGS:
            name = "megatron.core.optimizer.optimizer" if module else "anywhere"
            warnings.warn_explicit(f"{message} and more", category, "file.py", 1, name)
        warnings.warn("something new", stacklevel=1)
    assert [str(each.message) for each in heard] == ["something new"]
