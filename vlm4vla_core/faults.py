"""What a training run says, in one line, when it cannot go on; and how it hears of Ctrl-C.

Trap: a signal handler may only set a flag. Saving inside of it would save in the middle of a step.
"""

from __future__ import annotations

import errno
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from vlm4vla_core import checkpoint
from vlm4vla_core.errors import InputError

if TYPE_CHECKING:
    import torch

_FULL = {errno.ENOSPC: "no space left on the disk", errno.EDQUOT: "the quota is used up",
         errno.EFBIG: "the file would be larger than is allowed"}  # fmt: skip


@contextmanager
def stop_flag() -> Iterator[threading.Event]:
    """An event set by Ctrl-C, so that a step is finished and saved before the process leaves."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = signal.signal(signal.SIGINT, lambda number, frame: stop.set())
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def threads(wanted: int | None) -> Iterator[None]:
    """Torch's threads while training: as asked, else at most 2 (more slow small models down, many times under load)."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(wanted or min(2, before, os.cpu_count() or 1))
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def room_on_disk(out: Path) -> Iterator[None]:
    """Say of a full disk which checkpoint is whole, as an OSError of one line."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        if (reason := _FULL.get(_number(error) or 0)) is None:
            raise
        raise OSError(
            f"the run could not be written, {reason} [{out}]; make room and issue the same command again, it goes on "
            f"from {last_good(out)}"
        ) from error


def _number(error: Exception) -> int | None:
    """The system's number of an error; safetensors has it in words only."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    return next((number for number in _FULL if f"os error {number})" in str(error)), None)


def last_good(out: Path) -> str:
    """The newest whole checkpoint of a run, by name."""
    whole = checkpoint.complete(out)
    return whole[-1].name if whole else "the beginning"


def diverged(what: str, step: int, rows: object, out: Path) -> NoReturn:
    """Raise InputError about a loss or gradient that is no number."""
    fix = f"lower the learning rate; the last good checkpoint is {last_good(out)}"
    raise InputError(f"{what} at step {step}, on rows {rows}", where=out, fix=fix)


def memory_needed(model: torch.nn.Module) -> float:
    """Gigabytes (1e9) of fp32 weights, gradients and two AdamW moments, of all processes together."""
    counts = {True: 0, False: 0}
    for parameter in model.parameters():
        counts[parameter.requires_grad] += parameter.numel()
    return (16 * counts[True] + 4 * counts[False]) / 1e9


def too_large(gigabytes: float, step: int, samples: int, accumulate: int, out: Path) -> InputError:
    """What to say when memory does not suffice. samples: at once; gigabytes: needed whatever their number."""
    return InputError(
        f"out of memory at step {step} with {samples} samples at once; weights, gradients and optimizer alone "
        f"take {gigabytes:.3g} GB",
        where=out,
        fix=f"give another --out and --accumulate {accumulate * 2}, checkpoint_activations, precision bf16, freeze or "
        "lora; on several devices, --parallel fsdp",
    )


def out_of_memory(error: Exception) -> bool:
    """Whether an error of torch means that memory did not suffice."""
    import torch

    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
