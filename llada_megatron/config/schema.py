"""What a run is: one dataclass per configuration group, without torch.

hydra composes `configs/` into `Config`, so a misspelt key fails before anything starts. What a value may
be is part of its type: a member of choices.py, or within a range of ranges.py, which enforces it.
Rules that span groups live in `rules.py`, arithmetic on the schedule in `schedule.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from omegaconf import MISSING

from llada_megatron.config.choices import (
    AdapterTarget,
    AttentionBackend,
    BlockGrid,
    Core,
    DecayStyle,
    Denominator,
    Dispatcher,
    Dtype,
    ExpertScore,
    Fp8,
    LayerSpec,
    LearningRateAtStart,
    MomentsAtStart,
    OffloadModule,
    PreferenceForm,
    RatePer,
    Recompute,
    RecomputeModule,
    TooLong,
    Wandb,
    Weight,
)
from llada_megatron.config.concepts import ConceptsConfig
from llada_megatron.config.editing import EditingConfig, OputConfig
from llada_megatron.config.levenshtein import LevenshteinConfig
from llada_megatron.config.mla import MlaConfig
from llada_megatron.config.multi_block import MultiBlockConfig
from llada_megatron.config.ranges import (
    Amount,
    Count,
    Decay,
    Extent,
    Factor,
    Name,
    Path,
    Positive,
    Range,
    Share,
    Size,
    Text,
    Ways,
    block_size,
    metric,
    shares,
)
from llada_megatron.config.rotary import RotaryScaling as RotaryScaling
from llada_megatron.config.rotary import RotaryScalingConfig
from llada_megatron.config.router import RouterConfig
from llada_megatron.config.site import ClusterConfig, SlurmConfig
from llada_megatron.config.training import TrainingConfig


@dataclass
class RunConfig:
    """Identity of a run."""

    name: Name = MISSING
    """Stable across restarts; also the identity in wandb."""
    dir: Path = "runs/${run.name}"
    """Holds config.yaml, metrics.jsonl, evaluations.jsonl, checkpoints/ and report/."""
    seed: Annotated[int, Range(at_least=0, below=2**32)] = 1
    """Every random draw is a function of this seed, the global sample index and the draw's purpose."""
    resume: Path = "auto"
    """`auto` (newest good checkpoint of this run, if any), `never`, or a checkpoint's path."""
    allow_change: list[Text] = field(default_factory=list)
    """Settings, by their whole names, that a resume may change although the run becomes another."""
    max_failures: Positive = 3
    """Failures in a row without a new checkpoint after which a run is not started again by itself."""


@dataclass
class LoraConfig:
    """Low-rank adapters; with them everything else is frozen (docs/post_training.md)."""

    rank: Extent = 0
    """Of each adapter; 0: no adapters."""
    alpha: Factor = 16.0
    """What an adapter adds is multiplied by alpha / rank."""
    targets: list[AdapterTarget] = field(default_factory=lambda: list(AdapterTarget))


