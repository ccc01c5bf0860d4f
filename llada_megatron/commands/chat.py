"""`llada chat`: a conversation with a checkpoint in the terminal, whose blocks appear as they are decoded."""

from __future__ import annotations

import argparse
import io
import os
import re
import signal
import sys
import termios
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TextIO

from llada_megatron.commands import generate, opened
from llada_megatron.config.errors import BadInput, Interrupted
from llada_megatron.config.quantities import so_many

if TYPE_CHECKING:
    from rich.console import Console

    from llada_megatron.config.schema import Config
    from llada_megatron.generate.conversation import Conversation
    from llada_megatron.record.manifest import Checkpoint

EXAMPLE = "llada chat runs/chat --threshold 0.9"
COMMANDS = "/reset, /system TEXT and /quit"
COMMAND = re.compile(r"/[a-z]+(?=\s|$)")
WAIT_SEC = 7 * 24 * 3600
"""How long ranks wait for a person to write something."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    opened.add_arguments(parser)
    parser.add_argument("--system", default="", metavar="TEXT", help="the system message")
    generate.add_decoding_arguments(parser, new_tokens=512)


def run(args: argparse.Namespace) -> int:
    """Talk until the input ends: 0; BadInput for a checkpoint, rule or layout that do not fit.

    In a pipe also for a line that cannot be answered; a terminal is told so and asked for another one.
    """
    from llada_megatron.runtime.launch import launch

    with opened.opened(args) as checkpoint:
        config, job, title = prepare(args, checkpoint)
        told = (config, job, title, args.system, args.chat_template)
        if config.layout.processes == 1:
            return _on_this_rank(*told)
        heard = signal.signal(signal.SIGINT, signal.SIG_IGN)  # rank 0 hears Ctrl-C, which ends nobody else
        try:
            return launch(
                _on_this_rank,
                *told,
                processes=config.layout.processes,
                preload=generate.PRELOAD,
            )[0]
        finally:
            signal.signal(signal.SIGINT, heard)


def prepare(args: argparse.Namespace, checkpoint: Checkpoint) -> tuple[Config, dict[str, Any], str]:
    """The configuration, the arguments of Job, and what a terminal is told first; BadInput as `run`."""
    from llada_megatron.config.layout import data_parallel_size

    config, job, _ = generate.decoding(args, checkpoint, as_chat=True)
    if (replicas := data_parallel_size(config.layout) // config.layout.bp) > 1:
        raise BadInput(
            f"A chat is one conversation, and {config.layout.processes} processes with"
            f" layout.tp={config.layout.tp} are {replicas} replicas of the model: set"
            f" layout.tp={config.layout.processes}, with layout.ep for the experts."
        )
    step = f", step {checkpoint.manifest.step}" if checkpoint.manifest.step else ""
    blocks = f"block size {job['block_size']}" if job["block_size"] else "next tokens"
    title = f"{args.checkpoint}{step}: {blocks}, rule {job['rule']}, context {config.data.sequence_length:,}"
    return config, job | {"batch": 1}, title


def _on_this_rank(
    config: Config, job: dict[str, Any], title: str, system: str, chat_template: str | None
) -> int:
    from llada_megatron.data.tokenizer import load_tokenizer
    from llada_megatron.generate.conversation import Conversation, follow
    from llada_megatron.generate.job import Job, decoder_of
    from llada_megatron.parallel import groups, ranks
    from llada_megatron.runtime import interrupts

    made = Job(**job)
    assert made.tokenizer is not None
    if config.layout.processes > 1 and os.environ["RANK"] == "0":
        signal.signal(signal.SIGINT, interrupts.interrupt)  # until `talk` has its own
    groups.join(config.layout, threads=0, timeout_sec=WAIT_SEC)
    try:
        groups.initialize(config.layout)
        decoder = decoder_of(config, made)
        if ranks.rank() > 0:
            follow(decoder, made.limits)
            return 0
        encoder = generate.chat_encoder(chat_template, made.tokenizer, load_tokenizer(made.tokenizer))
        conversation = Conversation(decoder, encoder, made.limits, system)
        talk(conversation, title)
        conversation.end()
        return 0
    finally:
        groups.destroy()


def talk(conversation: Conversation, title: str) -> None:
    """Ask and answer until the input ends; on a terminal with pictures, else line by line."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # whatever the terminal's encoding lacks
    # Of rank 0 among several, sys.stdin is empty: multiprocessing put it there.
    stdin = open(0, encoding="utf-8", errors="replace", closefd=False)  # noqa: SIM115 - it is not ours to close
    if stdin.isatty() and sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb":
        sys.stdin = stdin  # which input() reads
        _in_terminal(conversation, title, stdin)
    else:
        in_pipe(conversation, stdin)


