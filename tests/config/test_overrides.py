"""KEY=VALUE: an error names the one at fault, says why, and what it proposes works."""

import re
import shlex

import pytest

from llada_megatron.config.compose import compose, load, resolve, save
from llada_megatron.config.errors import BadInput

PARITY = ["experiment=parity"]


def refusal(*overrides: str) -> str:
    with pytest.raises(BadInput) as caught:
        compose([*PARITY, *overrides])
    sentence = str(caught.value)
    assert sentence.endswith(".") and "\n" not in sentence
    return sentence


@pytest.mark.parametrize(
    ("override", "key", "meant"),
    [
        ("run.dir=/a/lr=0.1", "run.dir", "/a/lr=0.1"),
        ("run.dir=/a/données", "run.dir", "/a/données"),
        ("run.dir=(1)", "run.dir", "(1)"),
        ("run.dir=it's", "run.dir", "it's"),
        ('run.dir=a"b', "run.dir", 'a"b'),
        ("run.name=1e5", "run.name", "1e5"),
        ("run.name=true", "run.name", "true"),
        ("data.path=[/a/données/x]", "data.path", ["/a/données/x"]),
        ("data.path=[/a/lr=0.1,/b c]", "data.path", ["/a/lr=0.1", "/b c"]),
    ],
)
def test_what_hydra_cannot_read_is_quoted_in_the_answer_and_the_quoted_text_means_what_was_meant(
    override, key, meant
):
    sentence = refusal(override)
    assert sentence.startswith(override)
    (remedy,) = shlex.split(re.search(r"(?:for example|write) (.*)\.$", sentence)[1])
    group, name = key.split(".")
    assert getattr(getattr(compose([*PARITY, remedy]), group), name) == meant


def test_a_blank_in_a_value_needs_no_quotes():
    assert compose([*PARITY, "run.dir=/a b/c"]).run.dir == "/a b/c"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optimizer.lr=fast", "optimizer.lr takes a number"),
        ("model.layers=4.5", "model.layers takes a whole number"),
        ("model.layers=true", "model.layers takes a whole number"),
        ("training.preflight=2", "training.preflight takes true or false"),
        ("run.name=null", "run.name takes text"),
        ("data.path=a", "data.path takes a list such as [a,b]"),
        ("data.path=[[a]]", "data.path takes a list such as [a,b], each text"),
        ("diffusion.weight=invers", "diffusion.weight takes one of inverse, flat"),
        ("run=5", "run takes settings of its own: allow_change, dir"),
        ("schedule.stages=[{name: a, blocksize: '4', tokens: 1}]", "did you mean block_size?"),
        ("optimizer={lr: fast}", "as its lr a number"),
        ("model=foo", "there is no such model: choose from demo, dlcm_2b"),
        ("model=pariti", "did you mean parity?"),
        ("model=[tiny,demo]", "there is no such model"),
        ("optimizer=null", "there is no such optimizer"),
        ("model.layerz=4", "did you mean model.layers?"),
        ("lr=1", "(did you mean optimizer.lr?)"),
        ("optimizer.learning_rate=1", "choose from optimizer.lr, optimizer.min_lr"),
        ("difusion.weight=flat", "did you mean diffusion.weight"),
        ("+new.key=1", "new.key is no setting"),
        ("++new.key=1", "new.key is no setting"),
        ("++optimizer.foo=3", "optimizer.foo is no setting"),
        ("~model.layers", "takes a setting away"),
        ("~optimizer", "takes a setting away"),
        ("+optimizer.lr=1", "leave out the +"),
        ("+experiment=demo", "leave out the +"),
        ("++model=tiny", "leave out the +"),
        ("hydra.verbose=true", "is a setting of hydra"),
        ("hydra/launcher=basic", "is a setting of hydra"),
        ("model@foo=tiny", "write model=tiny"),
        ("optimizer.lr=1,2", "llada submit --multirun"),
        ("optimizer.lr=range(1,3)", "llada submit --multirun"),
        ("schedule.stages[0].tokens=5", "schedule.stages.0.tokens=5"),
        ("run.seed", "run.seed=2"),
        ("=1", "run.seed=2"),
        ("run.dir=${oops", "as ${run.name}"),
        ("run.dir=${nothing}", "'nothing' not found"),
        ("data.path=" + "[" * 5000, "cannot be read"),
    ],
)
def test_an_error_names_the_override_and_says_what_to_write(override, words):
    sentence = refusal("run.seed=3", override)
    assert words in sentence
    assert override.lstrip("+~")[:20].split("=")[0] in sentence