@dataclass
class ModelConfig:
    """An architecture as data: BailingMoeV2 (Ling 2.0, LLaDA2) and its relatives."""

    family: Text = "gpt"
    """A name of FAMILIES in config/families/: whose stage builder and formulas these settings are for."""
    vocab_size: Size = MISSING
    mask_token_id: Extent = MISSING
    """The id that stands for [MASK]; it is not in the public config.json of LLaDA2 (156895 there)."""
    layers: Size = MISSING
    hidden_size: Size = MISSING
    heads: Size = MISSING
    kv_heads: Size = MISSING
    head_dim: Size = MISSING
    """Of queries and keys, and of values without model.mla."""
    mla: MlaConfig = field(default_factory=MlaConfig)
    ffn_hidden_size: Extent = MISSING
    """Width of the dense feed-forward layers."""
    dense_layers: Extent = 1
    """The first N layers are dense; equal to `layers` for a model without experts."""
    experts: Extent = 0
    experts_per_token: Extent = 0
    expert_hidden_size: Extent = 0
    shared_expert_hidden_size: Extent = 0
    """0: no shared expert. The shared expert is ungated."""
    expert_groups: Size = 1
    """Experts are selected from the best `expert_groups_per_token` of this many groups."""
    expert_groups_per_token: Size = 1
    expert_capacity: Extent = 0
    """Block routing (LLaDA2.2): the tokens of a block choose from a pool of so many experts, and groups are
    not used; 0: each token chooses from all (docs/experts.md)."""
    routed_scaling_factor: Factor = 1.0
    expert_score: ExpertScore = ExpertScore.sigmoid
    """softmax is that of Qwen3-MoE and LLaDA-MoE, without expert_bias (docs/experts.md)."""
    normalize_expert_weights: bool = True
    """Whether the weights of a token's experts add up to routed_scaling_factor; false: softmax over all."""
    expert_bias: bool = True
    """Loss-free balancing: a bias per expert that takes part in selection only."""
    expert_bias_update_rate: Amount = 1e-3
    """Ling 2.0's rate; what LLaDA2.0 used is not published."""
    expert_bias_zero_mean: bool = True
    """Subtract the mean of each update, as Ling 2.0 does."""
    expert_balance_clean_half: bool = True
    """Whether the clean half of `[x_t ; x_0]` counts in the balance statistics.

    True balances the load that experts carry in training, where every other token is a clean one; their
    time and memory follow that load. False balances what decoding mostly runs: each block passes up to
    block_size times noisy and once clean, and a balance over both halves may hide experts that only clean
    tokens choose; clean tokens then leave out the last layer's experts (docs/objective.md). Stages without
    a clean half count all tokens either way.
    """
    qkv_bias: bool = False
    """Biases on queries, keys and values, as Qwen2 has them."""
    qk_norm: bool = True
    """RMSNorm over the head dimension of queries and keys, before rotary; with model.mla, which always has
    it, over the latents."""
    rotary_fraction: Annotated[float, Range(above=0, at_most=1)] = 0.5
    """The first `rotary_fraction * head_dim` channels of a head are rotated; with model.mla
    qk_rope_head_dim."""
    rotary_base: Factor = 600000.0
    rotary_scaling: RotaryScalingConfig = field(default_factory=RotaryScalingConfig)
    norm_eps: Annotated[float, Range(above=0, below=1)] = 1e-6
    tied_head: bool = False
    lora: LoraConfig = field(default_factory=LoraConfig)
    router: RouterConfig = field(default_factory=RouterConfig)
    concepts: ConceptsConfig = field(default_factory=ConceptsConfig)
    init_std: Amount = 0.02
    attention_backend: AttentionBackend = AttentionBackend.auto
    """cudnn_flex needs sm_90, sm_100 or sm_103, cudnn_graph sm_90 or sm_100, varlen decodes alone; one that
    cannot serve stops a run."""
    layer_spec: LayerSpec = LayerSpec.auto
    core: Core = Core.gpt
    """megatron-core's class of models; numbers and checkpoints are the same in both (docs/families.md)."""
    fusions: bool = True
    """Fused router, permutation, rotary and sum of weight gradients, of transformer_engine's layers alone."""
    head_chunk_tokens: Size = 1024
    """Supervised positions per call of the output head; bounds the memory of the logits."""

    @property
    def has_experts(self) -> bool:
        """Whether any layer is a mixture of experts."""
        return self.dense_layers < self.layers

    @property
    def value_dim(self) -> int:
        """Channels of a head's values."""
        return self.mla.v_head_dim if self.mla.is_used else self.head_dim

    @property
    def rotated_channels(self) -> int:
        """Channels of a head that are rotated."""
        return self.mla.qk_rope_head_dim if self.mla.is_used else int(self.rotary_fraction * self.head_dim)


@dataclass
class DataConfig:
    """Where clean tokens come from."""

    path: list[Path] = field(default_factory=list)
    """Prefixes of Megatron .bin/.idx pairs; a folder or a pattern of prefixes is one corpus of shards."""
    weights: list[Factor] = field(default_factory=list)
    """One per path; empty means in proportion to the tokens."""
    validation: list[Path] = field(default_factory=list)
    """Held-out text of its own, named as in path; each entry is a domain. Empty: what split keeps back."""
    split: Annotated[str, shares] = "99,1"
    """Shares of the documents for training and validation, in file order."""
    sequence_length: Size = MISSING
    """L: tokens of one packed sequence."""
    tokenizer: Path = "bytes"
    """A tokenizer.json, or `bytes`."""
    cache_dir: Text = ""
    """Where indices are kept; empty means `<first path>.cache`."""
    pad_to: Size = 1
    """Conversations are padded with end-of-document tokens to multiples of this: the stages' block size."""
    supervise_padding: bool = True
    """Whether that padding is learnt, as what comes after an answer; at the end of a sequence it never is."""
    too_long: TooLong = TooLong.drop
    """Conversations longer than a sequence: left out, cut after the last answer that fits, or refused."""


