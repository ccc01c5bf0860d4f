"""Golden traces of decoding: samplers are replayed, each quantity can fail, what is missing is asked for."""

import json
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from llada_megatron.config.errors import BadInput
from llada_megatron.config.schema import LayoutConfig
from llada_megatron.parallel import groups
from llada_megatron.verify.golden import check
from llada_megatron.verify.golden_cases import CaseResult
from llada_megatron.verify.golden_decode import GROUPS, check_case
from llada_megatron.verify.golden_set import Stored, load

DECODE = Path(__file__).parents[1] / "golden_decode"
CASES = json.loads((DECODE / "cases.json").read_text())["cases"]
HF, EDIT, DINFER, SGLANG, FULL, DUAL = (
    "hf_steps3_b8_t95",
    "edit_b8_t95_e50_post0",
    "dinfer_thr_b8_t50_p19",
    "sgl_low_b8_t50_p24",
    "fastdllm_factor_nocache_b16_f2",
    "fastdllm_dual_b16_t70",
)


@pytest.fixture(scope="module", autouse=True)
def one_process():
    groups.initialize(LayoutConfig())
    try:
        yield
    finally:
        groups.destroy()


@pytest.fixture(scope="module")
def golden(one_process):
    return load(DECODE, DECODE.parent / "golden", 500)


def checked(golden, name, *, case=lambda case: None, tensors=lambda tensors: None):
    """The result of a case of the set, altered."""
    described = deepcopy(CASES[name])
    case(described)
    stored = {key: tensor.clone() for key, tensor in golden.stored.items()}
    tensors({key.removeprefix(f"{name}."): tensor for key, tensor in stored.items() if key.startswith(name)})
    return check_case(replace(golden, stored=Stored(stored, set())), name, described)


@pytest.mark.parametrize("name", sorted(CASES))
def test_the_public_sampler_is_replayed_forward_by_forward(golden, name):
    result = checked(golden, name)
    assert isinstance(result, CaseResult) and result.passed, result
    assert set(result.differences) == {"forwards", "tokens", "confidence"}


