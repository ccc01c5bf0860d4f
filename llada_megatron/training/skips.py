"""What a run leaves out so that it goes on, and when that is too much."""

from __future__ import annotations

from dataclasses import dataclass, field

from llada_megatron.config.errors import RunFailed
from llada_megatron.config.schema import TrainingConfig


@dataclass
class Skips:
    """Steps and samples that were left out lately, the same on every rank."""

    steps: list[int] = field(default_factory=list)
    """Steps that were skipped."""
    samples: list[int] = field(default_factory=list)
    """The step of each sample that was left out."""

    def add_step(self, settings: TrainingConfig, step: int, samples: range, spike: str = "") -> None:
        """Count a skipped step; raises RunFailed when it is one too many, naming its samples.

        spike: what was wrong with a step of which all was finite.
        """
        self.steps = _lately(settings, [*self.steps, step])
        if len(self.steps) > (limit := settings.max_skipped_steps):
            why = spike or "for a non-finite loss or gradient or for want of good samples"
            raise RunFailed(
                f"Step {step} (samples {samples[0]} to {samples[-1]}) is skipped as number {len(self.steps)}"
                f" {_window(settings)}, {why}: more than training.max_skipped_steps={limit}. Lower"
                " optimizer.lr or look at these samples, which training.skip_samples passes over."
            )

    def add_samples(self, settings: TrainingConfig, step: int, why: list[str]) -> None:
        """Count samples that were left out; why: a sentence for each. Raises RunFailed past the limit."""
        self.samples = _lately(settings, [*self.samples, *[step] * len(why)])
        if len(self.samples) > (limit := settings.max_skipped_samples):
            raise RunFailed(
                f"{len(self.samples)} samples were left out {_window(settings)}, more than"
                f" training.max_skipped_samples={limit}: mend the corpus. The last one: {why[-1]}"
            )


def _lately(settings: TrainingConfig, steps: list[int]) -> list[int]:
    window = settings.skip_window_steps
    return [step for step in steps if not window or step > steps[-1] - window]


def _window(settings: TrainingConfig) -> str:
    window = settings.skip_window_steps
    return f"within training.skip_window_steps={window}" if window else "of the run"
