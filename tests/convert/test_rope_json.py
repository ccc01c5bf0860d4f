"""Every spelling of rotary settings becomes the same ones; what says two things or is unknown is refused."""

import pytest

from llada_megatron.config.errors import BadInput
from llada_megatron.config.schema import ModelConfig, RotaryScaling, RotaryScalingConfig
from llada_megatron.convert import rope_json
from llada_megatron.convert.families import FAMILIES
from llada_megatron.convert.rope_json import Rotary

LING, LLADA2, LLAMA = "BailingMoeV2ForCausalLM", "LLaDA2MoeModelLM", "LlamaForCausalLM"
BASE = {"rope_theta": 600000}
YARN = {"factor": 4.0, "original_max_position_embeddings": 8192}
LLAMA3 = YARN | {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
PLAIN_SETTINGS = RotaryScalingConfig()
YARN_SETTINGS = RotaryScalingConfig(RotaryScaling.yarn, 4.0, 8192)
LLAMA3_SETTINGS = RotaryScalingConfig(RotaryScaling.llama3, 4.0, 8192)
LINEAR_SETTINGS = RotaryScalingConfig(RotaryScaling.linear, 4.0)


def read(described: dict, architecture: str = LING) -> Rotary:
    defaults = FAMILIES[architecture].rotary
    assert defaults is not None
    return rope_json.read(described, defaults, architecture, "config.json")


def nested(settings: dict, *kinds: str) -> dict:
    return {"rope_parameters": {kind: settings for kind in kinds}}


SPELLINGS = [
    (BASE, PLAIN_SETTINGS),
    (BASE | {"rope_scaling": None}, PLAIN_SETTINGS),
    (BASE | {"rope_scaling": {}}, PLAIN_SETTINGS),
    (BASE | {"rope_scaling": {"rope_type": "default"}}, PLAIN_SETTINGS),
    (BASE | {"rope_scaling": {"type": "default"}}, PLAIN_SETTINGS),
    ({"rope_parameters": BASE}, PLAIN_SETTINGS),
    ({"rope_parameters": BASE | {"rope_type": None}}, PLAIN_SETTINGS),
    (BASE | {"rope_parameters": BASE | {"rope_type": "default"}}, PLAIN_SETTINGS),
    (nested(BASE, "full_attention"), PLAIN_SETTINGS),
    (nested(BASE, "full_attention", "sliding_attention"), PLAIN_SETTINGS),
    (BASE | {"rope_scaling": YARN | {"type": "yarn"}}, YARN_SETTINGS),
    (BASE | {"rope_scaling": YARN | {"rope_type": "yarn"}}, YARN_SETTINGS),
    (BASE | {"rope_scaling": YARN | {"rope_type": "yarn", "type": "yarn"}}, YARN_SETTINGS),
    ({"rope_parameters": BASE | YARN | {"type": "yarn"}}, YARN_SETTINGS),
    ({"rope_parameters": BASE | YARN | {"rope_type": "yarn"}}, YARN_SETTINGS),
    ({"rope_parameters": BASE | YARN | {"rope_type": None, "type": "yarn"}}, YARN_SETTINGS),
    (
        BASE | {"rope_scaling": YARN | {"type": "yarn", "finetuned": True, "attention_factor": None}},
        YARN_SETTINGS,
    ),
    (BASE | {"rope_scaling": {"type": "yarn", "factor": 4}, "max_position_embeddings": 8192}, YARN_SETTINGS),
    (
        BASE
        | {
            "rope_scaling": YARN | {"type": "yarn", "factor": None},
            "max_position_embeddings": 32768,
        },
        YARN_SETTINGS,
    ),
    (nested(BASE | YARN | {"type": "yarn"}, "full_attention"), YARN_SETTINGS),
    (BASE | {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}, LINEAR_SETTINGS),
    ({"rope_parameters": BASE | {"type": "linear", "factor": 4}}, LINEAR_SETTINGS),
    (BASE | {"rope_scaling": LLAMA3 | {"rope_type": "llama3"}}, LLAMA3_SETTINGS),
    ({"rope_parameters": BASE | LLAMA3 | {"type": "llama3"}}, LLAMA3_SETTINGS),
]


@pytest.mark.parametrize("described, scaling", SPELLINGS, ids=range(len(SPELLINGS)))
def test_every_spelling_is_read(described: dict, scaling: RotaryScalingConfig) -> None:
    assert read(described) == Rotary(600000.0, 1.0, scaling)


@pytest.mark.parametrize("place", ["beside", "rope_parameters", "rope_scaling"])
def test_the_share_of_the_head_is_read_in_either_place(place: str) -> None:
    share = {"partial_rotary_factor": 0.25}
    described = BASE | share if place == "beside" else {place: BASE | share}
    assert read(described).rotary_fraction == 0.25


def test_what_is_absent_is_what_the_public_code_takes() -> None:
    assert read({}, LLAMA) == Rotary(10000.0, 1.0, PLAIN_SETTINGS)
    assert read(BASE, LING).rotary_fraction == 1.0 and read(BASE, LLADA2).rotary_fraction == 0.5
    for architecture in (LING, LLADA2):
        with pytest.raises(BadInput, match="has no 'rope_theta'"):
            read({}, architecture)


@pytest.mark.parametrize(
    "extra, factor",
    [
        ({}, 0.0),
        ({"attention_factor": 1.5}, 1.5),
        ({"attention_factor": 1.5, "mscale": 1.0, "mscale_all_dim": 0.5}, 1.5),
        ({"mscale": 1.0, "mscale_all_dim": 1.0}, 1.0),
        ({"mscale": 1.0, "mscale_all_dim": 0.707}, 1.0857263992561355),  # of transformers, at factor 40
        ({"mscale": 1.0}, 0.0),
        ({"mscale": 1.0, "mscale_all_dim": 0}, 0.0),
    ],
)
def test_the_attention_factor_follows_as_in_the_public_code(extra: dict, factor: float) -> None:
    scaling = read(BASE | {"rope_scaling": YARN | {"type": "yarn", "factor": 40.0} | extra}).rotary_scaling
    assert scaling.attention_factor == pytest.approx(factor, rel=1e-12)


def yarn(**changed: object) -> dict:
    return BASE | {"rope_scaling": YARN | {"type": "yarn"} | changed}


BY_LAYER = {
    "rope_parameters": {
        "full_attention": YARN | {"type": "yarn"},
        "sliding_attention": {"type": "default"},
    }
}
REFUSED = [
    ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type=dynamic"),
    ({"rope_scaling": {"rope_type": "longrope", "long_factor": [1.0]}}, "rope_type=longrope"),
    ({"rope_scaling": {"type": "su"}}, "rope_type=su"),
    ({"rope_scaling": {"type": ["yarn"]}}, r"rope_type=\['yarn'\]"),
    ({"rope_scaling": "yarn"}, "rope_scaling='yarn': it must be an object, or null"),
    ({"rope_parameters": []}, r"rope_parameters=\[\]: it must be an object, or null"),
    ({"rope_scaling": YARN}, "numbers of a rotary scaling in rope_scaling and no rope_type"),
    ({"rope_scaling": YARN | {"type": "yarn", "rope_type": "linear"}}, "sets two types in rope_scaling"),
    ({"rope_scaling": {"type": "linear"}}, "rope_type=linear in rope_scaling and no 'factor'"),
    ({"rope_scaling": {"type": "linear", "factor": None}}, "no 'factor'"),
    ({"rope_scaling": YARN | {"type": "llama3"}}, "no 'low_freq_factor'"),
    ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "no 'original_max_position_embeddings'"),
    ({"rope_parameters": {"rope_theta": 10000}}, "rope_theta=600000 and, in rope_param"),
    ({"rope_theta": "6e5"}, "rope_theta='6e5' in config.json: it must be a number"),
    ({"rope_theta": True}, "rope_theta=True in config.json: it must be a number"),
    ({"rope_theta": float("nan")}, "rope_theta=nan in config.json: it must be a number"),
    ({"rope_theta": 10**400}, "it must be a number"),
    ({"rope_theta": -1}, "rope_theta=-1.0: it must be above 0"),
    ({"partial_rotary_factor": 0}, "partial_rotary_factor=0.0: it must be above 0"),
    ({"partial_rotary_factor": 0.5, "rope_parameters": {"partial_rotary_factor": 1.0}}, "keep one"),
    (yarn(factor="4"), "factor='4' in rope_scaling: it must be a number"),
    (yarn(beta_fast=True), "beta_fast=True"),
    (yarn(truncate=None), "truncate=None in rope_scaling: it must be true or false"),
    (yarn(original_max_position_embeddings=8192.5), "must be a whole number"),
    (yarn(attention_factor=0), "attention_factor=0.0 in rope_scaling: it must be above 0"),
    (yarn(mrope_section=[1, 2]), "mrope_section in rope_scaling, which is unknown"),
    (yarn() | {"rope_parameters": {"rope_type": "default"}}, "settings in rope_parameters, rope_scaling"),
    (BY_LAYER, "several rotary settings in rope_parameters: one for all layers is served"),
    ({"rope_parameters": {"full_attention": {}, "rope_theta": 1}}, "mixes settings and kinds of layers"),
]  # fmt: skip


