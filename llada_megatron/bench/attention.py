"""Attention executors against the dense reference and against each other: correct first, then fast.

An executor's output and gradients are compared with float64; one that differs gets no time. Times are medians
of interleaved rounds: of process CPU time on a CPU, which other processes cannot lengthen much, and of the
time between events on CUDA. Memory is the peak of one forward and backward over the inputs, each in a fresh
process.

Legend: S positions, Q queries, K keys, B batch, H heads, Hkv key and value heads, G = H / Hkv, D head dim.
"""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from llada_megatron.attention import BlockDiffusionMask, Rectangle, block_diffusion_attention
from llada_megatron.attention.registry import executor_names
from llada_megatron.bench import attention_baselines as baselines
from llada_megatron.bench.attention_baselines import CAUSAL, DENSE, Attention, row_parts
from llada_megatron.bench.attention_cases import Case
from llada_megatron.config.errors import BadInput
from llada_megatron.runtime import device
from llada_megatron.runtime.launch import launch

MAX_REFERENCE_POSITIONS = 4096
"""The reference keeps several S x S tensors per head."""
TOLERANCES = {torch.float32: 2e-5, torch.bfloat16: 2e-2}
"""Largest error relative to the largest element, of the output and of each gradient."""
CHECKED_KV_HEADS = 2
"""Key heads that are compared with float64, with the query heads that share them."""
FORWARD_FLOPS, BACKWARD_FLOPS = 4, 10
"""Per visible pair, head and channel: two products forward, five backward."""
CASE_SEC = 12.0
"""Rounds of a case go on for about this long, at least MIN_ROUNDS and at most MAX_ROUNDS."""
MIN_ROUNDS, MAX_ROUNDS = 3, 20


@dataclass
class Result:
    """One executor on one case; times in seconds."""

    case: Case
    executor: str
    visible_pairs: int
    error: float | None = None
    """Worst of the output and the gradients, relative; None for the yardstick, which computes less."""
    correct: bool = True
    refusal: str | None = None
    """Why the executor does not serve this case."""
    forward: list[float] = field(default_factory=list)
    backward: list[float] = field(default_factory=list)
    dense_sec: float | None = None
    dense_is_extrapolated: bool = False
    peak_bytes: int | None = None

    @property
    def seconds(self) -> float | None:
        """Median of forward plus median of backward."""
        return statistics.median(self.forward) + statistics.median(self.backward) if self.forward else None

    @property
    def ideal(self) -> float:
        """Dense pairs over visible pairs: the speed-up of an executor that computes nothing else as fast."""
        return self.case.positions**2 / self.visible_pairs

    @property
    def speedup(self) -> float | None:
        """Over dense-mask SDPA."""
        return self.dense_sec / self.seconds if self.dense_sec and self.seconds else None

    @property
    def flops_per_sec(self) -> float | None:
        """On visible pairs; None for the yardstick."""
        if self.executor == CAUSAL or not self.seconds:
            return None
        per_pair = (FORWARD_FLOPS + BACKWARD_FLOPS) * self.case.shape.heads * self.case.shape.head_dim
        return per_pair * self.visible_pairs / self.seconds

    def as_dict(self) -> dict[str, Any]:
        """Every figure, for JSON and CSV."""
        speedup = self.speedup
        derived = {
            "case": self.case.name,
            "length": self.case.length,
            "block_size": self.case.block_size,
            "documents": self.case.documents,
            "head_shape": str(self.case.shape),
            "is_baseline": self.executor in baselines.NAMES,
            "seconds": self.seconds,
            "ideal": self.ideal,
            "speedup": speedup,
            "of_ideal": speedup and speedup / self.ideal,
            "flops_per_sec": self.flops_per_sec,
        }
        return derived | {name: value for name, value in asdict(self).items() if name != "case"}


def run(cases: list[Case]) -> list[Result]:
    """Measure every executor of the registry, and the baselines, on every case."""
    torch.set_num_threads(1)
    results = [result for case in cases for result in _run_case(case)]
    _set_dense_times(results)
    return results


