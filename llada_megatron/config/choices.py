"""Settings that are one of a few words; configuration files name members as they are written here."""

from __future__ import annotations

from enum import StrEnum


class Weight(StrEnum):
    """w(t) of the masked positions' cross entropy."""

    inverse = "inverse"
    flat = "flat"


class RatePer(StrEnum):
    """What shares one draw of the mask rate t."""

    sequence = "sequence"
    document = "document"
    block = "block"


class Denominator(StrEnum):
    """What the weighted sum of cross entropies is divided by; formulas in objectives/weights.py."""

    tokens = "tokens"
    masked = "masked"
    sequence = "sequence"
    document = "document"
    batch = "batch"


class ExpertScore(StrEnum):
    """What a router makes of its logits: scores that experts are chosen and weighted by."""

    sigmoid = "sigmoid"
    softmax = "softmax"


class GroupRates(StrEnum):
    """How the blocks of a noise group get their mask rates (objectives/multi_block.py)."""

    chain = "chain"
    independent = "independent"


class WrongWords(StrEnum):
    """Where objective `editing` takes wrong tokens from."""

    text = "text"
    """Other places of the same sequence that may be masked: its unigram distribution."""
    vocabulary = "vocabulary"


class ConceptOf(StrEnum):
    """What a concept of the family `dlcm` is made of."""

    mean = "mean"
    """Of its tokens' hidden states."""
    boundary_token = "boundary_token"
    """The hidden state of its first token."""


class BoundaryGrad(StrEnum):
    """What of the next tokens' loss reaches the boundary detector of the family `dlcm`."""

    none = "none"
    ste = "ste"
    """H-Net's straight-through estimator, and the weights of the smoothing."""


class ConceptAttention(StrEnum):
    """How the tokens of the family `dlcm` attend to concepts."""

    ragged = "ragged"
    replicated = "replicated"


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
    deepep = "deepep"
    hybridep = "hybridep"

    @property
    def is_flex(self) -> bool:
        """Whether it is a backend of megatron-core's `flex` dispatcher."""
        return self in (Dispatcher.deepep, Dispatcher.hybridep)


class RecomputeModule(StrEnum):
    """A part of a layer that backward may compute again, by megatron-core's names.

    Of transformer_config.py:1762 in megatron-core 0.19.2; the others there belong to other architectures.
    """

    core_attn = "core_attn"
    mla_up_proj = "mla_up_proj"
    mlp = "mlp"
    moe = "moe"
    shared_experts = "shared_experts"
    layernorm = "layernorm"
    moe_act = "moe_act"


class OffloadModule(StrEnum):
    """A part of a layer whose input may wait in host memory, by megatron-core's names.

    Of transformer_config.py:1853 in megatron-core 0.19.2; fused_group_mlp there needs an option that is not
    offered.
    """

    attn_norm = "attn_norm"
    qkv_linear = "qkv_linear"
    core_attn = "core_attn"
    attn_proj = "attn_proj"
    mlp_norm = "mlp_norm"
    expert_fc1 = "expert_fc1"
    moe_act = "moe_act"


class CudaGraphPart(StrEnum):
    """A part of a layer that may be captured as a CUDA graph, by megatron-core's names.

    Of CudaGraphModule in transformer/enums.py of megatron-core 0.19.2; attention is not among them, since
    its mask differs from batch to batch, nor experts, whose rows do.
    """

    mlp = "mlp"
    moe_router = "moe_router"
    moe_preprocess = "moe_preprocess"


class AttentionBackend(StrEnum):
    """An executor of attention/registry.py; `auto` takes the fastest that can serve."""

    auto = "auto"
    cudnn_flex = "cudnn_flex"
    flex_torch = "flex_torch"
    cudnn_graph = "cudnn_graph"
    varlen = "varlen"
    portable = "portable"
    reference = "reference"


class RotaryScaling(StrEnum):
    """What becomes of the rotary frequencies for contexts longer than those of pretraining."""

    none = "none"
    linear = "linear"
    yarn = "yarn"
    llama3 = "llama3"


class AdapterTarget(StrEnum):
    """Linear layers that adapters stand beside."""

    attention = "attention"
    dense = "dense"
    shared_experts = "shared_experts"
    experts = "experts"


class Core(StrEnum):
    """megatron-core's class of models: GPTModel, or HybridModel, which is to take its place."""

    gpt = "gpt"
    hybrid = "hybrid"


class LayerSpec(StrEnum):
    """Whose modules a layer is made of; `auto`: transformer_engine on CUDA when it is installed."""

    auto = "auto"
    local = "local"
    transformer_engine = "transformer_engine"


class DecayStyle(StrEnum):
    """How the learning rate falls, by megatron-core's names."""

    WSD = "WSD"
    cosine = "cosine"
    linear = "linear"
    constant = "constant"


class Dtype(StrEnum):
    """Of a kind of tensors."""

    fp32 = "fp32"
    bf16 = "bf16"


class Fp8(StrEnum):
    """TransformerEngine's recipes of FP8: what shares a scale, and when it is found."""

    none = "none"
    tensorwise = "tensorwise"
    delayed = "delayed"
    blockwise = "blockwise"
    mxfp8 = "mxfp8"


class Wandb(StrEnum):
    """Where wandb's records go."""

    disabled = "disabled"
    offline = "offline"
    online = "online"


class Container(StrEnum):
    """What the ranks run in."""

    none = "none"
    pyxis = "pyxis"
    apptainer = "apptainer"


class BadSamples(StrEnum):
    """What happens at a sample that cannot be trained on."""

    refuse = "refuse"
    skip = "skip"


class TooLong(StrEnum):
    """What happens to a conversation that does not fit into a sequence."""

    drop = "drop"
    cut = "cut"
    refuse = "refuse"


class PreferenceForm(StrEnum):
    """The loss of a pair, from how much more than the reference the policy prefers the chosen text."""

    dpo = "dpo"
    ipo = "ipo"
    kto = "kto"
