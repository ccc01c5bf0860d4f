"""Into an image with a torch of its own goes what it lacks, as it is locked, and never a torch."""

import importlib.util
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
LOCK = (ROOT / "requirements.txt").read_text()
LOCK_ENTRIES = [line for line in LOCK.splitlines() if "==" in line and line[0].isalpha()]
IMAGE = {"torch": "2.14.0a0+b2c75dd062.nv26.9", "numpy": "2.1.0", "packaging": "25.0", "psutil": "5.9"}
WANTED = [Requirement(line) for line in ("torch>=2.13,<2.15", "numpy>=2.0", "psutil>=6.0", "wandb>=0.26")]


@pytest.fixture(scope="module")
def additions():
    spec = importlib.util.spec_from_file_location("additions", ROOT / "docker" / "additions.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_what_is_there_stays_and_the_rest_comes_with_its_hashes(additions):
    entries = {entry.partition("==")[0]: entry for entry in additions.additions(LOCK, WANTED, IMAGE)}
    assert {"megatron-core", "hydra-core", "wandb"} < entries.keys()
    assert not {"numpy", "packaging"} & entries.keys()
    assert "psutil" in entries, "the image's is older than pyproject.toml asks for"
    assert all("--hash=sha256:" in entry for entry in entries.values())
    assert not [name for name in entries if name.startswith(("torch", "triton", "nvidia-", "cuda-"))]


def test_an_image_whose_torch_does_not_fit_is_refused(additions):
    with pytest.raises(ValueError, match=r"this image has torch 2\.12\.0a0"):
        additions.additions(LOCK, WANTED, IMAGE | {"torch": "2.12.0a0+1"})


def test_a_package_that_one_of_ours_excludes_is_replaced_once(additions):
    requires = {"wandb": ["click>=8.2", "torch>=99; extra == 'media'"], "torch": ["numpy<2"]}
    wanted = additions.wanted(["wandb>=0.26", "torch>=2.13"], requires)
    assert {str(part) for part in wanted} == {"wandb>=0.26", "torch>=2.13", "click>=8.2"}

    locked = {entry.partition("==")[0]: entry.partition("==")[2].split()[0] for entry in LOCK_ENTRIES}
    there = locked | {"click": "8.1.8"}
    assert [entry.partition("==")[0] for entry in additions.additions(LOCK, wanted, there)] == ["click"]
    too_new = [*wanted, Requirement("click>=99")]
    assert additions.additions(LOCK, too_new, locked) == [], "the lock has none that is newer"
