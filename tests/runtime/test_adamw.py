"""torch's AdamW in the place of TransformerEngine's. What patches megatron-core runs in forked ranks."""

import pytest
import torch

from llada_megatron.runtime.adamw import FusedAdamW
from llada_megatron.verify.layouts import write_corpus
from tests.distributed import run_ranks
from tests.training.runs import arrays_in, checkpoint, configure, records


def test_fused_adam_equals_torch_s_adamw():
    def parameters():
        generator = torch.Generator().manual_seed(0)
        return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((5, 3), (7,))]

    settings = dict(lr=0.01, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1)
    ours, theirs = parameters(), parameters()
    fused = FusedAdamW([{"params": ours[:1]}, {"params": ours[1:], "weight_decay": 0.0}], **settings)
    torchs = torch.optim.AdamW(
        [{"params": theirs[:1]}, {"params": theirs[1:], "weight_decay": 0.0}], **settings, fused=True
    )
    generator = torch.Generator().manual_seed(1)
    for step in range(6):
        for one, other in zip(ours, theirs, strict=True):
            one.grad = torch.randn(one.shape, generator=generator)
            other.grad = one.grad.clone()
        for optimizer in (fused, torchs):
            optimizer.param_groups[0]["lr"] = 0.01 / (step + 1)
            optimizer.step()
    assert [group["step"] for group in fused.param_groups] == [6, 6]
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one, other)


def test_fused_adam_refuses_coupled_weight_decay():
    with pytest.raises(ValueError, match="adam_w_mode"):
        FusedAdamW([torch.nn.Parameter(torch.zeros(1))], adam_w_mode=False)


def fall_back():
    """megatron-core as it is where it finds neither TransformerEngine nor Apex."""
    from megatron.core import optimizer
    from megatron.core.optimizer import distrib_optimizer

    optimizer.Adam, distrib_optimizer.Adam = torch.optim.AdamW, torch.optim.Adam
    optimizer.USING_PYTORCH_OPTIMIZER = True
    distrib_optimizer.HAVE_APEX_OR_TE = distrib_optimizer.USING_APEX_OPTIMIZER = False


def whose_adam(is_cuda, has_fused):
    from megatron.core import optimizer

    from llada_megatron.runtime import adamw

    fall_back()
    if has_fused:
        optimizer.Adam, optimizer.USING_PYTORCH_OPTIMIZER = torch.optim.SGD, False
    adamw.device.on_cuda = lambda: is_cuda
    for _ in range(2):
        adamw.install()
    return optimizer.Adam.__name__


@pytest.mark.parametrize(
    ("is_cuda", "has_fused", "name"),
    [(True, False, "FusedAdamW"), (True, True, "SGD"), (False, True, "FusedAdamW")],
)
def test_it_is_taken_on_a_cpu_and_where_megatron_core_would_fall_back_on_cuda(is_cuda, has_fused, name):
    assert run_ranks(whose_adam, is_cuda, has_fused) == [name]


def train_as_on_a_gpu_without_packages(configs):
    from llada_megatron.runtime import adamw
    from llada_megatron.training import loop

    fall_back()
    on_cuda, adamw.device.on_cuda = adamw.device.on_cuda, lambda: True
    adamw.install()
    adamw.device.on_cuda = on_cuda
    return [loop.run(config).step for config in configs]


def test_without_transformer_engine_a_run_trains_saves_and_resumes_bit_for_bit(tmp_path):
    corpus = write_corpus(tmp_path)
    straight = configure(corpus, tmp_path / "straight", "training.steps=3")
    begun = configure(corpus, tmp_path / "resumed", "training.steps=1")
    resumed = configure(corpus, tmp_path / "resumed", "training.steps=3")
    runs = (straight, begun, resumed)
    assert run_ranks(train_as_on_a_gpu_without_packages, runs) == [[3, 1, 3]]
    assert records(tmp_path / "straight")[-1]["loss"] == records(tmp_path / "resumed")[-1]["loss"]
    folders = [checkpoint(tmp_path / name, 3) for name in ("straight", "resumed")]
    [[one, other]] = run_ranks(arrays_in, folders)
    assert one == other and len(one) > 50
