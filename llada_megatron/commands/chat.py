"""`llada chat`: a conversation in the terminal; blocks appear as they are decoded."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from llada_megatron.commands.generate import add_decoding_arguments, decoding, opened
from llada_megatron.config.errors import BadInput

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import Console
    from rich.text import Text

    from llada_megatron.data.chat import ChatEncoder
    from llada_megatron.data.chat_template import Message
    from llada_megatron.generate import BlockChanged, Decoder, Limits, Result

EXAMPLE = "llada chat runs/chat --threshold 0.9"
MASK_CHARACTER = "░"
HELP = "an empty line or Ctrl-D ends, Ctrl-C ends an answer, /new forgets what was said"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="or a run: its newest, or hf:FOLDER")
    parser.add_argument("--system", metavar="TEXT", help="the system's message, before all others")
    add_decoding_arguments(parser, new_tokens=512)


def run(args: argparse.Namespace) -> int:
    """Talk until the user leaves: 0; BadInput for a checkpoint, template, rule or layout that do not fit."""
    from rich.console import Console

    from llada_megatron.generate.job import Job, decoder_of
    from llada_megatron.parallel import groups
    from llada_megatron.runtime.launch import threads_per_process

    with opened(args.checkpoint, args.overrides) as checkpoint:
        config, job, encoder = decoding(args, checkpoint, as_chat=True)
        assert encoder is not None
        if config.layout.processes > 1:
            raise BadInput("A chat runs in one process: leave out the layout, or use llada generate --chat.")
        groups.initialize(config.layout, threads=threads_per_process(1))
        try:
            asked = Job(**job, batch=1)
            Chat(decoder_of(config, asked), encoder, asked.limits, args.system, Console()).talk()
        finally:
            groups.destroy()
    return 0


class Chat:
    """The turns so far, and a decoder that keeps what it has read of them."""

    def __init__(
        self, decoder: Decoder, encoder: ChatEncoder, limits: Limits, system: str | None, console: Console
    ) -> None:
        self.decoder, self.encoder, self.limits, self.console = decoder, encoder, limits, console
        self.beginning: list[Message] = [{"role": "system", "content": system}] if system else []
        self.messages = list(self.beginning)

    def talk(self) -> None:
        """Until the user leaves."""
        self.console.print(HELP, style="dim")
        for said in self._inputs():
            if said == "/new":
                self.messages = list(self.beginning)
                continue
            self.messages.append({"role": "user", "content": said})
            try:
                answer = self.answer()
            except BadInput as fault:  # longer than the context, most of the time
                self.console.print(f"{fault} /new begins another one.", style="red")
                self.messages.pop()
                continue
            self.messages.append({"role": "assistant", "content": answer})

    def _inputs(self) -> Iterator[str]:
        while True:
            try:
                said = input("> ").strip()
            except (EOFError, KeyboardInterrupt):
                self.console.print()
                return
            if not said:
                return
            yield said

    def answer(self) -> str:
        """The model's next message, shown while it is decoded; as far as it came when Ctrl-C is pressed."""
        from rich.live import Live

        from llada_megatron.generate import BlockChanged

        prompt = self.encoder.prompt(self.messages)
        generated: dict[int, int] = {}
        result: Result | None = None
        events = self.decoder.run([prompt], self.limits)
        with Live(console=self.console, auto_refresh=False, vertical_overflow="visible") as live:
            try:
                for event in events:
                    if isinstance(event, BlockChanged):
                        live.update(self._shown(len(prompt), generated, event), refresh=True)
                    else:
                        result = event
            except KeyboardInterrupt:
                events.close()  # type: ignore[attr-defined]
            text = self._decided(generated) if result is None else str(result.text)
            live.update(text, refresh=True)
        if result is not None:
            self.console.print(
                f"{len(result.tokens)} tokens, {result.tokens_per_forward:.1f} a forward,"
                f" {len(result.tokens) / result.seconds:.1f} a second ({result.stop.value})",
                style="dim",
            )
        return text

    def _shown(self, prompt: int, generated: dict[int, int], event: BlockChanged) -> Text:
        """What is decided so far, in order, with a shade for each mask of the block."""
        from rich.text import Text

        text = Text()
        for place, (token, is_masked) in enumerate(zip(event.tokens, event.is_masked, strict=True)):
            if event.first + place >= prompt and not is_masked:
                generated[event.first + place] = int(token)
        before = [generated[at] for at in sorted(generated) if at < event.first]
        text.append(self._text(before))
        run: list[int] = []
        for place, (token, is_masked) in enumerate(zip(event.tokens, event.is_masked, strict=True)):
            if event.first + place < prompt:
                continue
            if is_masked:
                text.append(self._text(run), style="bold")
                text.append(MASK_CHARACTER, style="dim")
                run = []
            else:
                run.append(int(token))
        text.append(self._text(run), style="bold")
        return text

    def _decided(self, generated: dict[int, int]) -> str:
        """The text up to the first mask."""
        first = min(generated, default=0)
        ids = []
        while first in generated:
            ids.append(generated[first])
            first += 1
        return self._text(ids)

    def _text(self, ids: list[int]) -> str:
        assert self.decoder.text is not None
        return self.decoder.text(ids)
