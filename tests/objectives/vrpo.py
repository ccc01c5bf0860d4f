"""Variance of a preference's estimate over masks (VRPO, arXiv 2505.19223, table 2), on a small model.

A reference is trained on conversations, a policy is a few steps of DPO away from it; then the score, the loss
and its gradient are estimated many times with n_t counts of masked tokens (their t) and n_y masks of each.

    .venv/bin/python -m tests.objectives.vrpo

Legend: K counts, M masks of each, T texts (chosen, rejected, ...), P pairs, G estimates, D of a sketch.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llada_megatron.config import rules
from llada_megatron.config.schema import Config
from tests.distributed import run_ranks
from tests.objectives.conversations import BLOCK, configure, write

ROWS = {
    "n_t 8, n_y 1": (8, 1, True),
    "n_t 4, n_y 1": (4, 1, True),
    "n_t 2, n_y 2": (2, 2, True),
    "n_t 1, n_y 4": (1, 4, True),
    "n_t 1, n_y 1": (1, 1, True),
    "n_t 4, n_y 1, masks not shared": (4, 1, False),
}
"""Of their table 2, in the order of its variances of score and loss, the least first."""
COMPLEMENTS = "2 masks and their complements"
"""Of the same budget of 4, as the objective `preference` draws: their table has none."""
SFT_STEPS, SFT_LR = 150, 2e-3
DPO_STEPS, DPO_LR = 8, 1e-5
GRADIENTS = 500
"""Estimates whose gradients are taken, of those whose scores are."""
SKETCH = 2048
"""Numbers that a gradient is added up in, with random signs: squared lengths stay, within 3%."""


@dataclass
class Variances:
    """Over the masks, of a pair's score, its loss (means over pairs), its gradient (the sum over weights)."""

    score: float
    loss: float
    gradient: float


@dataclass
class Pool:
    """Estimates of K counts with M masks each, that rows are put together from."""

    policy_KMT: np.ndarray
    reference_KMT: np.ndarray
    complements_2KT: np.ndarray
    """B of policy and reference as `preference` draws them: means over M/2 masks and their complements."""
    gradients_KM2D: np.ndarray | None
    """Of the first pair's B(chosen) and B(rejected) by the policy's weights, sketched in D numbers."""


def models(config: Config, chats: str, *, lr: float) -> tuple[Any, Any]:
    """A reference after SFT, and a policy that DPO has led a little way from it."""
    import torch

    from llada_megatron.model.provider import build_stage
    from llada_megatron.objectives.preference import bounds

    reference = build_stage(config)
    _train(reference, configure(chats, "sft", "diffusion.t_per=block"), SFT_STEPS, SFT_LR)
    reference.requires_grad_(False)
    policy = build_stage(config)
    with torch.no_grad():
        for mine, theirs in zip(
            [*policy.parameters(), *policy.buffers()],
            [*reference.parameters(), *reference.buffers()],
            strict=True,
        ):
            mine.copy_(theirs)

    def score(batch: Any) -> None:
        with torch.no_grad():
            batch.whole["reference"] = bounds(batch, reference(batch.inputs))

    _train(policy, config, DPO_STEPS, lr, score)
    return policy, reference


def _train(model: Any, config: Config, steps: int, lr: float, prepare: Any = lambda batch: None) -> None:
    import torch

    schedule = rules.check(config)
    stage = schedule.stages[0]
    objective, data = _objective(config), _sequences(config)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr)
    for step in range(steps):
        indices = list(range(8 * step, 8 * step + 8))
        if stage.objective == "preference":
            batch, _ = objective.scored(data, indices, stage.block_size)
        else:
            batch = objective.batch(data, indices, stage)
        batch.inputs.readout = objective.readout
        prepare(batch)
        loss = objective.loss(batch, model(batch.inputs))
        optimizer.zero_grad()
        sum(part / count for part, count in zip(loss.sums, loss.counts, strict=True)).backward()
        optimizer.step()


def _objective(config: Config) -> Any:
    from llada_megatron.objectives.registry import objective_of

    schedule = rules.schedule_of(config)
    return objective_of(schedule.stages[0].objective, config, schedule)


