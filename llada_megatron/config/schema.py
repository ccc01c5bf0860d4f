"""What a run is: one dataclass per configuration group, without torch.

hydra composes `configs/` into `Config`, so a misspelt key fails before anything starts.
Rules that span groups live in `rules.py`, arithmetic on the schedule in `schedule.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum  # members are lower case: configuration files name them as they are written

from omegaconf import MISSING


class Weight(StrEnum):
    """w(t) of the masked positions' cross entropy."""

    inverse = "inverse"
    flat = "flat"


class RatePer(StrEnum):
    """What shares one draw of the mask rate t."""

    sequence = "sequence"
    block = "block"


class Denominator(StrEnum):
    """What the weighted sum of cross entropies is divided by; formulas in objectives/weights.py."""

    tokens = "tokens"
    masked = "masked"
    sequence = "sequence"
    batch = "batch"


class BlockGrid(StrEnum):
    """Where block 0 begins."""

    sequence = "sequence"
    document = "document"


class LearningRateAtStart(StrEnum):
    """What the learning rate does when a stage begins."""

    keep = "keep"
    rewarm = "rewarm"


class MomentsAtStart(StrEnum):
    """What happens to the optimizer's moments when a stage begins."""

    keep = "keep"
    reset = "reset"


class Recompute(StrEnum):
    """What backward computes a second time instead of keeping it."""

    none = "none"
    selective = "selective"
    full = "full"


class Dispatcher(StrEnum):
    """How tokens reach their experts on other processes."""

    alltoall = "alltoall"
    allgather = "allgather"


class BadSamples(StrEnum):
    """What happens at a sample that cannot be trained on."""

    refuse = "refuse"
    skip = "skip"


@dataclass
class RunConfig:
    """Identity of a run."""

    name: str = MISSING
    """Stable across restarts; also the identity in wandb."""
    dir: str = "runs/${run.name}"
    """Holds config.yaml, metrics.jsonl, evaluations.jsonl, checkpoints/ and report/."""
    seed: int = 1
    """Every random draw is a function of this seed, the global sample index and the draw's purpose."""
    resume: str = "auto"
    """`auto` (newest good checkpoint of this run, if any), `never`, or a checkpoint's path."""
    allow_change: list[str] = field(default_factory=list)
    """Settings, by their whole names, that a resume may change although the run becomes another."""
    max_failures: int = 3
    """Failures in a row without a new checkpoint after which a run is not started again by itself."""


@dataclass
class ModelConfig:
    """An architecture as data: BailingMoeV2 (Ling 2.0, LLaDA2) and its relatives."""

    family: str = "gpt"
    """Whose stage builder and formulas these settings are for; see config/families/."""
    vocab_size: int = MISSING
    mask_token_id: int = MISSING
    """The id that stands for [MASK]; it is not in the public config.json of LLaDA2 (156895 there)."""
    layers: int = MISSING
    hidden_size: int = MISSING
    heads: int = MISSING
    kv_heads: int = MISSING
    head_dim: int = MISSING
    ffn_hidden_size: int = MISSING
    """Width of the dense feed-forward layers."""
    dense_layers: int = 1
    """The first N layers are dense; equal to `layers` for a model without experts."""
    experts: int = 0
    experts_per_token: int = 0
    expert_hidden_size: int = 0
    shared_expert_hidden_size: int = 0
    """0: no shared expert. The shared expert is ungated."""
    expert_groups: int = 1
    """Experts are selected from the best `expert_groups_per_token` of this many groups."""
    expert_groups_per_token: int = 1
    routed_scaling_factor: float = 1.0
    expert_bias: bool = True
    """Loss-free balancing: a bias per expert that takes part in selection only."""
    expert_bias_update_rate: float = 1e-3
    """Ling 2.0's rate; what LLaDA2.0 used is not published."""
    expert_bias_zero_mean: bool = True
    """Subtract the mean of each update, as Ling 2.0 does."""
    expert_balance_clean_half: bool = True
    """Whether the clean half of `[x_t ; x_0]` counts in the balance statistics.

    True balances the load that experts carry in training, where every other token is a clean one; their
    time and memory follow that load. False balances what decoding mostly runs: each block passes up to
    block_size times noisy and once clean, and a balance over both halves may hide experts that only clean
    tokens choose. Stages without a clean half count all tokens either way.
    """
    qk_norm: bool = True
    """RMSNorm over the head dimension of queries and keys, before rotary."""
    rotary_fraction: float = 0.5
    """The first `rotary_fraction * head_dim` channels of a head are rotated."""
    rotary_base: float = 600000.0
    norm_eps: float = 1e-6
    tied_head: bool = False
    init_std: float = 0.02
    attention_backend: str = "auto"
    """`auto`, `cudnn_flex` (sm_90, sm_100, sm_103), `flex_torch`, `cudnn_graph` (sm_90, sm_100), `portable`
    or `reference`; `auto` takes the fastest that can serve, and a run with one that cannot stops."""
    layer_spec: str = "auto"
    """`local`, `transformer_engine`, or `auto` (transformer_engine on CUDA when it is installed)."""
    head_chunk_tokens: int = 1024
    """Supervised positions per call of the output head; bounds the memory of the logits."""

    @property
    def has_experts(self) -> bool:
        """Whether any layer is a mixture of experts."""
        return self.dense_layers < self.layers


