"""Object arrays of `.npy` files, such as CALVIN's `auto_lang_ann.npy`, read without executing anything.

A pickle may name any function and call it. Here a name is looked up in a short table (numpy's own way to rebuild
arrays, dtypes and scalars, under its old and new module names, and four plain builtins) and refused otherwise,
before anything of it is imported.
Trap: a damaged pickle raises nearly any exception, so all of them become one InputError.
"""

from __future__ import annotations

import codecs
import pickle
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from vlm4vla_core.episodes.checks import reason
from vlm4vla_core.errors import InputError


def _latin1(text: str, encoding: str) -> bytes:
    """What pickles of protocol 2 call to hold bytes; any other codec is refused."""
    if codecs.lookup(encoding).name != "iso8859-1":
        raise pickle.UnpicklingError(f"bytes in encoding '{encoding}'")
    return text.encode("latin-1")


def _admitted() -> dict[tuple[str, str], Any]:
    array: Any = np.zeros(1)
    reconstruct, scalar, frombuffer = array.__reduce__()[0], array[0].__reduce__()[0], array.__reduce_ex__(5)[0]
    table: dict[tuple[str, str], Any] = {("numpy", "ndarray"): np.ndarray, ("numpy", "dtype"): np.dtype}
    for core in ("numpy.core", "numpy._core"):  # numpy 1 and numpy 2
        table |= {(f"{core}.multiarray", "_reconstruct"): reconstruct, (f"{core}.multiarray", "scalar"): scalar}
        table[f"{core}.numeric", "_frombuffer"] = frombuffer
    for builtins in ("builtins", "__builtin__"):
        table |= {(builtins, kind.__name__): kind for kind in (set, frozenset, complex, bytearray)}
    return table | {("_codecs", "encode"): _latin1}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        table = _admitted()
        if (module, name) not in table:
            raise pickle.UnpicklingError(f"it names '{module}.{name}', only numpy arrays and plain values are read")
        return table[module, name]

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("it refers to something outside itself")


def load_npy(path: Path) -> Any:
    """The content of a `.npy` file: an array, or the object inside an object array of shape ().

    Raises InputError when it is missing, damaged, or names a class that is not admitted.
    """
    try:
        with Path(path).open("rb") as handle:
            array = _read(handle)
    except OSError as error:
        raise InputError(f"cannot be read ({error.strerror or error})", where=path) from None
    except Exception as error:  # see the module's trap
        raise InputError(
            f"not a readable .npy file ({reason(error)})", where=path, fix="fetch the file again"
        ) from None
    return array.item() if array.dtype.hasobject and array.shape == () else array


def _read(handle: BinaryIO) -> np.ndarray:
    version = np.lib.format.read_magic(handle)
    header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = header(handle)
    if not dtype.hasobject:
        handle.seek(0)
        return np.lib.format.read_array(handle, allow_pickle=False)
    array = _Unpickler(handle).load()
    if not isinstance(array, np.ndarray) or array.shape != shape:
        raise ValueError("its content is not the array that its header tells")
    return array
