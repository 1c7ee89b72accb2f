"""Simulators behind one small interface: `benchmark("tabletop-abc-d@1")` gives a named, versioned protocol."""

from vlm4vla_core.sims.benchmarks import PROTOCOLS, BatchedEnv, Benchmark, benchmark, coverage

__all__ = ["PROTOCOLS", "BatchedEnv", "Benchmark", "benchmark", "coverage"]
