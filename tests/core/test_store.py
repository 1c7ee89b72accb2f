"""The episode store: what goes in comes out, equal input gives equal bytes, bad input leaves nothing behind."""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from vlm4vla_core import folders, images
from vlm4vla_core.actions import BRIDGE
from vlm4vla_core.episodes import writer
from vlm4vla_core.episodes.store import Episode, EpisodeStore, statistics, write_store
from vlm4vla_core.errors import InputError

LENGTHS = (5, 3, 7)


def smooth(rng: np.random.Generator, steps: int, size: int) -> np.ndarray:
    """Images that JPEG keeps well: slow gradients."""
    x, y = np.meshgrid(np.linspace(0, 1, size), np.linspace(0, 1, size))
    a, b, c = rng.uniform(40, 200, (3, steps, 1, 1, 3))
    return (a * 0.4 + 0.3 * b * x[None, ..., None] + 0.3 * c * y[None, ..., None]).astype(np.uint8)


def make(lengths: tuple[int, ...] = LENGTHS, size: int = 16, seed: int = 0) -> list[Episode]:
    rng = np.random.default_rng(seed)
    return [
        Episode(
            instruction=f"do thing {number % 2}",
            images={"front": smooth(rng, steps, size), "wrist": smooth(rng, steps, 2 * size)},
            state=rng.normal(size=(steps, 7)).astype(np.float32),
            action=rng.normal(size=(steps, 7)).astype(np.float32),
            columns={"truth/objects": rng.normal(size=(steps, 3)).astype(np.float32)},
            split="val" if number == 1 else "train",
            source=f"file, record {number}",
            info={"task": "touch", "seed": str(number)},
        )
        for number, steps in enumerate(lengths)
    ]


def write(out: Path, episodes: list[Episode] | Iterator[Episode], **more) -> EpisodeStore:
    settings = {"source": "made", "convention": BRIDGE, "state_names": BRIDGE.names, "config": {"n": 1}, "inputs": {}}
    return write_store(out, episodes, **settings, **more)


def test_what_goes_in_comes_out(tmp_path: Path):
    episodes = make()
    store = write(
        tmp_path / "s",
        iter(episodes),
        column_names={"truth/objects": ("cube/x", "cube/y", "cube/z")},
    )
    assert len(store) == 15
    np.testing.assert_array_equal(store.action, np.concatenate([e.action for e in episodes]))
    np.testing.assert_array_equal(store.state, np.concatenate([e.state for e in episodes]))
    np.testing.assert_array_equal(
        store.column("truth/objects"), np.concatenate([e.columns["truth/objects"] for e in episodes])
    )
    assert store.column_names("truth/objects") == ("cube/x", "cube/y", "cube/z")
    assert store.episode_of.tolist() == np.repeat([0, 1, 2], LENGTHS).tolist()
    assert store.step_of.tolist() == [*range(5), *range(3), *range(7)]
    assert (store.cameras, store.state_names, store.convention) == (("front", "wrist"), BRIDGE.names, BRIDGE)
    table = store.episodes
    assert table["start"].tolist() == [0, 5, 8]
    assert table["length"].tolist() == list(LENGTHS)
    assert table["instruction"].tolist() == store.instructions == ["do thing 0", "do thing 1", "do thing 0"]
    assert table["split"].tolist() == ["train", "val", "train"]
    assert table["source"].tolist() == [e.source for e in episodes]
    assert table["seed"].tolist() == ["0", "1", "2"]
    assert not store.action.flags.writeable
    assert len(set(store.content)) == 3


