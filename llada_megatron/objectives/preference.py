"""Preferences over the likelihood bound: DPO for block diffusion (LLaDA2.0, eq. 7 and 8; VRPO, arXiv
2505.19223).

    B(y) = mean over draws of sum over masked i of weight_i log p(y_i | its masked block, clean text before)
    r(y) = B_policy(y) - B_reference(y), of the same masks

    dpo   -(1 - e) log sigmoid(s) - e log sigmoid(-s), s = beta (r(chosen) - r(rejected)), e = label smoothing
    ipo   (r(chosen) - r(rejected) - 1 / (2 beta))^2                               (arXiv 2310.12036)
    kto   mean of 1 - sigmoid(beta r(chosen)) and 1 - sigmoid(-beta r(rejected))   (arXiv 2402.01306, z0 = 0)

plus sft_weight times the chosen texts' bound per token. B is minus the bound of the negative log-likelihood.
A pair lies in one sequence and its draws in one micro-batch, so that the gradient is that of the formula;
where context parallelism parts it, sums are completed before the nonlinear function. The reference's bounds
are numbers of a file that `llada score` wrote: no second model is kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state

from llada_megatron.attention.mask import block_starts
from llada_megatron.config.schedule import Stage
from llada_megatron.config.schema import BlockGrid, PreferenceConfig, PreferenceForm
from llada_megatron.config.stage_settings import at_stage
from llada_megatron.data.packed import PackedSample, PackedSequences
from llada_megatron.objectives import passes
from llada_megatron.objectives.batch import MicroBatch, Samples, context_part
from llada_megatron.objectives.bound import complementary_count_mask
from llada_megatron.objectives.diffusion import Diffusion, diffusion_inputs
from llada_megatron.objectives.objective import Loss
from llada_megatron.objectives.passes import counted_once, sum_over_context
from llada_megatron.objectives.reference import ReferenceScores
from llada_megatron.parallel.dealing import even_parts
from llada_megatron.runtime import device

SIDES = 2  # chosen, rejected


class Preference(Diffusion):
    """The loss over pairs, and the chosen texts' bound over their tokens."""

    scores: ReferenceScores | None = None
    """None until a stage is opened, unless somebody has set them: a benchmark, a dry run."""
    mask: Callable[..., tuple[np.ndarray, np.ndarray]] = staticmethod(complementary_count_mask)
    """Which tokens of a text a draw scores, and their weights."""

    def open(self, stage: Stage) -> None:
        """Read the reference's scores; BadInput for those of other texts, masks or weights."""
        self.scores = ReferenceScores.load(
            at_stage(self.config, stage.index), stage.block_size, self.identity.get("reference")
        )
        self.identity = {"reference": self.scores.reference}

    def _scores(self, stage: Stage) -> ReferenceScores:
        if self.scores is None or self.scores.block_size not in (0, stage.block_size):
            self.open(stage)
        assert self.scores is not None
        return self.scores

    def batch(
        self,
        data: PackedSequences,
        indices: list[int],
        stage: Stage,
        *,
        noise_sigma: float = 0.0,
        draft: torch.Tensor | None = None,
    ) -> MicroBatch:
        """`[x_t ; x_0]` of whole groups of draws: sample i is draw i mod n of sequence i // n."""
        scores = self._scores(stage)
        batch, texts = self.scored(data, indices, stage.block_size)
        known = np.array([scores.of(prefix, document) for prefix, document in texts]).T  # [D, texts]
        batch.whole["reference"] = torch.from_numpy(known).reshape(batch.whole["reference"].shape)
        return batch

    def scored(
        self, data: Samples, indices: list[int], block_size: int
    ) -> tuple[MicroBatch, list[tuple[str, int]]]:
        """The batch, its reference zero, and (corpus, document) of each text in the order of slots."""
        draws, seed, grid = (
            self.config.preference.draws,
            self.config.run.seed,
            self.config.diffusion.block_grid,
        )
        samples = self.read(data, indices)
        texts: list[tuple[str, int]] = []
        first_text: dict[int, int] = {}  # of a sequence
        tokens = 0  # of the chosen texts
        masks, weights, slots = [], [], []
        for index, sample in zip(indices, samples, strict=True):
            assert sample.document_ids is not None and sample.supervised is not None
            own = [] if sample.is_left_out else sample.document_ids[sample.document_ids >= 0].tolist()
            if index // draws not in first_text:
                first_text[index // draws] = len(texts)
                texts += [(sample.corpus, document) for document in own]
                edges = sample.cu_seqlens[: len(own) + 1]
                tokens += int(np.add.reduceat(sample.supervised, edges[:-1])[::SIDES].sum())
            masked, weight, text = self._masks(sample, own, index % draws, block_size, grid, seed)
            masks.append(masked)
            weights.append(weight[masked])
            slots.append((index % draws, first_text[index // draws] + text[masked]))
        slot = np.concatenate([draw * len(texts) + text for draw, text in slots])
        inputs = diffusion_inputs(
            samples,
            masks,
            block_size=block_size,
            grid=grid,
            mask_token_id=self.config.model.mask_token_id,
        )
        rows = {
            "weights": torch.from_numpy(np.concatenate(weights)),
            "slot": torch.from_numpy(slot),
        }
        whole = {"reference": torch.zeros(draws, len(texts) // SIDES, SIDES, dtype=torch.float64)}
        counts = (len(texts) // SIDES, tokens)
        return MicroBatch(inputs, rows, counts, whole, relative=frozenset({"slot"})), texts

    def _masks(
        self, sample: PackedSample, own: list[int], draw: int, block_size: int, grid: BlockGrid, seed: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """masked bool [L], weights float64 [L] and each token's text in the sequence, int64 [L]."""
        assert sample.supervised is not None
        starts = block_starts(sample.cu_seqlens, block_size, grid)
        masked, weights = np.zeros(len(starts), dtype=bool), np.zeros(len(starts))
        for text, document in enumerate(own):
            part = slice(sample.cu_seqlens[text], sample.cu_seqlens[text + 1])
            masked[part], weights[part] = self.mask(
                seed, document, draw, self.config.preference.draws, starts[part], sample.supervised[part]
            )
        lengths = np.diff(sample.cu_seqlens)
        return masked, weights, np.repeat(np.arange(len(lengths)), lengths)

    def loss(self, batch: MicroBatch, output: torch.Tensor) -> Loss:
        """Of cross entropies [N]: the preference over pairs, the chosen bound over tokens."""
        settings, reference_DP2 = self.config.preference, batch.whole["reference"]
        weighted = output.double() * batch.rows["weights"]
        bound_DP2 = sum_over_context(bounds(batch, output))
        reward_DP2 = bound_DP2 - reference_DP2
        reward_P2 = reward_DP2.mean(dim=0)
        losses_P = preference_losses(reward_P2, settings)
        is_chosen = batch.rows["slot"] % SIDES == 0
        chosen = (weighted * is_chosen).sum() * (settings.sft_weight / settings.draws)
        here = slice(0, int(batch.counts[0]))  # all pairs on one context-parallel rank, none on the others
        shown = figures(bound_DP2.detach(), reference_DP2, settings)
        first = torch.zeros(len(losses_P), dtype=torch.int64, device=losses_P.device)
        return Loss(
            [counted_once(losses_P.sum()), chosen],
            batch.counts,
            {name: (first[here], values[here]) for name, values in shown.items()},
        )

    def held_out(
        self, model: Sequence[torch.nn.Module], samples: Sequence[PackedSample], stage: Stage
    ) -> dict[str, dict[str, float | None]]:
        """The figures of a step over held-out pairs; `se` is over pairs. BadInput for one without scores."""
        scores, settings = self._scores(stage), self.config.preference
        texts = [
            (sample.corpus, document)
            for sample in samples
            for document in ([] if sample.document_ids is None else sample.document_ids.tolist())
            if document >= 0
        ]
        row_of = {text: row for row, text in enumerate(dict.fromkeys(texts))}
        found_TD = self.text_bounds(
            model,
            dict(enumerate(samples)),
            len(samples),
            stage.block_size,
            rows=len(row_of),
            row_of=lambda *text: row_of[text],
        )
        known_TD = np.array([scores.of(*text) for text in row_of])
        bound_DP2, reference_DP2 = (
            torch.from_numpy(side.T.reshape(settings.draws, -1, SIDES)) for side in (found_TD, known_TD)
        )
        shown = figures(bound_DP2, reference_DP2, settings)
        return {name: _estimate(values_P) for name, values_P in shown.items()}

    def text_bounds(
        self,
        model: Sequence[torch.nn.Module],
        data: Samples,
        sequences: int,
        block_size: int,
        *,
        rows: int,
        row_of: Callable[[str, int], int],
    ) -> np.ndarray:
        """B of every draw of the texts of the first sequences, float64 [rows, draws]; the same on every rank.

        row_of: (corpus, document) -> its row; rows of which no text was read are NaN.
        """
        draws, layout = self.config.preference.draws, self.config.layout
        size = max(1, layout.micro_batch // draws)
        parts = even_parts(sequences, size, layout.pp if layout.vpp > 1 else 1)
        samples = [[s * draws + draw for s in part for draw in range(draws)] for part in parts]
        scored: list[list[int]] = []  # rows of each micro-batch

        def batches(chunk: int) -> Iterator[MicroBatch]:  # one at a time: a corpus has more than a host holds
            for indices in samples:
                batch, texts = self.scored(data, indices, block_size)
                if chunk == 0:
                    scored.append([row_of(*text) for text in texts])
                batch.inputs.readout = self.readout
                yield context_part(batch).to(device.device())

        length = len(data[0].tokens)
        found = passes.forward_only(
            model,
            [batches(chunk) for chunk in range(len(model))],
            bounds,
            num_microbatches=len(parts),
            seq_length=length if block_size == length else 2 * length,
            micro_batch_size=size * draws,
        )
        totals = torch.zeros(rows, draws, dtype=torch.float64, device=device.device())
        covered = torch.zeros_like(totals)
        for numbers, sums in zip(scored, found, strict=False):  # nothing was found on the earlier pp_stages
            totals[numbers] = sums.reshape(draws, -1).T
            # Context-parallel ranks hold parts of the same texts: the parts add up to one covering.
            covered[numbers] = float(parallel_state.get_context_parallel_rank() == 0)
        for tensor in (totals, covered):
            dist.all_reduce(tensor, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
            dist.all_reduce(tensor, group=parallel_state.get_pipeline_model_parallel_group())
        return (totals / covered).cpu().numpy()

    def shown(self, stage: Stage, means: dict[str, list[float | None]]) -> dict[str, Any]:
        """Means over the pairs of a step."""
        return {name: values[0] for name, values in means.items()}


def bounds(batch: MicroBatch, output: torch.Tensor) -> torch.Tensor:
    """This rank's part of B of each draw, pair and side, float64 [D, P, 2], from cross entropies [N]."""
    weighted = output.double() * batch.rows["weights"]
    like = batch.whole["reference"]
    return weighted.new_zeros(like.numel()).index_add(0, batch.rows["slot"], -weighted).view_as(like)


def figures(
    bound_DP2: torch.Tensor, reference_DP2: torch.Tensor, settings: PreferenceConfig
) -> dict[str, torch.Tensor]:
    """What is shown of each pair, float64 [P] by name: bounds in nats per text, the variance over draws."""
    reward_DP2 = bound_DP2 - reference_DP2
    margin_DP = settings.beta * (reward_DP2[..., 0] - reward_DP2[..., 1])
    return {
        "margin": margin_DP.mean(dim=0),
        "accuracy": (margin_DP.mean(dim=0) > 0).double(),
        "margin_variance": margin_DP.var(dim=0) if settings.draws > 1 else 0 * margin_DP[0],
        "chosen_bound": -bound_DP2[..., 0].mean(dim=0),
        "rejected_bound": -bound_DP2[..., 1].mean(dim=0),
    }


def _estimate(values_P: torch.Tensor) -> dict[str, float | None]:
    pairs = len(values_P)
    error = float(values_P.std()) / math.sqrt(pairs) if pairs > 1 else None
    return {"mean": float(values_P.mean()), "se": error}


def preference_losses(reward_P2: torch.Tensor, settings: PreferenceConfig) -> torch.Tensor:
    """The loss [P] of pairs whose chosen and rejected texts have the rewards r [P, 2]."""
    difference_P = reward_P2[:, 0] - reward_P2[:, 1]
    match settings.form:
        case PreferenceForm.dpo:
            score_P, smoothing = settings.beta * difference_P, settings.label_smoothing
            return -(1 - smoothing) * F.logsigmoid(score_P) - smoothing * F.logsigmoid(-score_P)
        case PreferenceForm.ipo:
            return (difference_P - 1 / (2 * settings.beta)).square()
        case PreferenceForm.kto:
            signed_P2 = settings.beta * reward_P2 * reward_P2.new_tensor([1.0, -1.0])
            return (1 - signed_P2.sigmoid()).mean(dim=-1)


OBJECTIVE = Preference
