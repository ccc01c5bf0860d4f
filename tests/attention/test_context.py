"""Context-parallel attention of real processes against the dense reference of one."""

import pytest

from tests.attention.test_executors import grouped
from tests.distributed import run_ranks

VIEWS = [(True, False), (True, False), (False, False), (False, True)]  # clean_copy, causal
MASKS = 24


def random_mask(seed):
    import numpy as np
    import torch

    from llada_megatron.attention import BlockDiffusionMask

    random = np.random.default_rng(seed)
    length = int(random.integers(3, 25)) * 4
    clean_copy, causal = VIEWS[seed % len(VIEWS)]
    samples = [
        torch.tensor([0, *sorted(random.choice(np.arange(1, length), random.integers(0, 5), False)), length])
        for _ in range(random.integers(1, 3))
    ]
    block_size = int(random.choice([1, 2, 4, 7, length // 4, length // 2, length]))
    grid = ["sequence", "document"][random.integers(2)]
    mask = BlockDiffusionMask(samples, block_size, grid, clean_copy, causal)
    return grouped(mask, 0.5, random) if seed % len(VIEWS) == 1 else mask


def largest_differences(seeds):
    """Per mask: halo keys sent, and the largest differences of output and gradients on this rank."""
    import torch
    from megatron.core import parallel_state

    from llada_megatron.attention import block_diffusion_attention
    from llada_megatron.attention.context import ContextShard
    from llada_megatron.config.schema import LayoutConfig
    from llada_megatron.parallel import groups

    results = []
    for cp in (2, 4):
        groups.initialize(LayoutConfig(cp=cp, processes=4))
        group = parallel_state.get_context_parallel_group()
        for seed in seeds:
            mask = random_mask(seed)
            torch.manual_seed(seed)
            shape = mask.total, mask.batch
            value_dim = (8, 5)[seed // len(VIEWS) % 2]
            sizes = (4, 8), (2, 8), (2, value_dim)
            whole = [torch.randn(*shape, *size).double().requires_grad_() for size in sizes]
            weight = torch.randn(*shape, 4, value_dim).double()
            expected = block_diffusion_attention(*whole, mask, "reference")
            expected_gradients = torch.autograd.grad(expected, whole, weight)

            shard = ContextShard(mask, group.rank(), cp)
            rows, sample = torch.from_numpy(shard.rows).T, torch.arange(mask.batch)

            def mine(tensor, rows=rows, sample=sample):
                return tensor.detach()[rows, sample]

            query, key, value = part = [mine(tensor).requires_grad_() for tensor in whole]
            keys, values = shard.of(key, value, 1, group)
            for backend in ("reference", "auto"):
                output = block_diffusion_attention(query, keys, values, shard.rectangle, backend)
                gradients = torch.autograd.grad(output, part, mine(weight), retain_graph=True)
                pairs = zip(
                    [output, *gradients], [mine(t) for t in (expected, *expected_gradients)], strict=True
                )
                results.append((len(shard.halo_rows), [float((a - b).abs().max()) for a, b in pairs]))
        groups.destroy()
    return results


@pytest.fixture(scope="module")
def differences():
    return run_ranks(largest_differences, range(MASKS), processes=4)  # a quarter of them with noise groups


def test_output_and_gradients_equal_one_process(differences):
    for rank in differences:
        for _, largest in rank:
            assert max(largest) < 1e-12


def test_blocks_that_span_ranks_were_among_the_masks(differences):
    halos = [halo for halo, _ in differences[0]]
    assert sum(halo > 0 for halo in halos) > 10 and sum(halo == 0 for halo in halos) > 10
