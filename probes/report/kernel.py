"""Execute a notebook's cells in a fresh kernel of the interpreter that runs this code.

Trap: Jupyter looks kernels up by name in the user's home first, and may find another environment's Python there; the
kernel manager here knows one kernel only.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from probes.report import worker
from probes.report.notebook import Notebook

FOLDER_VARIABLE = "VLM4VLA_REPORT_FOLDER"  # tells `pages.finish` in the kernel where the run's folder is


class NotebookFailed(Exception):
    """A cell failed (not the user's input): told in one line, exit code 1."""


def execute(notebook: Notebook, given: Mapping[str, Any], copy: Path) -> None:
    """Run the cells in a fresh kernel and write the executed notebook to `copy`, also when a cell fails."""
    import jupytext
    import nbformat
    import papermill
    from nbclient.exceptions import DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    source = jupytext.read(notebook.path, as_version=4)  # reads .ipynb and percent .py alike
    source.cells = [cell for cell in source.cells if "injected-parameters" not in cell.metadata.get("tags", [])]
    for cell in source.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    with tempfile.TemporaryDirectory(prefix="vlm4vla-kernel-") as scratch, worker.unfinished(Path(scratch)):
        try:
            papermill.execute_notebook(
                source,
                str(copy.resolve()).replace("{", "{{").replace("}", "}}"),  # papermill formats its path
                parameters=dict(given),
                kernel_name="python3",
                language="python",
                progress_bar=sys.stderr.isatty(),
                start_timeout=180,
                kernel_manager_class=_own_kernel(copy.resolve().parent, Path(scratch), notebook.path.resolve().parent),
            )
        except PapermillExecutionError as error:
            raise NotebookFailed(_cell_failure(notebook, error)) from None
        except (DeadKernelError, RuntimeError) as error:
            raise NotebookFailed(f"the kernel of notebook '{notebook.name}' died ({error})") from None
    done = nbformat.read(copy, as_version=4)
    done.metadata.pop("papermill", None)  # temporary paths, no use to a reader
    nbformat.write(done, copy)


def _own_kernel(folder: Path, scratch: Path, beside: Path) -> type:
    """A kernel manager for this very interpreter, blind to kernels and startup files in the user's home.

    folder: where the run writes. scratch: connection files. beside: the notebook's folder, importable from.
    """
    from jupyter_client.kernelspec import KernelSpec
    from jupyter_client.manager import AsyncKernelManager

    spec = KernelSpec(
        argv=[sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}", "--HistoryManager.enabled=False"],
        language="python",
        display_name="Python 3",
        env={
            FOLDER_VARIABLE: str(folder),
            "IPYTHONDIR": str(scratch),
            "MPLBACKEND": "Agg",  # figures are shown by `pages.show`, never by themselves
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),  # small models are slower on many threads
            "PYTHONWARNINGS": "ignore:IProgress not found",  # of tqdm: a page has no use for its bars
            "PYTHONPATH": os.pathsep.join([str(beside), *filter(None, [os.environ.get("PYTHONPATH")])]),
            "PYDEVD_DISABLE_FILE_VALIDATION": "1",
        },
    )

    # Sockets in a folder: no ports that two kernels could race for, and nothing for others on the machine to read.
    # A socket's path must fit 104 characters (macOS); Windows has none.
    short = os.name == "posix" and len(str(scratch)) < 85
    transport = {"transport": "ipc"} if short else {}

    class OwnKernel(AsyncKernelManager):
        kernel_spec = spec

        def __init__(self, **settings: Any) -> None:
            super().__init__(connection_file=str(scratch / "kernel.json"), **transport, **settings)

        async def _async_launch_kernel(self, kernel_cmd: list[str], **settings: Any) -> None:
            with worker.LAUNCHING:
                await super()._async_launch_kernel(kernel_cmd, **settings)
                if process := getattr(self.provisioner, "pid", None):
                    worker.KERNELS.add(process)

        async def _async_cleanup_resources(self, restart: bool = False) -> None:
            worker.KERNELS.discard(getattr(self.provisioner, "pid", None) or 0)  # it has ended; the id may be reused
            await super()._async_cleanup_resources(restart)

        async def _async_interrupt_kernel(self) -> None:
            """Jupyter interrupts even an idle kernel before it asks it to end; the kernel then complains on stderr."""
            if not self.shutting_down:
                await super()._async_interrupt_kernel()

    return OwnKernel


def _cell_failure(notebook: Notebook, error: Any) -> str:
    """`notebook 'x' failed at In [3] (`table = …`): ValueError: …`, on one line."""
    first = next((line for line in error.source.splitlines() if line.strip()), "")
    why = " ".join(str(error.evalue).split())
    return f"notebook '{notebook.name}' failed at In [{error.exec_count}] (`{first.strip()}`): {error.ename}: {why}"
