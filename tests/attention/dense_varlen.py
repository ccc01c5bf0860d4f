"""A stand-in for FlashAttention over sequences of unequal length: its contract in plain torch."""

import torch


def dense_varlen(query, key, value, call, scale):
    """Query [T, H, D] in entries of rows, key and value [K, Hkv, D] in as many entries of keys."""
    row_edges, key_edges = (edges.tolist() for edges in (call.row_edges, call.key_edges))
    assert call.row_edges.dtype == call.key_edges.dtype == torch.int32
    assert len(row_edges) == len(key_edges) and row_edges[0] == key_edges[0] == 0
    assert row_edges == sorted(row_edges) and key_edges == sorted(key_edges)
    assert row_edges[-1] == len(query) and key_edges[-1] <= len(key)
    group = query.size(1) // key.size(1)
    output = torch.full_like(query, torch.nan)
    for entry in range(len(row_edges) - 1):
        rows = slice(row_edges[entry], row_edges[entry + 1])
        keys = slice(key_edges[entry], key_edges[entry + 1])
        # For one row an entry the kernel reads the rows without their edges.
        assert 1 < call.longest >= rows.stop - rows.start and call.keys >= keys.stop - keys.start
        seen, summed = (tensor[keys].repeat_interleave(group, dim=1) for tensor in (key, value))
        weights = (torch.einsum("qhd,khd->hqk", query[rows], seen) * scale).softmax(dim=-1)
        output[rows] = torch.einsum("hqk,khd->qhd", weights, summed)
    return output
