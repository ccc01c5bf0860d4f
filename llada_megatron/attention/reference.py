"""Dense attention under a block-diffusion mask: the truth that every other executor is tested against.

Legend: Q queries, K keys, B batch, H heads, D key width, Dv value width, Hkv key and value heads,
G = H / Hkv.
"""

import torch
from torch import Tensor

from llada_megatron.attention.mask import Rectangle


def reference_attention(
    query: Tensor, key: Tensor, value: Tensor, rectangle: Rectangle, softmax_scale: float
) -> Tensor:
    """Return softmax(scale * Q K^T + mask) V, [Q, B, H, Dv], from a Q x K score matrix per head.

    query [Q, B, H, D]; key [K, B, Hkv, D]; value [K, B, Hkv, Dv]. Computes in float32, or in float64 for
    float64 inputs. Every row sees at least itself, so no row of the softmax is empty.
    """
    compute_dtype = torch.promote_types(query.dtype, torch.float32)
    Q, B, H, _ = query.shape
    grouped_query = query.to(compute_dtype).unflatten(2, (key.size(2), -1))  # [Q, B, Hkv, G, D]
    scores = torch.einsum("qbhgd,kbhd->bhgqk", grouped_query, key.to(compute_dtype)) * softmax_scale
    visible = torch.stack([rectangle.dense(sample) for sample in range(B)]).to(query.device)  # [B, Q, K]
    weights = scores.masked_fill(~visible[:, None, None], float("-inf")).softmax(dim=-1)
    output = torch.einsum("bhgqk,kbhd->qbhgd", weights, value.to(compute_dtype))
    return output.reshape(Q, B, H, -1).to(query.dtype)
