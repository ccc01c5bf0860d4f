"""Rules across groups: what cannot work is refused before any process starts, naming the setting."""

from __future__ import annotations

from llada_megatron.config.changes import check_names
from llada_megatron.config.choices import GroupRates, WrongWords
from llada_megatron.config.families import formulas_of
from llada_megatron.config.layout_rules import check_batches, check_layout, require
from llada_megatron.config.schedule import Batches, Schedule, Stage, block_size_of
from llada_megatron.config.schema import BlockGrid, Config, DiffusionConfig, RatePer
from llada_megatron.config.speed_rules import check_switches
from llada_megatron.config.stage_settings import at_stage, diffusion_of


def schedule_of(config: Config, batches: Batches = ()) -> Schedule:
    """The schedule on the axis of steps; batches: of a run whose global batch a resume changed."""
    return Schedule(
        config.schedule,
        sequence_length=config.data.sequence_length,
        batches=batches or [(0, config.layout.global_batch)],
        micro_batch=config.layout.micro_batch,
    )


def check(config: Config) -> Schedule:
    """Check every rule that needs no file; returns the schedule. Raises BadInput with one sentence."""
    check_names(config.run.allow_change)
    check_layout(config)
    _check_objective(config)
    schedule = schedule_of(config)
    check_batches(config.layout, schedule)
    check_switches(config, schedule)
    require(
        config.optimizer.warmup_tokens < schedule.total_tokens,
        f"optimizer.warmup_tokens={config.optimizer.warmup_tokens} is not less than the schedule's"
        f" {schedule.total_tokens} tokens: shorten the warm-up.",
    )
    for stage in schedule.stages:
        _check_stage(config, stage)
    formulas_of(config.model).check_run(config, schedule)
    _check_conversations(config, schedule)
    if any(stage.objective == "levenshtein" for stage in schedule.stages):
        _check_orders(config)
    for axis in ("pp", "cp"):
        ways = getattr(config.layout, axis)
        require(
            not config.evaluation.infill_sequences or ways == 1,
            f"evaluation.infill_sequences={config.evaluation.infill_sequences} needs layout.{axis}=1, not"
            f" {ways}: decoding runs whole sequences through whole models, set it to 0.",
        )
    _check_best(config, schedule)
    return schedule


def _check_stage(config: Config, stage: Stage) -> None:
    """What a stage has of its own, or of the run, fits together."""
    own, where = at_stage(config, stage.index), f"schedule.stages[{stage.index}]"
    said = config.schedule.stages[stage.index]
    formulas_of(own.model).check(own.model)
    require(
        stage.geometry.family in ("", config.model.family),
        f"{where}.objective={stage.objective} is what the family {stage.geometry.family} learns, not"
        f" model.family={config.model.family}: choose another objective.",
    )
    paths, weights = own.data.path, own.data.weights
    names = [where if getattr(said, name) else "data" for name in ("weights", "path")]
    require(
        len(weights) in (0, len(paths)),
        f"{names[0]}.weights has {len(weights)} entries and {names[1]}.path {len(paths)}: give one per path,"
        " or none for shares in proportion to the tokens.",
    )
    require(
        own.optimizer.min_lr <= own.optimizer.lr,
        f"optimizer.min_lr={own.optimizer.min_lr} must be at most"
        f" {f'{where}.lr' if said.lr else 'optimizer.lr'}={own.optimizer.lr}.",
    )
    for index, size in enumerate(config.evaluation.block_sizes):
        block_size_of(size, stage.sequence_length, f"evaluation.block_sizes[{index}]")
    require(
        not config.diffusion.random_length_share or stage.geometry.causal or stage.objective == "diffusion",
        f"diffusion.random_length_share={config.diffusion.random_length_share} cuts sequences of objective"
        f" diffusion alone, and {where} trains {stage.objective}: set it to 0.",
    )
    if stage.objective == "multi_block":
        _check_groups(config, stage)
    if stage.objective == "editing" or config.evaluation.planted_share:
        check_words(config)


