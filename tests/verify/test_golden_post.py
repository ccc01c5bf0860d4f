"""Golden cases of post-training: each quantity can fail, and what a case needs is asked for."""

import json
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from llada_megatron.config.errors import BadInput
from llada_megatron.config.schema import LayoutConfig
from llada_megatron.parallel import groups
from llada_megatron.verify.golden_cases import CaseResult
from llada_megatron.verify.golden_post import check_case
from llada_megatron.verify.golden_set import Golden, Stored, load

POST = Path(__file__).parents[1] / "golden_post"
CASES = json.loads((POST / "cases.json").read_text())["cases"]
CAP, PAIR, SFT, DPO, KTO, LIK, GUIDED, BD3, BOS, SEARCH = (
    "cap_mixed_beta2",
    "pair_cap_lambda2_temp0.5",
    "sft_quantised",
    "dpo_bdlm_seq_t_k2_unshared",
    "kto_beta0.02_zero_D1_U1",
    "lik_a3_b8_wraps",
    "lik_a7_mc8_cfg05",
    "bd3_clip_30_80_resample_b16",
    "bd3_ignore_bos_train_b16",
    "bd3_search",
)
HNET, DLCM, TABLE = "hnet_projected", "dlcm_train", "dlcm_aux_table"
Cases = dict[str, dict[str, Any]]
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def golden() -> Iterator[Golden]:
    groups.initialize(LayoutConfig())
    try:
        yield load(POST, POST.parent / "golden", 500)
    finally:
        groups.destroy()


def checked(
    golden: Golden,
    name: str,
    *,
    cases: Callable[[Cases], object] = lambda cases: None,
    tensors: Callable[[Tensors], object] = lambda tensors: None,
) -> CaseResult | str:
    """The result of a case of the set, altered."""
    described = {name: deepcopy(CASES[name])}
    cases(described)
    stored = {key: tensor.clone() for key, tensor in golden.stored.items()}
    tensors(stored)
    return check_case(replace(golden, stored=Stored(stored, set())), name, described[name])


def through_experts(cases: Cases) -> None:
    """As if the public code had differentiated its routed experts."""
    for case in cases.values():
        norms = case["grad_norms"]
        case["grad_norms"] = {name: norm for name, norm in norms.items() if norm is not None}


def nothing_hidden(tensors: Tensors) -> None:
    tensors["pair.attention_mask"].fill_(1)


def another_label(tensors: Tensors) -> None:
    """A prediction that was right is not."""
    labels, argmax = tensors["cap.labels.mixed"], tensors["cap.argmax"]
    row, column = (labels == argmax).nonzero()[0].tolist()
    labels[row, column] = (labels[row, column] + 1) % 400


def swap_sides(tensors: Tensors) -> None:
    for name in [name for name in tensors if name.endswith("chosen") and name.startswith("dpo")]:
        other = name.removesuffix("chosen") + "rejected"
        tensors[name], tensors[other] = tensors[other], tensors[name]


def weigh(tensors: Tensors) -> None:
    tensors[f"{DPO}.weight_ref_chosen"][0] *= 1.01


def others_masked(tensors: Tensors) -> None:
    tensors[f"{LIK}.mask"] = tensors[f"{LIK}.mask"].flip(-1)


def share_masks(cases: Cases) -> None:
    cases[DPO]["masks_shared_policy_reference"] = True


def set_to(name: str, **values: Any) -> Callable[[Cases], object]:
    return lambda cases: cases[name].update(values)


