"""Films for people: captions, endings, what a player gets."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vlm4vla_core.errors import InputError
from vlm4vla_core.film import captioned, write_video


def test_captions_enlarge_the_picture_and_keep_long_words_whole() -> None:
    frame = np.random.default_rng(0).integers(0, 255, (56, 56, 3), dtype=np.uint8)
    short = captioned(frame, "touch the red cube")
    assert short.shape == (246, 224, 3)
    np.testing.assert_array_equal(short[22:], frame.repeat(4, 0).repeat(4, 1))
    long = captioned(
        frame, "stack the yellow cylinder on the purple cylinder and the purple cube on the yellow cylinder"
    )
    assert (long[:22, -4:] == 255).all() and (long[12:22] < 128).any() and (long[:10] < 128).any()  # two lines, inside
    told = captioned(frame, "touch the red cube", outcome="reached in 5 steps")
    assert (told[-20:-2, :4] == 0).all() and (told[-22:, -20:] == short[-22:, -20:]).all()


def test_small_things_keep_their_colour_in_a_gif(tmp_path: Path) -> None:
    """Hundreds of shades of wood, and one small thing of each colour, which must not be painted in another's."""
    shades = np.random.default_rng(0).integers(0, 60, (96, 96, 3))
    frame = (np.array([190, 140, 95]) - shades * np.array([1.0, 0.9, 0.7])).astype(np.uint8)
    colours = np.array([[220, 30, 30], [30, 170, 60], [35, 75, 230], [245, 210, 30], [150, 50, 190], [30, 200, 215]])
    for k, colour in enumerate(colours):
        frame[10 + 14 * k : 13 + 14 * k, 40:43] = colour
    write_video(tmp_path / "a.gif", [frame, frame[::-1]], 5)
    with Image.open(tmp_path / "a.gif") as film:
        shown = np.array(film.convert("RGB")).astype(int)
    assert np.abs(shown - frame).max() < 30


@pytest.mark.parametrize("ending", [".mp4", ".gif"])
def test_a_film_holds_its_frames(tmp_path: Path, ending: str) -> None:
    frames = [np.full((57, 64, 3), shade, np.uint8) for shade in (0, 120, 250)]  # an odd height
    path = tmp_path / "new" / f"film{ending}"
    write_video(path, frames, fps=5)
    if ending == ".mp4":
        import av

        with av.open(str(path)) as film:
            seen = [frame.to_ndarray(format="rgb24").mean() for frame in film.decode(video=0)]
    else:
        from PIL import ImageSequence

        with Image.open(path) as pages:
            seen = [np.asarray(page.convert("RGB")).mean() for page in ImageSequence.Iterator(pages)]
    np.testing.assert_allclose(seen, [0, 120, 250], atol=4)
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_bad_films_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"\.mp4 or \.gif"):
        write_video(tmp_path / "a.avi", [np.zeros((8, 8, 3), np.uint8)], 5)
    with pytest.raises(InputError, match="no frames"):
        write_video(tmp_path / "a.gif", [], 5)


def test_an_action_fits_under_a_narrow_picture() -> None:
    from vlm4vla_core.film import numbers

    text = numbers(np.array([0.5, -0.25, 0.012, 0, 0.1, -1, 1]))
    assert text == "+0.50 -0.25 +0.012 +0.000 +0.10 -1.00 +1.00"
    plain = captioned(np.full((112, 112, 3), 128, np.uint8), "look")
    below = captioned(np.full((112, 112, 3), 128, np.uint8), "look", outcome=text)
    band = (below != plain).any(2)
    assert band[-22:].any() and not band[:-24].any()
    assert (below[-20:-2].min(2) > 200).any() and not (below[-20:-2, -4:].min(2) > 200).any()  # no letter at the edge