@dataclass
class EmbeddingNoiseConfig:
    """Noise on the embeddings of masked tokens at the start of a conversion (LLaDA2.0, section 7.1).

    sigma and its duration are not published; both numbers are ours.
    """

    sigma_over_rms: Amount = 0.0
    """Standard deviation relative to the RMS of the embedding table's entries; 0 switches it off."""
    fade_tokens: Count = 0
    """The noise fades linearly to zero over this many data tokens from the first diffusion stage."""


@dataclass
class DiffusionConfig:
    """The objective; where LLaDA2.0's report is silent the default is ours (docs/objective.md)."""

    weight: Weight = Weight.inverse
    t_per: RatePer = RatePer.sequence
    mask_rate_min: Share = 1e-3
    mask_rate_max: Share = 1.0
    denominator: Denominator = Denominator.tokens
    complementary: bool = False
    """Pair every sample with its complement: masked where the first was clean, and the reverse."""
    antithetic: bool = False
    """The rates of a sequence's documents or blocks, whichever t_per says, spread evenly over their range."""
    resample: bool = False
    """Draw a block's masks anew while the share that is masked lies outside mask_rate_min/max, as BD3-LM."""
    random_length_share: Share = 0.0
    """Share of the sequences of text of which only the first n tokens are learnt, n uniform on 1..L: 0.01 in
    LLaDA's pretraining, where full attention would else know one length alone."""
    block_grid: BlockGrid = BlockGrid.sequence
    gives_mask_token: bool = True
    """False: the mask token's logit counts as minus infinity, as in BD3-LM; a model never has to give it."""
    embedding_noise: EmbeddingNoiseConfig = field(default_factory=EmbeddingNoiseConfig)
    multi_block: MultiBlockConfig = field(default_factory=MultiBlockConfig)
    editing: EditingConfig = field(default_factory=EditingConfig)
    oput: OputConfig = field(default_factory=OputConfig)


@dataclass
class ConfidenceConfig:
    """Confidence-aware parallel training (CAP, dParallel): objective `confidence` (docs/post_training.md)."""

    weight: Amount = 2.0
    """Of the mean entropy of right predictions, beside the diffusion loss; dParallel's is 2."""
    temperature: Factor = 1.0
    """Entropies are those of softmax(logits / temperature): 0.5 in dParallel, 1 in dFactory."""


@dataclass
class PreferenceConfig:
    """Preferences over the likelihood bound (DPO, VRPO): objective `preference` (docs/post_training.md)."""

    form: PreferenceForm = PreferenceForm.dpo
    beta: Factor = 0.1
    """LLaDA2.0's; VRPO uses 0.2."""
    label_smoothing: Annotated[float, Range(at_least=0, below=0.5)] = 0.0
    """Probability that a pair is labelled the wrong way round, of `dpo`."""
    draws: Annotated[int, Range(at_least=1, at_most=1024)] = 2
    """Masks per text, the same for policy and reference: 1, or pairs of masks and their complements."""
    sft_weight: Amount = 0.05
    """Of the chosen texts' bound in nats per token, beside the preference (VRPO)."""


