"""A stand-in for FlashAttention over sequences of unequal length: its contract in plain torch."""

from itertools import pairwise

import torch


def dense_varlen(query, key, value, call, scale):
    """Query [T, H, D] in entries of rows, key and value [K, Hkv, D] in as many entries of keys.

    What it computes reads no number on the host; what it demands of the edges does.
    """
    check(query, key, call)
    group = query.size(1) // key.size(1)
    of_row, of_key = (
        torch.bucketize(torch.arange(tokens, device=query.device), edges[1:], right=True)
        for tokens, edges in ((len(query), call.row_edges), (len(key), call.key_edges))
    )
    key, value = (tensor.repeat_interleave(group, dim=1) for tensor in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query, key) * scale
    weights = scores.masked_fill(of_row[:, None] != of_key, -torch.inf).softmax(dim=-1)
    return torch.einsum("hqk,khd->qhd", weights, value)


def check(query, key, call):
    row_edges, key_edges = (edges.tolist() for edges in (call.row_edges, call.key_edges))
    assert call.row_edges.dtype == call.key_edges.dtype == torch.int32
    assert len(row_edges) == len(key_edges) and row_edges[0] == key_edges[0] == 0
    assert row_edges == sorted(row_edges) and key_edges == sorted(key_edges)
    assert row_edges[-1] == len(query) and key_edges[-1] <= len(key)
    most_rows, most_keys = (
        max(stop - start for start, stop in pairwise(edges)) for edges in (row_edges, key_edges)
    )
    # For one row an entry the kernel reads the rows without their edges.
    assert 1 < call.longest >= most_rows and call.keys >= most_keys
