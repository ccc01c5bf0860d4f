"""How much may be left out."""

import pytest

from llada_megatron.config.errors import RunFailed
from llada_megatron.config.schema import TrainingConfig
from llada_megatron.training.skips import Skips


@pytest.mark.parametrize("kind", ["steps", "samples"])
def test_what_is_left_out_counts_in_a_window_of_steps_or_in_the_whole_run(kind):
    def add(skips: Skips, settings: TrainingConfig, step: int) -> None:
        if kind == "steps":
            skips.add_step(settings, step, range(4 * step, 4 * step + 4))
        else:
            skips.add_samples(settings, step, [f"why {step}"])

    settings = TrainingConfig(max_skipped_steps=2, max_skipped_samples=2, skip_window_steps=10)
    skips = Skips()
    for step in (0, 5, 10, 15, 20, 25):  # two in every ten
        add(skips, settings, step)
    assert getattr(skips, kind) == [20, 25]
    message = r"Step 29 \(samples 116 to 119\) .*max_skipped_steps=2" if kind == "steps" else "why 29"
    with pytest.raises(RunFailed, match=message):
        add(skips, settings, 29)
    whole, skips = TrainingConfig(max_skipped_steps=2, max_skipped_samples=2, skip_window_steps=0), Skips()
    add(skips, whole, 1)
    add(skips, whole, 5000)
    with pytest.raises(RunFailed, match="of the run"):
        add(skips, whole, 9000)
