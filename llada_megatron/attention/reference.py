"""Dense attention under a block-diffusion mask: the truth that every other executor is tested against.

Legend: S sequence, B batch, H heads, D head dim, Hkv key and value heads, G = H / Hkv.
"""

import torch
from torch import Tensor

from llada_megatron.attention.mask import BlockDiffusionMask


def reference_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: BlockDiffusionMask, softmax_scale: float
) -> Tensor:
    """Return softmax(scale * Q K^T + mask) V, [S, B, H, D], from an S x S score matrix per head.

    query [S, B, H, D]; key, value [S, B, Hkv, D]. Computes in float32, or in float64 for float64 inputs.
    Every row sees at least itself, so no row of the softmax is empty.
    """
    compute_dtype = torch.promote_types(query.dtype, torch.float32)
    S, B, H, D = query.shape
    grouped_query = query.to(compute_dtype).unflatten(2, (key.size(2), -1))  # [S, B, Hkv, G, D]
    scores = torch.einsum("qbhgd,kbhd->bhgqk", grouped_query, key.to(compute_dtype)) * softmax_scale
    visible = torch.stack([mask.dense(sample) for sample in range(B)]).to(query.device)  # [B, S, S]
    weights = scores.masked_fill(~visible[:, None, None], float("-inf")).softmax(dim=-1)
    output = torch.einsum("bhgqk,kbhd->qbhgd", weights, value.to(compute_dtype))
    return output.reshape(S, B, H, D).to(query.dtype)