@dataclass
class DataConfig:
    """Where clean tokens come from."""

    path: list[str] = field(default_factory=list)
    """Prefixes of Megatron .bin/.idx pairs."""
    weights: list[float] = field(default_factory=list)
    """One per path; empty means in proportion to the tokens."""
    split: str = "99,1"
    """Shares of the documents for training and validation, in file order."""
    sequence_length: int = MISSING
    """L: tokens of one packed sequence."""
    tokenizer: str = "bytes"
    """A tokenizer.json, or `bytes`."""
    cache_dir: str = ""
    """Where indices are kept; empty means `<first path>.cache`."""


@dataclass
class EmbeddingNoiseConfig:
    """Noise on the embeddings of masked tokens at the start of a conversion (LLaDA2.0, section 7.1).

    sigma and its duration are not published; both numbers are ours.
    """

    sigma_over_rms: float = 0.0
    """Standard deviation relative to the RMS of the embedding table's entries; 0 switches it off."""
    fade_tokens: int = 0
    """The noise fades linearly to zero over this many data tokens from the first diffusion stage."""


@dataclass
class DiffusionConfig:
    """The objective; where LLaDA2.0's report is silent the default is ours (docs/objective.md)."""

    weight: Weight = Weight.inverse
    t_per: RatePer = RatePer.sequence
    mask_rate_min: float = 1e-3
    mask_rate_max: float = 1.0
    denominator: Denominator = Denominator.tokens
    complementary: bool = False
    """Pair every sample with its complement: masked where the first was clean, and the reverse."""
    block_grid: BlockGrid = BlockGrid.sequence
    embedding_noise: EmbeddingNoiseConfig = field(default_factory=EmbeddingNoiseConfig)


@dataclass
class StageConfig:
    """One stage of the block-size schedule."""

    name: str = MISSING
    block_size: str = MISSING
    """A number of tokens that divides L, or `full`: one block, the clean half dropped (MDLM)."""
    tokens: int = MISSING
    """Budget in data tokens; the stage ends on the whole step that reaches it."""
    objective: str = "diffusion"
    """What the stage trains: a name of OBJECTIVES in config/objectives.py."""
    learning_rate: LearningRateAtStart = LearningRateAtStart.keep
    moments: MomentsAtStart = MomentsAtStart.keep
    micro_batch: int = 0
    """Sequences per micro-batch in this stage; 0 means layout.micro_batch."""


@dataclass
class ScheduleConfig:
    """The block-size schedule: warm-up 1 -> 4 -> 32 -> 64 -> L, stable L, decay L -> ... -> 32."""

    stages: list[StageConfig] = field(default_factory=list)
    rewarm_tokens: int = 0
    """Length of the linear warm-up of stages with `learning_rate: rewarm`."""


