"""Files of every kind that is read, with bytes and values changed: a result or a sentence, and nothing else.

No traceback, no hang, no more memory than the file can justify. The short run is always the same; the long
one (`make test-full`) draws anew.
"""

import json
import os
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llada_megatron.config import compose
from llada_megatron.config.errors import BadInput, Refusal
from llada_megatron.record import events, manifest, metrics
from llada_megatron.record.json_files import read_json
from tests import packages
from tests.foreign import conversations, mutations

TESTS = Path(__file__).parents[1]
OLD = TESTS / "old_run"
SECONDS, MEGABYTES = 10, 300
"""At most, for a file of some kilobytes."""


@dataclass(frozen=True)
class Kind:
    """A file that is read: where it lies in a folder, and by whom."""

    file: str
    source: Path
    """Of the folder, or of the one file."""
    read: Callable[[Path], Any]
    """Takes the folder."""
    steps: st.SearchStrategy[list[mutations.Step]] = mutations.OF_BYTES
    finish: Callable[[bytes], bytes] = bytes


def read_corpus(folder: Path) -> None:
    from llada_megatron.data.corpus import read_index, read_sidecar

    read_sidecar(f"{folder}/text")
    index = read_index(f"{folder}/text")
    ends = index.document_offsets + index.document_lengths.astype("int64") * index.dtype.itemsize
    assert min(index.document_lengths.min(), index.document_offsets.min()) >= 0
    assert ends.max() <= (folder / "text.bin").stat().st_size


def read_weights(folder: Path) -> None:
    from llada_megatron.checkpoint.shards import whole
    from llada_megatron.convert.safetensors_files import SafetensorsReader

    reader = SafetensorsReader(folder)
    for name, shape in reader.shapes().items():
        reader.read(whole(name, *shape))


def read_model(folder: Path) -> None:
    from llada_megatron.convert.config_json import model_config

    model_config(read_json(folder / "config.json", "give another"), 5, f"{folder}/config.json")


def read_tokenizer(folder: Path) -> None:
    from llada_megatron.convert.tokenizer_files import mask_token
    from llada_megatron.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(f"{folder}/tokenizer.json")
    tokenizer.decode(tokenizer.encode("some text"))
    mask_token(folder, None, None)


def read_gguf(folder: Path) -> None:
    from llada_megatron.convert import gguf, gguf_tokenizer

    source = folder / "model.gguf"
    file, described = gguf.read_description(source, None)
    list(gguf.llama_entries(described))
    with gguf.named(source):
        for tensor in file.tensors.values():
            gguf.dequantised(tensor)
        gguf_tokenizer.write_tokenizer(file.fields, folder)


def read_shards(folder: Path) -> None:
    from llada_megatron.checkpoint.shards import ShardsReader, whole

    reader = ShardsReader(folder)
    for name, shape in reader.shapes().items():
        reader.read(whole(name, *shape))


def read_manifest(folder: Path) -> None:
    checkpoint = manifest.Checkpoint.read(folder)
    compose.model_of(checkpoint.path, checkpoint.manifest.config)
    with suppress(BadInput):  # it speaks of settings, which may as well be the overrides'
        compose.elsewhere(checkpoint.manifest.config, [])
    manifest.file_damage(checkpoint, sorted(checkpoint.manifest.files))


def read_metrics(folder: Path) -> None:
    steps = metrics.read_jsonl(folder / "metrics.jsonl", *metrics.STEP_FIELDS)
    sum(map(metrics.step_seconds, steps))
    metrics.by_stage(steps)
    metrics.MetricsFile(folder / "metrics.jsonl", 2).close()


def read_events(folder: Path) -> None:
    events.last(events.read(folder), "saved", "ended")


def read_run_config(folder: Path) -> None:
    compose.load(folder / "config.yaml")


def of_records(file: str, format: str) -> Callable[[Path], None]:
    return partial(conversations.read_records, file=file, format=format)


