"""`vlm4vla convert` and `vlm4vla inspect` as a user types them."""

from __future__ import annotations

import base64
import json
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tfds_bytes import bridge_episode, jpeg, write_tfds

from vlm4vla_core import images
from vlm4vla_core.actions import BRIDGE
from vlm4vla_core.cli import main
from vlm4vla_core.episodes.store import Episode, EpisodeStore, write_store
from vlm4vla_core.episodes.summary import contact_sheet, summarise


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_tfds(tmp_path / "mini" / "1.0.0", {"train": [[bridge_episode(n, steps=6) for n in range(3)]]})


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    text = capsys.readouterr().err
    assert text.count("\n") == 1, text
    return text


def test_convert_inspect_and_again(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "store"
    command = ["convert", "rlds", str(source.parent), "--out", str(out)]
    assert main([*command, "--json", str(tmp_path / "c.json")]) == 0
    text = capsys.readouterr().out
    assert "3 episodes, 12 steps, 2 instructions, cameras image_0 (" in text
    assert "black everywhere and left out: image_1" in text and "in up to 64 episodes" in text
    told = json.loads((tmp_path / "c.json").read_text())
    assert told["counts"] == {"episodes": 3, "steps": 12, "instructions": 2}
    assert told["account"]["black_cameras"] == ["image_1"]

    before = (out / "dataset.json").stat().st_mtime_ns
    (tmp_path / ".store.partial" / "parts").mkdir(parents=True)  # as after a kill at the very end
    assert main([*command, "--json", str(tmp_path / "again.json")]) == 0
    assert not (tmp_path / ".store.partial").exists()
    assert capsys.readouterr().out == f"{out} is up to date\n"
    assert (out / "dataset.json").stat().st_mtime_ns == before
    again = json.loads((tmp_path / "again.json").read_text())
    assert {**told, "frames_per_s": None} == again

    assert main([*command, "--size", "16"]) == 2  # a good store is never replaced by one with other settings
    assert "made with other settings" in one_line(capsys)
    assert (out / "dataset.json").stat().st_mtime_ns == before
    other = tmp_path / "other"
    command[4] = str(other)
    assert main([*command, "--size", "16"]) == 0
    assert EpisodeStore.open(other).images("image_0", [0]).shape == (1, 16, 16, 3)
    write_tfds(source, {"train": [[bridge_episode(7, steps=6)]]})
    assert main([*command, "--size", "16"]) == 2  # nor by one with other content
    next(other.glob("steps-*.arrow")).unlink()
    assert main([*command, "--size", "16"]) == 0  # a damaged one is made again
    assert len(EpisodeStore.open(other)) == 4

    capsys.readouterr()
    assert main(["inspect", str(other), "--sheet", str(tmp_path / "s.png"), "--json", str(tmp_path / "i.json")]) == 0
    text = capsys.readouterr().out
    assert "episodes  1 (1 train)" in text
    assert "do thing 1" in text
    with Image.open(tmp_path / "s.png") as sheet:
        assert sheet.format == "PNG"
    report = json.loads((tmp_path / "i.json").read_text())
    assert report["steps"] == 4
    assert len(report["dimensions"]) == 14


def test_a_store_of_a_newer_version_is_refused_and_never_replaced(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "store"
    assert main(["convert", "rlds", str(source), "--out", str(out)]) == 0
    manifest = json.loads((out / "dataset.json").read_text())
    (out / "dataset.json").write_text(json.dumps(manifest | {"version": manifest["version"] + 1, "config": {}}))
    capsys.readouterr()
    for command in (["inspect", str(out)], ["convert", "rlds", str(source), "--out", str(out)]):
        assert main(command) == 2
        assert "written by a newer vlm4vla (format 3, this one reads 2)" in one_line(capsys)
    assert json.loads((out / "dataset.json").read_text())["version"] == 3


def test_transform_and_cameras_can_be_chosen(source: Path, tmp_path: Path):
    out = tmp_path / "raw"
    command = ["convert", "rlds", str(source), "--out", str(out), "--transform", "none", "--cameras", "image_0"]
    assert main(command) == 0
    np.testing.assert_array_equal(EpisodeStore.open(out).action[:6], bridge_episode(0, steps=6)["steps/action"])


def test_the_order_of_cameras_is_the_user_s_and_decides_the_store(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    seen = [jpeg(200)] * 6
    source = write_tfds(tmp_path / "mini" / "1.0.0", {"train": [[bridge_episode(0, steps=6, image_1=seen)]]})
    for names in (("image_1", "image_0"), ("image_0", "image_1")):
        out = tmp_path / names[0]
        assert main(["convert", "rlds", str(source), "--out", str(out), "--cameras", *names]) == 0
        assert EpisodeStore.open(out).cameras == names
    capsys.readouterr()
    assert main(["convert", "rlds", str(source), "--out", str(out), "--cameras", *reversed(names)]) == 2
    assert "made with other settings" in one_line(capsys)


def fails(capsys: pytest.CaptureFixture[str], out: Path, source: Path, *more: str) -> str:
    """The command is refused with exit code 2 and one line; nothing is left beside the source."""
    before = sorted(out.parent.iterdir())
    assert main(["convert", "rlds", str(source), "--out", str(out), *more]) == 2
    assert sorted(out.parent.iterdir()) == before
    return one_line(capsys)


def test_bad_sources_exit_2_with_one_line(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "store"
    assert "no such folder" in fails(capsys, out, tmp_path / "gone")
    assert "no camera 'top'" in fails(capsys, out, source, "--cameras", "top")
    assert "no split 'dev'" in fails(capsys, out, source, "--split", "dev")
    assert "--size 0" in fails(capsys, out, source, "--size", "0")
    assert "--workers must be" in fails(capsys, out, source, "--workers", "0")
    for part in ("0/2", "3/2", "1/1", "2", "a/b"):
        assert f"--shard {part} is no part" in fails(capsys, out, source, "--shard", part)
    assert "rlds data have no option 'scenes'" in fails(capsys, out, source, "--scenes", "A")
    assert "no action convention 'bride'" in (line := fails(capsys, out, source, "--convention", "bride"))
    assert "did you mean 'bridge'" in line
    assert "rlds data have no option 'convention'" in fails(capsys, out, source, "--convention", "bridge")
    model = json.dumps(BRIDGE.to_dict())
    wrong = [("control_hz", -1), ("gripper_open", "open"), ("names", [1] * 7), ("relative", 1), ("frame", None)]
    typed = [(json.dumps(json.loads(model) | {key: value}), f"{key} cannot be") for key, value in wrong]
    for text, told in (
        ("[]", "no action convention"), (model.replace("frame", "fame"), "fame, frame"), ("{", "JSON"), *typed,
    ):  # fmt: skip
        (tmp_path / "c.json").write_text(text)
        assert told in fails(capsys, out, source, "--convention", str(tmp_path / "c.json"))
    (tmp_path / "c.json").write_text(model)
    assert "have no option 'convention'" in fails(capsys, out, source, "--convention", str(tmp_path / "c.json"))
    assert "transform 'libero' does not belong" in fails(capsys, out, source, "--transform", "libero")
    assert "black" in fails(capsys, out, source, "--cameras", "image_1")

    shard = source / "mini-train.tfrecord-00000-of-00001"
    data = shard.read_bytes()
    shard.write_bytes(data[:-10])
    line = fails(capsys, out, source)
    assert "cut short" in line
    assert f"{shard}, record 2" in line
    shard.write_bytes(data[:100] + bytes([data[100] ^ 255]) + data[101:])
    line = fails(capsys, out, source)
    assert "CRC mismatch" in line
    assert f"{shard}, record 0" in line

    action = bridge_episode(1)["steps/action"]
    action[3, 4] = np.nan
    write_tfds(source, {"train": [[bridge_episode(0), bridge_episode(1, action=action)]]})
    line = fails(capsys, out, source)
    assert "NaN in dimension 4 (pitch)" in line
    assert f"{shard}, record 1, step 3" in line

    write_tfds(source, {"train": [[bridge_episode(0, language_instruction=[b""] * 4)]]})
    line = fails(capsys, out, source)
    assert "no episodes to convert" in line
    assert "1 episodes without language" in line


def test_machines_do_their_parts_and_the_plain_command_finishes(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    units = [[bridge_episode(10 * unit + n, steps=6) for n in range(3)] for unit in range(3)]
    source = write_tfds(tmp_path / "mini" / "1.0.0", {"train": units, "val": [units[1][:2]]})
    command = ["convert", "rlds", str(source), "--out", str(tmp_path / "s"), "--encoding", "raw", "--size", "16"]
    for part in ("1/2", "2/2"):
        assert main([*command, "--shard", part]) == 0
        assert f"part {part} is done" in capsys.readouterr().out
    assert not (tmp_path / "s").exists()
    assert main([*command, "--size", "8"]) == 2
    assert "unfinished conversion with other settings" in one_line(capsys)
    assert main(command) == 0
    text = capsys.readouterr().out
    assert "9 episodes, 36 steps" in text and "2 episodes of split 'val' repeat an earlier split" in text
    command[4] = str(tmp_path / "one")
    assert main([*command, "--workers", "1"]) == 0
    one, both = EpisodeStore.open(tmp_path / "one"), EpisodeStore.open(tmp_path / "s")
    assert one.fingerprint == both.fingerprint
    jpeg_of = write_tfds(tmp_path / "x" / "1.0.0", {"train": units[:1]})  # raw is what the resized picture was
    assert main(["convert", "rlds", str(jpeg_of), "--out", str(tmp_path / "full")]) == 0
    full = EpisodeStore.open(tmp_path / "full").images("image_0", range(12), size=16)
    np.testing.assert_array_equal(both.images("image_0", range(12)), full)


def test_a_failed_conversion_keeps_the_old_store(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "store"
    assert main(["convert", "rlds", str(source), "--out", str(out)]) == 0
    action = bridge_episode(1)["steps/action"]
    action[0, 0] = np.inf
    write_tfds(source, {"train": [[bridge_episode(0), bridge_episode(1, action=action)]]})
    fails(capsys, out, source)
    assert len(EpisodeStore.open(out)) == 12


def test_inspect_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["inspect", str(tmp_path / "gone")]) == 2
    assert "no such folder" in one_line(capsys)
    (tmp_path / "empty").mkdir()
    assert main(["inspect", str(tmp_path / "empty")]) == 2
    assert "no known format of robot data" in one_line(capsys)
    (tmp_path / "empty" / "dataset.json").write_text("{}")
    assert main(["inspect", str(tmp_path / "empty")]) == 2
    assert "expected a episode store" in one_line(capsys)
    assert main(["inspect", str(tmp_path / "gone"), "--episodes", "0"]) == 2
    assert "--episodes must be at least 1" in one_line(capsys)


def test_inspect_data_that_are_not_converted_yet(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    silent = bridge_episode(9, steps=6, language_instruction=[b""] * 6)
    units = [[bridge_episode(10 * unit + n, steps=6) for n in range(4)] for unit in range(5)]
    source = write_tfds(
        tmp_path / "mini" / "1.0.0", {"train": [[silent, *units[0]], *units[1:]], "val": [units[2][:1]]}
    )
    told = tmp_path / "told.json"
    before = sorted(tmp_path.rglob("*"))
    assert main(["inspect", str(source.parent), "--episodes", "8", "--json", str(told)]) == 0
    text = capsys.readouterr().out
    assert (
        "looked at 8 episodes of rlds data, evenly spread over 6 parts, 1 episodes without language passed over" in text
    )
    assert "warning: camera image_1 is black" in text
    assert "warning: 1 episodes are in train and in val alike" in text
    report = json.loads(told.read_text())
    assert report["splits"] == {"train": 7, "val": 1} and report["steps"] == 8 * 4
    assert report["looked_at"].startswith("8 episodes of rlds data")
    assert sorted(tmp_path.rglob("*")) == sorted([*before, told])  # nothing else was written
    write_tfds(source, {"train": [[silent]]})
    assert main(["inspect", str(source)]) == 2
    assert "no episodes to look at" in (line := one_line(capsys)) and "1 without language" in line


class Reader(HTMLParser):
    """Tags with their attributes, and the text."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_is_whole_and_shows_the_histograms(tmp_path: Path):
    store = store_of(tmp_path / "s", [episode(n, instruction=f"<b>do</b> & thing {n}") for n in range(3)])
    assert main(["inspect", str(store.path), "--html", str(tmp_path / "sub" / "page.html")]) == 0
    html = (tmp_path / "sub" / "page.html").read_text()
    reader = Reader()
    reader.feed(html)
    assert "<b>do</b> & thing 2" in reader.text  # escaped in the source, literal to the reader
    pictures = [attrs["src"] for tag, attrs in reader.tags if tag == "img"]
    assert len(pictures) == 2 and all(src and src.startswith("data:image/jpeg;base64,") for src in pictures)
    assert "http" not in html.replace("http-equiv", "") and "<script" not in html
    shown = images.decode(base64.b64decode(str(pictures[0]).partition(",")[2]))
    assert shown.shape == contact_sheet(store, "front").shape
    # The first histogram: bars as high as an independent count of the same values says, lines at the quantiles.
    first = reader.tags[[tag for tag, _ in reader.tags].index("svg") :]
    bars = {}
    for tag, attrs in first[1:]:
        if tag == "svg":
            break
        if tag == "rect":
            bars[round(float(str(attrs["x"])) / 6)] = float(str(attrs["height"]))
    x = store.action[:, 0].astype(np.float64)
    place = np.clip(((x - x.min()) / (x.max() - x.min()) * 40).astype(int), 0, 39)
    counts = np.bincount(place, minlength=40)
    expected = {place: 70 * n / counts.max() for place, n in enumerate(counts) if n}
    assert bars == pytest.approx(expected, abs=0.06)
    lines = [float(str(attrs["x1"])) for tag, attrs in first[1:] if tag == "line"][:2]
    assert lines == pytest.approx(240 * (np.percentile(x, [1, 99]) - x.min()) / (x.max() - x.min()), abs=0.06)


# --- summary --------------------------------------------------------------------------------------------


def store_of(folder: Path, episodes: list[Episode]) -> EpisodeStore:
    return write_store(
        folder, episodes, source="made", convention=BRIDGE, state_names=BRIDGE.names, config={}, inputs={}
    )


def episode(seed: int, **change) -> Episode:
    rng = np.random.default_rng(seed)
    action = rng.normal(size=(50, 7)).astype(np.float32)
    action[:, 6] = np.arange(50) % 2
    parts = {"instruction": f"do thing {seed % 6} " + "very " * 40 * (seed == 2) + "well", "action": action}
    parts |= {"images": {"front": [jpeg(10 + seed)] * 50, "side": [jpeg(90, 16)] * 50}}
    return Episode(**(parts | {"state": rng.normal(size=(50, 7))} | change))


def test_summary_numbers(tmp_path: Path):
    store = store_of(tmp_path / "s", [episode(n) for n in range(4)])
    summary = summarise(store)
    assert summary.warnings == ()
    frame = summary.to_frame().set_index(["kind", "name"])
    x = store.action[:, 0].astype(np.float64)
    low, high = np.percentile(x, [1, 99])
    row = frame.loc[("action", "x")]
    np.testing.assert_allclose(
        row[["min", "q01", "mean", "q99", "max", "outside"]].astype(float),
        [x.min(), low, x.mean(), high, x.max(), np.mean((x < low) | (x > high))],
        rtol=1e-6,
    )
    assert row["outside"] == 0.02  # 2 + 2 of 200
    assert row["unit"] == "m"
    assert (summary.episodes, summary.steps, summary.lengths) == (4, 200, (50, 50, 50))
    assert summary.cameras == {"front": (8, 8), "side": (16, 16)}


def test_warnings(tmp_path: Path):
    still = episode(0).action.copy()
    still[:, 3], still[:, 6] = 0.25, 1
    black = {"front": [jpeg(0)] * 50, "side": [jpeg(90, 16)] * 50}
    bad = [episode(n, action=still, images=black, state=np.full((50, 7), float(n > 1))) for n in range(3)]
    still = still.copy()
    still[:, 6] = 0  # the gripper differs between episodes but never changes within one
    bad[2] = episode(2, action=still, images=black, state=np.ones((50, 7)), instruction="")
    found = "\n".join(summarise(store_of(tmp_path / "s", bad)).warnings)
    assert "camera front is black" in found
    assert "side" not in found
    assert "action dimension roll is constant (0.25)" in found
    assert "gripper command never changes" in found
    assert "1 of 3 episodes have no instruction" in found
    assert "1 episodes repeat another one" in found
    assert "alike" not in found
    both = "\n".join(summarise(store_of(tmp_path / "b", [episode(0), episode(1), episode(1, split="val")])).warnings)
    assert "1 episodes are in train and in val alike" in both


def test_contact_sheet_shows_one_episode_per_instruction(tmp_path: Path):
    made = [
        episode(n, images={"front": [jpeg(20 * n + 15)] * 50}) for n in range(12)
    ]  # 0 to 5, the same again; 8 differs from 2
    grey = contact_sheet(store_of(tmp_path / "s", made), "front", episodes=3, frames=2, cell=32)[..., 0].astype(int)
    shown = [n for n in range(12) if (np.abs(grey - (20 * n + 15)) <= 2).sum() >= 2 * 32 * 32 * 0.95]
    assert shown == [0, 3, 8]  # the first episodes of the first, the fourth and the last of seven instructions


@pytest.mark.samples
def test_bridge_sample_through_both_verbs(samples: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "store"
    assert main(["convert", "rlds", str(samples / "bridge_rlds_octo"), "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert "25 episodes, 200 steps, 4 instructions, cameras image_0, image_1, image_2 (" in text
    assert "25 episodes of split 'val' repeat an earlier split" in text
    assert main(["inspect", str(out), "--sheet", str(tmp_path / "sheet.png")]) == 0
    assert "nothing looks wrong" in capsys.readouterr().out
    store = EpisodeStore.open(out)
    expected = np.load(samples / "bridge_rlds_octo" / "openvla_bridge_orig_expected.npz")
    np.testing.assert_array_equal(store.action, np.concatenate([expected[f"action_{n:02d}"] for n in range(25)]))
    assert store.images("image_2", np.arange(200)).std() > 20
