"""Where a run computes: one process, or several under torchrun that share every batch (PyTorch's DDP or FSDP2).

Trap: what is said here holds for all processes at once. A collective that one of them skips leaves the others waiting,
so every decision (stop, bad loss) is made on numbers that all have.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from vlm4vla_core.errors import InputError

if TYPE_CHECKING:
    import torch

    from vlm4vla_core.backbone import Backbone


class Devices:
    """This process's device, its rank and the number of processes, as torchrun says. wanted: auto, cpu or cuda.
    parallel: ddp or fsdp (`sharded`).

    Raises InputError when a GPU is asked for and there is none, and for fsdp in one process.
    """

    def __init__(self, wanted: str, parallel: str = "ddp") -> None:
        import torch

        self.world = int(os.environ.get("WORLD_SIZE", "1"))
        self.sharded = parallel == "fsdp"
        if self.sharded and self.world == 1:
            fix = "start it with torchrun (docs/cluster.md), or use --parallel ddp"
            raise InputError("parallel fsdp shares the model among processes, and there is one", fix=fix)
        if wanted == "cuda" and not torch.cuda.is_available():
            raise InputError("torch sees no CUDA device", fix="use --device cpu, or a CUDA build of torch")
        gpu = wanted != "cpu" and torch.cuda.is_available()
        self.rank = 0
        self.device = torch.device("cuda" if gpu else "cpu")
        if self.world > 1:
            from accelerate import PartialState

            began = not torch.distributed.is_initialized()
            state = PartialState(cpu=not gpu, **({} if gpu else {"backend": "gloo"}))
            if began:  # for good: a group that is left and joined again, as by two stages, may wait for ever
                atexit.register(torch.distributed.destroy_process_group)
            self.rank, self.device = state.process_index, state.device
            if state.num_processes != self.world or state.device.type != ("cuda" if gpu else "cpu"):
                raise InputError(
                    f"{self.world} processes on {'GPUs' if gpu else 'the CPU'} were asked for, {state.num_processes} "
                    f"on {state.device.type} run",
                    fix="start them with torchrun",
                )

    @property
    def first(self) -> bool:
        """Whether this process writes."""
        return self.rank == 0

    def share(self, module: torch.nn.Module, backbone: Backbone, *, bf16: bool) -> Any:
        """`module`, with gradients averaged over processes; sharded in place for fsdp (see `sharding.shard`).

        What takes no part in a loss keeps no gradient. Make the optimizer afterwards. Raises RuntimeError when what
        was asked for is not what came of it.
        """
        if self.world == 1:
            return module
        if self.sharded:
            from vlm4vla_core.sharding import check_sharded, shard

            shard(module, backbone, self.device, self.world, bf16=bf16)
            check_sharded(module, self.world)
            return module
        from torch.nn.parallel import DistributedDataParallel

        gpu = [self.device] if self.device.type == "cuda" else None
        return DistributedDataParallel(module, device_ids=gpu, find_unused_parameters=True)

    def local(self, module: Any, wait: bool) -> Any:
        """Context in which gradients stay in this process, when `wait`: all parts of a step but the last.

        Shards are summed in every part: whole gradients would need the memory that sharding saves.
        """
        return module.no_sync() if wait and self.world > 1 and not self.sharded else nullcontext()

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        """For fsdp, the processes of one machine one after the other, so that it holds one whole model at a time."""
        if not self.sharded:
            yield
            return
        mine, all_here = int(os.environ.get("LOCAL_RANK", self.rank)), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        for _ in range(mine):
            self.wait()
        yield
        for _ in range(mine, all_here):
            self.wait()

    def sum(self, values: Sequence[float]) -> list[float]:
        """Each value summed over the processes, in double precision."""
        if self.world == 1:
            return list(values)
        import torch

        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(total)
        return total.tolist()

    def wait(self) -> None:
        """Until all processes are here."""
        self.sum([0.0])

    def memory_gb(self) -> float:
        """Largest memory held so far in this process, in GB (1e9): of the GPU, or resident."""
        import torch

        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated() / 1e9
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9

    @contextmanager
    def randomness(self, key: Sequence[int]) -> Iterator[None]:
        """Torch draws (dropout) as a function of the key and this process; its global state is left alone."""
        import numpy as np
        import torch

        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(int(np.random.SeedSequence([*key, self.rank]).generate_state(1)[0]))
            yield