def machine(size: int = 1024, rounds: int = 10) -> dict[str, Any]:
    """Describe the device, with what it reaches in a product of square matrices of the benchmark's dtype."""
    matrix = torch.ones(size, size, dtype=_dtype(), device=device.device())
    seconds = min(device.timed(lambda: matrix @ matrix)[1] for _ in range(rounds))
    return {
        "device": device.name(),
        "dtype": str(_dtype()).removeprefix("torch."),
        "torch": torch.__version__,
        "matmul_flops_per_sec": 2 * size**3 / seconds,
    }


def _set_dense_times(results: list[Result]) -> None:
    """Give every result the time of dense-mask SDPA on its case, or that of the longest by pairs."""
    dense = [result for result in results if result.executor == DENSE and result.seconds]
    dense.sort(key=lambda result: result.case.positions)
    by_case = {result.case: result.seconds for result in dense}
    longest = {result.case.shape: result for result in dense}
    for result in results:
        base = longest.get(result.case.shape)
        result.dense_sec = by_case.get(result.case)
        if result.dense_sec is None and base is not None and base.seconds is not None:
            result.dense_sec = base.seconds * (result.case.positions / base.case.positions) ** 2
            result.dense_is_extrapolated = True


def _run_case(case: Case) -> list[Result]:
    rectangle = _mask(case).whole()
    inputs = _inputs(case)
    checked = _some_heads(*inputs)
    exact = _exact(rectangle, *checked)
    results: dict[str, Result] = {}
    runnable: dict[str, Attention] = {}
    for name in contestants(case):
        result = results[name] = Result(case, name, rectangle.visible_pairs())
        try:
            attention = _attention(name, case, rectangle)
            if name != CAUSAL:
                result.error = _error(attention, exact, *checked)
                result.correct = result.error <= TOLERANCES[inputs[0].dtype]
        except (BadInput, NotImplementedError) as refusal:
            result.refusal = str(refusal)
        if result.correct and result.refusal is None:
            runnable[name] = attention
    _time(runnable, results, *inputs)
    for name in runnable:
        preload = "llada_megatron.bench.attention"
        results[name].peak_bytes = launch(_peak_bytes, case, name, processes=1, preload=preload)[0]
    return list(results.values())


def _time(
    runnable: dict[str, Attention],
    results: dict[str, Result],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grad: Tensor,
) -> None:
    """Interleaved rounds; the first one warms up."""
    spent, turn = 0.0, 0
    while turn <= MIN_ROUNDS or (spent < CASE_SEC and turn <= MAX_ROUNDS):
        for name, attention in runnable.items():
            output, forward = device.timed(partial(attention, query, key, value))
            weight = grad[: len(output)]
            _, backward = device.timed(partial(torch.autograd.grad, output, (query, key, value), weight))
            del output
            spent += forward + backward
            if turn:
                results[name].forward.append(forward)
                results[name].backward.append(backward)
        turn += 1


def contestants(case: Case) -> list[str]:
    """Executors and baselines that fit this case, by name."""
    able = executor_names(device.device(), _dtype(), case.shape.head_dim)
    small = case.positions <= MAX_REFERENCE_POSITIONS
    return [name for name in able if name != "reference" or small] + baselines.fitting(case, _dtype())


def _attention(name: str, case: Case, rectangle: Rectangle) -> Attention:
    if name in baselines.NAMES:
        return baselines.attention(name, case, rectangle, _dtype())
    return lambda query, key, value: block_diffusion_attention(query, key, value, rectangle, name)


def _mask(case: Case) -> BlockDiffusionMask:
    return BlockDiffusionMask([torch.tensor(case.cu_seqlens())], case.block_size, clean_copy=case.clean_copy)


def _dtype() -> torch.dtype:
    return torch.bfloat16 if device.on_cuda() else torch.float32