def obey(conversation: Conversation, line: str) -> str | None:
    """Do what a command says, and return it in words; None for /quit. Raises BadInput for another one."""
    word, _, rest = line.partition(" ")
    if word == "/quit":
        return None
    if word == "/reset":
        conversation.begin(conversation.system)
        return "The conversation begins anew."
    if word == "/system":
        conversation.begin(rest.strip())
        return f"The conversation begins anew, with{'' if rest.strip() else 'out'} a system message."
    raise BadInput(f"{word} is no command, {COMMANDS} are: quote it to say it to the model.")


def in_pipe(conversation: Conversation, lines: Iterable[str]) -> None:
    """Print the answer to each line on a line of its own, in which `\\n` stands for a line break."""
    from llada_megatron.generate.conversation import Answer
    from llada_megatron.generate.screen import shown

    answers: list[Answer] = []
    for line in map(str.strip, lines):
        if COMMAND.match(line):
            if obey(conversation, line) is None:
                break
        elif line:
            *_, answer = conversation.say(line, lambda: False)
            assert isinstance(answer, Answer)
            print(shown(answer.text).replace("\n", "\\n"), flush=True)
            answers.append(answer)
    tokens, denoised = sum(each.tokens for each in answers), sum(each.denoised for each in answers)
    seconds = sum(each.seconds for each in answers)
    print(
        f"{so_many(len(answers), 'answer')}, {so_many(tokens, 'token')} in {seconds:.1f} s"
        f" ({tokens / (seconds or 1):.1f} tokens/s,"
        f" {tokens / (denoised or 1):.2f} a forward)",
        file=sys.stderr,
    )


class _CtrlC:
    """A handler of Ctrl-C: it stops an answer, or takes back what is being typed."""

    def __init__(self) -> None:
        self.is_pressed = self.is_typing = False

    def __call__(self, number: int, frame: Any) -> None:
        self.is_pressed = True
        if self.is_typing:
            raise KeyboardInterrupt

    @contextmanager
    def typing(self) -> Iterator[None]:
        self.is_typing = True
        try:
            yield
        finally:
            self.is_typing = False


def _in_terminal(conversation: Conversation, title: str, stdin: TextIO) -> None:
    import readline  # noqa: F401 - input() edits lines with it

    from rich.console import Console

    console, ctrl_c = Console(highlight=False), _CtrlC()
    console.print(title, style="bold", markup=False)
    console.print(f"{COMMANDS}; Ctrl-C stops an answer, Ctrl-D ends", style="dim")
    heard = signal.signal(signal.SIGINT, ctrl_c)
    try:
        while True:
            try:
                with ctrl_c.typing():
                    line = input("\n\001\033[1m\002> \001\033[0m\002").strip()
            except Interrupted:  # by another signal
                raise
            except KeyboardInterrupt:
                console.print("\nCtrl-D ends", style="dim")
                continue
            except EOFError:
                console.print()
                return
            try:
                if COMMAND.match(line):
                    if (done := obey(conversation, line)) is None:
                        return
                    console.print(done, style="dim")
                elif line:
                    _turn(conversation, line, console, ctrl_c, stdin)
            except BadInput as fault:
                console.print(str(fault), style="red", markup=False)
    finally:
        signal.signal(signal.SIGINT, heard)


def _turn(conversation: Conversation, line: str, console: Console, ctrl_c: _CtrlC, stdin: TextIO) -> None:
    from llada_megatron.generate import PromptRead
    from llada_megatron.generate.conversation import Answer
    from llada_megatron.generate.screen import Writing

    ctrl_c.is_pressed = False
    assert conversation.decoder.text is not None
    with _typed_later(stdin, ctrl_c), Writing(console, conversation.decoder.text) as writing:
        for said in conversation.say(line, lambda: ctrl_c.is_pressed):
            if isinstance(said, Answer):
                writing.answer(said)
            elif isinstance(said, PromptRead):
                writing.read(said)
            else:
                writing.draft(said)


@contextmanager
def _typed_later(stdin: TextIO, ctrl_c: _CtrlC) -> Iterator[None]:
    """What is typed meanwhile waits for the next prompt without being shown; Ctrl-C drops it."""
    before = termios.tcgetattr(stdin)
    quiet = [*before]
    # Without NOFLSH the terminal drops what is being drawn as well.
    quiet[3] = quiet[3] & ~termios.ECHO | termios.NOFLSH
    termios.tcsetattr(stdin, termios.TCSADRAIN, quiet)
    try:
        yield
    finally:
        if ctrl_c.is_pressed:
            termios.tcflush(stdin, termios.TCIFLUSH)
        termios.tcsetattr(stdin, termios.TCSADRAIN, before)
