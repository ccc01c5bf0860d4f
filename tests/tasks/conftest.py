"""What every test of tasks needs: lm-eval as `llada eval` sets it up, and its caches elsewhere."""

import pytest

from llada_megatron.harness import tasks


@pytest.fixture(autouse=True, scope="session")
def harness(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Of data sets, which read it when they are imported: no test file here imports lm-eval itself."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("HF_HOME", str(tmp_path_factory.getbasetemp() / "hugging_face"))
        tasks.prepare()
