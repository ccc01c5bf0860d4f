"""Embedding noise on CUDA, computed on a CPU: a function of the seed alone."""

import torch

from llada_megatron.model import normal
from llada_megatron.model.normal import hashed_rows, noise_rows

CPU = torch.device("cpu")


def test_noise_is_the_same_however_many_rows_are_drawn_at_once(monkeypatch):
    whole = hashed_rows(7, 5, 12, CPU)
    monkeypatch.setattr(normal, "ELEMENTS_PER_CALL", 7)
    assert torch.equal(hashed_rows(7, 5, 12, CPU), whole)
    assert torch.equal(hashed_rows(7, 3, 12, CPU), whole[:3])
    assert not torch.equal(hashed_rows(8, 5, 12, CPU), whole) and hashed_rows(7, 0, 12, CPU).shape == (0, 12)


def test_noise_is_standard_normal_and_its_rows_are_uncorrelated():
    rows = hashed_rows(2**62 + 3, 400, 256, CPU)
    n = rows.numel()
    assert rows.dtype is torch.float32
    assert abs(rows.mean()) < 4 / n**0.5 and abs(rows.square().mean() - 1) < 4 * (2 / n) ** 0.5
    assert abs((rows[1:] * rows[:-1]).mean()) < 4 / n**0.5


def test_on_a_cpu_noise_stays_what_torch_draws():
    expected = torch.randn(3, 4, generator=torch.Generator().manual_seed(11))
    assert torch.equal(noise_rows(11, 3, 4, CPU), expected)
