"""Reader for RLDS data as TensorFlow Datasets (TFDS) stores it: one record of a tfrecord file is one episode.

A folder has `dataset_info.json` (splits and records per shard), `features.json` (keys and shapes) and the files
NAME-SPLIT.tfrecord-XXXXX-of-YYYYY. Which key means what differs per dataset: one `Layout` per dataset says so.
Traps: splits may repeat each other; `has_image_*` flags may be 0 on real cameras, so they are ignored and what is
black is looked at instead; episodes may lack language. Everything left out is counted in `Report`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vlm4vla_core import folders, images
from vlm4vla_core.actions import BRIDGE, ActionConvention
from vlm4vla_core.episodes.store import Episode
from vlm4vla_core.episodes.tfrecord import Feature, parse_example, read_records
from vlm4vla_core.episodes.transforms import transform_named
from vlm4vla_core.errors import InputError, nearest

TEMPLATE = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
_INFO_FIX = "give the folder that holds dataset_info.json, or the one above"


@dataclass(frozen=True)
class Layout:
    """Which keys of a record mean what. cameras: a prefix; every image key under it is a camera of the rest's name."""

    action: str
    state: str
    cameras: str
    language: str
    origin: str
    convention: ActionConvention
    state_names: tuple[str, ...]
    transform: str


LAYOUTS: dict[str, Layout] = {
    "bridge_orig": Layout(
        action="steps/action",
        state="steps/observation/state",
        cameras="steps/observation/",
        language="steps/language_instruction",
        origin="episode_metadata/file_path",
        convention=BRIDGE,
        state_names=("x", "y", "z", "roll", "pitch", "yaw", "gripper"),
        transform="bridge_orig",
    )
}


@dataclass(frozen=True)
class RldsDataset:
    """An opened TFDS folder. shapes: key -> shape of one step; shards: split -> (file, records) in order."""

    folder: Path
    name: str
    version: str
    layout_name: str
    shapes: dict[str, tuple[int, ...]]
    cameras: tuple[str, ...]
    shards: dict[str, tuple[tuple[Path, int], ...]]

    @property
    def layout(self) -> Layout:
        return LAYOUTS[self.layout_name]

    def check_camera(self, camera: str) -> None:
        """Raises InputError when the data has no such camera."""
        if camera not in self.cameras:
            fix = nearest(camera, self.cameras)
            raise InputError(f"no camera '{camera}' in the data", where=self.folder, fix=fix)

    def records(self, split: str) -> int:
        return sum(count for _, count in self.shards[split])

    def files(self, splits: Iterable[str]) -> list[Path]:
        """Everything that the content of these splits depends on."""
        shards = [path for split in splits for path, _ in self.shards[split]]
        return [self.folder / "dataset_info.json", self.folder / "features.json", *shards]


@dataclass
class Report:
    """What reading met and left out; filled while `episodes` runs."""

    read: int = 0
    kept: int = 0
    no_language: int = 0
    too_short: int = 0
    duplicates: dict[str, int] = field(default_factory=dict)  # split -> episodes that an earlier split has too
    black_cameras: tuple[str, ...] = ()
    missing_images: dict[str, int] = field(default_factory=dict)  # camera -> absent images, stored black

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> list[str]:
        """Readable lines, none when nothing was left out."""
        out = []
        if self.black_cameras:
            out.append(f"black everywhere and left out: {', '.join(self.black_cameras)}")
        out += [f"{n} episodes of split '{split}' repeat an earlier split" for split, n in self.duplicates.items()]
        if self.no_language:
            out.append(f"{self.no_language} episodes without language left out")
        if self.too_short:
            out.append(f"{self.too_short} episodes too short for the transform left out")
        out += [f"{n} absent images of {camera} stored black" for camera, n in self.missing_images.items()]
        return out


# --- the folder -----------------------------------------------------------------------------------------