def _inputs(case: Case) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """query, key, value and the gradient of the output, fp32 on a CPU and bf16 on CUDA."""
    generator = torch.Generator().manual_seed(0)

    def draw(heads: int) -> Tensor:
        drawn = torch.randn(case.positions, 1, heads, case.shape.head_dim, generator=generator)
        return drawn.to(device.device(), _dtype())

    query, key, value = (draw(n) for n in (case.shape.heads, case.shape.kv_heads, case.shape.kv_heads))
    return query.requires_grad_(), key.requires_grad_(), value.requires_grad_(), draw(case.shape.heads)


def _some_heads(query: Tensor, key: Tensor, value: Tensor, grad: Tensor) -> list[Tensor]:
    """A few key heads with the query heads that share them: enough to be right or wrong."""
    count = min(CHECKED_KV_HEADS, key.size(2))
    query_heads = count * (query.size(2) // key.size(2))
    heads = query_heads, count, count, query_heads
    tensors = zip((query, key, value, grad), heads, strict=True)
    return [tensor[:, :, :count].detach().requires_grad_() for tensor, count in tensors]


def _exact(rectangle: Rectangle, query: Tensor, key: Tensor, value: Tensor, grad: Tensor) -> list[Tensor]:
    """Output and gradients in float64 from the mask's definition, some rows against the keys they see."""
    scale, kv_heads = query.size(3) ** -0.5, key.size(2)
    query, grad = (
        t.detach()[:, 0].double().unflatten(1, (kv_heads, -1)) for t in (query, grad)
    )  # [S, Hkv, G, D]
    key, value = (t.detach()[:, 0].double() for t in (key, value))  # [S, Hkv, D]
    output, grad_query = torch.empty_like(query), torch.empty_like(query)
    grad_key, grad_value = torch.zeros_like(key), torch.zeros_like(value)
    for rows in row_parts(len(query)):
        visible = rectangle.mask.dense(0, rows).to(query.device)
        seen = visible.any(dim=0).nonzero()[:, 0]
        rows, k, v, hidden = rows.to(query.device), key[seen], value[seen], ~visible[:, seen]
        scores = torch.einsum("qhgd,khd->hgqk", query[rows], k) * scale
        weights = scores.masked_fill(hidden, float("-inf")).softmax(dim=-1)
        output[rows] = torch.einsum("hgqk,khd->qhgd", weights, v)
        grad_value.index_add_(0, seen, torch.einsum("hgqk,qhgd->khd", weights, grad[rows]))
        grad_weights = torch.einsum("qhgd,khd->hgqk", grad[rows], v)
        row_sum = (grad_weights * weights).sum(dim=-1, keepdim=True)
        grad_scores = weights * (grad_weights - row_sum) * scale
        grad_query[rows] = torch.einsum("hgqk,khd->qhgd", grad_scores, k)
        grad_key.index_add_(0, seen, torch.einsum("hgqk,qhgd->khd", grad_scores, query[rows]))
    return [*(t.flatten(1, 2)[:, None] for t in (output, grad_query)), grad_key[:, None], grad_value[:, None]]


def _error(
    attention: Attention, exact: list[Tensor], query: Tensor, key: Tensor, value: Tensor, grad: Tensor
) -> float:
    """Largest relative error; infinite where a result is not finite."""
    output = attention(query, key, value)
    ours = [output.detach(), *torch.autograd.grad(output, (query, key, value), grad)]
    errors = [
        float((got.double() - want).abs().max() / want.abs().max())
        for got, want in zip(ours, exact, strict=True)
    ]
    return max(error if error == error else float("inf") for error in errors)


def _peak_bytes(case: Case, name: str) -> int:
    """Memory of one forward and backward, and of the mask or plan that it needs, over that of the inputs."""
    torch.set_num_threads(1)
    small = Case(64, 4, "one", case.shape)
    _forward_and_backward(small, name, *_inputs(small))  # loads what kernels load once
    inputs = _inputs(case)
    return device.peak_bytes_of(partial(_forward_and_backward, case, name, *inputs))


def _forward_and_backward(
    case: Case, name: str, query: Tensor, key: Tensor, value: Tensor, grad: Tensor
) -> None:
    output = _attention(name, case, _mask(case).whole())(query, key, value)
    torch.autograd.grad(output, (query, key, value), grad[: len(output)])
