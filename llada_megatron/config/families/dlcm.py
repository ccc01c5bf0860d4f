"""The `dlcm` family: an encoder of tokens, a backbone over concepts, a decoder of tokens (arXiv 2512.24617).

Its blocks are the `gpt` family's layers: `tokens_of` and `concepts_of` are a model's two halves in its words.
Legend: H hidden_size, Hc concepts.hidden_size, n and nkv heads, d head_dim, R tokens_per_concept.

    encoder, decoder       gpt's layers of H, embedding, head and last norm
    backbone               gpt's layers of Hc; 1/R of the tokens pass it
    encoder's last norm    H                       replicated over tp
    backbone's last norm   Hc                      replicated
    boundary detector      2 H^2                   replicated
    concept_proj           H Hc                    replicated
    concept attention      2 H n d + 2 Hc nkv d    / tp
    its norms and start    2 d + Hc                replicated
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from llada_megatron.config.choices import ConceptAttention, ConceptOf, Core
from llada_megatron.config.concepts import ConceptsConfig
from llada_megatron.config.contents import Coarse, Contents, Parameters, Watched, aligned
from llada_megatron.config.families import gpt
from llada_megatron.config.layout_rules import require
from llada_megatron.config.schedule import Schedule
from llada_megatron.config.schema import Config, LayoutConfig, ModelConfig

FILLS_MASKS = False


def tokens_of(model: ModelConfig, layers: int) -> ModelConfig:
    """So many layers of encoder or decoder, as a dense model of the `gpt` family."""
    return replace(
        model,
        family="gpt",
        layers=layers,
        dense_layers=layers,
        experts=0,
        experts_per_token=0,
        expert_hidden_size=0,
        shared_expert_hidden_size=0,
        expert_groups=1,
        expert_groups_per_token=1,
        expert_bias=False,
        concepts=ConceptsConfig(),
    )


def concepts_of(model: ModelConfig) -> ModelConfig:
    """The backbone, as a model of the `gpt` family."""
    concepts = model.concepts
    layers = concepts.backbone_layers(model.layers)
    return replace(
        model,
        family="gpt",
        layers=layers,
        dense_layers=layers - (model.layers - model.dense_layers),
        hidden_size=concepts.hidden_size,
        heads=concepts.heads,
        kv_heads=concepts.kv_heads,
        ffn_hidden_size=concepts.ffn_hidden_size,
        concepts=ConceptsConfig(),
    )


def check(model: ModelConfig) -> None:
    """Raise BadInput for settings of an architecture that cannot be built."""
    concepts, name = model.concepts, "model.concepts"
    for field in ("encoder_layers", "decoder_layers", "hidden_size", "heads", "kv_heads"):
        require(getattr(concepts, field) > 0, f"{name}.{field} is 0: the family dlcm needs all its parts.")
    tokens = concepts.encoder_layers + concepts.decoder_layers
    require(
        tokens < model.layers,
        f"{name}.encoder_layers and decoder_layers are {tokens} of model.layers={model.layers}: leave some to"
        " the backbone.",
    )
    require(
        tokens <= model.dense_layers <= model.layers,
        f"model.dense_layers={model.dense_layers} must be from the {tokens} of encoder and decoder to"
        f" model.layers={model.layers}: experts are the backbone's.",
    )
    require(
        concepts.ffn_hidden_size > 0 or model.dense_layers == tokens,
        f"{name}.ffn_hidden_size is 0 but the backbone has dense layers: set it.",
    )
    require(
        concepts.heads % concepts.kv_heads == 0,
        f"{name}.heads={concepts.heads} is not a multiple of {name}.kv_heads={concepts.kv_heads}.",
    )
    require(
        concepts.attention is ConceptAttention.ragged or concepts.concept is ConceptOf.mean,
        f"{name}.attention=replicated needs {name}.concept=mean: how often a concept stands there that is not"
        " finished is known from later tokens.",
    )
    gpt.check(replace(model, family="gpt"))
    for setting, isset, instead in (
        ("model.core=hybrid", model.core is Core.hybrid, "gpt: it builds its stacks itself"),
        ("model.lora.rank", model.lora.rank, "0: adapters stand beside the gpt family's layers"),
        ("model.mla.kv_lora_rank", model.mla.is_used, "0: both its attentions keep keys and values of heads"),
        ("model.tied_head", model.tied_head, "false: muP gives embedding and head other scales"),
        ("model.expert_capacity", model.expert_capacity, "0: concepts have no blocks to route by"),
        ("model.router.rows_cap", model.router.rows_cap, "0: it counts rows of tokens"),
        ("model.router", model.router.has_losses, "its defaults: its losses count sequences of tokens"),
    ):
        require(not isset, f"{setting} is set, and model.family=dlcm needs {instead}.")


def check_layout(config: Config) -> None:
    """Raise BadInput for a layout that concepts cannot be split by."""
    layout, concepts = config.layout, config.model.concepts
    require(
        layout.pp == 1,
        f"layout.pp={layout.pp} sends tensors of one shape from stage to stage, and concepts have another"
        " than tokens and vary in number: model.family=dlcm needs layout.pp=1.",
    )
    require(
        layout.cp == 1,
        f"layout.cp={layout.cp} deals a sequence's tokens over processes, which would cut concepts:"
        " model.family=dlcm needs layout.cp=1.",
    )
    for field in ("heads", "kv_heads", "ffn_hidden_size"):
        size = getattr(concepts, field)
        require(
            size % layout.tp == 0,
            f"layout.tp={layout.tp} does not divide model.concepts.{field}={size}: choose another.",
        )


def check_run(config: Config, schedule: Schedule) -> None:
    """Raise BadInput for what the family does not learn, and for what it does not serve."""
    for stage in schedule.stages:
        require(
            stage.objective == "concepts",
            f"schedule.stages[{stage.index}].objective={stage.objective} is nothing that model.family=dlcm"
            " learns: set it to concepts.",
        )
    check_layout(config)
    layout, training = config.layout, config.training
    for setting, isset, instead in (
        (
            "layout.overlap_experts",
            layout.overlap_experts,
            "false: its plan of a forward is the gpt family's",
        ),
        ("layout.overlap_shared_experts", layout.overlap_shared_experts, "false"),
        ("layout.overlap_tensor_parallel", layout.overlap_tensor_parallel, "false: concepts vary in number"),
        ("layout.offload_modules", layout.offload_modules, "[]"),
        ("training.cuda_graphs", training.cuda_graphs, "[]: the number of concepts is a shape"),
        ("evaluation.infill_sequences", config.evaluation.infill_sequences, "0: it fills no masks"),
        ("evaluation.planted_share", config.evaluation.planted_share, "0: it mends no tokens"),
    ):
        require(not isset, f"{setting} is set, and model.family=dlcm needs {instead}.")


def stage_contents(model: ModelConfig, layout: LayoutConfig) -> list[list[Contents]]:
    """One stage: the family serves no pipeline."""
    return [[Contents(model.dense_layers, model.layers - model.dense_layers, first=True, last=True)]]


def parameters(
    model: ModelConfig, contents: Iterable[Contents], *, tp: int = 1, ep: int = 1, etp: int = 1
) -> Parameters:
    """Parameters of one process."""
    layers = model.concepts.encoder_layers + model.concepts.decoder_layers
    backbone = concepts_of(model)
    moe = model.layers - model.dense_layers
    of_tokens = gpt.parameters(tokens_of(model, layers), [Contents(layers, 0, True, True)], tp=tp)
    of_concepts = gpt.parameters(
        backbone, [Contents(backbone.dense_layers, moe, False, False)], tp=tp, ep=ep, etp=etp
    )
    sharded = [size // tp for size in _attention_weights(model)]
    hidden, concept = model.hidden_size, backbone.hidden_size
    alike = [hidden**2, hidden**2, hidden * concept, concept]  # the last is the start vector
    replicated = [hidden, concept, model.head_dim, model.head_dim, *alike]
    ((tokens_buffer, _),), ((concepts_buffer, experts_buffer),) = of_tokens.buffers, of_concepts.buffers
    buffer = tokens_buffer + concepts_buffer + aligned(*sharded, *replicated)
    return Parameters(
        sharded=of_tokens.sharded + of_concepts.sharded + sum(sharded),
        replicated=of_tokens.replicated + of_concepts.replicated + sum(replicated),
        expert=of_concepts.expert,
        bias=of_concepts.bias,
        counts=of_concepts.counts,
        alike=sum(alike),
        buffers=((buffer, experts_buffer),),
    )


def coarse(model: ModelConfig) -> Coarse:
    """The backbone, with its last norm; its rows are concepts, as many as the parser aims at."""
    backbone = concepts_of(model)
    moe = backbone.layers - backbone.dense_layers
    layers = gpt.parameters(backbone, [Contents(backbone.dense_layers, moe, False, False)])
    parameters = layers.trained + layers.bias + backbone.hidden_size
    return Coarse(model.concepts.tokens_per_concept, parameters)


def active_weights(model: ModelConfig) -> dict[str, int]:
    """Weights that one token passes through, those of the backbone by the concepts that it makes."""
    per_concept = model.concepts.tokens_per_concept
    layers = model.concepts.encoder_layers + model.concepts.decoder_layers
    query, key_value, output = _attention_weights(model)
    found = gpt.active_weights(tokens_of(model, layers))
    for name, weights in gpt.active_weights(concepts_of(model)).items():
        found[name] += round(weights / per_concept)
    of_concept = key_value + model.hidden_size * model.concepts.hidden_size
    found["concepts"] = 2 * model.hidden_size**2 + query + output + round(of_concept / per_concept)
    return found


def last_layer_weights(model: ModelConfig) -> dict[str, int]:
    """None: there is no clean half."""
    return {}


def active_adapters(model: ModelConfig) -> int:
    """0: the family has none."""
    return 0


def pair_flops(model: ModelConfig) -> int:
    """Forward FLOPs of a visible pair of tokens in all layers, with its share of pairs with concepts."""
    concepts, R = model.concepts, model.concepts.tokens_per_concept
    layers = concepts.encoder_layers + concepts.decoder_layers
    of_tokens = model.heads * (layers + 1 / R)
    of_concepts = concepts.heads * concepts.backbone_layers(model.layers) / R**2
    return round(4 * model.head_dim * (of_tokens + of_concepts))


def before(model: ModelConfig) -> tuple[dict[str, int], int]:
    """Weights and FLOPs of a pair in a pass before a step's own: the encoder's and the detector's."""
    encoder = tokens_of(model, model.concepts.encoder_layers)
    weights = gpt.active_weights(encoder) | {"concepts": 2 * model.hidden_size**2}
    return weights, gpt.pair_flops(encoder)


