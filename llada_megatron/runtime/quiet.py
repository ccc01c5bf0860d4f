"""Silences what megatron-core 0.19 and torch say on every start although nothing is wrong, and no more."""

from __future__ import annotations

import logging
import warnings

WARNINGS: list[tuple[type[Warning], str, str]] = [  # category, beginning of the message, module that warns
    # Optional packages: our own norms and FusedAdamW (adamw.py) stand in, or TransformerEngine is there.
    (UserWarning, "Apex is not installed", ""),
    (UserWarning, "Transformer Engine and Apex are not installed", ""),
    # Asked before the process group exists; megatron-core then takes rank 0 to print other warnings.
    (UserWarning, "Could not determine rank from torch.distributed", ""),
    # Raised by TransformerConfig's own default; where graphs are captured, their parts are named (speed.py).
    (UserWarning, "full scope is deprecated", ""),
    # recompute_modules with core_attn: TransformerEngine's attention would not need it, ours takes its place.
    (UserWarning, "If you are using transformer_engine as the transformer implementation", ""),
    # Expert layers split by etp, not tp: with etp 1 there is no sequence parallelism inside an expert.
    (UserWarning, "`sequence_parallel` is set to `True`, but tensor model parallel size is 1", ""),
    # megatron-core then uses Python's logging, as intended.
    (UserWarning, "absl.logging is not installed", ""),
    # Imported by megatron-core itself; multimodal models are not used.
    (UserWarning, "MimoModelConfig is experimental", ""),
    # optimizer.py:68 asks every parameter for a gradient, views of the optimizer's shards included.
    (UserWarning, "The .grad attribute of a Tensor that is not a leaf Tensor", "megatron"),
    # megatron-core calls names that torch 2.14 renamed; requirements.txt pins both.
    (FutureWarning, "`torch.distributed.reduce_scatter_tensor` is deprecated", ""),
    (FutureWarning, "`torch.distributed.all_gather_into_tensor` is deprecated", ""),
    # Loads of a checkpoint: every rank reads what it needs by itself, over torch's older shard format.
    (
        UserWarning,
        "torch.distributed is disabled, unavailable or uninitialized, assuming the intent is to",
        "",
    ),
    (UserWarning, "The argument order of load has been changed", ""),
    (FutureWarning, "Please use DTensor instead", ""),
    # A docstring with an unescaped backslash, seen when megatron-core is compiled to bytecode.
    (SyntaxWarning, "invalid escape sequence", ".*megatron"),
]

LOGGED = [  # logger, part of the message
    # A CUDA toolkit without a device: the seam serves the CPU.
    ("torch.utils.cpp_extension", "No CUDA runtime is found"),
    # Advice to move to HybridModel; the version is pinned and GPTModel still gets its fixes.
    ("megatron.core.models.gpt.gpt_model", "GPTModel IS DEPRECATED"),
]


def install() -> None:
    """Filter exactly the messages above; calling it again changes nothing."""
    for category, message, module in WARNINGS:
        warnings.filterwarnings("ignore", message, category, module)
    for logger, fragment in LOGGED:
        if not any(isinstance(each, _Without) for each in logging.getLogger(logger).filters):
            logging.getLogger(logger).addFilter(_Without(fragment))


class _Without(logging.Filter):
    """Drops records that contain a fragment."""

    def __init__(self, fragment: str) -> None:
        super().__init__()
        self.fragment = fragment

    def filter(self, record: logging.LogRecord) -> bool:
        return self.fragment not in record.getMessage()
