"""Bytes and calls of messages against a dry run that recorded every collective."""

from collections import Counter
from dataclasses import replace

from llada_megatron.config.schema import Dispatcher, Recompute
from llada_megatron.plan.activations import recomputed_modules
from llada_megatron.plan.traffic import Message, boundary_message, layer_messages, step_messages
from tests.plan.flash import LAYOUT, balanced_shape, held_by, model_of

SHAPE = balanced_shape(tp=2, cp=2, rows=8192)
LAYERS, MICRO_BATCHES = 8, 8


def summed(messages: list[Message], times: int = 1, recomputed: frozenset[str] = frozenset()):
    """Bytes and calls by group and operation."""
    payload, calls = Counter(), Counter()
    for message in messages:
        name = message.group, message.operation
        calls[name] += times * message.calls(recomputed)
        payload[name] += times * message.calls(recomputed) * message.payload
    return payload, calls


def moe_layer(**changes: object) -> list[Message]:
    return layer_messages(model_of("flash"), SHAPE, replace(LAYOUT, **changes), moe=True, b=2)


def test_a_stage_of_moe_layers_sends_what_the_dry_run_recorded() -> None:
    payload, calls = summed(moe_layer(), LAYERS * MICRO_BATCHES)
    assert calls["ep", "all_to_all"] == 384 and round(payload["ep", "all_to_all"] / 1e9, 2) == 34.37
    assert calls["tp", "all_gather"] == 384 and round(payload["tp", "all_gather"] / 1e9, 2) == 12.88
    assert calls["tp", "reduce_scatter"] == 256 and round(payload["tp", "reduce_scatter"] / 1e9, 2) == 8.59
    assert (
        round(payload["cp", "all_gather"] / 1e9, 3)
        == round(payload["cp", "reduce_scatter"] / 1e9, 3)
        == 0.537
    )


def test_neighbouring_stages_exchange_what_the_dry_run_recorded() -> None:
    payload, _ = summed([boundary_message(model_of("flash"), SHAPE, b=2)] * 2, MICRO_BATCHES)
    assert round(payload["pp", "send"] / 1e9, 3) == 0.268


def test_gradients_and_weights_of_a_step_are_those_of_the_dry_run() -> None:
    overlapped = replace(LAYOUT, overlap_grad_reduce=True, overlap_param_gather=True)
    messages = step_messages(held_by(1), model_of("flash"), overlapped, b=2, holds_table=False)
    payload, _ = summed(messages)
    rounded = {name: round(size / 1e9, 3) for name, size in payload.items()}
    assert rounded == {
        ("dp", "reduce_scatter"): 0.839,
        ("dp", "all_gather"): 0.42,
        ("expert dp", "reduce_scatter"): 3.221,
        ("expert dp", "all_gather"): 1.611,
        ("tp", "all_reduce"): 0.034,
        ("tp*dp", "all_reduce"): 0.0,
    }


def test_the_optimizers_of_experts_and_of_the_rest_each_gather_all_weights_unless_gathers_overlap() -> None:
    overlapped = replace(LAYOUT, overlap_grad_reduce=True, overlap_param_gather=True)

    def gathered(layout) -> float:
        messages = step_messages(held_by(1), model_of("flash"), layout, b=2, holds_table=False)
        payload, _ = summed(messages)
        return payload["dp", "all_gather"] + payload["expert dp", "all_gather"]

    assert gathered(LAYOUT) == 2 * gathered(overlapped)


def test_recompute_repeats_the_forward_messages_of_its_modules_alone() -> None:
    plain, _ = summed(moe_layer())
    for modules, repeated in ((["moe"], {"ep", "tp"}), (["core_attn"], {"cp"}), (["shared_experts"], {"tp"})):
        layout = replace(LAYOUT, recompute=Recompute.selective, recompute_modules=modules)
        again, _ = summed(moe_layer(), recomputed=recomputed_modules(layout))
        assert {
            group for group, _ in plain if any(again[group, op] > plain[group, op] for _, op in plain)
        } - {"ep*etp"} == repeated  # counts of tokens, with the experts'
    full = recomputed_modules(replace(LAYOUT, recompute=Recompute.full))
    assert summed(moe_layer(), recomputed=full)[0]["ep", "all_to_all"] == plain["ep", "all_to_all"] * 1.5


def test_a_tied_head_on_another_stage_sums_its_gradient() -> None:
    model = replace(model_of("flash"), tied_head=True)
    messages = step_messages(held_by(0), model, LAYOUT, b=2, holds_table=True)
    assert [message.payload for message in messages if message.group == "embedding"] == [
        4 * 157184 // 2 * 4096
    ]


def test_without_parallelism_nothing_is_sent() -> None:
    alone = replace(LAYOUT, tp=1, cp=1, ep=1, etp=1)
    assert layer_messages(model_of("flash"), SHAPE, alone, moe=True, b=2) == []


def test_gathering_dispatch_sends_every_token_to_all() -> None:
    payload, calls = summed(moe_layer(dispatcher=Dispatcher.allgather))
    assert ("ep", "all_to_all") not in payload
    tokens = 2048 * 32
    there_and_summed = 2 * tokens * 4096 + 4 * tokens * 4096
    assert payload["ep*etp", "all_gather"] == there_and_summed + 5 * tokens * 256
    assert payload["ep*etp", "reduce_scatter"] == there_and_summed + 4 * tokens * 256
    assert calls["ep*etp", "reduce_scatter"] == 3


def test_split_experts_gather_their_copies() -> None:
    payload, _ = summed(moe_layer(etp=2))
    copies = SHAPE.routed * (2 * 4096 + 4 + 4 * 4096)  # bf16 there with probabilities, and fp32 back
    assert payload["etp", "all_gather"] == payload["etp", "reduce_scatter"] == copies
