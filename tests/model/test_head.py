"""Each readout against full logits in float64: on one process, with a split vocabulary, in chunks."""

from itertools import product

import pytest

from tests.distributed import run_ranks

S, B = 16, 2
ROWS, CHUNKS = (19, 0), (1000, 7)  # 19 = 7 + 7 + 5
FIGURES = {
    "cross entropy": 1,
    "confidence": 3,
    "confidence at 0.5": 3,
    "confidence without 3": 3,
    "confidence at 0.25 without 3": 3,
    "top-1": 2,
    "proposal": 2,
    "proposal and entropy": 3,
    "proposal and label": 3,
    "logits": 0,
}
HIDDEN = 3


def temperature_of(name):
    _, _, temperature = name.removesuffix(f" without {HIDDEN}").partition(" at ")
    return float(temperature or 1)


def expected_figures(name, logits_NV, labels_N):
    """Float64, from the definition."""
    import torch

    if name.endswith(f"without {HIDDEN}"):
        logits_NV = logits_NV.masked_fill(torch.arange(logits_NV.shape[1]) == HIDDEN, -1e9)

    log_p_NV = logits_NV.log_softmax(dim=-1)
    if name == "logits":
        return logits_NV
    if name == "top-1":
        probability_N, choice_N = log_p_NV.exp().max(dim=-1)
        return torch.stack([choice_N, probability_N], dim=-1)
    if name.startswith("proposal"):
        is_hidden_V = torch.arange(logits_NV.shape[1]) == HIDDEN
        choice_N = logits_NV.masked_fill(is_hidden_V, -1e9).argmax(dim=-1)
        probability_N = log_p_NV.gather(1, choice_N[:, None])[:, 0].exp()
        third_N = -(log_p_NV.exp() * log_p_NV).sum(dim=-1)
        if name.endswith("label"):
            third_N = log_p_NV.gather(1, labels_N[:, None])[:, 0].exp()
        return torch.stack([choice_N, probability_N, third_N], dim=-1)[:, : FIGURES[name]]
    cross_entropy_N = -log_p_NV.gather(1, labels_N[:, None])[:, 0]
    if name == "cross entropy":
        return cross_entropy_N
    log_q_NV = (logits_NV / temperature_of(name)).log_softmax(dim=-1)
    entropy_N = -(log_q_NV.exp() * log_q_NV).sum(dim=-1)
    return torch.stack([cross_entropy_N, entropy_N, logits_NV.argmax(dim=-1) == labels_N], dim=-1)


def relative(ours, expected):
    return float((ours - expected).norm() / max(expected.norm(), 1e-30))


def measured(tp):
    """What one rank finds: differences by case, choices among equals, sizes of messages, an id above 2^24."""
    from megatron.core import parallel_state

    from llada_megatron.config.compose import compose
    from llada_megatron.model import readout
    from llada_megatron.model.provider import build_stage
    from llada_megatron.parallel import groups

    overrides = ["experiment=parity", f"layout.tp={tp}", f"layout.processes={tp}", "layout.etp=1"]
    config = compose(overrides)
    groups.initialize(config.layout)
    group = parallel_state.get_tensor_model_parallel_group()
    stage = build_stage(config)
    readouts = [
        readout.CROSS_ENTROPY,
        readout.CONFIDENCE,
        readout.confidence(0.5),
        readout.without_token(readout.CONFIDENCE, HIDDEN),
        readout.without_token(readout.confidence(0.25), HIDDEN),
        readout.TOP_ONE,
        readout.proposal(HIDDEN),
        readout.proposal(HIDDEN, entropy=True),
        readout.proposal(HIDDEN, label=True),
        readout.LOGITS,
    ]
    try:
        cases = {
            (each.name, rows, chunk): differences(stage, group, each, rows, chunk)
            for each, rows, chunk in product(readouts, ROWS, CHUNKS)
        }
        return {
            "columns": {each.name: each.columns for each in readouts},
            "cases": cases,
            "equals": among_equals(group, readout.TOP_ONE, readout.CONFIDENCE),
            "messages": {each.name: largest_message(group, each) for each in readouts},
            "same cross entropy": same_cross_entropy(group, readout.CROSS_ENTROPY, readout.CONFIDENCE),
            "large id": large_id(group, readout.TOP_ONE) if tp == 1 else None,
        }
    finally:
        groups.destroy()