@dataclass
class StageConfig:
    """One stage of the block-size schedule."""

    name: Name = MISSING
    block_size: Annotated[str, block_size] = MISSING
    """A number of tokens that divides L, or `full`: one block, the clean half dropped (MDLM)."""
    tokens: Positive = MISSING
    """Budget in data tokens; the stage ends on the whole step that reaches it."""
    objective: Text = "diffusion"
    """What the stage trains: a name of OBJECTIVES in config/objectives.py."""
    learning_rate: LearningRateAtStart = LearningRateAtStart.keep
    moments: MomentsAtStart = MomentsAtStart.keep
    micro_batch: Extent = 0
    """Sequences per micro-batch in this stage; 0 means layout.micro_batch."""
    global_batch: Extent = 0
    """Sequences per step in this stage; 0 means layout.global_batch."""
    lr: Amount = 0.0
    """The largest learning rate of this stage; 0 means optimizer.lr."""
    sequence_length: Extent = 0
    """L in this stage; 0 means data.sequence_length."""
    path: list[Path] = field(default_factory=list)
    """What this stage reads, named as in data.path; empty means data.path."""
    weights: list[Factor] = field(default_factory=list)
    """One per path; empty means data.weights, or in proportion to the tokens where the stage has a path."""
    mask_rate_min: Share = 0.0
    """0 means diffusion.mask_rate_min."""
    mask_rate_max: Share = 0.0
    """0 means diffusion.mask_rate_max."""
    rotary_base: Amount = 0.0
    """0 means model.rotary_base."""
    rotary_scaling: RotaryScalingConfig | None = None
    """null means model.rotary_scaling."""


@dataclass
class ScheduleConfig:
    """The block-size schedule: warm-up 1 -> 4 -> 32 -> 64 -> L, stable L, decay L -> ... -> 32."""

    stages: list[StageConfig] = field(default_factory=list)
    rewarm_tokens: Count = 0
    """Length of the linear warm-up of stages with `learning_rate: rewarm`."""


@dataclass
class LayoutConfig:
    """How the run is split over processes; dp = processes / (tp pp cp) is derived."""

    tp: Ways = 1
    """Tensor parallelism. sp, sequence parallelism, is derived: on where tp > 1, because experts need it."""
    pp: Ways = 1
    """Pipeline stages."""
    vpp: Ways = 1
    """Virtual stages per pipeline stage, interleaved: less idle time, more messages."""
    cp: Ways = 1
    """Context parallelism: each process holds L/cp tokens of each half."""
    ep: Ways = 1
    """Expert parallelism: experts/ep experts per process, over the processes of tp, cp and dp."""
    etp: Ways = 1
    """Tensor parallelism inside an expert; need not equal tp."""
    bp: Ways = 1
    """Of decoding: replicas that read the branches of one sequence (LoPA) side by side, bp of the dp ones."""
    processes: Ways = 1
    """Ranks, one per device; 0 in a configuration file: as few as the axes ask for."""
    micro_batch: Size = 1
    """Sequences per process and micro-batch."""
    global_batch: Size = 1
    """Sequences per step, over all processes."""
    pipeline: list[Extent] = field(default_factory=list)
    """Layers of each of the pp*vpp stages in the order that data passes them; empty means evenly.

    The last stage also computes the output head: with a large vocabulary it should hold fewer layers.
    """
    dispatcher: Dispatcher = Dispatcher.alltoall
    """`alltoall` sends a token to the processes of its experts; `allgather` sends all to all; `deepep` and
    `hybridep`, on CUDA with their packages, send it once to each node."""
    overlap_experts: bool = False
    """Send one micro-batch's tokens to experts and back while another one computes."""
    delay_weight_gradients: bool = False
    """Compute weight gradients while tokens travel, after the inputs' gradients; needs overlap_experts."""
    overlap_shared_experts: bool = False
    """Compute the shared expert while tokens travel to the others and back."""
    overlap_tensor_parallel: bool = False
    """Let messages of tensor parallelism run inside the products that need them (TransformerEngine)."""
    recompute: Recompute = Recompute.none
    """`selective` recomputes recompute_modules in backward, `full` whole layers: less memory, more time."""
    recompute_modules: list[RecomputeModule] = field(default_factory=lambda: [RecomputeModule.core_attn])
    """Of `selective`; mlp is that of dense layers, mla_up_proj what makes heads of the latents of model.mla;
    layernorm and moe_act need transformer_engine's layers."""
    offload_modules: list[OffloadModule] = field(default_factory=list)
    """Keep the inputs of these parts of a layer in host memory between forward and backward; empty: none."""
    overlap_grad_reduce: bool = False
    """Reduce gradients while backward still computes others."""
    overlap_param_gather: bool = False
    """Gather updated weights while the next forward computes; needs overlap_grad_reduce."""


