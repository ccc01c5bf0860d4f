"""Graphs of the forwards within a block, as far as a CPU goes: what a graph would do, and what it cannot."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core import parallel_state
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llada_megatron.attention import varlen
from llada_megatron.attention.keys import KeyPool, PooledKeys
from llada_megatron.config.errors import BadInput
from llada_megatron.config.schema import LayoutConfig
from llada_megatron.generate import Decoder, Limits
from llada_megatron.generate.full import CACHES, FullDecoder
from llada_megatron.generate.graphs import Graphs, missing_requirement, room_for
from llada_megatron.generate.rules import rule_of
from llada_megatron.model.experts import keep_on_device
from llada_megatron.model.inputs import ModelInputs
from llada_megatron.model.provider import build_model
from llada_megatron.model.readout import LOGITS
from llada_megatron.parallel import groups
from llada_megatron.runtime import device
from tests.attention.dense_varlen import dense_varlen
from tests.distributed import run_ranks
from tests.generate.models import CONTEXT, MASK, prompt_of, settings

attend = partial(varlen.varlen_attention, kernel=dense_varlen)


@pytest.fixture(scope="module", autouse=True)
def world():
    groups.initialize(LayoutConfig())
    yield
    groups.destroy()


def built(*overrides: str, attention: Any = attend) -> torch.nn.Module:
    (model,) = build_model(settings(*overrides), attention=attention)
    return model.eval().requires_grad_(False)


class Tape(TorchDispatchMode):
    """What a CUDA graph is, on a CPU: operations on the same memory, with the host's numbers of the first
    time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.operations.append((function, args, kwargs or {}, result))
        return result

    def replay(self) -> None:
        for function, args, kwargs, result in self.operations:
            again = function(*args, **kwargs)
            for before, now in zip(tree_leaves(result), tree_leaves(again), strict=True):
                if isinstance(before, torch.Tensor) and before.data_ptr() != now.data_ptr():
                    before.copy_(now)


def taped(function):
    with Tape() as tape:
        result = function()
    result.fill_(torch.nan)  # a graph computes nothing while it is captured
    return result, tape.replay


def decoder(model: torch.nn.Module, **options: Any) -> Decoder:
    chosen = {"rule": rule_of("threshold", {"threshold": 0.05}), "block_size": 4} | options
    return Decoder(model, mask_token_id=MASK, context=CONTEXT, **chosen)


LENGTHS = (17, 2, 40, 9)


@pytest.mark.parametrize(("name", "batch"), [("threshold", 1), ("joint", 3), ("credit", 3), ("soft", 2)])
def test_tokens_of_replayed_forwards_are_those_of_the_model_itself(name, batch):
    model, limits = built(), Limits(new_tokens=13)
    prompts = [prompt_of(length) for length in LENGTHS]
    plain = decoder(model, batch=batch, rule=rule_of(name))
    expected = plain.results(prompts, limits)
    keep_on_device(model)
    ours = decoder(model, batch=batch, rule=rule_of(name))
    ours.graphs = Graphs(model, capture=taped)
    for result, other in zip(ours.results(prompts, limits), expected, strict=True):
        np.testing.assert_array_equal(result.tokens, other.tokens)
        assert result.forwards == other.forwards
    # Of few numbers of rows, and one room: most forwards run what an earlier one captured. Tokens that are
    # read in part are one tensor more: a graph of their own.
    assert ours.graphs.captured <= batch * (2 if name == "soft" else 1)
    assert plain.counts.forwards > ours.graphs.replayed > 2 * ours.graphs.captured


def test_full_attention_and_its_stale_keys_are_those_of_the_model_itself():
    model, limits = built(), Limits(new_tokens=13)
    prompts = [prompt_of(length) for length in LENGTHS]
    options: dict[str, Any] = {"rule": rule_of("threshold", {"threshold": 0.05}), "block_size": 4}
    options |= {"mask_token_id": MASK, "context": CONTEXT, "batch": 2, "full": CACHES["dual"]}
    expected = FullDecoder(model, **options).results(prompts, limits)
    keep_on_device(model)
    ours = FullDecoder(model, **options)
    ours.graphs = Graphs(model, capture=taped)
    for result, other in zip(ours.results(prompts, limits), expected, strict=True):
        np.testing.assert_array_equal(result.tokens, other.tokens)
    assert ours.graphs.replayed == ours.counts.forwards > ours.graphs.captured