def differences(stage, group, readout, rows, chunk_tokens):
    """Shape, and relative differences of figures and of the gradients of hidden states and weights."""
    import torch

    from llada_megatron.model.head import head_output
    from llada_megatron.model.inputs import ModelInputs

    generator = torch.Generator().manual_seed(rows)
    weight_VH = stage.output_layer.weight
    V, H = weight_VH.shape[0] * group.size(), weight_VH.shape[1]
    whole_SBH, whole_VH = torch.randn(S, B, H, generator=generator), torch.randn(V, H, generator=generator)
    whole_VH *= 2 / H**0.5
    outputs_N = torch.randperm(S * B, generator=generator)[:rows]
    labels_N = torch.randint(V, (rows,), generator=generator)
    whole = [tensor.double().requires_grad_() for tensor in (whole_SBH, whole_VH)]
    logits_NV = whole[0].flatten(0, 1)[outputs_N] @ whole[1].T
    labels_N[::2] = logits_NV.argmax(dim=-1)[::2]  # some are right
    labels_N[labels_N == HIDDEN] += 1
    expected = expected_figures(readout.name, logits_NV, labels_N)

    hidden = whole_SBH.chunk(group.size())[group.rank()].clone().requires_grad_()
    stage.zero_grad(set_to_none=True)
    with torch.no_grad():
        weight_VH.copy_(whole_VH.chunk(group.size())[group.rank()])
    inputs = ModelInputs(None, None, None, outputs_N, labels_N if readout.needs_labels else None, readout)
    figures = head_output(
        hidden_states=hidden,
        output_layer=stage.output_layer,
        output_weight=None,
        context=(inputs, chunk_tokens),
        config=stage.config,
    )
    found = {"shape": tuple(figures.shape), "figures": relative(figures, expected)}
    if readout.name == "top-1" or readout.name.startswith("proposal"):
        return found | {"choices": torch.equal(figures[:, 0], expected[:, 0])}
    slope = torch.randn(figures.shape, generator=generator)
    figures.backward(slope)
    gradients = torch.autograd.grad(expected, whole, slope.double())
    for key, ours, theirs in zip(("hidden", "weight"), (hidden, weight_VH), gradients, strict=True):
        found[key] = relative(ours.grad, theirs.chunk(group.size())[group.rank()])
    return found


def columns(logits_nV, group):
    return logits_nV.chunk(group.size(), dim=-1)[group.rank()].contiguous()


def among_equals(group, top_one, confidence):
    """Ids that TOP_ONE chose, and those that CONFIDENCE calls right, where several logits are largest."""
    import torch

    logits_nV = torch.zeros(4, 12)
    for row, ids in enumerate([[3, 5], [2, 8], [7, 11], range(12)]):
        logits_nV[row, ids] = 1.0
    logits_nV = columns(logits_nV, group)
    chosen = top_one(logits_nV, None, group)[:, 0].tolist()
    right = [
        confidence(logits_nV.clone(), torch.full((4,), label), group)[:, 2].tolist() for label in range(12)
    ]
    return chosen, [[row[n] for row in right].index(1.0) for n in range(4)], sum(map(sum, right))


