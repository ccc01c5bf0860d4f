"""What a save writes where, what a load reads, and that any layout loads what any other saved."""

import gc
import shutil
import zlib
from pathlib import Path

import pytest
import torch

from llada_megatron.checkpoint.shards import Part, Stored, require_whole
from llada_megatron.config.compose import compose
from llada_megatron.config.errors import BadInput
from llada_megatron.config.schema import Config
from llada_megatron.record.manifest import Checkpoint, Manifest
from tests.distributed import run_ranks

STEP = 7
# One axis each, and two that deal the experts' optimizer out otherwise than the rest.
LAYOUTS = {
    "one": [],
    "dp2": ["layout.processes=2"],
    "dp4": ["layout.processes=4"],
    "tp2 etp2": ["layout.tp=2", "layout.etp=2", "layout.processes=4"],
    "tp2 ep2": ["layout.tp=2", "layout.ep=2", "layout.processes=4"],
    "pp2 vpp2": ["layout.pp=2", "layout.vpp=2", "layout.processes=4"],
    "cp2 ep2": ["layout.cp=2", "layout.ep=2", "layout.processes=4"],
}


def configure(layout: str, *overrides: str) -> Config:
    return compose(["experiment=parity", *LAYOUTS[layout], *overrides])


def built(config: Config):
    from llada_megatron.model.provider import build_model
    from llada_megatron.parallel import groups
    from llada_megatron.training.optimizer import build_optimizer, wrap

    groups.initialize(config.layout)
    model = wrap(config, build_model(config))
    return model, build_optimizer(config, model)


def expected(part, dtype):
    """A number for each element of a moment, by its name and its place in the whole tensor."""
    axes = [
        torch.arange(at, at + count, dtype=torch.float64) * stride
        for at, count, stride in zip(part.offset, part.size, strides(part.shape), strict=True)
    ]
    index = sum(torch.meshgrid(*axes, indexing="ij")) if len(axes) > 1 else axes[0]
    return (torch.cos(index + zlib.crc32(part.name.encode()) % 1000)).to(dtype)


def strides(shape):
    return [int(torch.tensor(shape[axis + 1 :]).prod()) for axis in range(len(shape))]


def moments_of(model, optimizer):
    from llada_megatron.checkpoint import moments, store

    held = list(moments.held_here(store.sharded_model(model), optimizer))
    return [each for each in held if ".exp_avg" in each.part.name], held


def weights_of(model):
    named = [
        (index, name, value)
        for index, chunk in enumerate(model)
        for name, value in chunk.state_dict().items()
    ]
    return [((index, name), value) for index, name, value in named if isinstance(value, torch.Tensor)]


def bytes_done(kind: str) -> int:
    """By this process's read or write calls, on whatever file."""
    with open("/proc/self/io") as counters:
        return int(dict(line.split(": ") for line in counters.read().splitlines())[kind])


def save(config: Config, folder: Path, in_background: bool = False) -> tuple[int, bool]:
    """Save this rank's part; the bytes it wrote, and whether the writer could collect garbage."""
    from llada_megatron.checkpoint import shards
    from llada_megatron.checkpoint.store import Saver

    model, optimizer = built(config)
    for each in moments_of(model, optimizer)[0]:
        each.values.copy_(expected(each.part, each.values.dtype))
    for group in optimizer.param_groups:
        group["step"] = STEP
    collects, append = [], shards.HashedFile.append

    def watched(self, part, values):
        collects.append(gc.isenabled())
        append(self, part, values)

    shards.HashedFile.append = watched
    saver = Saver(threads=config.checkpoint.writer_threads, in_background=in_background)
    for _ in range(2):  # the second deals out as the first did
        shutil.rmtree(folder, ignore_errors=True)
        before = bytes_done("wchar")
        saving = saver.save(folder, Manifest(config={}), model, optimizer, carried_along={})
        if in_background:
            for each in moments_of(model, optimizer)[0]:
                each.values.fill_(torch.nan)
        saving.publish()
        if in_background:
            break
    return bytes_done("wchar") - before, all(collects) and gc.isenabled()


def load(config: Config, folder: Path) -> int:
    """Load and check this rank's part; the bytes it read."""
    from llada_megatron.checkpoint import store

    model, optimizer = built(config)
    changed, held = moments_of(model, optimizer)
    weights = {name: value.clone() for name, value in weights_of(model)}
    masters = [each.values.clone() for each in held if each not in changed]
    for each in held:
        each.values.fill_(torch.nan)
    for _, value in weights_of(model):
        value.zero_()
    before = bytes_done("rchar")
    store.load(folder, model, optimizer)
    read = bytes_done("rchar") - before
    for name, value in weights_of(model):
        assert value.equal(weights[name]), name
    for each, was in zip((each for each in held if each not in changed), masters, strict=True):
        assert each.values.equal(was)
    for each in changed:
        assert each.values.equal(expected(each.part, each.values.dtype)), each.part
    assert {group["step"] for group in optimizer.param_groups} == {STEP}
    return read


def processes(layout: str) -> int:
    return configure(layout).layout.processes


def bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*.distcp"))


RING = list(zip(LAYOUTS, [*list(LAYOUTS)[1:], "one"], strict=True))
PAIRS = [("dp2", "one"), *RING, *((b, a) for a, b in RING[1:])]
IN_CI = RING[4]  # from tensor and expert to pipeline parallelism


@pytest.mark.parametrize(
    ("saved_by", "loaded_by"),
    [
        PAIRS[0],
        *(
            pytest.param(*pair, marks=pytest.mark.slow if pair == IN_CI else pytest.mark.full)
            for pair in PAIRS[1:]
        ),
    ],
)
def test_any_layout_loads_bit_for_bit_what_any_other_saved(tmp_path, saved_by, loaded_by):
    folder = tmp_path / "saved"
    run_ranks(save, configure(saved_by), folder, processes=processes(saved_by))
    run_ranks(load, configure(loaded_by), folder, processes=processes(loaded_by))


def test_every_rank_writes_its_share_and_reads_it_once(tmp_path):
    folder, config = tmp_path / "saved", configure("dp4")
    written = [count for count, _ in run_ranks(save, config, folder, processes=4)]
    total = bytes_in(folder)
    assert total <= sum(written) < 1.2 * total  # the rest is the index and the manifest
    assert max(written) < 1.5 * total / 4
    read = run_ranks(load, config, folder, processes=4)
    assert sum(read) < 1.5 * total  # the rest is the index, and what surrounds small tensors


def test_a_background_save_copies_first_and_leaves_garbage_collection_on(tmp_path):
    folder, config = tmp_path / "saved", configure("dp2")
    for _, collects in run_ranks(save, config, folder, True, processes=2):
        assert collects
    run_ranks(load, config, folder, processes=2)


def files_of(layout: str, folder: Path, *overrides: str) -> list[str]:
    run_ranks(save_in_small_files, configure(layout, *overrides), folder, processes=processes(layout))
    return sorted(path.name for path in (folder / "optimizer").glob("*.distcp"))


def save_in_small_files(config: Config, folder: Path) -> None:
    from llada_megatron.checkpoint import shards

    shards.OWN_FILE_BYTES = 1000
    save(config, folder)


def test_a_rank_writes_as_many_files_at_a_time_as_it_may(tmp_path):
    assert files_of("one", tmp_path / "one", "checkpoint.writer_threads=1") == ["__0_0.distcp"]
    assert files_of("one", tmp_path / "three", "checkpoint.writer_threads=3") == [
        f"__0_{index}.distcp" for index in range(3)
    ]
    run_ranks(load, configure("one"), tmp_path / "three")


def weights_without_training_state(config: Config, folder: Path) -> tuple[bool, str]:
    from llada_megatron.checkpoint import store
    from llada_megatron.checkpoint.load import load_model
    from llada_megatron.parallel import groups

    groups.initialize(config.layout)
    shutil.rmtree(folder / "optimizer")
    checkpoint = store.verified(Checkpoint.read(folder), weights_alone=True)
    stages = load_model(config, checkpoint.path)
    try:
        store.verified(checkpoint)
    except BadInput as damage:
        return all(value.isfinite().all() for value in stages[0].parameters()), str(damage)
    return False, ""


def test_weights_are_verified_and_loaded_without_the_optimizers_files(tmp_path):
    folder, config = tmp_path / "saved", configure("one")
    run_ranks(save, config, folder)
    [(loaded, damage)] = run_ranks(weights_without_training_state, config, folder)
    assert loaded and "optimizer/__0_0.distcp is missing" in damage


def save_on_a_full_disk(config: Config, folder: Path) -> str:
    import torch.distributed as dist

    from llada_megatron.checkpoint import shards
    from llada_megatron.checkpoint.store import Saver

    model, optimizer = built(config)
    append = shards.HashedFile.append

    def refused(self, part, values):
        if dist.get_rank() == 1:
            raise OSError(28, "No space left on device")
        append(self, part, values)

    shards.HashedFile.append = refused
    saver = Saver(threads=2, in_background=True)
    try:
        saver.save(folder, Manifest(config={}), model, optimizer, carried_along={}).publish()
    except OSError as error:
        return str(error)
    return ""


def test_a_write_that_fails_on_one_rank_is_said_by_every_rank_and_nothing_is_published(tmp_path):
    for said in run_ranks(save_on_a_full_disk, configure("dp2"), tmp_path / "saved", processes=2):
        assert "could not be written: [Errno 28] No space left on device" in said and "saved" in said
    assert not (tmp_path / "saved").exists()


def test_no_checkpoint_has_a_part_of_a_tensor_missing_or_double():
    stored = [
        Stored(Part("a", (4, 2), (row, 0), (2, 2)), torch.float32, "__0_0.distcp", 16 * row, 16)
        for row in (0, 2)
    ]
    require_whole(stored)
    for wrong, said in ((stored[:1], "Parts of a are missing"), (stored + stored[:1], "a was written twice")):
        with pytest.raises(ValueError, match=said):
            require_whole(wrong)