@dataclass
class LayoutConfig:
    """How the run is split over processes; dp = processes / (tp pp cp) is derived."""

    tp: int = 1
    """Tensor parallelism. sp, sequence parallelism, is derived: on where tp > 1, because experts need it."""
    pp: int = 1
    """Pipeline stages."""
    vpp: int = 1
    """Virtual stages per pipeline stage, interleaved: less idle time, more messages."""
    cp: int = 1
    """Context parallelism: each process holds L/cp tokens of each half."""
    ep: int = 1
    """Expert parallelism: experts/ep experts per process, over the processes of tp, cp and dp."""
    etp: int = 1
    """Tensor parallelism inside an expert; need not equal tp."""
    processes: int = 1
    """Ranks, one per device; 0 in a configuration file: as few as the axes ask for."""
    micro_batch: int = 1
    """Sequences per process and micro-batch."""
    global_batch: int = 1
    """Sequences per step, over all processes."""
    pipeline: list[int] = field(default_factory=list)
    """Layers of each of the pp*vpp stages in the order that data passes them; empty means evenly.

    The last stage also computes the output head: with a large vocabulary it should hold fewer layers.
    """
    dispatcher: Dispatcher = Dispatcher.alltoall
    """`alltoall` sends a token to the processes of its experts; `allgather` sends all to all."""
    recompute: Recompute = Recompute.none
    """`selective` recomputes recompute_modules in backward, `full` whole layers: less memory, more time."""
    recompute_modules: list[str] = field(default_factory=lambda: ["core_attn"])
    """Of `selective`, by megatron-core's names: core_attn, mlp (of dense layers), moe, shared_experts; with
    model.layer_spec=transformer_engine also layernorm and moe_act."""
    overlap_grad_reduce: bool = False
    """Reduce gradients while backward still computes others."""
    overlap_param_gather: bool = False
    """Gather updated weights while the next forward computes; needs overlap_grad_reduce."""


@dataclass
class OptimizerConfig:
    """AdamW and the learning rate's schedule (which is not the block-size schedule)."""

    lr: float = MISSING
    min_lr: float = 0.0
    warmup_tokens: int = 0
    decay_style: str = "WSD"
    """`WSD`, `cosine`, `linear` or `constant`; the names are megatron-core's."""
    wsd_decay_tokens: int = 0
    """Length of the final decay of `WSD`."""
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    clip_grad: float = 1.0


@dataclass
class PrecisionConfig:
    """Numbers of the weights and activations; the optimizer keeps fp32 masters and moments."""

    dtype: str = "fp32"
    """`fp32` or `bf16`."""
    deterministic: bool = True
    """Ask torch for deterministic kernels on CUDA; CPU runs are deterministic anyway."""


@dataclass
class CheckpointConfig:
    """What is kept, and what a run starts from."""

    every_steps: int = 0
    """0: only at the end, on a signal and at the end of a stage."""
    at_stage_end: bool = True
    in_background: bool = False
    """Write while training goes on, from a copy in host memory of what this rank saves."""
    keep_last: int = 2
    """Older checkpoints are deleted, except those at the end of a stage and those kept by the next keys."""
    keep_every_steps: int = 0
    """Checkpoints at multiples of this step stay for good; 0: none."""
    keep_best: int = 0
    """Number of checkpoints that stay because their `best_metric` is lowest."""
    best_metric: str = "nll_block32"
    """Of the evaluation at that step: `nll_ar`, or `nll_block` and one of evaluation.block_sizes."""
    init_from: str = ""
    """A checkpoint (or a run's directory: its newest) whose weights alone are taken."""


@dataclass
class EvaluationConfig:
    """The likelihood bound on held-out text."""

    block_sizes: list[str] = field(default_factory=list)
    """Block sizes of the bound; `full` means L. Empty: no evaluation."""
    sequences: int = 64
    """Held-out sequences."""
    draws: int = 4
    """Masks per sequence, stratified in the number of masked tokens."""
    at_stage_end: bool = True
    every_steps: int = 0
    infill_sequences: int = 0
    """After a diffusion stage fill in this many half-masked held-out sequences, as samples for the eye."""


@dataclass
class TrainingConfig:
    """Limits of the loop."""

    steps: int = 0
    """Stop after this many steps; 0: the schedule alone decides."""
    max_skipped_steps: int = 10
    """Steps with a non-finite loss or gradient are skipped; past this many in a window the run stops."""
    bad_samples: BadSamples = BadSamples.refuse
    """Of samples with the mask token or an id outside the vocabulary: `refuse` ends the run and names the
    document; `skip` learns nothing from the sample, on every rank alike, and records it."""
    max_skipped_samples: int = 100
    """Of `skip`: past this many in a window the run stops."""
    skip_window_steps: int = 1000
    """Steps in which max_skipped_steps and max_skipped_samples count; 0: the whole run."""
    hang_timeout_sec: float = 1800.0
    """A process without progress for so long leaves its stacks in run.dir/stacks and ends with exit code 1.

    The longest step, evaluation or save must fit. 0: never."""
    stop_deadline_sec: float = 300.0
    """From a signal to the end of the process, checkpoint included; past it the same happens. 0: no limit."""
    threads: int = 0
    """CPU threads per process; 0: cores divided by processes."""
    preflight: bool = False
    """Check every node before the model is built: clock, disk, products, messages (guard/preflight.py)."""
    straggler_every_steps: int = 0
    """Compare the ranks' times in every Nth step and name slow ones (guard/stragglers.py); 0: never."""


