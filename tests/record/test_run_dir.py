import ast
from pathlib import Path

import pytest

import llada_megatron
from llada_megatron.record.run_dir import MANIFEST, RunDir, damaged, partial, step_of


def test_a_checkpoint_is_found_by_the_name_that_its_step_gave_it(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    assert run.whole_checkpoints() == [] and run.newest_step() == 0
    for step in (120, 7):
        run.checkpoint(step).mkdir(parents=True)
        (run.checkpoint(step) / MANIFEST).touch()
    for other in (damaged(run.checkpoint(500)), partial(run.checkpoint(501)), run.checkpoints / "step_x"):
        other.mkdir()
        (other / MANIFEST).touch()
    run.checkpoint(502).mkdir()  # no manifest
    assert run.whole_checkpoints() == [run.checkpoint(7), run.checkpoint(120)]
    assert run.newest_step() == 120
    assert run.damaged_checkpoints() == [damaged(run.checkpoint(500))]
    assert run.partial_checkpoints() == [partial(run.checkpoint(501))]


@pytest.mark.parametrize(("name", "step"), [("step_00000012", 12), ("step_123456789", 123456789)])
def test_a_step_is_read_off_a_name(name: str, step: int) -> None:
    assert step_of(Path("runs/demo/checkpoints") / name) == step
    assert RunDir("").checkpoint(step).name == name


@pytest.mark.parametrize("name", ["step_", "step_1a", "damaged_step_00000012", ".step_00000012.partial"])
def test_another_name_says_no_step(name: str) -> None:
    assert step_of(Path(name)) is None


def test_no_other_module_spells_a_file_of_a_run() -> None:
    base = Path(llada_megatron.__file__).parent
    names = {path.name for path in vars(RunDir("")).values() if path.suffix} | {MANIFEST}
    assert {"metrics.jsonl", "config.yaml", "job.sbatch"} < names
    spelled = [
        f"{module.relative_to(base)}:{node.lineno}: {node.value}"
        for module in base.rglob("*.py")
        if module.name != "run_dir.py"
        for node in ast.walk(ast.parse(module.read_text()))
        if isinstance(node, ast.Constant) and node.value in names
    ]
    assert not spelled
