import pytest

from llada_megatron.config import rules
from llada_megatron.config.compose import compose
from llada_megatron.config.errors import BadInput

AR = "{name: a, objective: autoregressive, block_size: '1', tokens: 4096}"
BD = "{name: b, block_size: '4', tokens: 4096}"


def scaled(**settings: object) -> list[str]:
    return [f"model.rotary_scaling.{name}={value}" for name, value in settings.items()]


def groups(block_size: int, *overrides: str) -> list[str]:
    stage = f"{{name: m, block_size: '{block_size}', tokens: 4096, objective: multi_block}}"
    return [
        f"schedule.stages=[{stage}]",
        *(each if each[0] == "d" else f"diffusion.multi_block.{each}" for each in overrides),
    ]


BROKEN = [
    (groups(128), r"schedule.stages\[0\] has one block per sequence"),
    (groups(64, "group_size=3"), r"group_size=3 does not fit the 2 blocks of a sequence"),
    (groups(4, "group_size=1", "random_layouts=1"), r"group_size=1 leaves no size to draw"),
    (groups(4, "systematic=false"), "leaves no layout of groups: set random_layouts"),
    (
        groups(4, "diffusion.complementary=true", "diffusion.mask_rate_max=0.9"),
        "round: objective multi_block",
    ),
    (groups(4, "diffusion.resample=true"), "rates=chain has draws of its own: set diffusion.antithetic"),
    (groups(4, "group_size=3"), r"reads each sequence in 5 samples in a row"),
    (["model.kv_heads=3"], "model.kv_heads"),
    (["model.mask_token_id=512"], "model.mask_token_id"),
    (["model.rotary_fraction=0.03"], "model.rotary_fraction"),
    (scaled(type="linear", factor=0.5), "model.rotary_scaling.factor"),
    (scaled(type="yarn", factor=2), "model.rotary_scaling.original_positions"),
    (scaled(type="yarn", factor=2, original_positions=64, beta_slow=64), "model.rotary_scaling.beta_slow"),
    (scaled(type="yarn", original_positions=64, attention_factor=-1), "rotary_scaling.attention_factor"),
    ([*scaled(type="yarn", original_positions=64), "model.rotary_base=1"], "model.rotary_base"),
    (scaled(type="llama3", original_positions=64, low_freq_factor=4), "rotary_scaling.low_freq_factor"),
    (["model.experts=0"], "model.experts"),
    (["model.expert_groups=3"], "model.expert_groups"),
    (["model.experts_per_token=5"], "model.experts_per_token"),
    (["model.experts_per_token=3"], "model.expert_groups_per_token"),
    ([f"schedule.stages=[{BD}, {AR}]"], "autoregressive stages first"),
    (["schedule.stages=[{name: a, block_size: '4', tokens: 4096, learning_rate: rewarm}]"], "rewarm_tokens"),
    (["diffusion.mask_rate_min=0.6", "diffusion.mask_rate_max=0.5"], "diffusion.mask_rate_min"),
    (["diffusion.mask_rate_min=0"], "diffusion.mask_rate_min"),
    (["diffusion.antithetic=true"], "diffusion.t_per"),
    (
        [
            "schedule.stages=[{name: a, block_size: '4', tokens: 65536, objective: editing}]",
            "diffusion.editing.words=vocabulary",
        ],
        "diffusion.editing.vocabulary=0: set it to the number of the tokenizer's tokens",
    ),
    (["diffusion.complementary=true"], "diffusion.mask_rate_max"),
    (
        ["diffusion.complementary=true", "diffusion.mask_rate_max=0.9", "layout.global_batch=7"],
        r"schedule.stages\[0\] reads each sequence in 2 samples in a row",
    ),
    (["diffusion.embedding_noise.fade_tokens=0"], "diffusion.embedding_noise.fade_tokens"),
    (["optimizer.min_lr=1.0"], "optimizer.min_lr"),
    (["optimizer.warmup_tokens=12288"], "optimizer.warmup_tokens"),
    (["data.weights=[1,1]"], "data.weights has 2 entries and data.path 1"),
    (["checkpoint.keep_best=1"], "checkpoint.best_metric=nll_block32"),
    (["checkpoint.keep_best=1", "evaluation.block_sizes=['4']"], "choose from nll_block4"),
    (["model.expert_hidden_size=0"], "model.expert_hidden_size is 0"),
    (["model.ffn_hidden_size=0"], "model.ffn_hidden_size is 0"),
    (["evaluation.block_sizes=['4', '7']"], r"evaluation.block_sizes\[1\]"),
    *(
        ([f"schedule.stages=[{{name: a, block_size: '4', tokens: 65536, {own}}}]", *more], sentence)
        for own, sentence, *more in [
            ("sequence_length: 66", r"schedule.stages\[0\].block_size is 4, which does not divide"),
            ("sequence_length: 68", r"schedule.stages\[0\].sequence_length=68", "layout.cp=8"),
            ("sequence_length: 68", r"evaluation.block_sizes\[0\]", "evaluation.block_sizes=['8']"),
            ("sequence_length: 16", "data.pad_to=32 is more than the 16", "data.pad_to=32"),
            (
                "global_batch: 3",
                r"schedule.stages\[0\].global_batch=3 is not a multiple",
                "layout.processes=2",
            ),
            ("weights: [1, 2]", r"schedule.stages\[0\].weights has 2 entries and data.path 1"),
            (
                "path: [a, b], weights: [1]",
                r"weights has 1 entries and schedule.stages\[0\].path 2",
            ),
            ("lr: 1e-9", r"at most schedule.stages\[0\].lr=1e-09", "optimizer.min_lr=1e-8"),
            ("mask_rate_max: 0.0005", r"schedule.stages\[0\].mask_rate_min=0.001 must not be above"),
            ("rotary_scaling: {type: yarn, factor: 4}", "original_positions"),
        ]
    ),
    (
        ["evaluation.planted_share=0.1", "diffusion.editing.words=vocabulary"],
        "diffusion.editing.vocabulary=0: set it to the number of the tokenizer's tokens",
    ),
]


@pytest.mark.parametrize(
    ("overrides", "setting"), BROKEN, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_what_cannot_work_is_refused_and_the_setting_named(overrides, setting):
    with pytest.raises(BadInput, match=setting) as caught:
        rules.check(compose(["experiment=parity", *overrides]))
    assert str(caught.value).endswith(".") and "\n" not in str(caught.value)


SOUND = [
    ["diffusion.complementary=true", "diffusion.mask_rate_max=0.9", "layout.micro_batch=1"],
    ["diffusion.complementary=true", "diffusion.weight=flat"],
    ["diffusion.mask_rate_min=0", "diffusion.weight=flat"],
    ["diffusion.mask_rate_min=1", "diffusion.mask_rate_max=1"],  # always masked
    [f"schedule.stages=[{AR}, {BD}]"],
    ["model.dense_layers=4", "model.experts=0", "model.experts_per_token=0"],
    ["evaluation.block_sizes=['1', full]"],
    ["checkpoint.keep_best=1", "evaluation.block_sizes=['32']"],
    ["model.dense_layers=0", "model.ffn_hidden_size=0"],
    scaled(type="linear", factor=2),
    scaled(type="yarn", factor=2, original_positions=64),
    scaled(type="llama3", factor=2, original_positions=64),
]


@pytest.mark.parametrize("overrides", SOUND, ids=" ".join)
def test_what_can_work_is_let_through(overrides):
    rules.check(compose(["experiment=parity", *overrides]))
