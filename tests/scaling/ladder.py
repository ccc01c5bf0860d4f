"""Points whose law is known, as arrays and as the records of runs."""

import json
from dataclasses import replace
from functools import cache

import numpy as np

from llada_megatron.config.compose import compose, save
from llada_megatron.config.families.dlcm import coarse
from llada_megatron.config.parameters import total_parameters
from llada_megatron.config.schema import ScheduleConfig, StageConfig

KNOWN = {"E": 1.7, "A": 400.0, "B": 410.0, "alpha": 0.34, "beta": 0.28}
KNOWN_DLCM = {
    **{"E": 1.5, "A_tok": 60.0, "d_tok": 0.25, "t_tok": 2e7, "A_con": 20.0, "g": 0.35, "d_con": 0.22},
    **{"t_con": 1e7, "A_data": 900.0, "d_data": 0.32, "t_data": 1e8},
}
DLCM_RUNS = {
    **{"E": 1.2, "A_tok": 20.0, "d_tok": 0.35, "t_tok": 1e4, "A_con": 6.0, "g": 0.4, "d_con": 0.25},
    **{"t_con": 1e4, "A_data": 60.0, "d_data": 0.35, "t_data": 1e5},
}
"""Of the records of `make_dlcm_run`."""


def chinchilla(N, D, of=KNOWN):
    return of["E"] + of["A"] / N ** of["alpha"] + of["B"] / D ** of["beta"]


def dlcm(N, D, R, P, of=KNOWN_DLCM):
    token = of["A_tok"] / (N * (1 - P) + of["t_tok"]) ** of["d_tok"]
    concept = of["A_con"] * R ** of["g"] / (N * P + of["t_con"]) ** of["d_con"]
    return of["E"] + token + concept + of["A_data"] / (D + of["t_data"]) ** of["d_data"]


def grid(**axes):
    """Every combination of the values of some variables, as columns."""
    columns = np.meshgrid(*axes.values(), indexing="ij")
    return {name: column.ravel() for name, column in zip(axes, columns, strict=True)}


def scattered(losses, by, seed=0):
    return losses * np.exp(np.random.default_rng(seed).normal(0, by, len(losses)))


@cache
def base(experiment):
    return compose([f"experiment={experiment}", "run.name=rung"])


def make_run(run_dir, hidden_size, tokens, *, loss=None, end=1.0, lr_at_end=1e-4, record=None, **model):
    """A run's records; its AR NLL obeys a law like Chinchilla's, unless it is given."""
    config = base("parity")
    stage = StageConfig(name="ar", objective="autoregressive", block_size="1", tokens=tokens)
    config = replace(
        config,
        run=replace(config.run, dir=str(run_dir)),
        model=replace(config.model, hidden_size=hidden_size, **model),
        schedule=ScheduleConfig(stages=[stage]),
    )
    size = total_parameters(config.model)
    loss = loss or 1.2 + 60 / size**0.4 + 90 / tokens**0.4
    return _write(run_dir, config, stage, loss, end=end, lr_at_end=lr_at_end, record=record)


def make_dlcm_run(run_dir, encoder, backbone, tokens, R, *, opened=None, **concepts):
    """The records of a DLCM of these widths, as the others' concepts ask; its AR NLL obeys DLCM_RUNS."""
    config = base("dlcm_parity")
    concepts = {"hidden_size": backbone, "ffn_hidden_size": 4 * backbone, "tokens_per_concept": R, **concepts}
    model = replace(config.model, hidden_size=encoder, concepts=replace(config.model.concepts, **concepts))
    stage = StageConfig(name="concepts", objective="concepts", block_size="1", tokens=tokens)
    config = replace(
        config,
        run=replace(config.run, dir=str(run_dir)),
        model=model,
        schedule=ScheduleConfig(stages=[stage]),
    )
    size = total_parameters(model)
    share = coarse(model).parameters / size
    loss = float(dlcm(size, tokens, R, share, DLCM_RUNS))
    record = {"held_out": {"tokens_per_concept": {"mean": opened or R, "se": 0.1}}}
    return _write(run_dir, config, stage, loss, record=record, boundary_rate=1 / (opened or R))


def _write(run_dir, config, stage, loss, *, end=1.0, lr_at_end=1e-4, record=None, **figures):
    run_dir.mkdir(parents=True)
    save(config, run_dir / "config.yaml")
    tokens = stage.tokens
    evaluation = {
        **{"step": 1, "consumed_tokens": int(end * tokens), "stage": stage.name},
        **{"block_size": 1, "bound": {}},
        "sequence_length": config.data.sequence_length,
        "ar": {"nll": loss, "se": 0.01, "tokens": tokens},
        "baselines": {"unigram": 3.2, "bigram": 2.5},
        "vocab_size": config.model.vocab_size,
        **(record or {}),
    }
    (run_dir / "evaluations.jsonl").write_text(json.dumps(evaluation) + "\n")
    steps = [{"step": 0, "lr": 1e-3, **figures}, {"step": 1, "lr": lr_at_end, **figures}]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    return run_dir


def make_ladder(folder):
    """Nine runs: three widths, three numbers of tokens."""
    return [
        make_run(folder / f"{width}_{tokens}", width, tokens)
        for width in (32, 64, 128)
        for tokens in (2**17, 2**19, 2**21)
    ]


def make_dlcm_ladder(folder):
    """Thirty-six runs: three sizes with two shares each, four numbers of tokens; half have another R."""
    return [
        make_dlcm_run(folder / f"{encoder}_{backbone}_{tokens}_{R}", encoder, backbone, tokens, R)
        for encoder, backbone in ((64, 64), (64, 128), (128, 128), (128, 256), (256, 256), (256, 512))
        for tokens, R in ((2**17, 2), (2**17, 8), (2**19, 4), (2**21, 2), (2**21, 8), (2**23, 4))
    ]