def largest_message(group, readout):
    """Numbers in the largest tensor that a collective of forward or backward touches, per row."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class Messages(TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "c10d":
                sizes = [leaf.numel() for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)]
                self.largest = max(self.largest, *sizes)
            return func(*args, **(kwargs or {}))

    logits_nV = columns(torch.randn(8, 512), group).requires_grad_()
    with Messages() as messages:
        figures = readout(logits_nV.clone(), torch.arange(8), group)
        if figures.requires_grad:
            figures.sum().backward()
    return messages.largest / 8


def same_cross_entropy(group, cross_entropy, confidence):
    import torch

    logits_nV = columns(8 * torch.randn(64, 512, generator=torch.Generator().manual_seed(5)), group)
    labels_n = torch.arange(64)
    # In fp32 both work in place.
    return torch.equal(
        confidence(logits_nV.clone(), labels_n, group)[:, 0], cross_entropy(logits_nV, labels_n, group)
    )


def large_id(group, top_one):
    import torch

    logits_nV = torch.zeros(1, 2**24 + 4, dtype=torch.bfloat16)
    logits_nV[0, 2**24 + 1] = 100
    return top_one(logits_nV, None, group).tolist()


@pytest.fixture(scope="module", params=[1, 2], ids=["one process", "split vocabulary"])
def ranks(request):
    return run_ranks(measured, request.param, processes=request.param)


@pytest.mark.parametrize("name", FIGURES)
def test_figures_and_gradients_equal_those_of_full_logits(ranks, name):
    for rank in ranks:
        for rows, chunk in product(ROWS, CHUNKS):
            found = rank["cases"][name, rows, chunk]
            assert found["figures"] < 1e-6, (rows, chunk)
            assert found.get("choices", True)
            rounding = 1e-6 / temperature_of(name)  # logits grow, and their rounding
            assert max(found.get(key, 0) for key in ("hidden", "weight")) < rounding, (rows, chunk, found)


@pytest.mark.parametrize("name", FIGURES)
def test_a_readout_has_the_columns_that_it_says(ranks, name):
    for rank in ranks:
        assert rank["columns"][name] == FIGURES[name]
        for (case, rows, _), found in rank["cases"].items():
            if case == name and FIGURES[name]:
                assert found["shape"] == ((rows,) if FIGURES[name] == 1 else (rows, FIGURES[name]))


def test_the_lowest_of_equal_ids_is_chosen_whatever_the_split(ranks):
    for rank in ranks:
        chosen, right, times_right = rank["equals"]
        assert chosen == right == [3, 2, 7, 0]
        assert times_right == 4  # one label of each row


def test_logits_alone_travel_whole(ranks):
    for rank in ranks:
        messages = rank["messages"]
        assert all(0 < messages[name] <= 4 for name in FIGURES if name != "logits")
        assert messages["logits"] == (0 if len(ranks) == 1 else 512)


def test_confidence_has_the_cross_entropy_of_training_to_the_bit(ranks):
    assert all(rank["same cross entropy"] for rank in ranks)


def test_ids_that_float32_has_not_are_exact(ranks):
    if len(ranks) == 1:
        assert ranks[0]["large id"] == [[2**24 + 1, 1.0]]


def weight_gradients(dtype_name):
    """Relative errors of the head's weight gradient by number of chunks, and whether `main_grad` was used."""
    import torch

    from llada_megatron.config.compose import compose
    from llada_megatron.model import readout
    from llada_megatron.model.head import head_output
    from llada_megatron.model.inputs import ModelInputs
    from llada_megatron.model.provider import build_stage
    from llada_megatron.parallel import groups

    config = compose(["experiment=parity", f"precision={dtype_name}"])
    groups.initialize(config.layout)
    stage = build_stage(config)
    head = stage.output_layer.to(stage.config.params_dtype)
    V, H, N = *head.weight.shape, 1024
    generator = torch.Generator().manual_seed(0)
    hidden_NH = torch.randn(N, 1, H, generator=generator).to(head.weight.dtype)
    labels_N, slope_N = torch.randint(V, (N,), generator=generator), torch.rand(N, generator=generator)
    whole_VH = head.weight.detach().double().requires_grad_()
    logits_NV = hidden_NH[:, 0].double() @ whole_VH.T
    torch.nn.functional.cross_entropy(logits_NV, labels_N, reduction="none").backward(slope_N.double())
    found = {}
    for chunks in (1, 4, 64):
        head.weight.grad = None
        head.weight.main_grad = torch.zeros(V, H)
        inputs = ModelInputs(None, None, None, torch.arange(N), labels_N, readout.CROSS_ENTROPY)
        head_output(
            hidden_states=hidden_NH,
            output_layer=head,
            output_weight=None,
            context=(inputs, N // chunks),
            config=stage.config,
        ).backward(slope_N)
        ours = head.weight.main_grad + head.weight.grad  # as DDP does when autograd is done
        found[chunks] = relative(ours, whole_VH.grad), bool(head.weight.main_grad.any())
    groups.destroy()
    return found


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_the_weight_gradient_of_many_chunks_is_as_exact_as_that_of_one(dtype):
    found = run_ranks(weight_gradients, dtype, processes=1)[0]
    one, four, many = (error for error, _ in found.values())
    assert max(four, many) < 1.1 * one or many < 1e-6
    # In fp32 autograd sums the chunks as ever; one chunk needs no sum.
    assert [apart for _, apart in found.values()] == [False, *[dtype == "bf16"] * 2]