def test_a_graph_serves_other_places_positions_and_lengths():
    model = built()
    keep_on_device(model)
    graphs, pool = Graphs(model, capture=taped), KeyPool(400)
    generator = np.random.default_rng(0)
    for parts in ([(20, 24), (8, 12)], [(0, 4), (60, 64)], [(36, 40), (36, 40)]):
        places = generator.permutation(400)
        asked, at = [], 0
        for kept, length in parts:
            asked.append((kept, places[at : at + length]))
            at += length
        inputs = ModelInputs(
            tokens=torch.from_numpy(generator.integers(0, 480, (1, 8))),
            positions=torch.from_numpy(np.concatenate([np.arange(*part) for part in parts]))[None],
            keys=PooledKeys(pool, asked, 4),
            outputs=torch.tensor([1, 6, 7]),
            readout=LOGITS,
        )
        with torch.inference_mode():
            replayed = graphs(inputs).clone()
            torch.testing.assert_close(replayed, model(inputs))
            for kept, rows in asked:  # what the next graph finds in the pool
                for tensor in pool.of_layer(1, torch.zeros(1), torch.zeros(1)):
                    tensor[torch.from_numpy(rows[:kept])] = torch.randn(kept, *tensor.shape[1:])
    assert graphs.captured == 1


def test_forwards_of_many_rows_are_not_captured():
    model = built()
    graphs = Graphs(model, capture=taped, most_rows=4)
    for kept in (8, 4):
        keys = PooledKeys(KeyPool(40), [(kept, np.arange(12))], 8)
        inputs = ModelInputs(
            tokens=torch.arange(12 - kept)[None],
            positions=torch.from_numpy(keys.positions)[None],
            keys=keys,
            outputs=torch.tensor([0]),
            readout=LOGITS,
        )
        with torch.inference_mode():
            graphs(inputs)
        assert graphs.captured == (kept == 8)
        graphs.captured = 0


def test_a_prompt_and_a_block_that_was_just_done_are_read_without_a_graph():
    model = built()
    keep_on_device(model)
    graphs = Graphs(model, capture=taped)
    for parts in ([(0, 24)], [(16, 24), (20, 24)]):
        rows = sum(length - kept for kept, length in parts)
        keys = PooledKeys(KeyPool(400), [(kept, np.arange(length)) for kept, length in parts], 4)
        inputs = ModelInputs(
            tokens=torch.arange(rows)[None],
            positions=torch.from_numpy(keys.positions)[None],
            keys=keys,
            outputs=torch.tensor([0]),
            readout=LOGITS,
        )
        with torch.inference_mode():
            assert torch.equal(graphs(inputs), model(inputs))
    assert graphs.captured == graphs.replayed == 0


def test_a_forward_within_a_block_reads_nothing_on_the_host():
    # The kernel itself, whose form torch knows without values.
    model = built("precision.dtype=bf16", attention=varlen.varlen_attention)
    without_values = FakeTensorMode(allow_non_fake_inputs=True)

    def run(inputs):
        weights = dict([*model.named_parameters(), *model.named_buffers()])
        fake = {name: without_values.from_tensor(tensor) for name, tensor in weights.items()}
        return functional_call(model, fake, (inputs,))

    class FromTheHost(TorchDispatchMode):
        """A tensor that is made of the host's numbers would be copied to the device."""

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            made.append(function is torch.ops.aten.lift_fresh.default)
            return function(*args, **(kwargs or {}))

    made: list[bool] = []

    def traced(function):
        with without_values, FromTheHost():
            result = function()
        return torch.zeros(result.shape), lambda: None

    keys = PooledKeys(KeyPool(400), [(20, np.arange(24)), (8, np.arange(100, 112))], 4)
    inputs = ModelInputs(
        tokens=torch.arange(8)[None],
        positions=torch.from_numpy(keys.positions)[None],
        keys=keys,
        outputs=torch.arange(8),
        readout=rule_of("threshold").figures.readout(MASK),
    )
    with torch.no_grad():
        with pytest.raises(DataDependentOutputException):  # how many rows each expert has
            Graphs(run, capture=traced)(inputs)
        keep_on_device(model)
        assert Graphs(run, capture=traced)(inputs).shape == (8, 2)
    assert made and not any(made)


