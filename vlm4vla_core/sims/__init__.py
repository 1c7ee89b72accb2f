"""Simulators behind one small interface: `benchmark("tabletop-abc-d@1")` gives a named, versioned protocol."""

from vlm4vla_core.sims.benchmarks import PROTOCOLS, BatchedEnv, Benchmark, benchmark, coverage, simulators
from vlm4vla_core.sims.simulator import SimulatorBenchmark

__all__ = ["PROTOCOLS", "BatchedEnv", "Benchmark", "SimulatorBenchmark", "benchmark", "coverage", "simulators"]