def check_words(config: Config) -> None:
    """Wrong tokens, learnt or planted, come from somewhere, and are tokens of the model."""
    editing, vocabulary = config.diffusion.editing, config.model.vocab_size
    require(
        editing.words is not WrongWords.vocabulary or 2 <= editing.vocabulary <= vocabulary,
        "diffusion.editing.words=vocabulary draws ids below"
        f" diffusion.editing.vocabulary={editing.vocabulary}: set it to the number of the tokenizer's tokens,"
        f" from 2 to model.vocab_size={vocabulary}.",
    )


def _check_groups(config: Config, stage: Stage) -> None:
    """Noise groups of several blocks fit the sequence and its masks."""
    groups, where = config.diffusion.multi_block, f"schedule.stages[{stage.index}]"
    said, blocks = (
        f"diffusion.multi_block.group_size={groups.group_size}",
        (stage.sequence_length // stage.block_size),
    )
    require(
        stage.clean_copy,
        f"{where} has one block per sequence, of which no group can be made: objective multi_block needs a"
        " smaller block_size.",
    )
    require(
        groups.group_size <= blocks,
        f"{said} does not fit the {blocks} blocks of a sequence of {where}: set it to {blocks} at most.",
    )
    require(
        groups.group_size > 1 or not groups.random_layouts,
        f"{said} leaves no size to draw for diffusion.multi_block.random_layouts={groups.random_layouts}: set"
        " group_size to 2 or more, or random_layouts to 0.",
    )
    require(
        len(groups.layouts) > 0,
        "diffusion.multi_block.systematic=false leaves no layout of groups: set random_layouts to 1 or more.",
    )
    require(
        not config.diffusion.complementary,
        "diffusion.complementary=true would turn the rising rates of a group's blocks round: objective"
        " multi_block needs it false.",
    )
    require(
        groups.rates is GroupRates.independent
        or not (config.diffusion.antithetic or config.diffusion.resample),
        "diffusion.multi_block.rates=chain has draws of its own: set diffusion.antithetic=false and"
        " diffusion.resample=false, or rates=independent.",
    )


def _check_conversations(config: Config, schedule: Schedule) -> None:
    """What lies in one sequence fits its blocks, and what must be in one micro-batch is."""
    draws, pad_to = config.preference.draws, config.data.pad_to
    pairs = [config.schedule.stages[stage.index].path for stage in schedule.stages if stage.geometry.pairs]
    require(
        all(path == pairs[0] for path in pairs),
        f"schedule.stages[].path is {' and '.join(map(str, pairs))} where preferences are learnt: name the"
        " same corpora in each, since one reference has scored them.",
    )
    for stage in schedule.stages:
        where, together = f"schedule.stages[{stage.index}]", stage.geometry.together(config)
        first, each = schedule.samples_before(stage.first_step), stage.geometry.samples_per_sequence(config)
        require(
            first % each == 0 and stage.global_batch % each == 0,
            f"{where} reads each sequence in {each} samples in a row, of which steps must not cut any: make"
            f" the global batches of it and of the stages before it multiples of {each} (now"
            f" {stage.global_batch}, after {first} samples).",
        )
        require(
            pad_to <= stage.sequence_length,
            f"data.pad_to={pad_to} is more than the {stage.sequence_length} tokens of a sequence of {where}:"
            " lower it.",
        )
        require(
            stage.micro_batch % together == 0,
            f"{where}.micro_batch={stage.micro_batch} is not a multiple of the {together} draws of a pair"
            f" that objective {stage.objective} has in one micro-batch: set layout.micro_batch={together}, or"
            " preference.draws.",
        )
        require(
            together == 1 or config.diffusion.block_grid is BlockGrid.document,
            f"objective {stage.objective} needs diffusion.block_grid=document: a text's masks must not depend"
            " on where it lies.",
        )
        require(
            pad_to == 1 or not stage.clean_copy or pad_to % stage.block_size == 0,
            f"data.pad_to={pad_to} is no multiple of the blocks of {where}, of {stage.block_size} tokens: set"
            f" data.pad_to={stage.block_size}.",
        )
    require(
        draws == 1 or draws % 2 == 0,
        f"preference.draws={draws} is odd: give 1, or an even number, since draws are pairs of masks and"
        " their complements.",
    )


def _check_orders(config: Config) -> None:
    """The tokens that mean "delete" and "split" have rows of their own."""
    settings, model = config.levenshtein, config.model
    orders = settings.delete_token_id, settings.split_token_id
    require(
        len({*orders, model.mask_token_id}) == 3 and max(orders) < model.vocab_size,
        f"levenshtein.delete_token_id={orders[0]} and split_token_id={orders[1]} must be two rows of"
        f" model.vocab_size={model.vocab_size} beside model.mask_token_id={model.mask_token_id}, which no"
        " text has: 156930 and 156931 in LLaDA2.2's tokenizer.",
    )
    require(
        settings.deleted + settings.substituted <= 1,
        f"levenshtein.deleted={settings.deleted} and substituted={settings.substituted} are more than all"
        " tokens: lower them.",
    )


def _check_best(config: Config, schedule: Schedule) -> None:
    """What decides the best checkpoints must be measured."""
    metric, sizes = config.checkpoint.best_metric, config.evaluation.block_sizes
    measured = [f"nll_block{size}" for size in sizes]
    if sizes and any(stage.geometry.causal for stage in schedule.stages):
        measured.append("nll_ar")
    require(
        not config.checkpoint.keep_best or metric in measured,
        f"checkpoint.best_metric={metric} is measured by no evaluation of this run, so"
        f" checkpoint.keep_best={config.checkpoint.keep_best} would keep none: choose from"
        f" {', '.join(measured) or 'none (evaluation.block_sizes is empty)'}.",
    )


def _check_rates(diffusion: DiffusionConfig, of: str) -> None:
    require(
        diffusion.mask_rate_min <= diffusion.mask_rate_max,
        f"{of}mask_rate_min={diffusion.mask_rate_min} must not be above"
        f" mask_rate_max={diffusion.mask_rate_max}.",
    )
    require(
        diffusion.weight != "inverse" or diffusion.mask_rate_min > 0,
        f"{of}mask_rate_min=0 gives an unbounded weight 1/t: set it above 0 or use diffusion.weight=flat.",
    )
    require(
        not diffusion.complementary or diffusion.weight != "inverse" or diffusion.mask_rate_max < 1,
        f"{of}mask_rate_max=1 gives the complement an unbounded weight 1/(1-t): set it below 1 or use"
        " diffusion.weight=flat.",
    )


def _check_objective(config: Config) -> None:
    _check_rates(config.diffusion, "diffusion.")
    for index, stage in enumerate(config.schedule.stages):
        if stage.mask_rate_min or stage.mask_rate_max:
            _check_rates(diffusion_of(config.diffusion, stage), f"schedule.stages[{index}].")
    require(
        not config.diffusion.antithetic or config.diffusion.t_per is not RatePer.sequence,
        "diffusion.antithetic spreads the rates within a sequence, which has one: set diffusion.t_per=block,"
        " or document.",
    )
    noise = config.diffusion.embedding_noise
    require(
        noise.sigma_over_rms == 0 or noise.fade_tokens > 0,
        "diffusion.embedding_noise.fade_tokens is 0 while sigma_over_rms is not: say over how many tokens the"
        " noise fades.",
    )
    rewarms = any(stage.learning_rate == "rewarm" for stage in config.schedule.stages)
    require(
        not rewarms or config.schedule.rewarm_tokens > 0,
        "schedule.rewarm_tokens is 0 while a stage re-warms the learning rate: set its length.",
    )
    converted = [not stage.geometry.causal for stage in schedule_of(config).stages]
    require(
        converted == sorted(converted),
        "schedule.stages returns to an autoregressive stage after a diffusion one: put autoregressive stages"
        " first.",
    )
