"""Colours of all pictures: those of Okabe and Ito, which colour-blind readers can tell apart."""

from __future__ import annotations

BLUE, ORANGE, GREEN, VERMILION = "#0072B2", "#E69F00", "#009E73", "#D55E00"
PURPLE, SKY, YELLOW, GREY, LIGHT = "#CC79A7", "#56B4E9", "#F0E442", "#666666", "#bbbbbb"