def find_folder(source: Path) -> Path:
    """The TFDS version folder at `source`, one or two levels below it. Raises InputError on none or several."""
    source = Path(source)
    if not source.is_dir():
        raise InputError("no such folder", where=source, fix=_INFO_FIX)
    for pattern in ("dataset_info.json", "*/dataset_info.json", "*/*/dataset_info.json"):
        found = sorted(path.parent for path in source.glob(pattern))
        if len(found) > 1:
            names = ", ".join(str(path.relative_to(source)) for path in found)
            raise InputError(f"several datasets here: {names}", where=source, fix="name one of them")
        if found:
            return found[0]
    raise InputError("no dataset_info.json here nor two levels below", where=source, fix=_INFO_FIX)


def open_rlds(source: Path) -> RldsDataset:
    """Open a TFDS folder and find its layout. Raises InputError when a file is missing, damaged or of no known kind."""
    folder = find_folder(source)
    info = folders.read_json(folder / "dataset_info.json", fix=_INFO_FIX)
    features = folders.read_json(folder / "features.json", fix="fetch features.json of the dataset too")
    try:
        name, version = str(info["name"]), str(info.get("version", ""))
        if info.get("fileFormat", "tfrecord") != "tfrecord":
            raise InputError(f"files of format '{info['fileFormat']}', only tfrecord is read", where=folder)
        shards = {str(split["name"]): tuple(_shards(folder, name, split)) for split in info["splits"]}
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        what = f"not a TFDS description ({type(error).__name__}: {error})"
        raise InputError(what, where=folder / "dataset_info.json", fix="fetch the file again") from None
    if not any(shards.values()):
        raise InputError("the dataset has no splits with files", where=folder / "dataset_info.json")
    for path, _ in (shard for split in shards.values() for shard in split):
        if not path.is_file():
            raise InputError("missing tfrecord file", where=path, fix="fetch it, dataset_info.json lists it")
    shapes: dict[str, tuple[int, ...]] = {}
    pictures: list[str] = []
    try:
        _flatten(features, "", shapes, pictures)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        what = f"not a TFDS feature description ({type(error).__name__}: {error})"
        raise InputError(what, where=folder / "features.json", fix="fetch the file again") from None
    layout_name = _layout_of(shapes, pictures, folder)
    prefix = LAYOUTS[layout_name].cameras
    cameras = tuple(sorted(key.removeprefix(prefix) for key in pictures if key.startswith(prefix)))
    return RldsDataset(folder, name, version, layout_name, shapes, cameras, shards)


def _shards(folder: Path, name: str, split: dict[str, Any]) -> Iterator[tuple[Path, int]]:
    lengths = [int(length) for length in split.get("shardLengths", [])]
    total = f"{len(lengths):05d}"
    template = split.get("filepathTemplate") or TEMPLATE
    for index, length in enumerate(lengths):
        values = {"DATASET": name, "SPLIT": split["name"], "FILEFORMAT": "tfrecord", "SHARD_INDEX": f"{index:05d}"}
        values |= {"NUM_SHARDS": total, "SHARD_X_OF_Y": f"{index:05d}-of-{total}"}
        yield folder / template.format(**values), length


def _flatten(node: dict[str, Any], key: str, shapes: dict[str, tuple[int, ...]], pictures: list[str]) -> None:
    """Walk features.json: nested names are joined by "/", as in the records."""
    if "featuresDict" in node:
        for name, child in node["featuresDict"]["features"].items():
            _flatten(child, f"{key}/{name}" if key else name, shapes, pictures)
    elif "sequence" in node:
        _flatten(node["sequence"]["feature"], key, shapes, pictures)
    elif "image" in node:
        shapes[key] = tuple(int(size) for size in node["image"]["shape"].get("dimensions", []))
        pictures.append(key)
    elif "text" in node:
        shapes[key] = ()
    elif "tensor" in node:
        shapes[key] = tuple(int(size) for size in node["tensor"]["shape"].get("dimensions", []))


