"""`llada chat`: line by line in a pipe, pictures on a terminal; Ctrl-C ends an answer, Ctrl-D the chat."""

import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from fcntl import ioctl
from pathlib import Path

import pytest

from llada_megatron import cli
from llada_megatron.commands import chat
from llada_megatron.config.errors import BadInput
from llada_megatron.generate.conversation import Answer
from tests.convert.checkpoints import MASK, add_tokenizer, write

RUN = Path(__file__).parents[1] / "old_run" / "run"
COMMAND = [sys.executable, "-m", "llada_megatron", "chat"]
DEADLINE_SEC = 120.0


class Parrot:
    """A conversation whose model repeats what it is told."""

    def __init__(self) -> None:
        self.system, self.said, self.begun = "", [], []

    def begin(self, system: str) -> None:
        self.system = system
        self.begun.append(system)

    def say(self, text, is_stopped):
        if text == "long":
            raise BadInput("no room")
        self.said.append(text)
        yield Answer(f"{text}\n{text}", 4, "end", 2, 3, 0, 0.5)


def test_a_pipe_has_one_line_for_each_line_that_is_said(capsys):
    parrot = Parrot()
    chat.in_pipe(
        parrot, ["a\n", "\n", "/system be brief\n", " b \n", "/reset\n", "/usr/bin is\n", "/quit\n", "c"]
    )
    printed = capsys.readouterr()
    assert printed.out.splitlines() == ["a\\na", "b\\nb", "/usr/bin is\\n/usr/bin is"]
    assert parrot.said == ["a", "b", "/usr/bin is"] and parrot.begun == ["be brief", "be brief"]
    assert printed.err == "3 answers, 12 tokens in 1.5 s (8.0 tokens/s, 2.00 a forward)\n"


@pytest.mark.parametrize(
    ("line", "said"),
    [("/help", "/help is no command, /reset, /system TEXT and /quit are"), ("long", "no room")],
)
def test_a_line_that_cannot_be_answered_ends_a_pipe_with_a_sentence(capsys, line, said):
    with pytest.raises(BadInput, match=said):
        chat.in_pipe(Parrot(), ["a", line, "b"])
    assert capsys.readouterr().out == "a\\na\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["layout.processes=2"], "2 processes with layout.tp=1 are 2 replicas of the model: set layout.tp=2"),
        (["layout.pp=2"], "Decoding serves tp, ep and dp, not pp: set layout.pp=1."),
        (["--max-new-tokens", "0"], "--max-new-tokens 0: give at least 1."),
        (["--chat-template", "llada2"], "writes <role>, which is no token of bytes"),
        (["--rule", "best"], "There is no rule 'best': give threshold, "),
    ],
    ids=["dp", "pp", "tokens", "template", "rule"],
)
def test_what_does_not_fit_is_one_sentence(capsys, arguments, said):
    assert cli.main(["chat", str(RUN), *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


@pytest.fixture(params=["run", "folder"])
def chatting(request, tmp_path) -> list[str]:
    """Arguments for a run on one process, and for a Hugging Face folder on two."""
    if request.param == "run":
        return [str(RUN), "data.sequence_length=256"]
    folder = add_tokenizer(write(tmp_path / "hf", "llada2"), {MASK: "<|mask|>", 100: "<|endoftext|>"})
    return [
        f"hf:{folder}",
        "--chat-template",
        "plain",
        "--block-size",
        "4",
        "data.sequence_length=256",
        "layout.tp=2",
    ]


@pytest.mark.slow
def test_bytes_of_any_kind_go_through_a_pipe(chatting):
    said = b"One\n\xff\xfe \xe4\xbd\n/reset\nOne\n"
    options = ["--max-new-tokens", "12", "--threshold", "0.01", "--system", "Be brief."]
    done = subprocess.run([*COMMAND, *chatting, *options], input=said, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    answers = done.stdout.decode().splitlines()
    assert len(answers) == 3 and answers[0] == answers[2]
    assert "\n3 answers, " in "\n" + done.stderr.decode()


class Terminal:
    """A command on a terminal of its own."""

    def __init__(self, *arguments: str, columns: int = 60) -> None:
        self.ours, theirs = pty.openpty()
        ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 20, columns, 0, 0))
        self.process = subprocess.Popen(
            [*COMMAND, *arguments],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env=os.environ | {"TERM": "xterm"},
            preexec_fn=lambda: ioctl(0, termios.TIOCSCTTY, 0),
            start_new_session=True,
        )
        os.close(theirs)
        self.output = ""

    def until(self, pattern: str) -> str:
        """Whatever is written up to the pattern, which must come."""
        deadline = time.monotonic() + DEADLINE_SEC
        while not (found := re.search(pattern, self.output)):
            ready, _, _ = select.select([self.ours], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"{pattern} does not come: {self.output!r}"
            self.output += os.read(self.ours, 4096).decode(errors="replace")
        seen, self.output = self.output[: found.end()], self.output[found.end() :]
        return seen

    def type(self, text: str) -> None:
        os.write(self.ours, text.encode())

    def end(self) -> int:
        self.process.wait(DEADLINE_SEC)
        os.close(self.ours)
        return self.process.returncode


@pytest.mark.slow
def test_ctrl_c_stops_an_answer_and_ctrl_d_the_chat(chatting):
    long = [
        each.replace("length=256", "length=4096") for each in chatting
    ]  # an answer lasts until Ctrl-C comes
    terminal = Terminal(*long, "--max-new-tokens", "4000", "--rule", "quota", "--threshold", "1")
    terminal.until("Ctrl-D ends")
    terminal.type("One\n")
    terminal.until("░")
    terminal.until("tokens per forward")
    terminal.type("\x03")
    terminal.until("stopped")
    terminal.until("> ")
    terminal.type("half a li")
    terminal.until("half a li")
    time.sleep(0.5)  # Python hears Ctrl-C where it waits for a key, not on its way there
    terminal.type("\x03")
    terminal.until("Ctrl-D ends")
    terminal.type("/reset\n")
    terminal.until("begins anew")
    terminal.type("/nothing\n")
    terminal.until("is no command")
    terminal.until("> ")  # a Ctrl-D that comes before is no end of the next line
    time.sleep(0.5)
    terminal.type("\x04")
    assert terminal.end() == 0


@pytest.mark.slow
def test_a_terminal_is_left_as_it_was_when_a_chat_is_terminated():
    terminal = Terminal(
        str(RUN), "data.sequence_length=256", "--max-new-tokens", "200", "--rule", "quota", "--threshold", "1"
    )
    echoes = termios.tcgetattr(terminal.ours)[3] & termios.ECHO
    terminal.until("Ctrl-D ends")
    terminal.type("One\n")
    terminal.until("tokens per forward")
    terminal.process.send_signal(signal.SIGTERM)
    code = terminal.process.wait(DEADLINE_SEC)
    assert code == 128 + signal.SIGTERM
    assert termios.tcgetattr(terminal.ours)[3] & termios.ECHO == echoes != 0
    terminal.end()
