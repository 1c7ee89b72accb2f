"""Simulators behind one small interface: `benchmark("tabletop-abc-d@0")` gives a named, versioned protocol."""

from vlm4vla_core.sims.benchmark import BatchedEnv, Benchmark, benchmark, benchmarks

__all__ = ["BatchedEnv", "Benchmark", "benchmark", "benchmarks"]
