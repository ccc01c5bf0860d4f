"""Copies in the memory of nodes and their peers: four ranks are two nodes, each with a folder of its own."""

import contextlib
import io
import os
import shutil
import signal
from pathlib import Path

import pytest

from llada_megatron.runtime.launch import WorkerDied
from tests.distributed import run_ranks
from tests.training.runs import (
    STEPS,
    assert_equal_within_rounding,
    checkpoint,
    comparable,
    configure,
    records,
    train,
    train_rank,
)

pytestmark = pytest.mark.slow
NODES = ["layout.processes=4", "layout.tp=2"]
REMEMBERED, DIES_IN = 4, 5


def settings(folder: Path, *overrides: str) -> list[str]:
    return [
        "checkpoint.at_stage_end=false",
        "checkpoint.every_steps=3",
        "checkpoint.memory_every_steps=2",
        f"checkpoint.memory_dir={folder / 'memory'}",
        *overrides,
    ]


def as_nodes(configs, ranks_of_a_node: int):
    """The same on nodes of so many ranks: a node is what has a name of its own."""
    os.environ["SLURMD_NODENAME"] = f"node{int(os.environ['RANK']) // ranks_of_a_node}"
    said = io.StringIO()  # pytest sees only what the ranks' parent wrote when it began
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        outcomes = train_rank(configs)
    return outcomes, said.getvalue()


def dying(configs, ranks_of_a_node: int):
    """The same, killed where a step begins, which is when a node is lost; files travel in several pieces."""
    from llada_megatron.checkpoint import memory
    from llada_megatron.training import loop

    memory.CHUNK_BYTES = 100_000
    learn = loop._Run._learn

    def learn_or_die(self, step, stage):
        if step == DIES_IN:
            os.kill(os.getpid(), signal.SIGKILL)
        learn(self, step, stage)

    loop._Run._learn = learn_or_die
    return as_nodes(configs, ranks_of_a_node)


def lives(config, *, ranks_of_a_node: int = 2, steps: int = STEPS) -> str:
    """Train to the end; what the first rank said."""
    ranks = run_ranks(as_nodes, [config], ranks_of_a_node, processes=config.layout.processes)
    assert [outcomes for outcomes, _ in ranks] == [[(steps, 0, True)]] * config.layout.processes
    return ranks[0][1]


