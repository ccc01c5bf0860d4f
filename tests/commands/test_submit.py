"""Jobs as text, before any Slurm sees them; what Slurm makes of them is in tests/slurm."""

import pytest

from llada_megatron.commands.submit import lead_sec, render
from llada_megatron.commands.sweep import sweep
from llada_megatron.config.compose import compose
from llada_megatron.config.errors import BadInput
from llada_megatron.record import events

SITE = ["experiment=llada2_mini_cpt", "cluster=site_example", "data.path=[text]"]


def test_a_sweep_is_one_run_for_each_combination_with_a_name_of_its_own():
    runs = sweep(["experiment=parity", "optimizer.lr=1e-3,3e-4", "run.seed=1,2"])
    assert len(runs) == 4
    configs = [compose(overrides) for overrides in runs]
    assert {(c.optimizer.lr, c.run.seed) for c in configs} == {(a, b) for a in (1e-3, 3e-4) for b in (1, 2)}
    assert len({c.run.dir for c in configs}) == 4 and all(c.run.name.startswith("parity_") for c in configs)
    assert sweep(["experiment=parity", "run.seed=1"]) == [["experiment=parity", "run.seed=1"]]


def test_a_site_s_options_are_directives_and_every_placeholder_is_filled():
    text = render(compose([*SITE, "slurm.qos=long", "slurm.setup=['module load cuda']"]), lead_sec=77)
    for line in ("--account=my_project", "--qos=long", "--gpus-per-node=8", "--mem=0", "--signal=USR1@77"):
        assert f"#SBATCH {line}\n" in text
    assert "\nmodule load cuda\n" in text and "jobs/env/nccl.sh" in text
    filled = [
        word for line in text.splitlines() if not line.startswith("#SBATCH --signal") for word in line.split()
    ]
    assert not any(word.startswith("@") and word.endswith("@") for word in filled)


def test_an_option_that_could_end_its_line_is_refused():
    config = compose(SITE)
    config.slurm.account = "me\n#SBATCH --uid=0"
    with pytest.raises(BadInput, match=r"no option of sbatch needs"):
        render(config, lead_sec=60)


@pytest.mark.parametrize(
    ("container", "where"), [("pyxis", "--container-image="), ("apptainer", "apptainer exec")]
)
def test_containers_wrap_the_ranks_and_need_an_image(container, where):
    chosen = [*SITE, f"slurm.container={container}"]
    with pytest.raises(BadInput, match=r"needs slurm\.image"):
        render(compose(chosen), lead_sec=60)
    text = render(
        compose([*chosen, "slurm.image='my image.sif'", "slurm.mounts=['/data:/data']"]), lead_sec=60
    )
    assert where in text and "'my image.sif'" in text.replace(
        "'--container-image=my image.sif'", "'my image.sif'"
    )


def test_the_warning_before_the_limit_grows_with_what_saves_have_taken(tmp_path):
    assert lead_sec(tmp_path, 300) == 300
    events.append(tmp_path, "saved", step=10, seconds=400.0)
    assert lead_sec(tmp_path, 300) == 830
    events.append(tmp_path, "published", step=20, seconds=600.0)  # behind training, which waited for less
    assert lead_sec(tmp_path, 300) == 1230
