"""The layouts that come with the project are within 5% of what the search finds with their switches."""

import re

import pytest

from llada_megatron.config import rules
from llada_megatron.config.compose import CONFIG_DIR, compose
from llada_megatron.plan.estimate import plan
from llada_megatron.plan.planner import Planner
from llada_megatron.plan.search import Search

SHIPPED = {
    "h100_8x_ep8": ["llada2_mini_cpt"],
    "h100_64x_ep8": ["llada2_mini_cpt"],
    "h100_64x_ep8_deepep": ["llada2_mini_cpt"],
    "h100_64x_tp2_pp4_vpp8_ep8": ["llada2_flash_cpt", "precision=bf16"],
    "h100_64x_tp2_pp2_vpp8_cp2_ep16_deepep": ["llada2_flash_cpt"],
    "h100_128x_pp4_vpp8_cp2_ep8": ["llada2_flash_cpt", "precision=bf16"],
    "h100_128x_pp4_vpp8_cp2_ep16_deepep": ["llada2_flash_cpt"],
    "h100_512x_pp4_vpp8_cp2_ep8": ["llada2_flash_cpt", "precision=bf16"],
    "h100_512x_pp4_vpp8_cp2_ep16_deepep": ["llada2_flash_cpt"],
}
OF_LONG_STAGES = {"h100_512x_tp2_pp4_vpp4_cp8_ep8"}
"""For experiment=llada2_flash_32k."""
QUICK = "h100_8x_ep8"


def behind(name: str) -> float:
    """Hours of a shipped layout over those of the fastest that the search finds, less 1."""
    (gpus,) = re.findall(r"^h100_(\d+)x_", name)
    experiment, *more = SHIPPED[name]
    config = compose([f"experiment={experiment}", f"layout={name}", f"cluster=h100_{gpus}", *more])
    planner = Planner(config)
    shipped = plan(planner, config.layout, rules.check(config))
    assert shipped.fits
    return shipped.hours / Search(planner).run().candidates[0].hours - 1


def test_every_layout_of_a_cluster_is_held_against_the_search() -> None:
    shipped = {path.stem for path in (CONFIG_DIR / "layout").glob("h100_*.yaml")}
    assert shipped == SHIPPED.keys() | OF_LONG_STAGES


def test_the_layout_of_one_node_is_within_5_percent_of_the_search() -> None:
    assert behind(QUICK) < 0.05


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in SHIPPED if name != QUICK])
def test_each_layout_is_within_5_percent_of_the_search(name: str) -> None:
    assert behind(name) < 0.05