@pytest.mark.parametrize(
    ("name", "change", "fails"),
    [
        (CAP, {"cases": set_to(CAP, confidence_beta=1.9)}, {"loss", "grad_norms"}),
        (CAP, {"cases": set_to(CAP, confidence_loss=0.878)}, {"loss"}),
        (CAP, {"cases": through_experts}, {"grad_norms"}),
        (CAP, {"tensors": another_label}, {"cross_entropy", "loss", "grad_norms"}),
        (CAP, {"tensors": lambda t: t["cap.argmax"].zero_()}, {"right"}),
        (CAP, {"tensors": lambda t: t["cap.entropy"].add_(0.01)}, {"entropy"}),
        (PAIR, {"cases": set_to(PAIR, temperature=1.0)}, {"loss", "grad_norms"}),
        (PAIR, {"cases": set_to(PAIR, n_correct_rev=15)}, {"right"}),
        (PAIR, {"tensors": nothing_hidden}, {"right", "loss", "grad_norms"}),
        (PAIR, {"tensors": lambda t: t["pair.masked"].zero_()}, {"mask"}),
        (SFT, {"cases": lambda c: c[SFT]["per_sequence"][1].update(loss=21.165)}, {"loss"}),
        (SFT, {"tensors": lambda t: t[f"{SFT}.seq2.per_token_ce"].mul_(1.01)}, {"cross_entropy"}),
        (SFT, {"cases": set_to(SFT, quantised_lengths=[48, 64, 64])}, {"lengths"}),
        (DPO, {"cases": set_to(DPO, beta=0.2)}, {"preference", "preference_norms"}),
        (DPO, {"cases": set_to(DPO, per_pair_loss=[19.38, 7.61])}, {"preference"}),
        (DPO, {"cases": share_masks}, {"cross_entropy", "bound", "preference", "preference_norms"}),
        (DPO, {"tensors": swap_sides}, {"preference", "preference_norms"}),
        (DPO, {"tensors": weigh}, {"bound", "preference"}),
        (KTO, {"cases": set_to(KTO, beta=0.021)}, {"preference", "preference_norms"}),
        (KTO, {"tensors": lambda t: t["kto.B_ref"].add_(0.1)}, {"bound"}),
        (LIK, {"cases": set_to(LIK, log_likelihood=-63.88)}, {"bound"}),
        (LIK, {"tensors": others_masked}, {"cross_entropy", "bound"}),
        (LIK, {"tensors": lambda t: t[f"{LIK}.p_mask"][0].zero_()}, {"mask"}),
        (LIK, {"tensors": lambda t: t[f"{LIK}.per_batch_loss"].mul_(1.1)}, {"bound"}),
        (GUIDED, {"cases": set_to(GUIDED, cfg_scale=0.51)}, {"cross_entropy", "bound"}),
        (BD3, {"cases": set_to(BD3, resample=False)}, {"mask", "cross_entropy", "loss", "grad_norms"}),
        (BD3, {"tensors": lambda t: t[f"{BD3}.t"].add_(1e-5)}, {"rate"}),
        (BD3, {"tensors": lambda t: t[f"{BD3}.nlls"].mul_(1.01)}, {"cross_entropy"}),
        (BOS, {"cases": set_to(BOS, training=False)}, {"loss", "grad_norms"}),
        (SEARCH, {"tensors": lambda t: t[f"{SEARCH}.values"][0].mul_(0.1)}, {"variance", "chosen"}),
        (HNET, {"tensors": lambda t: t[f"{HNET}.concepts"].mul_(1.001)}, {"concepts"}),
        (HNET, {"cases": lambda c: c[HNET]["load_balancing_loss"].update({"4.0": 1.44})}, {"parser"}),
        (DLCM, {"tensors": lambda t: t["dlcm.b_train"][0, 3].bitwise_xor_(1)}, {"boundaries"}),
        (DLCM, {"tensors": lambda t: t["dlcm.w_q"].mul_(-1)}, {"boundary_probability", "parser"}),
        (DLCM, {"tensors": lambda t: t["dlcm.train.z_start"].mul_(1.001)}, {"concept_attention"}),
        (TABLE, {"cases": lambda c: c[TABLE]["rows"][0].__setitem__(0, 2.01)}, {"parser"}),
    ],
)
def test_each_quantity_fails_where_it_is_another(
    golden: Golden, name: str, change: dict[str, Any], fails: set[str]
) -> None:
    result = checked(golden, name, **change)
    assert isinstance(result, CaseResult) and set(result.failed()) == fails


BAD = [
    (CAP, {"tensors": lambda t: t.pop("cap.entropy")}, "holds no cap.entropy"),
    (CAP, {"tensors": lambda t: t["cap.labels.mixed"].fill_(-100)}, "labels of masked tokens that are no"),
    (CAP, {"tensors": lambda t: t["cap.noisy_input_ids"].zero_()}, "neither clean nor the mask"),
    (CAP, {"cases": set_to(CAP, confidence_beta="2")}, "has confidence_beta '2', which is no number"),
    (CAP, {"cases": lambda c: c[CAP].pop("total_loss")}, "has no 'total_loss'"),
    (CAP, {"cases": set_to(CAP, block_size=None)}, "has block_size None"),
    (PAIR, {"tensors": lambda t: t["pair.attention_mask"][0, :3].zero_()}, "hides more than an end"),
    (SFT, {"cases": set_to(SFT, raw_lengths=[37, 48])}, "raw_lengths that is no list of 3 numbers"),
    (SFT, {"cases": set_to(SFT, per_sequence=[1])}, "per_sequence that is no list of objects"),
    (DPO, {"tensors": lambda t: t.pop(f"{DPO}.mask_rejected")}, f"holds no {DPO}.mask_rejected"),
    (DPO, {"tensors": lambda t: t.update({f"{DPO}.margin": torch.zeros(3)})}, "margin of shape [3]"),
    (DPO, {"tensors": lambda t: t.update({"dpo.policy.x": torch.zeros(3)})}, "has no x to put dpo.policy's"),
    (LIK, {"cases": set_to(LIK, log_likelihood="much")}, "log_likelihood or batch_size that cannot be"),
    (LIK, {"cases": set_to(LIK, batch_size=3)}, "log_likelihood or batch_size that cannot be"),
    (LIK, {"tensors": lambda t: t[f"{LIK}.mask"].zero_()}, "mask that is not of draws and tokens"),
    (BD3, {"cases": set_to(BD3, block_size=9)}, "x0 and xt are no whole blocks"),
    (BD3, {"tensors": lambda t: t[f"{BD3}.mask_draws"].fill_(1)}, "too few rounds of mask_draws"),
    (SEARCH, {"cases": set_to(SEARCH, intervals=[])}, "does not say intervals"),
]


@pytest.mark.parametrize(("name", "change", "sentence"), BAD, ids=[sentence for _, _, sentence in BAD])
def test_what_a_case_needs_is_asked_for(
    golden: Golden, name: str, change: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(BadInput) as refused:
        checked(replace(golden, _altered={}) if "to put" in sentence else golden, name, **change)
    assert sentence in str(refused.value) and "\n" not in str(refused.value)
