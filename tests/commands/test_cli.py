"""The command line's promises: quick help, exit codes, one sentence per error."""

import errno
import subprocess
import sys
import types
from collections.abc import Callable

import pytest

from llada_megatron import cli
from llada_megatron.config.errors import BadInput, NodeFault, RunFailed, RunHeld

SLOW_IMPORTS = ("torch", "hydra", "omegaconf", "numpy", "rich", "megatron", "wandb", "matplotlib")


@pytest.fixture
def verb(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., int]], types.ModuleType]:
    """Registers the verb `fake`, whose `run` is the function given."""

    def register(run: Callable[..., int]) -> types.ModuleType:
        module = types.ModuleType("fake_verb")
        module.add_arguments = lambda parser: parser.add_argument("--batch-size", type=int, default=1)
        module.run = run
        monkeypatch.setitem(sys.modules, "fake_verb", module)
        monkeypatch.setitem(cli.VERBS, "fake", ("fake_verb", "do nothing"))
        return module

    monkeypatch.delenv("LLADA_DEBUG", raising=False)
    return register


def raising(error: BaseException) -> Callable[..., int]:
    def run(args: object) -> int:
        raise error

    return run


def test_help_imports_nothing_slow() -> None:
    code = (
        "import sys\n"
        "from llada_megatron import cli\n"
        "try: cli.main(['--help'])\n"
        "except SystemExit as end: assert end.code == 0\n"
        f"print('slow:', [name for name in {SLOW_IMPORTS} if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "slow: []" in result.stdout


def test_help_names_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["--help"])
    assert end.value.code == 0
    printed = capsys.readouterr().out
    assert all(f"  {verb} " in printed and summary in printed for verb, (_, summary) in cli.VERBS.items())


@pytest.mark.parametrize("argv", [[], ["nonsense"], ["--nonsense"]])
def test_a_missing_or_unknown_verb_exits_2(argv: list[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(argv)
    assert end.value.code == 2


@pytest.mark.parametrize("argv", [["--unknown"], ["--batch-size", "many"], ["--batch", "3"]])
def test_a_verbs_usage_errors_and_abbreviations_exit_2(verb, argv: list[str]) -> None:
    verb(lambda args: 0)
    with pytest.raises(SystemExit) as end:
        cli.main(["fake", *argv])
    assert end.value.code == 2


def test_sub_parsers_refuse_abbreviations_too(verb) -> None:
    module = verb(lambda args: 0)
    module.add_arguments = lambda parser: (
        parser.add_subparsers().add_parser("pack").add_argument("--sequence-length")
    )
    assert cli.main(["fake", "pack", "--sequence-length", "8"]) == 0
    with pytest.raises(SystemExit):
        cli.main(["fake", "pack", "--sequence", "8"])


@pytest.mark.parametrize("code", [0, 1, 7])
def test_a_verbs_return_value_is_the_exit_code(verb, code: int) -> None:
    verb(lambda args: code)
    assert cli.main(["fake"]) == code


def test_a_verb_gets_its_parsed_arguments(verb) -> None:
    verb(lambda args: args.batch_size)
    assert cli.main(["fake", "--batch-size", "5"]) == 5


def test_settings_stand_before_and_behind_the_options_of_a_sub_command(verb) -> None:
    def add_arguments(parser) -> None:
        pack = parser.add_subparsers(dest="what").add_parser("pack")
        pack.add_argument("checkpoint", nargs="?")
        pack.add_argument("--rules")
        pack.add_argument("overrides", nargs="*")

    module = verb(lambda args: int(vars(args) != expected))
    module.add_arguments = add_arguments
    expected = {"what": "pack", "checkpoint": "run", "rules": "a", "overrides": ["b=1", "c=2"]}
    assert cli.main(["fake", "pack", "run", "b=1", "--rules", "a", "c=2"]) == 0


def test_a_verbs_help_shows_its_example(verb, capsys: pytest.CaptureFixture[str]) -> None:
    verb(lambda args: 0).EXAMPLE = "llada fake --batch-size 4"
    with pytest.raises(SystemExit) as end:
        cli.main(["fake", "--help"])
    assert end.value.code == 0
    assert "example:\n  llada fake --batch-size 4" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (BadInput("set run.seed to a number"), "set run.seed to a number"),
        (FileNotFoundError(errno.ENOENT, "No such file", "a.bin"), "No such file: a.bin"),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory", "a"), "Not a directory: a"),
        (PermissionError(errno.EACCES, "Permission denied", "a"), "Permission denied: a"),
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
    ],
)
def test_bad_input_exits_2_with_one_sentence(verb, capsys, error: Exception, sentence: str) -> None:
    verb(raising(error))
    assert cli.main(["fake"]) == 2
    assert capsys.readouterr().err == f"llada fake: error: {sentence}\n"