def test_experts_on_one_rank_compute_as_before_and_keep_their_weights():
    model = built()
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    keys = PooledKeys(KeyPool(40), [(0, np.arange(24))], 4)
    inputs = ModelInputs(
        tokens=torch.from_numpy(prompt_of(24))[None],
        positions=torch.arange(24)[None],
        keys=keys,
        outputs=torch.arange(24),
        readout=LOGITS,
    )
    with torch.inference_mode():
        expected = model(inputs)
        keep_on_device(model)
        torch.testing.assert_close(model(inputs), expected)
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())


def decoded(overrides: list[str]) -> Any:
    """Tokens of each prompt, and whether graphs ran, as this rank knows them."""

    def again(function):
        result = function()
        return result, lambda: result.copy_(function())

    config = settings("layout.global_batch=4", *overrides)
    torch.set_num_threads(1)
    if not torch.distributed.is_initialized():
        groups.initialize(config.layout)
    (model,) = build_model(config, attention=attend)
    keep_on_device(model.eval().requires_grad_(False))
    ours = decoder(model, batch=2)
    ours.graphs = Graphs(model, capture=again)
    results = ours.results([prompt_of(length) for length in LENGTHS], Limits(new_tokens=13))
    return [result.tokens.tolist() for result in results], ours.graphs.replayed > ours.graphs.captured


@pytest.mark.slow
@pytest.mark.parametrize("axis", ["layout.tp=2", "layout.tp=1"], ids=["tp", "dp"])
def test_split_layers_and_replicas_decode_the_tokens_of_one_process(axis):
    expected, _ = decoded([])
    for found, replayed in run_ranks(decoded, ["layout.processes=2", axis], processes=2):
        assert found == expected and replayed


@pytest.mark.parametrize("keys", [1, 255, 256, 257, 1000, 1023, 4096, 32768, 40000])
def test_a_room_is_larger_than_what_it_holds_by_a_quarter_at_most(keys):
    assert keys < room_for(keys) <= keys + max(256, keys / 4)
    assert len({room_for(each) for each in range(16384, 32768)}) == 4


@pytest.mark.parametrize(
    ("overrides", "architecture", "reason"),
    [
        ([], "CPU", "need a CUDA device, this is a CPU"),
        (["model.attention_backend=portable"], "sm_90", "need model.attention_backend=auto or varlen"),
        ([], "sm_75", "need attention by varlen, which needs a device of sm_80 or later, this is an sm_75"),
        (["precision.dtype=fp32"], "sm_90", "need attention by varlen, which serves bfloat16 and float16"),
        ([], "sm_80", "need sm_90, sm_100 or sm_103 for experts, this is an sm_80"),
        (["model.lora.rank=2", "model.lora.targets=[experts]"], "sm_90", "serve no adapters at experts"),
        ([], "sm_90", None),
    ],
)
def test_what_cannot_be_captured_is_refused_in_a_sentence(monkeypatch, overrides, architecture, reason):
    monkeypatch.setattr(device, "architecture", lambda at: architecture)
    model = built("precision.dtype=bf16", *overrides, attention=None)
    at = torch.device("cpu" if architecture == "CPU" else "cuda")
    found = missing_requirement(model, at)
    assert found is None if reason is None else found.startswith(reason)


@pytest.mark.parametrize(("axis", "name"), [("ep", "model"), ("etp", "tensor")])
def test_experts_on_several_ranks_are_refused(monkeypatch, axis, name):
    monkeypatch.setattr(device, "architecture", lambda at: "sm_90")
    model = built("precision.dtype=bf16", attention=None)
    monkeypatch.setattr(parallel_state, f"get_expert_{name}_parallel_world_size", lambda: 2)
    found = missing_requirement(model, torch.device("cuda"))
    assert found is not None and found.endswith(f"is read on the host: set layout.{axis}=1")


def test_a_model_that_learns_is_refused(monkeypatch):
    monkeypatch.setattr(device, "architecture", lambda at: "sm_90")
    model = built("precision.dtype=bf16", attention=None).requires_grad_()
    assert "this one learns" in str(missing_requirement(model, torch.device("cuda")))


def test_a_decoder_on_a_cpu_refuses_graphs():
    with pytest.raises(BadInput, match=r"CUDA graphs \(--cuda-graphs\) need a CUDA device, this is a CPU"):
        decoder(built(), cuda_graphs=True)