@pytest.mark.parametrize("described, sentence", REFUSED, ids=range(len(REFUSED)))
def test_what_is_not_served_or_said_twice_is_refused(described: dict, sentence: str) -> None:
    with pytest.raises(BadInput, match=sentence):
        read(BASE | described)


def test_a_llama_rotates_whole_heads() -> None:
    with pytest.raises(BadInput, match="the public code of LlamaForCausalLM rotates whole heads"):
        read({"rope_parameters": {"partial_rotary_factor": 0.5}}, LLAMA)


def test_keys_that_another_type_reads_are_listed() -> None:
    assert rope_json.unread(yarn(low_freq_factor=1.0, mscale=1.0, finetuned=True), "config.json") == [
        "rope_scaling.low_freq_factor",
        "rope_scaling.finetuned",
    ]


@pytest.mark.parametrize("architecture, fraction", [(LING, 0.5), (LLADA2, 1.0), (LLAMA, 1.0)])
@pytest.mark.parametrize(
    "scaling",
    [
        PLAIN_SETTINGS,
        LINEAR_SETTINGS,
        LLAMA3_SETTINGS,
        YARN_SETTINGS,
        RotaryScalingConfig(
            RotaryScaling.yarn, 2.0, 64, beta_fast=8.0, beta_slow=2.0, truncate=False, attention_factor=1.25
        ),
    ],
    ids=["none", "linear", "llama3", "yarn", "yarn_spelt_out"],
)
def test_what_is_written_is_read_as_the_same(scaling, architecture: str, fraction: float) -> None:
    model = ModelConfig(rotary_base=12345.0, rotary_fraction=fraction, rotary_scaling=scaling)
    defaults = FAMILIES[architecture].rotary
    assert defaults is not None
    assert read(rope_json.write(model, defaults), architecture) == Rotary(12345.0, fraction, scaling)
