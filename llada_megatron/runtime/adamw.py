"""torch's fused AdamW where neither TransformerEngine's nor Apex's is installed, in their form."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim.adamw import adamw

from llada_megatron.runtime import device
from llada_megatron.runtime.mcore_cpu import expect

NAMES = {
    "transformer_engine": "TransformerEngine's FusedAdam",
    "apex": "Apex's FusedAdam",
    "llada_megatron": "torch's fused AdamW",
}


class FusedAdamW(torch.optim.Optimizer):
    """torch's fused AdamW with the contract of TE's and Apex's FusedAdam: `step` is the parameter group's.

    megatron-core's fall-back to torch.optim.AdamW trains, but cannot go on from moments without a `step` of
    their own, which is how it makes them (optimizer/__init__.py:605), and saves but does not load:
    optimizer/distrib_optimizer.py wants one common step of a fresh optimizer (line 839) and finds no `step`
    in the reshardable form.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
        **unused: Any,
    ) -> None:
        if not adam_w_mode:
            raise ValueError("FusedAdamW decouples weight decay: keep adam_w_mode=True.")
        super().__init__(
            params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, bias_correction=True)
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            if not group["params"]:
                continue
            done = int(group.get("step", 0))
            group["step"] = done + 1
            params = [param for param in group["params"] if param.grad is not None]
            if not params:
                continue
            for param in params:
                if "exp_avg" not in self.state[param]:
                    self.state[param]["exp_avg"] = torch.zeros_like(param, dtype=torch.float32)
                    self.state[param]["exp_avg_sq"] = torch.zeros_like(param, dtype=torch.float32)
            steps = torch.full((len(params),), float(done), device=params[0].device)  # where the kernel reads
            adamw(
                params,
                [param.grad for param in params],
                [self.state[param]["exp_avg"] for param in params],
                [self.state[param]["exp_avg_sq"] for param in params],
                [],
                list(steps.unbind()),
                fused=True,
                amsgrad=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )


def install() -> None:
    """Put FusedAdamW in the place of torch.optim.AdamW in megatron-core; on a CPU always.

    It is checked against the installed source. Calling it again changes nothing.
    """
    optimizer = expect("megatron.core.optimizer", "USING_PYTORCH_OPTIMIZER = True", "adam_cls = Adam")
    distributed = expect(
        "megatron.core.optimizer.distrib_optimizer", "HAVE_APEX_OR_TE = False", "'torch.cuda.FloatTensor"
    )
    if device.on_cuda() and not optimizer.USING_PYTORCH_OPTIMIZER:
        return
    optimizer.Adam = distributed.Adam = FusedAdamW
    optimizer.USING_PYTORCH_OPTIMIZER = False
    distributed.HAVE_APEX_OR_TE = distributed.USING_APEX_OPTIMIZER = True


def in_use() -> str:
    """Whose AdamW a run here uses, in words."""
    install()
    package = importlib.import_module("megatron.core.optimizer").Adam.__module__.partition(".")[0]
    return NAMES[package]