@dataclass
class OptimizerConfig:
    """AdamW and the learning rate's schedule (which is not the block-size schedule)."""

    lr: Amount = MISSING
    min_lr: Amount = 0.0
    warmup_tokens: Count = 0
    decay_style: DecayStyle = DecayStyle.WSD
    wsd_decay_tokens: Count = 0
    """Length of the final decay of `WSD`."""
    weight_decay: Annotated[float, Range(at_least=0, at_most=1e3)] = 0.1
    beta1: Decay = 0.9
    beta2: Decay = 0.95
    eps: Annotated[float, Range(above=0, below=1)] = 1e-8
    clip_grad: Amount = 1.0
    """Largest norm of the gradient; 0: not clipped."""


@dataclass
class PrecisionConfig:
    """Numbers of weights, activations, gradients and moments; the optimizer keeps fp32 masters."""

    dtype: Dtype = Dtype.fp32
    fp8: Fp8 = Fp8.none
    """Compute the layers' products in FP8, by this recipe of TransformerEngine."""
    gradients: Dtype = Dtype.fp32
    """In which they are summed over micro-batches and reduced over data parallelism."""
    moments: Dtype = Dtype.fp32
    """In which the optimizer keeps Adam's moments."""
    deterministic: bool = False
    """Ask for deterministic kernels and one order of adding on CUDA, which cost time; for an experiment that
    compares runs bit for bit. CPU runs are deterministic anyway."""


@dataclass
class CheckpointConfig:
    """What is kept, and what a run starts from."""

    every_steps: Count = 0
    """0: only at the end, on a signal and at the end of a stage."""
    at_stage_end: bool = True
    in_background: bool | None = None
    """Write while training goes on, from a copy in host memory of what this rank saves; null: on CUDA."""
    writer_threads: Annotated[int, Range(at_least=1, at_most=64)] = 4
    """Files that each rank writes at the same time; small parts share one."""
    keep_last: Positive = 2
    """Older checkpoints are deleted, except those at the end of a stage and those kept by the next keys."""
    keep_every_steps: Count = 0
    """Checkpoints at multiples of this step stay for good; 0: none."""
    keep_best: Count = 0
    """Number of checkpoints that stay because their `best_metric` is lowest."""
    best_metric: Annotated[str, metric] = "nll_block32"
    """Of the evaluation at that step: `nll_ar`, or `nll_block` and one of evaluation.block_sizes."""
    copy_to: Text = ""
    """A URL such as s3://bucket/run where each checkpoint is copied too; a run whose run.dir is lost goes on
    from there. Empty: no copies."""
    memory_every_steps: Count = 0
    """Keep a copy in the nodes' memory, each rank's files on its node and on the next one; 0: never."""
    memory_dir: Path = "/dev/shm/llada_megatron"
    """Where a node keeps its copies: in memory, and its own."""
    init_from: Text = ""
    """A checkpoint (or a run's directory: its newest) whose weights alone are taken."""


@dataclass
class EvaluationConfig:
    """The likelihood bound on held-out text."""

    block_sizes: list[Annotated[str, block_size]] = field(default_factory=list)
    """Block sizes of the bound; `full` means L. Empty: no evaluation."""
    sequences: Positive = 64
    """Held-out sequences."""
    draws: Positive = 4
    """Masks per sequence, stratified in the number of masked tokens."""
    at_stage_end: bool = True
    every_steps: Count = 0
    """0: never between the ends of stages."""
    infill_sequences: Count = 0
    """After a diffusion stage fill in this many half-masked held-out sequences, as samples for the eye."""
    planted_share: Share = 0.0
    """Replace this share of held-out tokens by wrong ones and count what the model mends; 0: not measured."""


@dataclass
class LoggingConfig:
    """Where metrics go besides metrics.jsonl."""

    every_steps: Positive = 1
    """Of the terminal; metrics.jsonl has every step."""
    wandb: Wandb = Wandb.disabled
    wandb_project: Text = "llada_megatron"
    prometheus: bool = False
    """Keep run.dir/metrics.prom with the newest figures, for a textfile collector."""


@dataclass
class Config:
    """A complete run."""

    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    confidence: ConfidenceConfig = field(default_factory=ConfidenceConfig)
    preference: PreferenceConfig = field(default_factory=PreferenceConfig)
    levenshtein: LevenshteinConfig = field(default_factory=LevenshteinConfig)
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
