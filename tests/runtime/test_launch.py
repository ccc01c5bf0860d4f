import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from llada_megatron.config.errors import BadInput, Interrupted, NodeFault
from llada_megatron.runtime import interrupts
from llada_megatron.runtime.launch import WorkerError, already_started, set_environment
from tests.distributed import run_ranks


def join_group() -> None:
    from llada_megatron.config.schema import LayoutConfig
    from llada_megatron.parallel import groups

    groups.join(LayoutConfig(processes=int(os.environ["WORLD_SIZE"])))


def identity(offset):
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    return [int(os.environ[name]) + offset for name in names], os.getpid()


def test_every_rank_gets_its_place_and_results_come_in_rank_order():
    results = run_ranks(identity, 10, processes=3)
    assert [places for places, _ in results] == [[10 + rank, 10 + rank, 13] for rank in range(3)]
    assert len({os.getpid(), *(pid for _, pid in results)}) == 4


def imports_of_an_optimizer():
    import torch

    before = set(sys.modules)
    torch.optim.SGD([torch.zeros(1, requires_grad=True)])
    return sorted(sys.modules.keys() - before)


def test_what_ranks_need_is_imported_once_by_their_parent_and_frozen():
    assert run_ranks(imports_of_an_optimizer) == [[]]
    assert run_ranks(gc.get_freeze_count)[0] > 100_000


@pytest.mark.parametrize("said", ({}, {"OMP_WAIT_POLICY": "active"}, {"GOMP_SPINCOUNT": "7"}))
def test_threads_of_ranks_spin_briefly_unless_the_user_says_how_they_wait(said):
    light = (
        "llada_megatron.runtime.launch"  # in a process of its own: the ranks' parent keeps its environment
    )
    code = f"import os; from {light} import launch\n"
    code += f"print(launch(os.getenv, 'GOMP_SPINCOUNT', processes=1, preload='{light}')[0])"
    others = {
        name: text for name, text in os.environ.items() if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    }
    found = subprocess.run([sys.executable, "-c", code], env=others | said, capture_output=True, text=True)
    expected = said.get("GOMP_SPINCOUNT", "None" if said else "10000")
    assert found.stdout.strip() == expected, found.stderr


def raise_in_rank_one(error):
    join_group()
    if os.environ["RANK"] == "1":
        raise error
    import torch.distributed as dist

    dist.barrier()  # fails or waits for ever: either way rank 1 is to blame


REFUSALS = [
    BadInput("optimizer.lr is wrong."),
    NodeFault("hot", ["n1"]),
    FileNotFoundError(2, "gone", "file"),
]


@pytest.mark.parametrize("error", REFUSALS)
def test_a_refusal_of_a_rank_arrives_as_it_was_raised(error):
    with pytest.raises(type(error)) as caught:
        run_ranks(raise_in_rank_one, error, processes=2)
    assert str(caught.value) == str(error) and caught.value.args == error.args
    assert not multiprocessing.active_children()


def test_a_bug_in_a_rank_arrives_with_its_rank_and_traceback():
    with pytest.raises(WorkerError, match=r"process 1 failed:\n(.|\n)*in raise_in_rank_one\n(.|\n)*KeyError"):
        run_ranks(raise_in_rank_one, KeyError("x"), processes=2)
    assert not multiprocessing.active_children()


def break_others_then_raise():
    join_group()
    import torch.distributed as dist

    if os.environ["RANK"] == "1":
        dist.destroy_process_group()
        time.sleep(0.3)  # rank 0 reports its broken collective first
        raise BadInput("the cause")
    dist.barrier()


def test_the_cause_is_raised_although_another_rank_reports_its_consequence_first():
    with pytest.raises(BadInput, match="the cause"):
        run_ranks(break_others_then_raise, processes=2)


def die_in_rank_one():
    join_group()
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    import torch.distributed as dist

    dist.barrier()


@pytest.mark.parametrize("attempt", range(3))
def test_a_rank_that_dies_ends_the_launch_and_is_named(attempt):
    with pytest.raises(WorkerError, match="process 1 was killed by SIGKILL"):
        run_ranks(die_in_rank_one, processes=2)
    assert not multiprocessing.active_children()


def wait_for(number, folder):
    received = []
    signal.signal(number, lambda *_: received.append(number))
    (folder / os.environ["RANK"]).touch()
    deadline = time.monotonic() + 60
    while not received and time.monotonic() < deadline:
        time.sleep(0.02)
    return received


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_signals_reach_every_rank_and_the_handlers_come_back(number, tmp_path):
    def signal_when_both_wait():
        while len(list(tmp_path.iterdir())) < 2:
            time.sleep(0.02)
        os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    threading.Thread(target=signal_when_both_wait, daemon=True).start()
    assert run_ranks(wait_for, number, tmp_path, processes=2) == [[number], [number]]
    assert signal.getsignal(number) is before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_verb_is_interrupted_although_its_ranks_end_in_order(number, tmp_path):
    def signal_when_it_waits():
        while not (tmp_path / "0").exists():
            time.sleep(0.02)
        os.kill(os.getpid(), number)

    before = interrupts.handle(interrupts.interrupt)
    try:
        threading.Thread(target=signal_when_it_waits, daemon=True).start()
        with pytest.raises(Interrupted) as heard:
            run_ranks(wait_for, number, tmp_path)
        assert heard.value.args == (number,) and signal.getsignal(number) is interrupts.interrupt
    finally:
        interrupts.give_back(before)


def not_picklable():
    return lambda: None


def test_a_result_that_cannot_travel_is_an_error_and_no_hang():
    with pytest.raises(WorkerError, match="pickle"):
        run_ranks(not_picklable)


def test_under_slurm_the_variables_of_torch_are_adopted(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.setenv(name, "0")  # so that monkeypatch takes them back
        monkeypatch.delenv(name)
    for name, value in {"PROCID": 3, "LOCALID": 1, "STEP_NUM_TASKS": 8}.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    assert already_started()
    assert [os.environ[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")] == ["3", "1", "8"]


def test_a_slurm_allocation_with_one_task_starts_nothing(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    assert not already_started()


def test_what_torch_reads_in_ranks_is_set_unless_the_user_has(monkeypatch, tmp_path):
    for name in (
        *("PYTORCH_ALLOC_CONF", "NCCL_GRAPH_REGISTER"),
        *("TORCH_FR_BUFFER_SIZE", "TORCH_FR_DUMP_TEMP_FILE"),
    ):
        monkeypatch.setenv(name, "")  # put back afterwards
        monkeypatch.delenv(name)
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:64")
    monkeypatch.setenv("TORCH_NCCL_DUMP_ON_TIMEOUT", "0")
    monkeypatch.chdir(tmp_path)
    set_environment("run/stacks/nccl_rank_")
    assert not {"PYTORCH_ALLOC_CONF", "NCCL_GRAPH_REGISTER"} & os.environ.keys()
    assert os.environ["TORCH_NCCL_DUMP_ON_TIMEOUT"] == "0"
    assert os.environ["TORCH_FR_DUMP_TEMP_FILE"] == f"{tmp_path}/run/stacks/nccl_rank_"
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF")
    set_environment("other")
    assert os.environ["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    assert os.environ["NCCL_GRAPH_REGISTER"] == "0"
    assert os.environ["TORCH_FR_DUMP_TEMP_FILE"] == f"{tmp_path}/run/stacks/nccl_rank_"
