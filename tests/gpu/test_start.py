"""What a start sets on a machine with a CUDA device; skipped elsewhere. `make test-gpu` runs it."""

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.gpu


def llada(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "llada_megatron", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture
def corpus(tmp_path):
    assert llada("data", "python-text", "--output", str(tmp_path)).returncode == 0
    return tmp_path / "python"


def test_torch_s_adamw_in_fused_adam_s_form_steps_alike_on_both_devices():
    import torch

    from llada_megatron.runtime.adamw import FusedAdamW

    made = {}
    for device in ("cpu", "cuda"):
        generator = torch.Generator().manual_seed(0)
        params = [torch.randn(shape, generator=generator).to(device) for shape in ((5, 3), (7,))]
        params = [torch.nn.Parameter(each) for each in params]
        optimizer = FusedAdamW(params, lr=0.01, weight_decay=0.1)
        for _ in range(5):
            for each in params:
                each.grad = torch.randn(each.shape, generator=generator).to(device)
            optimizer.step()
        made[device] = [each.detach().cpu() for each in params]
    for one, other in zip(made["cpu"], made["cuda"], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_a_run_says_what_it_computes_with_and_refuses_portable_attention(corpus, tmp_path):
    common = ["train", "experiment=parity", f"data.path=[{corpus}]", "training.steps=1"]
    done = llada(*common, f"run.dir={tmp_path}/run")
    assert done.returncode == 0, done.stderr
    said = [line.split()[0] for line in done.stdout.splitlines()[:4]]
    assert said == ["layers", "experts", "optimizer", "attention"]
    refused = llada(*common, f"run.dir={tmp_path}/other", "model.attention_backend=portable")
    assert refused.returncode == 2 and "portable does not train on CUDA" in refused.stderr


def test_memory_grows_in_place_and_a_rank_keeps_to_the_cores_beside_its_device(tmp_path):
    import torch

    from llada_megatron.runtime import cores, device, launch

    launch.set_environment(str(tmp_path / "nccl_rank_"))
    look = (
        "import torch; torch.ones(1, device='cuda');print(torch.cuda.memory_snapshot()[0]['is_expandable'])"
    )
    done = subprocess.run([sys.executable, "-c", look], capture_output=True, text=True, env=os.environ)
    assert done.stdout.strip() == "True", done.stderr
    torch.cuda.set_device(0)
    assert device.pci_address().count(":") == 2
    assert set(cores.offered()) <= os.sched_getaffinity(0)


def test_noise_on_the_device_is_that_of_the_hash():
    import torch

    from llada_megatron.model.normal import hashed_rows, noise_rows

    found = noise_rows(3, 64, 128, torch.device("cuda")).cpu()
    torch.testing.assert_close(found, hashed_rows(3, 64, 128, torch.device("cpu")), rtol=1e-6, atol=1e-7)


def test_two_ranks_leave_their_last_messages_in_the_run_s_folder(tmp_path):
    import torch

    if torch.cuda.device_count() < 2:
        pytest.skip("needs two devices")
    script = """
import datetime, os, sys, time
import torch, torch.distributed as dist
rank = int(os.environ["RANK"])
torch.cuda.set_device(rank)
dist.init_process_group("nccl", timeout=datetime.timedelta(seconds=5))
dist.all_reduce(torch.ones(1, device="cuda"))
torch.cuda.synchronize()
if rank:
    time.sleep(60)
dist.all_reduce(torch.ones(1, device="cuda"))
torch.cuda.synchronize()
"""
    (tmp_path / "hang.py").write_text(script)
    environment = {**os.environ, "TORCH_FR_BUFFER_SIZE": "2000", "TORCH_NCCL_DUMP_ON_TIMEOUT": "1"}
    environment["TORCH_FR_DUMP_TEMP_FILE"] = f"{tmp_path}/nccl_rank_"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"{tmp_path}/hang.py"]
    assert subprocess.run(command, env=environment).returncode != 0
    assert (tmp_path / "nccl_rank_0").stat().st_size > 0