CHECKPOINT = OLD / "run" / "checkpoints" / "step_00000003"
SIGNED = partial(mutations.signed, manifest._digest)
GOLDEN = TESTS / "golden"
JSON = mutations.OF_JSON
KINDS = {
    "idx": Kind("text.idx", OLD / "corpus", read_corpus),
    "bin": Kind("text.bin", OLD / "corpus", read_corpus),
    "sidecar": Kind("text.json", OLD / "corpus", read_corpus, JSON),
    "safetensors": Kind("model.safetensors", GOLDEN, read_weights),
    "safetensors index": Kind("model.safetensors.index.json", Path("indexed"), read_weights, JSON),
    "config.json": Kind("config.json", GOLDEN / "config.json", read_model, JSON),
    "config.json of Ling": Kind("config.json", GOLDEN / "ling_ar" / "config.json", read_model, JSON),
    "config.json of Llama": Kind("config.json", Path("llama"), read_model, JSON),
    "tokenizer.json": Kind("tokenizer.json", Path("tokenizer"), read_tokenizer, JSON),
    "GGUF": Kind("model.gguf", Path("gguf"), read_gguf),
    ".metadata": Kind(".metadata", CHECKPOINT / "shards", read_shards),
    "shards": Kind("__0_0.distcp", CHECKPOINT / "shards", read_shards),
    "manifest": Kind("manifest.json", CHECKPOINT, read_manifest, JSON),
    "signed manifest": Kind("manifest.json", CHECKPOINT, read_manifest, JSON, SIGNED),
    "metrics": Kind("metrics.jsonl", OLD / "run" / "metrics.jsonl", read_metrics),
    "a record": Kind("metrics.jsonl", Path("record"), read_metrics, JSON),
    "events": Kind("events.jsonl", OLD / "run" / "events.jsonl", read_events),
    "an event": Kind("events.jsonl", Path("event"), read_events, JSON),
    "run's config": Kind("config.yaml", OLD / "run" / "config.yaml", read_run_config),
    "run's config as JSON": Kind("config.yaml", Path("json config"), read_run_config, JSON),
    "chats": Kind("chats.jsonl", Path("chats"), of_records("chats.jsonl", "chat")),
    "a chat": Kind("chat.json", Path("chats"), of_records("chat.json", "chat"), JSON),
    "preferences": Kind("pairs.jsonl", Path("chats"), of_records("pairs.jsonl", "preference")),
    "a preference": Kind("pair.json", Path("chats"), of_records("pair.json", "preference"), JSON),
    "chat template": Kind("chat_template.jinja", Path("template"), conversations.read_template),
    "tokenizer_config.json": Kind(
        "tokenizer_config.json", Path("described"), conversations.read_template, JSON
    ),
    "roles": Kind("pairs.roles.bin", Path("pairs"), conversations.read_corpus),
    "roles' index": Kind("pairs.roles.idx", Path("pairs"), conversations.read_corpus),
    "conversations' sidecar": Kind("pairs.json", Path("pairs"), conversations.read_corpus, JSON),
    "scores": Kind("pairs.scores.safetensors", Path("pairs"), conversations.read_scores),
}


def make_indexed(folder: Path) -> None:
    shutil.copy(TESTS / "golden" / "model.safetensors", folder / "a.safetensors")
    with open(folder / "a.safetensors", "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    names = dict.fromkeys(header.keys() - {"__metadata__"}, "a.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))


def make_llama(folder: Path) -> None:
    from tests.convert.checkpoints import LLAMA

    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
    others = {key: value for key, value in LLAMA.items() if key != "rope_theta"}
    (folder / "config.json").write_text(json.dumps(others | rope))


