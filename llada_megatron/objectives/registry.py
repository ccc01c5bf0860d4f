"""The objective of a stage, made once per run."""

from __future__ import annotations

import importlib

from llada_megatron.config.objectives import OBJECTIVES
from llada_megatron.config.schedule import Schedule
from llada_megatron.config.schema import Config
from llada_megatron.objectives.objective import Objective


def objective_of(name: str, config: Config, schedule: Schedule) -> Objective:
    """The objective called `name`, of class OBJECTIVE of the module that config/objectives.py gives."""
    return importlib.import_module(OBJECTIVES[name].module).OBJECTIVE(name, config, schedule)