@pytest.fixture(scope="module")
def straight(corpus, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("straight")
    assert train(configure(corpus, run, *NODES, "checkpoint.at_stage_end=false")) == [(STEPS, 0, True)]
    return run


@pytest.fixture(scope="module")
def killed(corpus, tmp_path_factory) -> Path:
    """A run that died in its sixth step: step 3 is on the disk, step 4 in the memory of two nodes."""
    folder = tmp_path_factory.mktemp("killed")
    config = configure(corpus, folder / "run", *NODES, *settings(folder))
    with pytest.raises(WorkerDied):
        run_ranks(dying, [config], 2, processes=4)
    return folder


@pytest.fixture
def mine(killed, tmp_path) -> Path:
    """The same folder, to be changed."""
    shutil.copytree(killed, tmp_path, dirs_exist_ok=True)
    return tmp_path


def content(path: Path) -> dict[str, bytes]:
    """Of every file of tensors."""
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*.distcp")}


def copies(folder: Path) -> list[Path]:
    return sorted((folder / "memory").glob("*/*/step_*"))


def steps_of(name: str, folder: Path) -> list[int]:
    return [event["step"] for event in records(folder / "run", "events") if event["event"] == name]


def recalled(folder: Path) -> list[int]:
    """What starts brought back, and found good when they loaded it."""
    assert not list((folder / "run" / "checkpoints").glob("damaged_*"))
    return steps_of("recalled", folder)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_each_node_keeps_its_own_files_and_its_peers_of_the_newest_copy_alone(killed):
    assert [path.name for path in copies(killed)] == [f"step_{REMEMBERED:08d}"] * 2
    assert [path.parts[-3] for path in copies(killed)] == ["node0", "node1"]
    one, other = map(content, copies(killed))
    assert one == other  # of two nodes each is the other's peer
    assert {f"shards/__{rank}_0.distcp" for rank in range(4)} <= one.keys()
    assert [path.name for path in (killed / "run" / "checkpoints").iterdir()] == ["step_00000003"]
    assert steps_of("remembered", killed) == [2, 4]


def test_a_run_that_lost_a_node_goes_on_from_the_peers_copy_bit_for_bit(corpus, mine, straight):
    shutil.rmtree(mine / "memory" / "node0")
    lives(configure(corpus, mine / "run", *NODES, *settings(mine)))
    assert recalled(mine) == [REMEMBERED]
    assert comparable(mine / "run") == comparable(straight)
    assert content(checkpoint(mine / "run", STEPS)) == content(checkpoint(straight, STEPS))
    assert not copies(mine)  # the disk has what is newer


@pytest.mark.full
def test_without_any_copy_it_goes_on_from_the_disk_and_says_so(corpus, mine, straight):
    shutil.rmtree(mine / "memory")
    said = lives(configure(corpus, mine / "run", *NODES, *settings(mine)))
    assert "no copy in memory of step 4 is left: the run goes on from step 3" in said
    assert recalled(mine) == []
    assert comparable(mine / "run") == comparable(straight)


def test_a_damaged_file_comes_from_the_other_node_that_has_it(corpus, mine, straight):
    flip(copies(mine)[0] / "shards" / "__0_0.distcp")
    flip(copies(mine)[1] / "optimizer" / "__0_0.distcp")
    (copies(mine)[1] / "optimizer" / "__3_0.distcp").unlink()
    lives(configure(corpus, mine / "run", *NODES, *settings(mine)))
    assert recalled(mine) == [REMEMBERED]
    assert comparable(mine / "run") == comparable(straight)


@pytest.mark.full
def test_a_copy_of_which_a_file_is_damaged_everywhere_is_passed_over(corpus, mine, straight):
    for path in copies(mine):
        flip(path / "shards" / "__2_0.distcp")
    said = lives(configure(corpus, mine / "run", *NODES, *settings(mine)))
    assert "step 4 is passed over: no node has shards/__2_0.distcp" in said
    assert recalled(mine) == []
    assert not list((mine / "run" / "checkpoints").glob(".*"))
    assert comparable(mine / "run") == comparable(straight)


@pytest.mark.full
def test_another_layout_on_one_node_goes_on_from_a_copy(corpus, mine, straight):
    shutil.rmtree(mine / "memory" / "node1")
    lives(configure(corpus, mine / "run", "layout.processes=2", *settings(mine)))
    assert recalled(mine) == [REMEMBERED]
    assert_equal_within_rounding(mine / "run", straight)


@pytest.mark.full
def test_what_another_run_left_is_neither_taken_nor_touched(corpus, mine, straight):
    shutil.rmtree(mine / "run")  # a new run in the same directory is another one
    left = copies(mine)
    lives(configure(corpus, mine / "run", *NODES, *settings(mine)))
    assert recalled(mine) == []
    assert copies(mine) == left
    assert comparable(mine / "run") == comparable(straight)


@pytest.mark.full
def test_a_start_from_a_checkpoint_that_is_named_drops_the_copies_after_it(corpus, mine):
    named = f"run.resume={checkpoint(mine / 'run', 3)}"
    config = configure(corpus, mine / "run", *NODES, *settings(mine, named, "training.steps=3"))
    lives(config, steps=3)
    assert not copies(mine)
    lives(configure(corpus, mine / "run", *NODES, *settings(mine)))
    assert recalled(mine) == []


@pytest.mark.full
def test_a_place_without_room_is_said_once_and_the_run_goes_on(corpus, tmp_path, straight):
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory" / "node1").write_text("in the way, as a full memory would be")
    said = lives(configure(corpus, tmp_path / "run", *NODES, *settings(tmp_path)))
    assert said.count("no copy in memory of step") == 1
    assert steps_of("not_remembered", tmp_path) == [2, 4]
    assert not copies(tmp_path)
    assert comparable(tmp_path / "run") == comparable(straight)


@pytest.mark.full
def test_one_node_has_no_peer_and_goes_on_after_a_crash_all_the_same(corpus, tmp_path, straight):
    config = configure(corpus, tmp_path / "run", *NODES, *settings(tmp_path))
    with pytest.raises(WorkerDied):
        run_ranks(dying, [config], 4, processes=4)
    said = lives(config, ranks_of_a_node=4)
    assert said.count("no peer, since there is one node") == 1
    assert recalled(tmp_path) == [REMEMBERED]
    assert comparable(tmp_path / "run") == comparable(straight)


@pytest.mark.full
def test_a_copy_that_is_written_while_training_goes_on_is_of_its_own_step(corpus, tmp_path, straight):
    every = ["checkpoint.in_background=true", "checkpoint.every_steps=0"]
    config = configure(corpus, tmp_path / "run", *NODES, *settings(tmp_path, *every))
    with pytest.raises(WorkerDied):
        run_ranks(dying, [config], 2, processes=4)
    assert steps_of("remembered", tmp_path)[:1] == [2]  # the next one, unless this one was still under way
    lives(config)
    assert recalled(tmp_path) == steps_of("remembered", tmp_path)[-1:]
    assert comparable(tmp_path / "run") == comparable(straight)
