"""SmolLM2 computed straight from its GGUF file in plain PyTorch: fp32, one sequence, nothing of the project.

Rows of Q and K are used in the file's own order, so heads are rotated by neighbouring pairs (2i, 2i + 1).
Legend: S positions, D head dim.
"""

from pathlib import Path

import torch
import torch.nn.functional as F

LAYERS, HEADS, KV_HEADS, D, THETA, EPS = 30, 9, 3, 64, 100000.0, 1e-5


def rotate(heads_SHD: torch.Tensor) -> torch.Tensor:
    angles = torch.arange(len(heads_SHD))[:, None] * THETA ** (-torch.arange(0, D, 2) / D)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    even, odd = heads_SHD[..., 0::2], heads_SHD[..., 1::2]
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2)


class Smollm2:
    def __init__(self, path: Path) -> None:
        from gguf import GGUFReader, dequantize

        self.weights = {
            tensor.name.removesuffix(".weight"): torch.tensor(dequantize(tensor.data, tensor.tensor_type))
            for tensor in GGUFReader(path).tensors
        }

    def norm(self, name: str, values: torch.Tensor) -> torch.Tensor:
        return values * torch.rsqrt(values.square().mean(-1, keepdim=True) + EPS) * self.weights[name]

    def project(self, name: str, values: torch.Tensor) -> torch.Tensor:
        return values @ self.weights[name].T

    @torch.no_grad()
    def nll_sum(self, tokens: torch.Tensor, document: torch.Tensor) -> tuple[float, int]:
        """Summed next-token NLL inside documents, and predicted tokens; document is the number of each."""
        position = torch.arange(len(tokens))
        seen = (position[:, None] >= position) & (document[:, None] == document)
        hidden = self.weights["token_embd"][tokens]
        for layer in range(LAYERS):
            name = f"blk.{layer}"
            normed = self.norm(f"{name}.attn_norm", hidden)
            q, k, v = (self.project(f"{name}.attn_{part}", normed).unflatten(-1, (-1, D)) for part in "qkv")
            q, k = rotate(q), rotate(k)
            k, v = (part.repeat_interleave(HEADS // KV_HEADS, dim=1) for part in (k, v))
            scores = torch.einsum("shd,thd->hst", q, k) / D**0.5
            weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
            attended = torch.einsum("hst,thd->shd", weights, v).flatten(1)
            hidden = hidden + self.project(f"{name}.attn_output", attended)
            normed = self.norm(f"{name}.ffn_norm", hidden)
            gated = F.silu(self.project(f"{name}.ffn_gate", normed)) * self.project(f"{name}.ffn_up", normed)
            hidden = hidden + self.project(f"{name}.ffn_down", gated)
        logits = self.project("token_embd", self.norm("output_norm", hidden))
        inside = document[:-1] == document[1:]
        nll = F.cross_entropy(logits[:-1][inside].double(), tokens[1:][inside], reduction="sum")
        return float(nll), int(inside.sum())
