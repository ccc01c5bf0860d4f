"""torch's fused AdamW where neither TransformerEngine's nor Apex's is installed, in their form."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
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
        exp_avg_dtype: torch.dtype = torch.float32,
        exp_avg_sq_dtype: torch.dtype = torch.float32,
        **unused: Any,
    ) -> None:
        if not adam_w_mode:
            raise ValueError("FusedAdamW decouples weight decay: keep adam_w_mode=True.")
        self.dtypes = {"exp_avg": exp_avg_dtype, "exp_avg_sq": exp_avg_sq_dtype}
        super().__init__(
            params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, bias_correction=True)
        )

    def initialize_state(self, param: Any, store_param_remainders: bool = False) -> None:
        """Moments of zero, in their dtypes; there are no masters here of which remainders could be stored."""
        for name, dtype in self.dtypes.items():
            self.state[param][name] = torch.zeros_like(param, dtype=dtype)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch does, but that moments keep their dtypes, where it gives them the fp32 masters'."""
        super().load_state_dict(state_dict)
        for state in self.state.values():
            state |= {name: state[name].to(dtype) for name, dtype in self.dtypes.items() if name in state}

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
                    self.initialize_state(param)
            if set(self.dtypes.values()) == {torch.float32}:
                self._update(group, params, done)
                continue
            for param in params:  # one by one: the kernel wants fp32, of which no more is there at a time
                self._update(group, [param], done)

    def _update(self, group: dict[str, Any], params: list[Any], done: int) -> None:
        """Step number done + 1 of parameters, with moments in fp32 for as long as it takes."""
        kept = [[self.state[param][name] for param in params] for name in self.dtypes]
        wide = [[moment.float() for moment in moments] for moments in kept]  # itself where it is fp32
        steps = torch.full((len(params),), float(done), device=params[0].device)  # where the kernel reads
        adamw(
            params,
            [param.grad for param in params],
            *wide,
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
        for moments, computed in zip(kept, wide, strict=True):
            for moment, value in zip(moments, computed, strict=True):
                if moment is not value:
                    moment.copy_(value)


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


@contextmanager
def moments_in(dtype: torch.dtype) -> Iterator[None]:
    """Have optimizers that megatron-core makes meanwhile keep their moments in a dtype, ours or TE's.

    Its own switch for it, use_precision_aware_optimizer, also hands the masters to TransformerEngine, refuses
    every other optimizer, and gives a checkpoint copies of the state to load into.
    """
    optimizer: Any = importlib.import_module("megatron.core.optimizer")
    made = optimizer.Adam
    if dtype is not torch.float32:
        optimizer.Adam = partial(made, exp_avg_dtype=dtype, exp_avg_sq_dtype=dtype)
    try:
        yield
    finally:
        optimizer.Adam = made


def in_use() -> str:
    """Whose AdamW a run here uses, in words."""
    install()
    package = importlib.import_module("megatron.core.optimizer").Adam.__module__.partition(".")[0]
    return NAMES[package]