def test_a_reader_that_leaves_ends_the_command_in_silence() -> None:
    command = [sys.executable, "-m", "llada_megatron", "train", "--check", "experiment=llada2_flash_cpt"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == cli.READER_LEFT


@pytest.mark.parametrize("sentence", ["", "Preflight failed", "is being trained by"])
@pytest.mark.parametrize("refusal, code", [(BadInput, 2), (NodeFault, 3), (RunHeld, 4), (RunFailed, 1)])
def test_a_refusal_s_class_is_its_exit_code(verb, capsys, refusal, code, sentence) -> None:
    verb(raising(refusal(sentence)))
    assert cli.main(["fake"]) == code
    assert capsys.readouterr().err == f"llada fake: error: {sentence}\n"


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            RuntimeError("[enforce fail at device.cc:189] rv != -1. -1 vs -1. Too many open files"),
            "`ulimit -n`",
        ),
        (RuntimeError("process 1 failed:\nTraceback\nRuntimeError: can't start new thread"), "thread"),
        (RuntimeError("DefaultCPUAllocator: Error code 12 (Cannot allocate memory)"), "Out of memory"),
        (RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"), "Out of memory"),
        (MemoryError(), "Out of memory"),
        (RuntimeError("unhandled system error: No space left on device"), "No space left on device"),
    ],
)
def test_a_limit_of_the_machine_is_a_sentence_that_names_it(verb, capsys, error, words) -> None:
    verb(raising(error))
    assert cli.main(["fake"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("llada fake: error: ") and said.count("\n") == 1 and words in said


@pytest.mark.slow
def test_too_few_open_files_end_a_training_in_a_sentence(corpus, tmp_path) -> None:
    few = ["bash", "-c", 'ulimit -n 40; exec "$@"', "_", sys.executable, "-m", "llada_megatron", "train"]
    run = ["experiment=parity", "training.steps=1", f"data.path=[{corpus}]", f"run.dir={tmp_path}/run"]
    two = ["data.sequence_length=64", "layout.processes=2"]
    done = subprocess.run([*few, *run, *two], capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "Too many open files (`ulimit -n` allows a process 40 open files: raise it)" in done.stderr


@pytest.mark.parametrize("error", [RuntimeError("bug"), ValueError("bug"), KeyError("bug"), OSError("bug")])
def test_a_bug_keeps_its_traceback(verb, error: Exception) -> None:
    verb(raising(error))
    with pytest.raises(type(error)):
        cli.main(["fake"])


def test_an_error_while_a_verb_is_imported_is_a_bug(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cli.VERBS, "fake", ("fake_verb_that_is_nowhere", "do nothing"))
    with pytest.raises(ModuleNotFoundError):
        cli.main(["fake"])


def test_an_interrupt_exits_130(verb) -> None:
    verb(raising(KeyboardInterrupt()))
    assert cli.main(["fake"]) == 130


def test_debugging_shows_the_traceback_and_keeps_the_exit_code(verb, capsys, monkeypatch) -> None:
    verb(raising(BadInput("set run.seed")))
    monkeypatch.setenv("LLADA_DEBUG", "1")
    assert cli.main(["fake"]) == 2
    printed = capsys.readouterr().err
    assert "Traceback" in printed and printed.endswith("llada fake: error: set run.seed\n")


def test_the_module_runs_like_the_command() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "llada_megatron", "nonsense"], capture_output=True, text=True
    )
    assert result.returncode == 2 and "invalid choice" in result.stderr
