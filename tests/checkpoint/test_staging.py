"""Copies of what a save writes: the values of that moment, each with memory of its own, in one block."""

import torch

from llada_megatron.checkpoint.staging import Staging


def test_copies_keep_the_values_and_views_do_not_drag_along_what_they_view():
    whole = torch.arange(1000.0)
    tensors = [whole[10:20], whole.view(10, 100)[3:5], torch.ones(3, dtype=torch.bfloat16), torch.empty(0, 4)]
    expected = [tensor.clone() for tensor in tensors]
    copies = Staging().copies(tensors)
    whole.zero_()
    for copy, values in zip(copies, expected, strict=True):
        assert copy.equal(values) and copy.shape == values.shape
        assert copy.untyped_storage().nbytes() == values.nbytes


def test_the_next_save_uses_the_same_memory():
    staging = Staging()
    [first] = staging.copies([torch.ones(1000)])
    [second] = staging.copies([torch.zeros(900)])
    assert first.data_ptr() == second.data_ptr()