def _sequences(config: Config) -> Any:
    from llada_megatron.data.packed import build_sequences

    return build_sequences(
        config.data,
        split="train",
        seed=config.run.seed,
        vocab_size=config.model.vocab_size,
        mask_token_id=config.model.mask_token_id,
    )


def masks(
    random: np.random.Generator, starts: np.ndarray, supervised: np.ndarray, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """masked bool and weights float64 [count, L]: k of each block drawn once, `count` subsets of so many."""
    scored = np.flatnonzero(supervised)
    _, block, size = np.unique(starts[scored], return_inverse=True, return_counts=True)
    k = random.integers(1, size + 1)
    masked = np.zeros((count, len(starts)), dtype=bool)
    for row in masked:
        order = np.lexsort((random.random(len(scored)), block))
        place = np.arange(len(scored)) - (np.cumsum(size) - size)[block[order]]
        row[scored[order]] = place < k[block[order]]
    weights = np.zeros(len(starts))
    weights[scored] = (size / k)[block]
    return masked, masked * weights


def complements_of(seed: int, sample: Any, starts: np.ndarray, draws: int) -> tuple[np.ndarray, np.ndarray]:
    """masked bool and weights float64 [draws, L] as the objective `preference` draws them."""
    from llada_megatron.objectives.bound import complementary_count_mask

    masked, weights = np.zeros((draws, len(starts)), dtype=bool), np.zeros((draws, len(starts)))
    for text, document in enumerate(sample.document_ids):
        part = slice(sample.cu_seqlens[text], sample.cu_seqlens[text + 1])
        for draw in range(draws if document >= 0 else 0):
            masked[draw, part], weights[draw, part] = complementary_count_mask(
                seed, document, draw, draws, starts[part], sample.supervised[part]
            )
    return masked, weights


def text_bounds(model: Any, sample: Any, masked: np.ndarray, weights: np.ndarray, config: Config) -> Any:
    """B [draws, T] of the texts of a sequence under masks [draws, L]."""
    import torch

    from llada_megatron.model.readout import CROSS_ENTROPY
    from llada_megatron.objectives.diffusion import diffusion_inputs

    draws, lengths = len(masked), np.diff(sample.cu_seqlens)
    inputs = diffusion_inputs(
        [sample] * draws,
        list(masked),
        block_size=BLOCK,
        grid=config.diffusion.block_grid,
        mask_token_id=config.model.mask_token_id,
    )
    inputs.readout = CROSS_ENTROPY
    text = np.repeat(np.arange(len(lengths)), lengths)
    slot = np.concatenate([draw * len(lengths) + text[row] for draw, row in enumerate(masked)])
    weighted = model(inputs).double() * torch.from_numpy(weights[masked])
    found = weighted.new_zeros(draws * len(lengths)).index_add(0, torch.from_numpy(slot), -weighted)
    return found.view(draws, -1)[:, : int((sample.document_ids >= 0).sum())]


def pool(
    config: Config, chats: str, counts: int, draws: int, lr: float, takes_gradients: bool = True
) -> Pool:
    """Draw K = `counts` counts with M = `draws` masks each, and score the texts of a sequence under all."""
    import torch

    from llada_megatron.attention.mask import block_starts
    from llada_megatron.parallel import groups

    groups.initialize(config.layout)
    torch.manual_seed(0)
    policy, reference = models(config, chats, lr=lr)
    sample = _sequences(config)[0]
    starts = block_starts(sample.cu_seqlens, BLOCK, config.diffusion.block_grid)
    random = np.random.default_rng(0)
    parameters = [p for p in policy.parameters() if p.requires_grad]
    size = sum(p.numel() for p in parameters)
    bucket, sign = torch.randint(SKETCH, (size,)), torch.randint(2, (size,)) * 2.0 - 1
    scored: list[tuple[Any, Any]] = []
    complements = []
    gradients = []
    for seed in range(counts):
        drawn = complements_of(seed, sample, starts, draws)
        with torch.no_grad():
            sides = [text_bounds(model, sample, *drawn, config) for model in (policy, reference)]
        complements.append(torch.stack(sides).mean(dim=1).numpy())
        drawn = masks(random, starts, sample.supervised, draws)
        with torch.no_grad():
            known = text_bounds(reference, sample, *drawn, config)
        bounds_MT = text_bounds(policy, sample, *drawn, config)
        scored.append((bounds_MT.detach().numpy(), known.numpy()))
        for bound in bounds_MT[:, :2].flatten() if takes_gradients else ():
            found = torch.autograd.grad(bound, parameters, retain_graph=True, materialize_grads=True)
            flat = torch.cat([gradient.flatten() for gradient in found])
            gradients.append(flat.new_zeros(SKETCH).index_add_(0, bucket, sign * flat).numpy())
    policy_KMT, reference_KMT = (np.stack(side) for side in zip(*scored, strict=True))
    complements_2KT = np.stack(complements, axis=1)
    gradients_KM2D = np.stack(gradients).reshape(counts, draws, 2, -1) if gradients else None
    return Pool(policy_KMT, reference_KMT, complements_2KT, gradients_KM2D)


def variances(
    pool: Pool, n_t: int, n_y: int, shared: bool, beta: float, *, estimates: int = 4000
) -> Variances:
    """Of estimates that draw n_t of the pool's counts and n_y masks of each, with replacement."""
    K, M, T = pool.policy_KMT.shape
    random = np.random.default_rng(1)

    def drawn() -> tuple[np.ndarray, np.ndarray]:
        k = random.integers(K, size=(estimates, n_t, 1))
        m = random.random((estimates, n_t, M)).argsort(axis=-1)[..., :n_y]
        return k, m

    # A text's masks are its own; where they are not shared the reference draws others.
    reward_GT, gradients_2GD = np.empty((estimates, T)), []
    for text in range(T):
        k, m = drawn()
        bound_G = pool.policy_KMT[k, m, text].mean(axis=(1, 2))
        if text < 2 and pool.gradients_KM2D is not None:
            few = zip(k[:GRADIENTS], m[:GRADIENTS], strict=True)
            gradients_2GD.append([pool.gradients_KM2D[*at, text].mean(axis=(0, 1)) for at in few])
        k, m = (k, m) if shared else drawn()
        reward_GT[:, text] = bound_G - pool.reference_KMT[k, m, text].mean(axis=(1, 2))
    score_GP = beta * (reward_GT[:, 0::2] - reward_GT[:, 1::2])
    loss_GP = np.logaddexp(0, -score_GP)
    gradient = np.nan
    if gradients_2GD:
        slope_G = -beta / (1 + np.exp(score_GP[:GRADIENTS, 0]))
        gradient = float((slope_G[:, None] * np.subtract(*gradients_2GD)).var(axis=0).sum())
    return Variances(float(score_GP.var(axis=0).mean()), float(loss_GP.var(axis=0).mean()), gradient)


def table(
    folder: Path, *, counts: int, draws: int = 4, lr: float = DPO_LR, takes_gradients: bool = True
) -> dict[str, Variances]:
    """The six rows and ours on a corpus that is written into `folder`; gradients take most of the time."""
    chats, pairs = write(folder, "chat"), write(folder, "preference")
    config = configure(pairs, "dpo", "layout.micro_batch=8", "preference.sft_weight=0")
    [found] = run_ranks(pool, config, chats, counts, draws, lr, takes_gradients)
    beta = config.preference.beta
    rows = {name: variances(found, *row, beta) for name, row in ROWS.items()}
    reward_KT = np.subtract(*found.complements_2KT)
    score_KP = beta * (reward_KT[:, 0::2] - reward_KT[:, 1::2])
    of_score, of_loss = (v.var(axis=0).mean() for v in (score_KP, np.logaddexp(0, -score_KP)))
    return rows | {COMPLEMENTS: Variances(float(of_score), float(of_loss), np.nan)}


def main(counts: int = 128) -> None:
    """Print the table for a policy that is close to its reference, and for others that are not."""
    for lr in (DPO_LR, 5e-5, 2e-4):
        print(f"after {DPO_STEPS} steps of DPO at {lr:g}: variance of score, loss, gradient")
        with tempfile.TemporaryDirectory() as folder:
            for name, row in table(Path(folder), counts=counts, lr=lr).items():
                print(f"  {name:<32} {row.score:10.3e} {row.loss:10.3e} {row.gradient:10.3e}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
