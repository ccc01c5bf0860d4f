"""Directories of synthetic runs whose numbers look like a conversion's."""

import json
import math
import random
from dataclasses import replace
from functools import cache

from llada_megatron.config.compose import compose, save
from llada_megatron.config.schema import ScheduleConfig, StageConfig
from llada_megatron.record.run_dir import MANIFEST, RunDir

LENGTH = 256
SCHEDULE = [
    ("pretrain", "1", "autoregressive", 60),
    ("warmup-1", "1", "diffusion", 8),
    ("warmup-4", "4", "diffusion", 8),
    ("warmup-32", "32", "diffusion", 8),
    ("warmup-64", "64", "diffusion", 8),
    ("stable", "full", "diffusion", 80),
    ("decay-128", "128", "diffusion", 10),
    ("decay-64", "64", "diffusion", 10),
    ("decay-32", "32", "diffusion", 20),
]
STEP_TOKENS = 8 * LENGTH


def block_size_of(text: str) -> int:
    return LENGTH if text == "full" else int(text)


def make_run(run_dir, schedule=SCHEDULE, stop_after=None, evaluated=True, experts=8):
    """A run's directory, finished, or still going after `stop_after` steps."""
    run_dir.mkdir(parents=True, exist_ok=True)
    rng = random.Random(0)
    write_config(run_dir, schedule, experts)
    steps, evaluations = [], []
    if evaluated:
        evaluations.append(evaluation("init", "diffusion", 1, -1, 0, 0, 5.2, rng))
    for index, (name, size, objective, count) in enumerate(schedule):
        for position in range(count):
            step = len(steps)
            floor = 1.6 if objective == "autoregressive" else 1.9 + 0.1 * math.log(block_size_of(size), 4)
            start = 5.5 if index == 0 else floor + 0.8
            loss = floor + (start - floor) * math.exp(-position / 12) + rng.gauss(0, 0.1)
            steps.append(step_record(step, name, objective, block_size_of(size), loss, experts, rng))
        if evaluated and (stop_after is None or len(steps) <= stop_after):
            evaluations.append(
                evaluation(name, objective, block_size_of(size), len(steps) - 1, len(steps), count, 2.0, rng)
            )
    steps = steps[:stop_after]
    write_lines(run_dir / "metrics.jsonl", steps)
    write_lines(run_dir / "evaluations.jsonl", evaluations)
    if evaluated:
        sample = {
            "stage": schedule[-1][0],
            "block_size": 32,
            "masked": "a ░░ <b> ``` c\nd",
            "filled": "a 12",
            "pieces": ["a", " ", "1", "2"],
            "decided_at": [0, 0, 2, 1],
            "original": "a|34",
        }
        write_lines(run_dir / "samples.jsonl", [sample] * 3)
    if stop_after is None:
        RunDir(run_dir).checkpoint(len(steps)).mkdir(parents=True)
        (RunDir(run_dir).checkpoint(len(steps)) / MANIFEST).write_text("{}")
    return run_dir


@cache
def base():
    return compose(["experiment=parity", "run.name=synthetic_run"])


def write_config(run_dir, schedule, experts):
    config = base()
    model = replace(config.model, vocab_size=512, layers=4, hidden_size=64, experts=experts)
    stages = [
        StageConfig(name=name, block_size=size, tokens=count * STEP_TOKENS, objective=objective)
        for name, size, objective, count in schedule
    ]
    config = replace(
        config,
        run=replace(config.run, dir=str(run_dir)),
        model=model,
        data=replace(config.data, sequence_length=LENGTH),
        layout=replace(config.layout, global_batch=STEP_TOKENS // LENGTH),
        schedule=ScheduleConfig(stages=stages),
    )
    save(config, run_dir / "config.yaml")


def watched(step):
    """Figures of a watched step of four layers, the first of them dense."""
    routed = [None, None, *[1.9 - step / 1000] * 3, None]
    return {
        "grad_norm_by_layer": [0.1 + part / 10 + 1 / (step + 1) for part in range(6)],
        "weight_norm_by_layer": [10.0 + part + step / 100 for part in range(6)],
        "activation_rms_by_layer": [None, *(0.5 * 2**layer for layer in range(4)), None],
        "router_entropy_by_layer": routed,
        "router_z_by_layer": routed,
        "dead_experts_by_layer": [None, None, 0, int(step < 40), 2, None],
        "largest_logit": 12.5,
    }


def step_record(step, stage, objective, block_size, loss, experts, rng):
    diffusion = objective == "diffusion"
    by_t = [loss * (0.4 + 0.12 * bin) + rng.gauss(0, 0.05) for bin in range(10)]
    by_t[rng.randrange(10)] = None  # a bin that no sample of the step fell into
    return {
        "step": step,
        "consumed_samples": 8 * (step + 1),
        "consumed_tokens": STEP_TOKENS * (step + 1),
        "stage": stage,
        "objective": objective,
        "block_size": block_size,
        "loss": None if step == 20 else loss,
        "grad_norm": 1.0,
        "lr": 1e-3 * min(1, (step + 1) / 20),
        "tokens_per_sec": 1000 + step,
        "mfu": None,
        "load_max_over_mean": 1.1 + math.exp(-step / 30) + rng.gauss(0, 0.03) if experts else None,
        "expert_rows_max_over_mean": 1.3 + abs(rng.gauss(0, 0.1)) if experts else None,
        "expert_rows_dropped": None,
        **(watched(step) if experts and step % 4 == 0 else {}),
        "loss_by_t": by_t if diffusion else None,
        "loss_by_block_position": [loss] * min(block_size, 4),
        "skipped_steps": int(step >= 20),
        "mask_row_norm": 1.0,
        "embedding_noise_sigma": 0.0,
    }


def evaluation(stage, objective, block_size, step, steps_done, stage_steps, level, rng):
    bound = {}
    if objective == "diffusion":
        for size in (1, 4, 32, LENGTH):
            mean = level + 0.08 * math.log2(size) + 0.4 * math.exp(-steps_done / 80) + rng.gauss(0, 0.02)
            bound[str(size)] = {"mean": mean, "se": 0.012, "bits_per_byte": mean / 3 / math.log(2)}
    return {
        "step": step,
        "consumed_tokens": STEP_TOKENS * steps_done,
        "stage": stage,
        "objective": objective,
        "block_size": block_size,
        "stage_tokens": STEP_TOKENS * stage_steps,
        "train_loss": level if stage_steps else None,
        "bound": bound,
        "ar": {"nll": 1.7, "se": 0.01, "bits_per_byte": 0.82, "tokens": 60 * STEP_TOKENS}
        if stage == "pretrain"
        else None,
        "block1_views": {"unshifted": 5.3, "shifted": 1.8, "ar_from_clean_half": 1.7}
        if stage == "init"
        else None,
        "baselines": {"unigram": 4.2, "bigram": 2.9},
        "vocab_size": 512,
        "wall_sec": 2.0 * steps_done,
    }


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
