"""A sweep's overrides are judged as those of one run."""

import re

import pytest

from llada_megatron.commands.sweep import sweep
from llada_megatron.config.errors import BadInput


def test_every_combination_is_a_run_named_after_its_values():
    runs = sweep(["experiment=parity", "run.name=x", "run.seed=1,2"])
    assert runs == [["experiment=parity", f"run.seed={n}", f"run.name=x_seed-{n}"] for n in (1, 2)]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("run.dir=/a=b", """'run.dir="/a=b"'"""),
        ("run.seed", "is no KEY=VALUE"),
        ("run.name=a,b", "gives several names: give one"),
    ],
)
def test_what_cannot_be_swept_is_a_sentence(override, words):
    with pytest.raises(BadInput, match=re.escape(words)):
        sweep(["experiment=parity", override, "run.seed=1,2"])
