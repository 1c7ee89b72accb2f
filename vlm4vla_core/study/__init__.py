"""Studies: what is to be trained, evaluated and probed, declared in one TOML file; the state of one is its folder."""

from vlm4vla_core.study.declare import Study, read_study
from vlm4vla_core.study.jobs import Cell, Job, Plan, expand

__all__ = ["Cell", "Job", "Plan", "Study", "expand", "read_study"]