def test_an_item_of_a_list_may_be_set_and_a_known_key_forced():
    config = compose([*PARITY, "schedule.stages.0.tokens=8192", "++optimizer.lr=0.5"])
    assert (config.schedule.stages[0].tokens, config.optimizer.lr) == (8192, 0.5)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("layout.tpp=1", "layout.tpp is no setting"),
        ("+new.key=1", "is no setting"),
        ("optimizer.lr=fast", "optimizer.lr takes a number"),
        ("optimizer.lr=.inf", "optimizer.lr=inf is out of range"),
        ("evaluation.sequences=0", "evaluation.sequences=0 is out of range"),
        ("layout.tp", "is no KEY=VALUE"),
        ("layout.tp=[", "layout.tp=["),
    ],
)
def test_overrides_of_a_saved_configuration_are_judged_alike(override, words):
    saved = compose(PARITY)
    with pytest.raises(BadInput, match=re.escape(words)):
        resolve(saved, [override])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("optimizer: {lrr: 1}", ["mine", "lrr"]),
        ("optimizer: {lr: fast}", ["mine", "fast", "optimizer.lr"]),
        ("new: {key: 1}", ["mine", "new"]),
        ("optimizer: {lr: .inf}", ["optimizer.lr=inf"]),
        ("diffusion: {weight: invers}", ["mine", "inverse, flat"]),
        ("run: [\n", ["mine.yaml", "line 5"]),
        ("run: {name: a, name: b}", ["mine.yaml", "line 4"]),
        ("run: " + "[" * 5000, ["mine.yaml", "is not YAML"]),
        ("model: null", ["mine", "'model' is not Optional"]),
        ("data: {path: a}", ["mine", "data.path"]),
        ("run: {dir: '${nope}'}", ["run.dir", "'nope' not found"]),
    ],
)
def test_a_fault_in_a_file_of_the_user_s_is_named_with_the_file_or_the_setting(
    tmp_path, monkeypatch, text, words
):
    (tmp_path / "configs" / "experiment").mkdir(parents=True)
    head = "# @package _global_\ndefaults: [parity, _self_]\n\n"
    (tmp_path / "configs" / "experiment" / "mine.yaml").write_text(head + text)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadInput) as caught:
        compose(["experiment=mine"])
    assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"5", ["mine.yaml", "`key: value`"]),
        (b"- a\n", ["mine", "`key: value`"]),
        (b"run: {name: x}", ["# @package _global_"]),
        ("run: {name: é}".encode("latin-1"), ["mine.yaml", "is not YAML"]),
        (b"# @package _global_\ndefaults: parity\n", ["experiment/mine", "must be a list"]),
        (b"# @package _global_\ndefaults: [nope]\n", ["experiment/nope"]),
        (b"# @package _global_\ndefaults: [mine]\n", ["recursion"]),
        (b"# @package _global_\ndefaults: [parity, {override /model: nope}]\n", ["model/nope", "tiny"]),
        (b"# @package _global_\nrun: !!python/object/apply:os.getcwd []\n", ["mine.yaml", "line 2"]),
    ],
)
def test_a_file_of_the_user_s_that_is_no_experiment_is_a_sentence(tmp_path, monkeypatch, content, words):
    (tmp_path / "configs" / "experiment").mkdir(parents=True)
    (tmp_path / "configs" / "experiment" / "mine.yaml").write_bytes(content)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadInput) as caught:
        compose(["experiment=mine"])
    assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value)


def test_a_fault_in_a_saved_configuration_is_named_with_the_file(tmp_path):
    save(compose(PARITY), tmp_path / "config.yaml")
    text = (tmp_path / "config.yaml").read_text()
    (tmp_path / "config.yaml").write_text(text.replace("clip_grad: 1.0", "clip_grad: -1"))
    with pytest.raises(BadInput, match=r"config\.yaml: optimizer\.clip_grad=-1\.0 is out of range"):
        load(tmp_path / "config.yaml")
