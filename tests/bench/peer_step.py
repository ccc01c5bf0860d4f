"""One training step here and the same step of dFactory's public code, in turns, on equal weights and batches.

    python -m tests.bench.peer_step DFACTORY RUN HF --packages DIR

DFACTORY is a checkout of inclusionAI/dFactory, RUN a run of `experiment=bench` in one stage of blocks, HF its
newest checkpoint by `llada convert mcore-to-hf`, DIR a folder that holds transformers 4.57. Each side is a
process of its own that waits while the others compute; seconds are processor time, so that other programs
cost little.

The public side runs its model in training mode, its mask function (with the packed documents' borders, which
it has no name for), its loss, torch's clipping and fused AdamW; its mask is ready before the clock starts.
VeOmni, which its model file imports names from, has parts for GPUs alone: what of it a CPU never calls is a
stand-in here.
"""

import argparse
import ast
import json
import resource
import statistics
import sys
import time
import types
from importlib import import_module
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

VARIANTS = {  # attention of the public model, and whether it recomputes layers (gradient checkpointing)
    "sdpa": ("sdpa", False),
    "sdpa, checkpointing": ("sdpa", True),
    "eager": ("eager", False),
}
STAGE = "schedule.stages=[{name: bdlm, block_size: '32', tokens: 1000000}]"
LOSS = ["diffusion.weight=flat", "diffusion.denominator=masked"]  # dFactory's: a mean over masked tokens


def resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def ours(pipe: Connection, args: argparse.Namespace, recompute: bool) -> None:
    """Sends all batches, then answers a step's number with (seconds, loss, peak MiB over the imports)."""
    import llada_megatron.training.loop  # noqa: F401 - before memory is looked at
    from llada_megatron.bench.step import _trainer
    from llada_megatron.checkpoint import store
    from llada_megatron.config.compose import compose
    from llada_megatron.record.manifest import find
    from llada_megatron.training.step import micro_batches, train_step

    imported = resident_mib()
    settings = ["experiment=bench", STAGE, *LOSS, "model.experts_per_token=4", f"data.path=[{args.data}]"]
    settings += [f"training.threads={args.threads}", f"layout.recompute={'full' if recompute else 'none'}"]
    trainer = _trainer(compose(settings))
    store.load(find(args.run).path, trainer.model, None)
    trainer.optimizer.reload_model_params()
    stage = trainer.schedule.stages[0]
    objective = trainer.objectives[stage.objective]
    steps = range(args.rounds + 1)
    pipe.send([for_public_code(*micro_batches(trainer, objective, stage, step, 0.0)) for step in steps])
    while (step := pipe.recv()) is not None:
        began = time.process_time()
        loss = train_step(trainer, step).loss
        pipe.send((time.process_time() - began, loss, peak_mib() - imported))


