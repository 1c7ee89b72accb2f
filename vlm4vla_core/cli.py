"""`vlm4vla VERB …`: one visible table of verbs; each verb's module is imported only when it is called.

A verb's module holds a frozen dataclass `Args` (tyro makes the flags and the help from it), a `run(args)`
and a module docstring whose last paragraph is an example. Verbs that ask questions live in `probes.verbs`
and are named here as text, so the core imports nothing of probes.

Exit codes: 0 done, 2 bad input (one clear line on stderr), 1 failure, 130 interrupted.
"""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path

from vlm4vla_core.errors import InputError, nearest

VERBS: dict[str, tuple[str, str]] = {
    "record": ("vlm4vla_core.verbs.record", "record scripted demonstrations in a simulator into an episode store"),
    "convert": ("vlm4vla_core.verbs.convert", "convert RLDS, CALVIN, LIBERO or LeRobot data into an episode store"),
    "inspect": (
        "vlm4vla_core.verbs.inspect",
        "look into robot data or an episode store: counts, histograms, warnings, contact sheet",
    ),
    "train": ("vlm4vla_core.verbs.train", "turn a VLM into a VLA (or train it on questions) from an episode store"),
    "evaluate": ("vlm4vla_core.verbs.evaluate", "roll a policy out in a benchmark, one row per episode"),
    "serve": ("vlm4vla_core.verbs.serve", "answer simulators that live elsewhere: a policy behind a websocket"),
    "features": ("probes.verbs.features", "extract features of a checkpoint at any layer"),
    "probe": ("probes.verbs.probe", "what can be read out of features, beside its baselines and controls"),
    "similarity": (
        "probes.verbs.similarity",
        "compare two checkpoints layer by layer: kernel alignment, neighbours, rotation",
    ),
    "attribute": ("probes.verbs.attribute", "show which parts of the frames move one number of a policy's answer"),
    "pictures": ("probes.verbs.pictures", "PCA maps, nearest neighbours and readouts of vision features, as pictures"),
    "diverge": ("probes.verbs.diverge", "measure how VLM training and VLA training part, in weights and gradients"),
    "power": ("probes.verbs.power", "what so many models and episodes can show, before they are paid for"),
    "compare": ("probes.verbs.compare", "compare policies on the same initial states, two or many"),
    "correlate": ("probes.verbs.correlate", "correlate VLM capability with VLA performance"),
    "import-results": ("probes.verbs.import_results", "read other evaluators' result files into the tidy tables"),
    "backbones": (
        "vlm4vla_core.verbs.backbones",
        "sizes of the backbones, what is added to them, what would be trained",
    ),
    "doctor": ("vlm4vla_core.verbs.doctor", "what is installed here, what is missing, and what to do about it"),
    "study": ("vlm4vla_core.verbs.study", "plan, run, look at and export a whole study that one file declares"),
    "report": ("probes.verbs.report", "run parameterised notebooks and build the report site"),
}


def _usage() -> str:
    width = max(map(len, VERBS))
    rows = "\n".join(f"  {name:<{width}}  {line}" for name, (_, line) in VERBS.items())
    return (
        "usage: vlm4vla VERB [options]\n\n"
        "Does this VLM make a good robot policy, and why?\n\n"
        f"verbs:\n{rows}\n\n"
        "`vlm4vla VERB --help` explains one verb, with an example.\n"
        "exit codes: 0 done, 2 bad input, 1 failure"
    )


def main(argv: list[str] | None = None) -> int:
    """Run one verb; returns the exit code (the console script passes it to the shell).

    One of several processes under torchrun ends right here: torn down by the interpreter while torch's threads for
    talking to the others are alive, now and then one aborts after all its work is done.
    """
    code = _run(argv)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and "torch.distributed" in sys.modules:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _run(argv: list[str] | None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(_usage())
        return 0 if words else 2
    if words[0] == "--version":
        from importlib.metadata import version

        print(f"vlm4vla {version('vlm4vla')}")
        return 0
    if words[0] not in VERBS:
        print(f"vlm4vla: unknown verb '{words[0]}'; {nearest(words[0], VERBS)}", file=sys.stderr)
        return 2
    try:
        return _call(words[0], words[1:])
    except InputError as error:
        print(f"vlm4vla {words[0]}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"vlm4vla {words[0]}: interrupted; issue the same command again to go on", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `vlm4vla … | head`
        sys.stderr.close()
        return 1
    except OSError as error:  # disk full, no permission: the line says it, a traceback would not help
        print(f"vlm4vla {words[0]}: {error}", file=sys.stderr)
        return 1


def _call(verb: str, words: list[str]) -> int:
    import tyro

    if verb != "report":  # whose kernels run side by side, on one thread each; a user's own setting stands everywhere
        os.environ.setdefault("OMP_NUM_THREADS", str(min(os.cpu_count() or 1, 8)))
    module = importlib.import_module(VERBS[verb][0])
    try:
        args = tyro.cli(module.Args, args=words, prog=f"vlm4vla {verb}", description=module.__doc__)
    except SystemExit as stop:  # tyro has printed its help (0) or its error (2)
        return int(stop.code or 0)
    _check_outputs(args)
    return int(module.run(args) or 0)


def _check_outputs(args: object) -> None:
    """Refuse impossible output paths before the work, not after it."""
    for name in ("json", "sheet", "plot", "html", "video"):
        path = getattr(args, name, None)
        if isinstance(path, Path) and path.is_dir():  # `evaluate --video` may be a number
            raise InputError(f"--{name} names a folder, not a file", where=path)
    out = getattr(args, "out", None)
    if out is not None and out.is_file():
        raise InputError("--out names a file, not a folder", where=out)


if __name__ == "__main__":
    sys.exit(main())
