"""The package as users install it: from a wheel, called from a directory that is no checkout."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from llada_megatron.config.compose import compose
from llada_megatron.config.errors import BadInput

CHECKOUT = Path(__file__).parents[1]


def succeed(*command: str, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        command, cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The wheel of this checkout, unpacked inside another project's clone, in its environment's place."""
    clone = tmp_path_factory.mktemp("another_project")
    wheel_dir, packages = tmp_path_factory.mktemp("wheel"), clone / "site-packages"
    succeed(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(wheel_dir), cwd=CHECKOUT)
    (wheel,) = wheel_dir.glob("*.whl")
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-compile")
    succeed(*pip, "--no-index", "--no-deps", "--target", str(packages), str(wheel), cwd=clone)
    git = ("git", "-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
    succeed("git", "init", "--quiet", cwd=clone)
    (clone / ".gitignore").write_text("site-packages\n")
    succeed("git", "add", ".gitignore", cwd=clone)
    succeed(*git, "commit", "--quiet", "--message", "theirs", cwd=clone)
    return packages


@pytest.fixture
def llada(installed, tmp_path):
    """Runs the installed command in an empty directory; -P keeps that directory off the path."""

    def run(*arguments: str) -> str:
        path = str(installed)
        return succeed(
            sys.executable, "-P", "-m", "llada_megatron", *arguments, cwd=tmp_path, PYTHONPATH=path
        )

    return run


def python(installed: Path, code: str) -> str:
    """What a Python that imports the installed package prints."""
    return succeed(sys.executable, "-P", "-c", code, cwd=installed, PYTHONPATH=str(installed)).strip()


def test_it_is_the_wheel_that_is_tested_and_it_holds_every_file_of_the_package(installed):
    where = python(installed, "import llada_megatron; print(llada_megatron.__file__)")
    assert where == str(installed / "llada_megatron" / "__init__.py")
    tracked = succeed("git", "ls-files", "llada_megatron", cwd=CHECKOUT).splitlines()
    assert any(name.endswith(".sbatch") for name in tracked)
    assert [name for name in tracked if not (installed / name).is_file()] == []


def test_the_commit_of_the_clone_that_it_is_installed_in_is_not_taken_for_its_own(installed):
    code = "from llada_megatron.record import manifest; print([manifest.git_commit(), manifest.git_diff()])"
    assert python(installed, code) == "['', '']"


def test_it_composes_plans_and_renders_a_job_from_the_package_s_own_files(llada, installed):
    assert "parity fits on local" in llada("plan", "experiment=parity")
    assert "fits" in llada("plan", "experiment=llada2_mini_cpt", "layout=h100_8x_ep8", "cluster=h100_8")
    nodes = ("layout=h100_64x_ep8", "cluster=site_example", "cluster.nodes=8")
    job = llada("submit", "experiment=llada2_mini_cpt", *nodes, "--dry-run")
    assert "#SBATCH --requeue" in job and "jobs/env/nccl.sh" in job


def test_a_job_puts_a_checkout_before_what_is_installed_and_nothing_before_a_container_s_packages():
    template = (CHECKOUT / "llada_megatron" / "jobs" / "train.sbatch").read_text()
    choice = template[template.index("case $4 in") : template.index("esac")] + "esac; echo $PYTHONPATH"
    for source, path in (("/home/me/llada", "/home/me/llada:/more"), ("/env/lib/site-packages", "/more")):
        said = succeed("bash", "-c", choice, "job", "", "", "", source, cwd=CHECKOUT, PYTHONPATH="/more")
        assert said.strip() == path


def test_experiments_and_clusters_of_the_user_are_found_by_name(llada, tmp_path):
    configs = tmp_path / "configs"
    for folder in ("experiment", "cluster"):
        (configs / folder).mkdir(parents=True)
    (configs / "experiment" / "mine.yaml").write_text(
        "# @package _global_\ndefaults: [parity, _self_]\nrun: {name: mine_alone}\noptimizer: {lr: 0.0625}\n"
    )
    (configs / "cluster" / "my_site.yaml").write_text("defaults: [h100_8, _self_]\nname: of_my_own\n")
    assert "mine_alone fits on of_my_own" in llada(
        "plan", "experiment=mine", "cluster=my_site", "layout.processes=8", "layout.global_batch=8"
    )
    assert "of_my_own" in llada("plan", "experiment=llada2_mini_cpt", "layout=h100_8x_ep8", "cluster=my_site")


def test_a_name_that_the_package_has_is_refused_and_not_read_from_one_of_the_two(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs" / "model").mkdir(parents=True)
    (tmp_path / "configs" / "config.yaml").touch()  # of another program: no group holds it
    assert compose(["experiment=parity"]).run.name == "parity"
    (tmp_path / "configs" / "model" / "parity.yaml").write_text("layers: 8\n")
    with pytest.raises(BadInput, match=r"model/parity\.yaml has the name .* rename it"):
        compose(["experiment=parity"])