def _layout_of(shapes: dict[str, tuple[int, ...]], pictures: list[str], folder: Path) -> str:
    for name, layout in LAYOUTS.items():
        fits = shapes.get(layout.action) == (layout.convention.size,)
        fits &= shapes.get(layout.state) == (len(layout.state_names),) and layout.language in shapes
        if fits and any(key.startswith(layout.cameras) for key in pictures):
            return name
    keys = ", ".join(f"{key}{list(shape)}" for key, shape in shapes.items() if key.startswith("steps/"))
    known = "; ".join(f"{name}: {spec.action}, {spec.state}, {spec.language}" for name, spec in LAYOUTS.items())
    raise InputError(f"no known dataset layout, it has {keys}", where=folder, fix=f"known layouts are {known}")


def choose_splits(dataset: RldsDataset, wanted: Iterable[str] = ()) -> tuple[str, ...]:
    """The splits to read, train first: the wanted ones, or by default train and val, as far as there are any.

    Raises InputError on an unknown split, or when there is neither train nor val to take by default.
    """
    wanted = tuple(dict.fromkeys(wanted)) or tuple(name for name in ("train", "val") if name in dataset.shards)
    for name in wanted:
        if name not in dataset.shards:
            raise InputError(f"no split '{name}'", where=dataset.folder, fix=nearest(name, dataset.shards))
    if not wanted:
        fix = f"choose with --split among: {', '.join(dataset.shards)}"
        raise InputError("no split named train or val", where=dataset.folder, fix=fix)
    return tuple(sorted(wanted, key=lambda name: name != "train"))


# --- the records ----------------------------------------------------------------------------------------


def _examples(dataset: RldsDataset, split: str) -> Iterator[tuple[dict[str, Feature], str, str]]:
    """Every record of a split, parsed; with its full place (for errors) and its short one (for the store)."""
    for path, expected in dataset.shards[split]:
        count = 0
        for count, data in enumerate(read_records(path), start=1):
            if count > expected:
                break
            place = f", record {count - 1}"
            yield parse_example(data, f"{path}{place}"), f"{path}{place}", f"{path.name}{place}"
        if count != expected:
            found = f"{count}" if count < expected else f"more than {expected}"
            raise InputError(
                f"{found} records found, dataset_info.json says {expected}", where=path, fix="fetch the file again"
            )


def seen_cameras(
    dataset: RldsDataset,
    splits: Iterable[str],
    cameras: Iterable[str] = (),
    progress: Callable[[int], Any] | None = None,
) -> tuple[dict[str, tuple[int, int]], tuple[str, ...]]:
    """Which of the wanted cameras (default: all) show anything: ({camera: (height, width)}, black ones).

    Reads on only until every camera has shown something; progress is called with 1 per record read.
    Raises InputError on an unknown camera and when none is left.
    """
    wanted = tuple(dict.fromkeys(cameras)) or dataset.cameras
    for camera in wanted:
        dataset.check_camera(camera)
    seen: dict[str, tuple[int, int]] = {}
    black: set[bytes] = set()  # black images of one source are equal bytes: look at each kind once
    for split in splits:
        for example, place, _ in _examples(dataset, split):
            for camera in (camera for camera in wanted if camera not in seen):
                for data in dict.fromkeys(_bytes(example, dataset.layout.cameras + camera, place)):
                    if not data or data in black:
                        continue
                    picture = _decode(data, camera, place)
                    if picture.max() > images.BLACK:
                        seen[camera] = picture.shape[:2]
                        break
                    black.add(data)
            if progress:
                progress(1)
            if len(seen) == len(wanted):
                return {camera: seen[camera] for camera in wanted}, ()
    left_out = tuple(camera for camera in wanted if camera not in seen)
    if not seen:
        raise InputError(f"nothing but black images from {', '.join(left_out)}", where=dataset.folder)
    return {camera: seen[camera] for camera in wanted if camera in seen}, left_out