def for_public_code(batch: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens [B, 2L], labels [B, L] with -100 where there is no loss, and the tokens' documents [B, L]."""
    inputs = batch.inputs
    B, S = inputs.tokens.shape
    labels_SB = np.full((S, B), -100)
    labels_SB.reshape(-1)[inputs.outputs.numpy()] = inputs.labels.numpy()
    documents = [inputs.keys.mask.document_ids(sample).numpy() for sample in range(B)]
    return inputs.tokens.numpy(), labels_SB.T[:, : S // 2].copy(), np.stack(documents)


def stand_in_for_veomni() -> None:
    def module(name: str, **names: Any) -> None:
        sys.modules[name] = types.ModuleType(name)
        vars(sys.modules[name]).update(names)

    import logging

    for name in ("veomni", "veomni.distributed", "veomni.utils"):
        module(name)
    module("veomni.ops", causallm_loss_function=None, fused_moe_forward=None)
    module("veomni.distributed.parallel_state", get_parallel_state=None)
    module("veomni.utils.import_utils", is_liger_kernel_available=lambda: False)
    module("veomni.utils.logging", get_logger=logging.getLogger)
    sys.modules["veomni.utils"].logging = sys.modules["veomni.utils.logging"]  # type: ignore[attr-defined]


def function_of(path: Path, name: str) -> Any:
    """A function of a script that cannot be imported here."""
    import torch

    tree = ast.parse(path.read_text())
    tree.body = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name]
    names: dict[str, Any] = {"torch": torch}
    exec(compile(tree, str(path), "exec"), names)
    return names[name]


def theirs(pipe: Connection, args: argparse.Namespace, attention: str, checkpointing: bool) -> None:
    """Answers (tokens [B, 2L], labels [B, L], documents [B, L]) with (seconds, loss, peak MiB)."""
    sys.path[:0] = [str(args.packages), str(args.dfactory)]
    stand_in_for_veomni()
    import torch

    torch.set_num_threads(args.threads)
    modeling = import_module("models.llada2_moe.modeling_llada2_moe")
    mask_of = function_of(args.dfactory / "tasks/train_llada2_bd.py", "block_diffusion_mask")
    imported = resident_mib()
    model = modeling.LLaDA2MoeModelLM.from_pretrained(
        args.hf, torch_dtype=torch.float32, attn_implementation=attention
    ).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    adam = {"lr": 1e-3, "betas": (0.9, 0.95), "weight_decay": 0.1, "fused": True}
    optimizer = torch.optim.AdamW(model.parameters(), **adam)
    pipe.send("ready")
    while (batch := pipe.recv()) is not None:
        tokens, labels, documents = map(torch.from_numpy, batch)
        L = labels.shape[1]
        place = torch.arange(2 * L)
        seen = mask_of(None, None, place[:, None], place[None], block_size=32, n=L)
        document = torch.cat([documents, documents], dim=1)
        seen = seen & (document[:, :, None] == document[:, None, :])
        mask = torch.zeros(seen.shape).masked_fill_(~seen, float("-inf"))[:, None]
        if attention == "eager":  # where transformers turns a mask of ones and zeros into an additive one
            mask = seen[:, None].float()
        positions = torch.arange(L).repeat(2).expand(len(tokens), -1)
        began = time.process_time()
        output = model(tokens, attention_mask=mask, position_ids=positions, use_cache=False)
        logits = output.logits[:, :L].contiguous()
        loss = torch.nn.functional.cross_entropy(
            logits.view(-1, logits.shape[-1]), labels.view(-1), reduction="none"
        )
        loss = loss.sum() / (labels != -100).sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        pipe.send((time.process_time() - began, loss.item(), peak_mib() - imported))
        del output, logits, loss


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("dfactory", type=Path)
    parser.add_argument("run", type=Path)
    parser.add_argument("hf", type=Path)
    parser.add_argument("--packages", type=Path, required=True)
    parser.add_argument("--data", default="runs/data/python")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--public", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--recompute", action="store_true", help="also here with layout.recompute=full")
    args = parser.parse_args()
    spawn = get_context("spawn")
    sides: dict[str, tuple[Any, tuple[Any, ...]]] = {"here": (ours, (False,))}
    if args.recompute:
        sides["here, layout.recompute=full"] = ours, (True,)
    sides |= {f"public, {name}": (theirs, VARIANTS[name]) for name in args.public}
    pipes: dict[str, Connection] = {}
    batches: list[Any] = []
    for name, (side, how) in sides.items():
        pipes[name], other = spawn.Pipe()
        spawn.Process(target=side, args=(other, args, *how), daemon=True).start()
        other.close()  # or the end of a side would be waited for
        first = pipes[name].recv()  # one after the other is built
        batches = first if name == "here" else batches
    found: dict[str, list[Any]] = {name: [] for name in sides}
    for step, batch in enumerate(batches):  # the first step warms up; its losses are of the same weights
        for name, pipe in pipes.items():
            pipe.send(step if name.startswith("here") else batch)
            found[name].append(pipe.recv())
            print(step, name, *found[name][-1], flush=True)
    report(found, args.json)


def report(found: dict[str, list[Any]], file: Path | None) -> None:
    rows, (here, *_) = {}, found.values()
    for name, steps in found.items():
        seconds = [each[0] for each in steps[1:]]
        ratios = sorted(each[0] / mine[0] for each, mine in zip(steps[1:], here[1:], strict=True))
        rows[name] = {
            "seconds": statistics.median(seconds),
            "seconds_min": min(seconds),
            "time_ratio": statistics.median(ratios),
            "time_ratio_from_to": (ratios[0], ratios[-1]),
            "peak_mib": steps[-1][2],
            "memory_ratio": steps[-1][2] / here[-1][2],
            "first_loss": steps[0][1],
        }
        print(f"{name:<28} " + ", ".join(f"{key} {value}" for key, value in rows[name].items()), flush=True)
    if file is not None:
        file.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