def make_gguf(folder: Path) -> None:
    gguf = packages.gguf()
    import numpy as np

    H, W, V = 8, 16, 6
    writer = gguf.GGUFWriter(folder / "model.gguf", "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(H)
    writer.add_feed_forward_length(W)
    writer.add_head_count(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(H // 2)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(["a", "b", "ab", "c", "<|endoftext|>", "<|mask|>"])
    writer.add_token_types([1, 1, 1, 1, 3, 3])
    writer.add_token_merges(["a b"])
    layer = {
        "attn_norm": (H,), "attn_q": (H, H), "attn_k": (H, H), "attn_v": (H, H), "attn_output": (H, H),
        "ffn_norm": (H,), "ffn_gate": (W, H), "ffn_up": (W, H), "ffn_down": (H, W),
    }  # fmt: skip
    shapes = {"token_embd": (V, H), "output_norm": (H,)} | {f"blk.0.{name}": at for name, at in layer.items()}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", np.ones(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def make_record(folder: Path) -> None:
    (folder / "metrics.jsonl").write_bytes((OLD / "run" / "metrics.jsonl").read_bytes().split(b"\n")[0])


def make_event(folder: Path) -> None:
    (folder / "events.jsonl").write_bytes((OLD / "run" / "events.jsonl").read_bytes().split(b"\n")[0])


def make_json_config(folder: Path) -> None:
    from omegaconf import OmegaConf

    content = OmegaConf.to_container(OmegaConf.load(OLD / "run" / "config.yaml"))
    (folder / "config.yaml").write_text(json.dumps(content))  # JSON is YAML


MADE = {
    "indexed": make_indexed, "llama": make_llama, "tokenizer": conversations.make_tokenizer,
    "gguf": make_gguf, "record": make_record, "event": make_event, "json config": make_json_config,
    "chats": conversations.make_chats, "template": conversations.make_template,
    "described": conversations.make_tokenizer_config, "pairs": conversations.make_corpus,
}  # fmt: skip


@pytest.fixture
def kind(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Kind, Path, bytes]:
    """A kind, a folder with a good file of it, and the file's content."""
    kind = KINDS[request.param]
    if str(kind.source) in MADE:
        MADE[str(kind.source)](tmp_path)
    elif kind.source.is_dir():
        shutil.copytree(kind.source, tmp_path, dirs_exist_ok=True)
    else:
        shutil.copy(kind.source, tmp_path / kind.file)
    content = (tmp_path / kind.file).read_bytes()
    kind.read(tmp_path)  # what is whole is read
    return kind, tmp_path, content


@contextmanager
def limited() -> Iterator[None]:
    """Fails where what is inside takes too long, or more memory than it did ever before."""

    def too_long(*_: object) -> None:
        raise TimeoutError

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    signal.signal(signal.SIGPROF, too_long)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)  # of the processor: a busy machine is no fault
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert grown < MEGABYTES, f"{grown:,.0f} MB"


def require_result_or_sentence(kind: Kind, folder: Path) -> None:
    with limited():
        try:
            kind.read(folder)
        except Refusal as refusal:
            sentence = str(refusal)
            assert "\n" not in sentence and len(sentence) < 1000, sentence
            assert str(folder) in sentence, sentence


def run(found: tuple[Kind, Path, bytes], examples: int, *, again: bool) -> None:
    kind, folder, content = found

    @settings(
        max_examples=examples, derandomize=again, database=None, deadline=None,
        suppress_health_check=[*HealthCheck],
    )  # fmt: skip
    @given(kind.steps)
    def each(steps: list[mutations.Step]) -> None:
        (folder / kind.file).unlink()  # what is mapped into memory stays as it was
        (folder / kind.file).write_bytes(kind.finish(mutations.apply(content, steps)))
        require_result_or_sentence(kind, folder)

    each()


@pytest.mark.parametrize("kind", KINDS, indirect=True)
def test_a_mutated_file_ends_in_a_result_or_a_sentence(kind):
    run(kind, 10, again=True)


@pytest.mark.full
@pytest.mark.parametrize("kind", KINDS, indirect=True)
def test_a_file_mutated_in_many_ways_ends_in_a_result_or_a_sentence(kind):
    run(kind, int(os.environ.get("LLADA_FUZZ_EXAMPLES", "1000")), again=False)


BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{after}: &{after} [{','.join([f'*{before}'] * 9)}]\n"
    for before, after in zip("abcdefgh", "bcdefghi", strict=True)
)
CONTENTS = {
    "nothing": b"",
    "zeros": bytes(4096),
    "UTF-16": '{"step": 0}\n'.encode("utf-16"),
    "nested": b"[" * 100_000,
    "nested objects": b'{"a":' * 100_000,
    "nested and closed": b"[" * 100_000 + b"]" * 100_000,
    "a number of 5,000 digits": b'{"step": ' + b"9" * 5000 + b"}",
    "half a surrogate": b'{"step": 0, "stage": "\\ud800"}',
    "NaN": b'{"step": NaN, "stage": Infinity}',
    "a list": b"[1, 2]",
    "a number": b"5",
    "a text": b'"x"',
    "tabs": b"model:\n\tlayers: 2\n",
    "the same key twice": b'{"step": 0, "step": "x"}\n',
    "a Python object": b"!!python/object/apply:os.mkdir [trace]",
    "an alias bomb": BOMB.encode(),
    "an interpolation of itself": b"model: ${model}\n",
}


@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize("kind", KINDS, indirect=True)
def test_another_content_ends_in_a_result_or_a_sentence(kind, content):
    found, folder, _ = kind
    (folder / found.file).unlink()
    (folder / found.file).write_bytes(CONTENTS[content])
    require_result_or_sentence(found, folder)
    assert not Path("trace").exists()


TEMPLATES = {
    "a power": "{{ 9 ** 99999999 }}",
    "a product": "{{ 'x' * 10**10 }}",
    "a long list": "{{ [0] * 10**10 }}",
    "much output": "{% for i in range(99999) %}{{ 'x' * 9999 }}{% endfor %}",
    "a macro of itself": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "Python's classes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "Python's modules": "{{ cycler.__init__.__globals__.os.mkdir('trace') }}",
    "another file": "{% include '/etc/passwd' %}",
    "another template": "{% import 'os' as os %}{{ os.mkdir('trace') }}",
    "more messages": "{{ messages.append(messages[0]) }}",
    "another message": "{{ messages[2].update(content='') }}",
    "marks inside marks": "{% generation %}" * 2 + "{{ messages }}" + "{% endgeneration %}" * 2,
    "marks of its own": "\ue001{{ messages }}\ue000",
    "marks around nothing": "{{ messages }}{% generation %}{% endgeneration %}",
    "marks around the first answer": "{% generation %}some{% endgeneration %}{{ messages }}",
    "half a surrogate pair": "{{ messages }}{{ '\\ud800' }}",
    "a long complaint": "{{ raise_exception('a\n' * 9999) }}",
    "parentheses": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "loops": "{% for a in 'b' %}" * 200 + "{% endfor %}" * 200,
    "a number": "{{ " + mutations.HUGE + " }}",
}


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("kind", ["chat template"], indirect=True)
def test_a_hostile_template_ends_in_a_result_or_a_sentence(kind, template):
    found, folder, _ = kind
    (folder / found.file).write_text(TEMPLATES[template])
    require_result_or_sentence(found, folder)
    assert not Path("trace").exists()