def episodes(
    dataset: RldsDataset,
    splits: Iterable[str],
    cameras: dict[str, tuple[int, int]],
    report: Report,
    transform: str | None = None,
) -> Iterator[Episode]:
    """Transformed episodes of these splits, in file order; what is left out is counted in `report`.

    cameras: as from `seen_cameras`. transform: default the layout's own. An episode that an earlier split holds too
    (same raw actions and first images) is left out. Raises InputError on damaged files, on features of the wrong
    length and on NaN or infinite actions or states, naming file and record.
    """
    layout = dataset.layout
    apply = transform_named(transform or layout.transform)
    earlier: set[str] = set()
    for split in splits:
        here: set[str] = set()
        for example, place, short in _examples(dataset, split):
            report.read += 1
            action = _floats(example, layout.action, dataset, layout.convention.names, place)  # (T, A)
            state = _floats(example, layout.state, dataset, layout.state_names, place)  # (T, S)
            frames = {camera: _bytes(example, layout.cameras + camera, place) for camera in cameras}
            _same_length({"action": action, "state": state, **frames}, place)
            digest = hashlib.sha256(action.tobytes())
            for camera in frames:
                digest.update(frames[camera][0] if frames[camera] else b"")
            here.add(digest.hexdigest())
            if digest.hexdigest() in earlier:
                report.duplicates[split] = report.duplicates.get(split, 0) + 1
                continue
            texts = [text.decode("utf-8", "replace").strip() for text in _bytes(example, layout.language, place)]
            instruction = next(filter(None, texts), "")
            transformed, steps = apply(action, state)
            if not instruction:
                report.no_language += 1
            elif not len(steps):
                report.too_short += 1
            else:
                report.kept += 1
                origin = _bytes(example, layout.origin, place) if layout.origin in example else []
                yield Episode(
                    instruction=instruction,
                    images={c: _present(frames[c], steps, c, cameras[c], report) for c in cameras},
                    state=state[steps],
                    action=transformed,
                    split="train" if split == "train" else "val",
                    source=short,
                    info={"origin": origin[0].decode("utf-8", "replace") if origin else ""},
                )
        earlier |= here


def _present(frames: list[bytes], steps: np.ndarray, camera: str, size: tuple[int, int], report: Report) -> list[bytes]:
    """The kept steps' images; an absent one (an empty string) becomes a black image of the camera's size."""
    kept = [frames[step] for step in steps]
    if absent := kept.count(b""):
        report.missing_images[camera] = report.missing_images.get(camera, 0) + absent
        black = images.encode(np.zeros((*size, 3), np.uint8))
        kept = [frame or black for frame in kept]
    return kept


def _decode(data: bytes, camera: str, place: str) -> np.ndarray:
    try:
        return images.decode(data)
    except ValueError as error:
        raise InputError(f"image of camera '{camera}' cannot be read ({error})", where=place) from None


def _bytes(example: dict[str, Feature], key: str, place: str) -> list[bytes]:
    value = example.get(key, [])
    if isinstance(value, np.ndarray):
        raise InputError(f"'{key}' holds numbers where bytes belong", where=place)
    return value


def _floats(
    example: dict[str, Feature], key: str, dataset: RldsDataset, names: tuple[str, ...], place: str
) -> np.ndarray:
    """A number feature as (T, D); records hold it flat."""
    value, width = example.get(key), dataset.shapes[key][0]
    if not isinstance(value, np.ndarray) or value.size == 0 or value.size % width:
        size = len(value) if value is not None else 0
        raise InputError(f"'{key}' has {size} values, expected a multiple of {width}", where=place)
    rows = value.reshape(-1, width).astype(np.float32)
    if not np.isfinite(rows).all():
        step, index = np.argwhere(~np.isfinite(rows))[0]
        what = "NaN" if np.isnan(rows[step, index]) else "infinite"
        what = f"'{key}' is {what} in dimension {index} ({names[index]})"
        raise InputError(what, where=f"{place}, step {step}", fix="repair or drop the episode")
    return rows


def _same_length(parts: dict[str, Any], place: str) -> None:
    lengths = {name: len(part) for name, part in parts.items()}
    if len(set(lengths.values())) > 1:
        listing = ", ".join(f"{name} {length}" for name, length in lengths.items())
        raise InputError(f"features of unequal length: {listing}", where=place, fix="drop the episode")