def test_images_come_out_near_and_resized_like_pillow(tmp_path: Path):
    episodes = make()
    store = write(tmp_path / "s", episodes)
    found = store.images("front", [14, 0, 6])
    assert (found.shape, found.dtype) == ((3, 16, 16, 3), np.uint8)
    for picture, original in zip(
        found,
        [episodes[2].images["front"][6], episodes[0].images["front"][0], episodes[1].images["front"][1]],
        strict=True,
    ):
        assert np.abs(picture.astype(int) - original).max() <= 6  # JPEG at quality 95 on a gradient
    pillow = Image.fromarray(found[1]).resize((24, 24), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(store.images("front", [14, 0, 6], size=24)[1], np.asarray(pillow))
    np.testing.assert_array_equal(images.decode(store.jpeg("front", 0)), found[1])
    assert store.images("wrist", []).shape == (0, 32, 32, 3)
    np.testing.assert_array_equal(store.images("front", (row for row in (14, 0, 6))), found)  # read once


def test_jpeg_bytes_are_copied_where_they_fit_and_made_anew_where_not(tmp_path: Path):
    def encoded(value: int, kind: str) -> bytes:
        buffer = io.BytesIO()
        Image.new("RGB", (16, 16), (value, 50, 90)).save(buffer, kind)
        return buffer.getvalue()

    jpegs = [encoded(value, "JPEG") for value in (10, 20, 30, 40, 50)]
    episode = replace(make((5,))[0], images={"front": jpegs})
    assert [write(tmp_path / "a", [episode]).jpeg("front", row) for row in range(5)] == jpegs
    assert [write(tmp_path / "b", [episode], image_size=16).jpeg("front", row) for row in range(5)] == jpegs
    small = write(tmp_path / "c", [episode], image_size=8)
    assert small.manifest["cameras"] == {"front": [8, 8]}
    assert np.abs(small.images("front", [3])[0].astype(int) - (40, 50, 90)).max() <= 4
    pngs = replace(episode, images={"front": [encoded(value, "PNG") for value in (10, 20, 30, 40, 50)]})
    made = write(tmp_path / "d", [pngs])
    assert made.jpeg("front", 0)[:2] == b"\xff\xd8"
    assert np.abs(made.images("front", [3])[0].astype(int) - (40, 50, 90)).max() <= 4


def test_equal_episodes_give_equal_bytes(tmp_path: Path):
    first, second = write(tmp_path / "a", make()), write(tmp_path / "b", make())
    assert first.fingerprint == second.fingerprint
    for name in ("stats.json", "episodes.arrow", "steps-00000.arrow"):
        assert (first.path / name).read_bytes() == (second.path / name).read_bytes()
    assert write(tmp_path / "c", make(seed=1)).fingerprint != first.fingerprint


def test_many_steps_go_into_several_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    whole = write(tmp_path / "one", make())
    monkeypatch.setattr(writer, "STEPS_PER_SHARD", 6)  # shards of whole episodes: 5 + 3 steps, then 7
    parts = write(tmp_path / "two", make())
    assert parts.manifest["shards"] == ["steps-00000.arrow", "steps-00001.arrow"]
    assert [len(shard.table) for shard in parts._shards] == [8, 7]
    for name in ("state", "action", "episode_of", "step_of"):
        np.testing.assert_array_equal(getattr(parts, name), getattr(whole, name))
        assert not getattr(parts, name).flags.writeable
    assert [parts.jpeg("wrist", row) for row in range(15)] == [whole.jpeg("wrist", row) for row in range(15)]
    rows = [14, 3, 4, 0, 11, 12]
    np.testing.assert_array_equal(parts.images("front", rows), whole.images("front", rows))


def test_statistics_are_those_of_all_steps(tmp_path: Path):
    store = write(tmp_path / "s", make((60, 41)))
    values = np.sort(store.action.astype(np.float64), axis=0)
    # 101 values: the 1 % and 99 % points fall exactly on the second and the last but one
    np.testing.assert_allclose(store.stats["action"]["q01"], values[1], rtol=1e-12)
    np.testing.assert_allclose(store.stats["action"]["q99"], values[-2], rtol=1e-12)
    np.testing.assert_allclose(store.stats["action"]["mean"], values.sum(0) / 101, rtol=1e-9)
    np.testing.assert_allclose(store.stats["action"]["std"], np.sqrt(((values - values.mean(0)) ** 2).sum(0) / 101))
    assert store.stats["action"]["min"] == values[0].tolist()
    assert store.stats["action"]["max"] == values[-1].tolist()
    assert store.stats["count"] == store.stats["state"]["count"] == 101
    assert statistics(np.array([[0.0], [1.0]]))["q01"] == [0.01]  # linear interpolation


def test_a_store_travels_to_another_process(tmp_path: Path):
    store = write(tmp_path / "s", make())
    again = pickle.loads(pickle.dumps(store))
    np.testing.assert_array_equal(again.images("front", [2]), store.images("front", [2]))


# --- bad input ------------------------------------------------------------------------------------------


def refused(tmp_path: Path, episodes: list[Episode], pattern: str, **more) -> None:
    with pytest.raises(InputError, match=pattern):
        write(tmp_path / "s", episodes, **more)
    assert list(tmp_path.iterdir()) == []  # nothing half-written


@pytest.mark.parametrize("name", ["action", "state"])
@pytest.mark.parametrize(("value", "word"), [(np.nan, "NaN"), (-np.inf, "infinite"), (1e300, "infinite")])
def test_nan_and_infinity_name_episode_step_and_dimension(tmp_path: Path, name: str, value: float, word: str):
    episodes = make()
    bad = getattr(episodes[2], name).astype(np.float64)
    bad[4, 2] = value
    episodes[2] = replace(episodes[2], **{name: bad})
    refused(tmp_path, episodes, rf"'{name}' is {word} in dimension 2 \(z\) \[file, record 2, step 4\]")


def test_other_broken_episodes_are_refused(tmp_path: Path):
    first, second, third = make()
    refused(tmp_path, [], "no episodes")
    empty = replace(second, state=second.state[:0], action=second.action[:0], source="file, record 9")
    refused(tmp_path, [first, empty], r"without steps \[file, record 9\]")
    refused(
        tmp_path,
        [first, replace(second, action=second.action[:, :6])],
        r"'action' has shape \(3, 6\), expected \(T, 7\)",
    )
    refused(tmp_path, [first, replace(second, state=second.state[:2])], "unequal length: state 2, action 3")
    refused(tmp_path, [first, replace(second, images={"front": second.images["front"]})], "cameras are")
    short = {**second.images, "wrist": second.images["wrist"][:2]}
    refused(tmp_path, [first, replace(second, images=short)], "2 images of camera 'wrist' for 3 steps")
    refused(tmp_path, [first, replace(second, images=make(size=12)[1].images)], "changes its image size")
    broken = {**second.images, "wrist": [b"\xff\xd8 no image"] * 3}
    refused(tmp_path, [first, replace(second, images=broken)], r"'wrist' cannot be read .*record 1, step 0")
    refused(tmp_path, [first, replace(second, columns={})], "columns are")
    refused(tmp_path, [replace(first, split="test")], "unknown split 'test'")
    refused(tmp_path, [replace(third, info={"length": "3"})], "info may not be named length")


def test_a_folder_of_other_things_is_never_replaced(tmp_path: Path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "dear.jpg").write_bytes(b"1")
    with pytest.raises(InputError, match="no episode store"):
        write(tmp_path / "photos", make())
    assert (tmp_path / "photos" / "dear.jpg").read_bytes() == b"1"


def damaged(store: EpisodeStore, pattern: str) -> None:
    with pytest.raises(InputError, match=pattern) as caught:
        EpisodeStore.open(store.path)
    assert "\n" not in str(caught.value)


def rewrite_manifest(store: EpisodeStore, **change: object) -> None:
    path = store.path / "dataset.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))


def test_opening_tells_what_is_wrong(tmp_path: Path):
    with pytest.raises(InputError, match=r"no such folder.*gone"):
        EpisodeStore.open(tmp_path / "gone")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"no dataset\.json"):
        EpisodeStore.open(tmp_path / "empty")

    store = write(tmp_path / "s", make())
    shard = store.path / "steps-00000.arrow"
    data = shard.read_bytes()
    shard.write_bytes(data[:-100])
    damaged(store, r"bytes, the manifest says .*steps-00000\.arrow")
    shard.write_bytes(bytes(len(data)))
    damaged(store, r"damaged or cut short .*steps-00000\.arrow")
    shard.unlink()
    damaged(store, r"missing .*steps-00000\.arrow")

    flipped = bytearray(data)
    flipped[len(data) // 2] ^= 1
    shard.write_bytes(flipped)
    with pytest.raises(InputError, match="content differs"):
        EpisodeStore.open(store.path, hashes=True)
    shard.write_bytes(data)
    assert len(EpisodeStore.open(store.path, hashes=True)) == 15

    rewrite_manifest(store, counts={"episodes": 3, "steps": 16})
    damaged(store, "15 steps found, the manifest says 16")
    rewrite_manifest(store, counts={"episodes": 0, "steps": 0})
    damaged(store, "the store is empty")
    rewrite_manifest(store, convention=None)
    damaged(store, "damaged episode store|empty")
    rewrite_manifest(store, version=folders.format_version("episodes") + 1)
    damaged(store, "newer vlm4vla")
    (store.path / "dataset.json").write_text("{")
    damaged(store, "not valid JSON")


def test_a_cut_shard_of_any_length_is_told(tmp_path: Path):
    store = write(tmp_path / "s", make((2,), size=8))
    shard = store.path / "episodes.arrow"
    data = shard.read_bytes()
    manifest = json.loads((store.path / "dataset.json").read_text())
    for length in range(0, len(data), 97):
        shard.write_bytes(data[:length])
        manifest["files"]["episodes.arrow"]["bytes"] = length  # so that the shorter file itself must be noticed
        (store.path / "dataset.json").write_text(json.dumps(manifest))
        damaged(store, r"episodes\.arrow")


def test_asking_for_what_is_not_there(tmp_path: Path):
    store = write(tmp_path / "s", make())
    with pytest.raises(InputError, match=r"no camera 'fornt'.*did you mean 'front'"):
        store.images("fornt", [0])
    with pytest.raises(InputError, match=r"no column 'truth/object'.*did you mean 'truth/objects'"):
        store.column("truth/object")
    for row in (-1, 15):
        with pytest.raises(IndexError, match="15 steps"):
            store.jpeg("front", row)


# --- raw images, depth, segmentation, older stores ------------------------------------------------------


def layered(lengths: tuple[int, ...] = LENGTHS) -> list[Episode]:
    rng = np.random.default_rng(5)
    return [
        replace(
            episode,
            depth={"front": rng.integers(0, 2**16, (len(episode.action), 12, 9)).astype(np.uint16)},
            depth_unit=0.0001,
            segmentation={"wrist": np.cumsum(rng.random((len(episode.action), 7, 11)) < 0.1, axis=2).astype(np.uint8)},
        )
        for episode in make(lengths)
    ]


def test_depth_and_segmentation_are_lossless(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(writer, "STEPS_PER_SHARD", 6)
    episodes = layered()
    store = write(tmp_path / "s", episodes, image_size=8)  # layers keep their own size
    depth = np.concatenate([episode.depth["front"] for episode in episodes])
    labels = np.concatenate([episode.segmentation["wrist"] for episode in episodes])
    found = store.depth("front", range(15))
    assert found.dtype == np.uint16 and store.segmentation("wrist", [0]).dtype == np.uint8
    np.testing.assert_array_equal(found, depth)
    np.testing.assert_array_equal(store.segmentation("wrist", [14, 2]), labels[[14, 2]])
    assert store.manifest["depth"] == {"front": {"size": [12, 9], "unit": 0.0001}}
    assert store.depth("front", []).shape == (0, 12, 9)
    with pytest.raises(InputError, match=r"no depth of camera 'wrist'.*known: front"):
        store.depth("wrist", [0])
    with pytest.raises(InputError, match="no column 'depth/front'"):
        store.column("depth/front")


def test_broken_layers_are_refused(tmp_path: Path):
    first, second, _ = layered()
    refused(tmp_path, [first, replace(second, depth={})], r"depths are \[\], in earlier episodes \['front'\]")
    refused(tmp_path, [first, replace(second, depth_unit=0.001)], "the unit of depth changes")
    metres = {"front": second.depth["front"].astype(np.float32)}
    refused(tmp_path, [first, replace(second, depth=metres)], r"depth of camera 'front' is float32 .*expected uint16")
    small = {"wrist": second.segmentation["wrist"][:, :5]}
    refused(tmp_path, [first, replace(second, segmentation=small)], r"segmentation .*\(3, 5, 11\), expected .*7, 11")


def test_damaged_depth_is_told_with_its_row(tmp_path: Path):
    store = write(tmp_path / "s", layered((4,)))
    shard = store.path / "steps-00000.arrow"
    packed = bytes(store._view("depth", "front", 2))
    shard.write_bytes(shard.read_bytes().replace(packed, bytes(len(packed))))
    with pytest.raises(InputError, match="damaged depth of camera 'front' at row 2"):
        EpisodeStore.open(store.path).depth("front", [0, 2])


def test_raw_images_are_exact_and_jpeg_is_made_of_them(tmp_path: Path):
    episodes = make()
    store = write(tmp_path / "s", episodes, encoding="raw")
    expected = np.concatenate([episode.images["front"] for episode in episodes])
    np.testing.assert_array_equal(store.images("front", range(15)), expected)
    assert store.manifest["images"]["encoding"] == "raw"
    assert np.abs(images.decode(store.jpeg("front", 9)).astype(int) - expected[9]).max() <= 6
    again = pickle.loads(pickle.dumps(store))
    np.testing.assert_array_equal(again.images("front", [9], size=8), images.resize(expected[[9]], 8))
    half = write(tmp_path / "h", episodes, encoding="raw", image_size=8)
    np.testing.assert_array_equal(half.images("wrist", [14]), images.resize(episodes[2].images["wrist"][6:], 8))


def test_shards_are_cut_by_the_size_of_pictures_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(writer, "BYTES_PER_SHARD", 8 * 16 * 16 * 3 * 5)  # 8 steps of 16 and 32 pixels
    store = write(tmp_path / "s", make(), encoding="raw")
    assert [len(shard.table) for shard in store._shards] == [8, 7]


def test_an_image_of_another_size_than_declared_is_damage(tmp_path: Path):
    store = write(tmp_path / "s", make((2,)))
    for size in ([8, 8], [16, 12], [32, 32]):
        rewrite_manifest(store, cameras={**store.manifest["cameras"], "front": size})
        with pytest.raises(InputError, match="damaged image of camera 'front' at row 1"):
            EpisodeStore.open(store.path).images("front", [1])


def test_a_store_of_the_first_version_keeps_opening(tmp_path: Path):
    """That version had the columns episode and step in its shards, which cut through episodes."""
    store = write(tmp_path / "s", make())
    expected = {"state": store.state.copy(), "pictures": store.images("wrist", range(15)).copy()}
    table = store._shards[0].table
    for name in ("step", "episode"):
        table = table.add_column(0, name, pa.array(store.column(name)))
    manifest = json.loads((store.path / "dataset.json").read_text())
    for key in ("depth", "segmentation", "domains", "seeds", "shards"):
        del manifest[key]
    del manifest["images"]["encoding"], manifest["files"]["steps-00000.arrow"]
    for number, rows in enumerate((slice(0, 6), slice(6, 15))):
        name = f"steps-{number + 5:05d}.arrow"  # beside the mapped one
        batch = table.slice(rows.start, rows.stop - rows.start).combine_chunks().to_batches()[0]
        with pa.OSFile(str(store.path / name), "wb") as sink, pa.ipc.new_file(sink, batch.schema) as out:
            out.write_batch(batch)
        manifest["files"][name] = {"bytes": (store.path / name).stat().st_size, "sha256": ""}
    (store.path / "dataset.json").write_text(json.dumps(manifest | {"version": 1}))
    old = EpisodeStore.open(store.path)
    np.testing.assert_array_equal(old.state, expected["state"])
    np.testing.assert_array_equal(old.images("wrist", range(15)), expected["pictures"])
    assert old.step_of.tolist() == [*range(5), *range(3), *range(7)]
    assert old.column("episode").tolist() == np.repeat([0, 1, 2], LENGTHS).tolist()