def watched(model: ModelConfig) -> Watched:
    """The three stacks, and what is between them: each part with the norm before it."""
    concepts = model.concepts
    sizes = {
        "encoder": concepts.encoder_layers,
        "backbone": concepts.backbone_layers(model.layers),
        "decoder": concepts.decoder_layers,
    }
    encoder, backbone, decoder = (
        [f"{name} {number}" for number in range(1, size + 1)] for name, size in sizes.items()
    )
    boundaries, attention = "boundaries", "concept attention"
    others = dict.fromkeys(("encoder", "boundary_q", "boundary_k", "concept_proj"), boundaries)
    others |= dict.fromkeys(("backbone", "concept_attention"), attention)
    others |= {"embedding": "embedding", "decoder": "head", "output_layer": "head"}
    parts = ["embedding", *encoder, boundaries, *backbone, attention, *decoder, "head"]
    return Watched(parts, {name: name for name in sizes}, others, padded="backbone")


def kept_numbers(model: ModelConfig, tp: int = 1) -> int:
    """Keys and values of a token, and those of its share of a concept."""
    concepts = model.concepts
    layers = concepts.encoder_layers + concepts.decoder_layers
    per_concept = concepts.kv_heads * concepts.backbone_layers(model.layers) + model.kv_heads
    heads = layers * model.kv_heads + round(per_concept / concepts.tokens_per_concept)
    return 2 * model.head_dim * heads // tp


def _attention_weights(model: ModelConfig) -> tuple[int, int, int]:
    """Of the attention of tokens to concepts: queries, keys and values, and the output projection."""
    width = model.heads * model.head_dim
    key_value = 2 * model.concepts.hidden_size * model.kv_heads * model.head_dim
    return model.hidden_size * width, key_value, width * model.hidden_size