def test_what_is_not_served_is_listed_and_not_counted(one_process, tmp_path):
    names = {HF, DUAL}
    described = json.loads((DECODE / "cases.json").read_text())
    described["cases"] = {name: CASES[name] for name in sorted(names)}
    described["cases"][DUAL] |= {"cache": "other"}
    (tmp_path / "cases.json").write_text(json.dumps(described))
    tensors = load_file(DECODE / "cases.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if name.partition(".")[0] in names}
    save_file(kept, tmp_path / "cases.safetensors")
    report = check(tmp_path, DECODE.parent / "golden")
    assert [case.name for case in report.cases] == [HF] and report.passed
    assert report.not_served == ["fastdllm_dual_b16_t70 (cache other)"]
    assert not report.derived and not report.unknown


def put(name, index, value):
    """A change of one entry of a stored tensor."""

    def change(tensors):
        tensors[name][index] = value

    return change


def cut(name, rows):
    """A stored tensor without its last rows."""
    return lambda tensors: tensors[name].resize_(len(tensors[name]) - rows, *tensors[name].shape[1:])


@pytest.mark.parametrize(
    ("name", "change", "fails"),
    [
        (HF, {"case": {"threshold": 0.5}}, {"forwards", "tokens"}),
        (HF, {"case": {"steps": 8}}, {"forwards", "tokens"}),
        (HF, {"case": {"gen_length": 31}}, {"tokens"}),
        (HF, {"tensors": put("output", 3, 7)}, {"tokens"}),
        (HF, {"tensors": cut("output", 1)}, {"tokens"}),
        (HF, {"tensors": put("canvas", 20, 7)}, {"tokens"}),
        (HF, {"tensors": put("acc", (2, 1), 12)}, {"tokens"}),
        (HF, {"tensors": put("top1", (1, 5), 12)}, {"tokens"}),
        (HF, {"tensors": put("block_before", (1, 5), 12)}, {"tokens"}),
        (HF, {"tensors": lambda t: t["conf"][t["conf"] >= 0].add_(0)}, set()),
        (HF, {"tensors": lambda t: t["conf"].add_((t["conf"] >= 0) * 2e-4)}, {"confidence"}),
        (HF, {"tensors": lambda t: t["conf"].add_((t["conf"] >= 0) * 5e-5)}, set()),
        (HF, {"tensors": put("fwd", (0, 0), 2)}, {"forwards"}),
        (HF, {"tensors": put("fwd", (3, 4), 0)}, {"forwards"}),
        (EDIT, {"case": {"editing_threshold": 0.9}}, {"forwards", "tokens"}),
        (EDIT, {"case": {"max_post_steps": 1}}, {"forwards", "tokens"}),
        (DINFER, {"case": {"maximum_unroll": 9, "expected_tpf": 1}}, {"forwards", "tokens"}),
        (DINFER, {"case": {"kv_cache": False}}, {"forwards", "tokens"}),
        (SGLANG, {"case": {"algorithm_config": {}}}, {"forwards", "tokens"}),
        (FULL, {"case": {"factor": 1.0}}, {"forwards", "tokens"}),
        (DUAL, {"case": {"cache": "prefix"}}, {"forwards", "tokens"}),
        (DUAL, {"case": {"cache": "nocache"}}, {"forwards", "tokens"}),
    ],
)
def test_each_quantity_fails_where_it_is_another(golden, name, change, fails):
    altered = {
        "case": lambda case: case.update(change.get("case", {})),
        "tensors": change.get("tensors", lambda tensors: None),
    }
    result = checked(golden, name, **altered)
    assert set(result.failed()) - {"confidence"} == fails - {"confidence"}
    assert "tokens" in fails or result.failed() == sorted(fails)


BAD = [
    (HF, {"case": lambda case: case.pop("steps")}, "has no 'steps'"),
    (HF, {"case": lambda case: case.update(steps=2.5)}, "steps of case hf_steps3_b8_t95 is 2.5: give a"),
    (HF, {"case": lambda case: case.update(block_length=0)}, "block_length=0 is out of range"),
    (HF, {"case": lambda case: case.update(threshold=True)}, "is True: give a number"),
    (DINFER, {"case": lambda case: case.update(kv_cache=1)}, "is 1: give true or false"),
    (SGLANG, {"case": lambda case: case.update(algorithm_config=[1])}, "algorithm_config that is no object"),
    (HF, {"tensors": lambda tensors: tensors["fwd"].resize_(3, 4)}, "holds fwd of shape [3, 4]"),
    (HF, {"tensors": lambda tensors: tensors["conf"].resize_(1, 1, 1)}, "holds conf of shape [1, 1, 1]"),
    (HF, {"tensors": lambda tensors: tensors["prompt"].fill_(512)}, "prompt that is not int64 below 512"),
]


@pytest.mark.parametrize(("name", "change", "sentence"), BAD, ids=[sentence for _, _, sentence in BAD])
def test_what_a_case_needs_is_asked_for(golden, name, change, sentence):
    with pytest.raises(BadInput) as refused:
        checked(golden, name, **change)
    assert sentence in str(refused.value) and "\n" not in str(refused.value)


def test_a_tensor_that_is_missing_is_named(golden):
    stored = {key: tensor for key, tensor in golden.stored.items() if key != f"{HF}.fwd"}
    with pytest.raises(BadInput, match=f"holds no {HF}.fwd"):
        check_case(replace(golden, stored=Stored(stored, set())), HF, CASES[HF])


def test_a_setting_of_the_rule_that_nobody_knows_is_not_passed_over(golden):
    result = checked(golden, SGLANG, case=lambda case: case["algorithm_config"].update(top_n=2))
    assert result == f"{SGLANG} (algorithm_config top_n)"


def test_a_cache_that_nobody_knows_is_not_passed_over(golden):
    result = checked(golden, DUAL, case=lambda case: case.update(cache="triple"))
    assert result == f"{DUAL} (cache triple)"


def test_every_served_group_has_a_case_here():
    assert {CASES[name]["group"] for name in CASES} == GROUPS.keys()
