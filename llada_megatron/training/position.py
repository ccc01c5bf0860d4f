"""Where a run starts: from nothing, from another run's weights, or from its own newest checkpoint."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from llada_megatron.checkpoint import copies, publish, store
from llada_megatron.checkpoint.recall import recall
from llada_megatron.config import changes
from llada_megatron.config.changes import setting_of
from llada_megatron.config.compose import differences, leaf_differences, model_of, resolve, tree_of
from llada_megatron.config.errors import BadInput
from llada_megatron.config.rules import schedule_of
from llada_megatron.config.schedule import Schedule
from llada_megatron.config.schema import Config
from llada_megatron.config.stage_settings import at_stage
from llada_megatron.data.blend import PERIOD
from llada_megatron.data.fingerprint import fingerprint_difference, of_stage
from llada_megatron.data.phases import PhasedData
from llada_megatron.parallel.ranks import from_first_rank, warn
from llada_megatron.record.manifest import Checkpoint, Manifest, find, readable
from llada_megatron.record.run_dir import RunDir
from llada_megatron.training.skips import Skips

TRAINING_OF_MODEL = (
    "model.attention_backend",
    "model.layer_spec",
    "model.core",
    "model.fusions",
    "model.head_chunk_tokens",
    "model.init_std",
    "model.expert_bias_update_rate",
    "model.expert_bias_zero_mean",
    "model.expert_balance_clean_half",
    "model.router.rows_cap",
    "model.router.z_loss",
    "model.router.sequence_balance",
)
"""Keys of the model that say how it is trained, not what its weights compute."""


@dataclasses.dataclass
class Position:
    """What a run goes on from."""

    step: int = 0
    skipped_steps: int = 0
    wall_sec: float = 0.0
    autoregressive_tokens: int = 0
    """Data tokens of the model that the weights came from, when they came from another run."""
    skips: Skips = dataclasses.field(default_factory=Skips)
    """What was left out lately."""
    rollbacks: list[list[int]] = dataclasses.field(default_factory=list)
    """Of record/manifest.py: where the run went back to earlier weights."""


def resume_checkpoint(config: Config) -> Checkpoint | None:
    """The checkpoint that run.resume selects, its files verified; every rank calls it.

    `auto` takes the newest good one and renames damaged newer ones, with a warning. BadInput when a path
    is given that holds none, or a damaged one.
    """
    if config.run.resume == "never":
        return None
    if config.run.resume == "auto" and config.checkpoint.copy_to:
        copies.fetch_newer(Path(config.run.dir), config.checkpoint.copy_to)
    if config.run.resume == "auto" and config.checkpoint.memory_every_steps:
        recall(Path(config.run.dir), config.checkpoint.memory_dir)
    if config.run.resume != "auto":
        return store.verified(from_first_rank(find, config.run.resume))
    return newest_good(from_first_rank(RunDir(config.run.dir).whole_checkpoints))


def newest_good(paths: list[Path]) -> Checkpoint | None:
    """The last of these checkpoints, oldest first, whose files are good; every rank calls it.

    Damaged ones after it are renamed, with a warning.
    """
    for path in reversed(paths):
        try:
            return store.verified(from_first_rank(Checkpoint.read, path))
        except BadInput as damage:
            kept_as = publish.set_aside_damaged(path)
            warn(f"{damage} It is kept as {kept_as.name}; the run goes on from the one before it.")
    return None


def check_same_run(config: Config, manifest: Manifest, data_fingerprint: dict[str, Any]) -> None:
    """Raise BadInput when the checkpoint belongs to another model, objective, seed, order or data."""
    saved, allowed = config_of(manifest), config.run.allow_change
    changed = [line for line in differences(saved, config) if not changes.is_free(setting_of(line))]
    changed += _changed_stages(saved, config, manifest)
    changed = [line for line in changed if not changes.covers(allowed, setting_of(line))]
    if changed:
        settings = dict.fromkeys(map(setting_of, changed))
        stay = [
            f"{name} must stay, since {changes.NEVER[name]}" for name in settings if name in changes.NEVER
        ]
        offered = ", ".join(name for name in settings if name not in changes.NEVER)
        raise BadInput(
            f"The checkpoint belongs to another run: {'; '.join([*changed, *stay])}. Put the settings back,"
            + (f" set run.allow_change=[{offered}]," if offered and not stay else "")
            + " or start anew with another run.name (from these weights with checkpoint.init_from)."
        )
    _check_same_data(manifest.data_fingerprint, data_fingerprint, allowed)
    for stage in saved.schedule.stages[: _in_progress(saved, manifest) + 1]:
        before, after = (of_stage(each, stage.name) for each in (manifest.data_fingerprint, data_fingerprint))
        _check_same_data(before, after, allowed)
        _check_same_order(before, after, config, manifest)


def check_same_place(manifest: Manifest, data: PhasedData) -> None:
    """Raise BadInput where a run that goes on would not go on where it was in its corpora."""
    if not manifest.data_read:  # by an earlier version, in which a stage went on by its samples alone
        if data.phases_begun(manifest.step) > 1:
            raise BadInput(
                "The checkpoint was written by an earlier version, in which a stage that pairs its samples"
                " read sequences again that stages before it had read: go on with that version, or start a"
                " new run from these weights with checkpoint.init_from."
            )
        return
    told, computed = (
        [(each["idx_sha256"], each["sequences"]) for each in read]
        for read in (manifest.data_read, data.read_before(manifest.step))
    )
    if told != computed:
        raise BadInput(
            f"The checkpoint has read {told} of its corpora, by their digests, and these settings would have"
            f" read {computed}: put the settings back, or start a new run from these weights with"
            " checkpoint.init_from."
        )


def _check_same_data(saved: dict[str, Any], now: dict[str, Any], allowed: list[str]) -> None:
    """Other text in the same places may be allowed; what moves the places may not."""
    found = " ".join(fingerprint_difference(saved, now))
    if not found:
        return
    if _places(saved) != _places(now):
        raise BadInput(
            f"The data changed since the checkpoint: {found} The run's place in them would be another one:"
            " put the data back, or start a new run from its weights with checkpoint.init_from."
        )
    has_text = saved["corpora"] == now["corpora"]
    has_tokenizer = saved["tokenizer_sha256"] == now["tokenizer_sha256"]
    needed = [name for name, same in (("data.path", has_text), ("data.tokenizer", has_tokenizer)) if not same]
    if not set(needed) <= set(allowed):
        raise BadInput(
            f"The data changed since the checkpoint: {found} Documents begin where they did: set"
            f" run.allow_change=[{', '.join(needed)}] to go on."
        )


def _check_same_order(saved: dict[str, Any], now: dict[str, Any], config: Config, manifest: Manifest) -> None:
    """A blend without a period had one order for the whole run, which ours follows for a period.

    A corpus without a window was shuffled as a whole, as ours is up to a window.
    """
    if "shuffle_window" in now and "shuffle_window" not in saved:
        raise BadInput(
            f"The checkpoint's sequences were shuffled over a whole corpus by an earlier version, and are"
            f" within windows of {now['shuffle_window']:,} now: their order would be another one. Go on with"
            " that version, or start a new run from these weights with checkpoint.init_from."
        )
    samples = schedule_of(config, manifest.batches(config.layout.global_batch)).total_samples
    if len(saved["corpora"]) > 1 and "blend_period" not in saved and samples > PERIOD:
        raise BadInput(
            f"The checkpoint's blend was ordered for all of its {samples:,} samples by an earlier version,"
            f" and is ordered in periods of {PERIOD:,} now: it would be another one after the first. Go on"
            " with that version, or start a new run from these weights with checkpoint.init_from."
        )


def _places(fingerprint: dict[str, Any]) -> list[Any]:
    """What decides which documents a sample holds."""
    order = [fingerprint[name] for name in ("weights", "split", "sequence_length")]
    return [[corpus["idx_sha256"] for corpus in fingerprint["corpora"]], *order]


def check_same_model(config: Config, checkpoint: Checkpoint) -> None:
    """Raise BadInput when weights to start from are of a model that computes otherwise.

    Shapes alone would not tell: another rotary base, norm or mask token loads without an error.
    """
    # A key that came after the checkpoint has the value that its weights were made with, the default.
    model = model_of(checkpoint.path, checkpoint.manifest.config_of_weights)
    saved = {"model": dataclasses.asdict(model)}
    first = at_stage(config, 0).model
    now = {"model": tree_of(first)}
    allowed = [*TRAINING_OF_MODEL, *config.run.allow_change]
    if not model.lora.rank:  # adapters that are new compute nothing yet
        allowed.append("model.lora.*")
    elif not config.model.lora.rank:
        raise BadInput(
            f"checkpoint.init_from={checkpoint.path} holds adapters of rank {model.lora.rank}: set"
            f" model.lora.rank={model.lora.rank}, or merge them first with `llada convert mcore-to-hf`."
        )
    if changed := [
        line for line in leaf_differences(saved, now) if not changes.covers(allowed, setting_of(line))
    ]:
        raise BadInput(
            f"checkpoint.init_from={checkpoint.path} holds another model: {'; '.join(changed)}. Choose its"
            " model, or name the keys in run.allow_change."
        )


def check_nothing_later(run_dir: Path, step: int) -> None:
    """Raise BadInput when the run's directory holds checkpoints past the step that it starts from.

    They belong to a history that this start abandons: the next resume would pick one of them, and they
    would count as newer than what is saved from now on.
    """
    for checkpoint in readable(run_dir):
        if checkpoint.manifest.step > step:
            raise BadInput(
                f"{checkpoint.path} is later than step {step}, where run.resume starts: remove it and those"
                " after it, or choose another run.dir."
            )


def _changed_stages(saved: Config, now: Config, manifest: Manifest) -> list[str]:
    """Stages that were trained, up to the one in progress, stay as they are; later ones are free.

    The one in progress may end elsewhere, but not before it has come.
    """
    in_progress = _in_progress(saved, manifest)
    schedule, changed = schedule_of(now, manifest.batches(now.layout.global_batch)), []
    for index, before in enumerate(saved.schedule.stages[: in_progress + 1]):
        after = now.schedule.stages[index] if index < len(now.schedule.stages) else None
        if after is not None:
            after = dataclasses.replace(after, micro_batch=before.micro_batch, path=before.path)
            if index == in_progress and schedule.stages[index].end_step >= manifest.step:
                after = dataclasses.replace(after, tokens=before.tokens)
        if after != before:
            changed.append(f"schedule.stages[{index}] ({before.name}) has been trained and is another now")
    return changed


def _in_progress(saved: Config, manifest: Manifest) -> int:
    """Index of the stage that was trained last."""
    return schedule_of(saved, manifest.batches(saved.layout.global_batch)).stage_at(manifest.step - 1).index


def batch_change(schedule: Schedule, manifest: Manifest) -> tuple[str, dict[str, int]] | None:
    """What another global batch than the checkpoint's means, a sentence and figures; None if it stays."""
    (_, before), (first, now) = [(0, 0), *schedule.batches][-2:]
    if first != manifest.step or not first:
        return None
    stage, sample = schedule.stage_at(first), schedule.samples_before(first)
    sentence = (
        f"layout.global_batch {before} -> {now} at step {first}: goes on with sample {sample} in stage"
        f" {stage.name}, which ends after step {stage.end_step} with {stage.tokens:,} tokens, in whole steps"
        f" of {schedule.tokens_of(first):,}; the schedule has {schedule.total_steps} steps and"
        f" {schedule.total_tokens:,} tokens now"
    )
    place = {"step": first, "sample": sample, "before": before, "now": now}
    return sentence, place | {"steps": schedule.total_steps, "tokens": schedule.total_tokens}


def config_of(manifest: Manifest) -> Config:
    """The configuration stored in a checkpoint."""
    return resolve(manifest.config)