@dataclass
class LoggingConfig:
    """Where metrics go besides metrics.jsonl."""

    every_steps: int = 1
    wandb: str = "disabled"
    """`disabled`, `offline` or `online`."""
    wandb_project: str = "llada_megatron"
    prometheus: bool = False
    """Keep run.dir/metrics.prom with the newest figures, for a textfile collector."""


@dataclass
class ClusterConfig:
    """What the machines can do; zero means unknown, and a question that needs the number says so."""

    name: str = "local"
    peak_tflops: float = 0.0
    """Dense bf16 peak per device in TFLOP/s, for MFU."""
    peak_tflops_fp32: float = 0.0
    """Peak per device in TFLOP/s of fp32 matrix products as torch runs them by default (no TF32)."""
    has_gpus: bool = True
    """False: each of gpus_per_node is a process of the node's CPUs."""
    nodes: int = 0
    gpus_per_node: int = 0
    memory_gb: float = 0.0
    """Per device, in 10^9 bytes."""
    memory_margin: float = 0.1
    """Share of memory_gb that a plan leaves free for what it does not model."""
    memory_gb_per_sec: float = 0.0
    """Bandwidth of the device's memory in 10^9 bytes per second."""
    node_gb_per_sec: float = 0.0
    """Per device and direction, between devices of a node, in 10^9 bytes per second."""
    node_latency_us: float = 0.0
    network_gb_per_sec: float = 0.0
    """Per device and direction, between nodes, in 10^9 bytes per second."""
    network_latency_us: float = 0.0
    gemm_efficiency: float = 0.0
    """Share of the peak that plain matrix products reach."""
    grouped_gemm_efficiency: float = 0.0
    """Share of the peak that the experts' products reach."""
    attention_efficiency: float = 0.0
    """Share of the peak that attention reaches, counted on visible pairs: hidden pairs of tiles and the
    scores that backward computes again lower it."""
    memory_efficiency: float = 0.0
    """Share of memory_gb_per_sec that operations without matrix products reach."""
    link_efficiency: float = 0.0
    """Share of node_gb_per_sec and network_gb_per_sec that collectives reach."""
    message_overlap: float = 1.0
    """Share of the messages beside computation that it hides; 0 where the processor itself sends them."""
    price_per_gpu_hour: float = 0.0
    """In any currency; 0: no cost is given."""


class Container(StrEnum):
    """What the ranks run in."""

    none = "none"
    pyxis = "pyxis"
    apptainer = "apptainer"


@dataclass
class SlurmConfig:
    """How a run is submitted at a site; what is empty is left to the site's defaults."""

    account: str = ""
    partition: str = ""
    qos: str = ""
    constraint: str = ""
    time_limit_min: int = 0
    """Of one attempt; the run goes on in the next one."""
    options: list[str] = field(default_factory=list)
    """Further options of sbatch, one each: `--mem=0`."""
    setup: list[str] = field(default_factory=list)
    """Lines of shell before the ranks start: `module load cuda`."""
    environment: str = ""
    """A file of jobs/env/ that the job sources: `nccl` or `gloo`; empty: `nccl` where nodes have GPUs."""
    container: Container = Container.none
    image: str = ""
    """For a container: a name or path of its image."""
    mounts: list[str] = field(default_factory=list)
    """For a container: `HOST:INSIDE`; the run's directory, the data and this source must be among them."""
    python: str = ""
    """Of the ranks; empty: the one that submits, and `python` in a container."""
    signal_lead_sec: int = 300
    """Warning before the time limit; a submission raises it to what steps and saves have taken so far."""
    exclude_failed_nodes: bool = False
    """Leave nodes that fail a preflight out of the job's next start, if enough others are left for it."""


@dataclass
class Config:
    """A complete run."""

    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    layout: LayoutConfig = field(default_factory=LayoutConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    slurm: SlurmConfig = field(default_factory=SlurmConfig)
