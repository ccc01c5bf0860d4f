"""Which weights a run may start from."""

from dataclasses import asdict
from pathlib import Path

import pytest

from llada_megatron.config.compose import compose
from llada_megatron.config.errors import BadInput
from llada_megatron.record.manifest import Checkpoint, Manifest
from llada_megatron.training.position import check_same_model


def test_a_checkpoint_from_before_model_family_is_of_gpt_and_another_family_is_refused() -> None:
    config = compose(["experiment=parity"])
    old = asdict(config.model)
    del old["family"]
    check_same_model(config, Checkpoint(Path("old"), Manifest(config={"model": old})))
    with pytest.raises(BadInput, match=r"model\.family: other -> gpt"):
        other = Manifest(config={"model": old | {"family": "other"}})
        check_same_model(config, Checkpoint(Path("other"), other))
