"""Augmentations against slow literal references: pixel loops, colorsys, bilinear sampling by hand."""

from __future__ import annotations

import colorsys

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from vlm4vla_core.episodes.augment import (
    AUGMENTATIONS,
    BRIDGE,
    CALVIN,
    Augmentation,
    augment,
    cropped,
    recoloured,
    shifted,
)


@pytest.fixture(scope="module")
def picture() -> np.ndarray:
    """(12, 14, 3): noise of all brightnesses, and every kind of awkward pixel: grey, black, white, pure, ties."""
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (12, 14, 3)).astype(np.uint8)
    image[:4] = (rng.random((4, 14, 3)) * 60 + 100).astype(np.uint8)
    special = (
        [0, 0, 0],
        [255] * 3,
        [128] * 3,
        [255, 0, 0],
        [0, 255, 0],
        [0, 0, 255],
        [255, 255, 0],
        [9, 200, 200],
        [7, 0, 7],
    )
    image[-1, : len(special)] = special
    return image


def literal(image: np.ndarray, brightness=0.0, contrast=1.0, saturation=1.0, hue=0.0) -> np.ndarray:
    """Pixel by pixel in Python floats, HSV through colorsys; unrounded levels."""
    height, width, _ = image.shape
    pixels = [[[float(v) / 255 for v in image[i, j]] for j in range(width)] for i in range(height)]

    def clip(value: float) -> float:
        return min(1.0, max(0.0, value))

    pixels = [[[clip(v + brightness) for v in p] for p in row] for row in pixels]
    means = [sum(p[c] for row in pixels for p in row) / (height * width) for c in range(3)]
    pixels = [[[clip((v - m) * contrast + m) for v, m in zip(p, means, strict=True)] for p in row] for row in pixels]
    for row in pixels:
        for j, pixel in enumerate(row):
            h, s, v = colorsys.rgb_to_hsv(*pixel)
            row[j] = colorsys.hsv_to_rgb((h + hue) % 1.0, clip(s * saturation), v)
    return np.array(pixels) * 255


@pytest.mark.parametrize(
    "options",
    [
        {"brightness": 0.13}, {"brightness": -0.2}, {"contrast": 0.8}, {"contrast": 1.2},
        {"saturation": 0.8}, {"saturation": 1.2}, {"saturation": 3.0}, {"saturation": 0.0},
        {"hue": 0.05}, {"hue": -0.05}, {"hue": 0.4}, {"hue": -0.5},
        {"brightness": 0.2, "contrast": 1.2, "saturation": 1.2, "hue": 0.05},
        {"brightness": -0.07, "contrast": 0.83, "saturation": 0.91, "hue": -0.031},
    ],
)  # fmt: skip
def test_colours_against_the_literal_reference(picture: np.ndarray, options: dict[str, float]):
    found = recoloured(picture, **options)
    assert found.dtype == np.uint8
    assert np.abs(found - literal(picture, **options)).max() < 0.501  # rounding, and no more


def test_a_grey_picture_has_the_contrast_that_pillow_gives_it(picture: np.ndarray):
    """Where the definitions meet: all channels equal, so that there is one mean and no saturation."""
    grey = np.repeat(picture[..., :1], 3, axis=2)
    theirs = np.asarray(ImageEnhance.Contrast(Image.fromarray(grey)).enhance(0.8)).astype(int)
    assert np.abs(recoloured(grey, contrast=0.8).astype(int) - theirs).max() <= 1  # Pillow rounds mean and levels down
    np.testing.assert_array_equal(recoloured(grey, saturation=1.2, hue=0.05), grey)


def test_nothing_to_do_is_nothing_done(picture: np.ndarray):
    batch = picture[None]
    assert augment(batch, AUGMENTATIONS["none"], 0, 0) is batch
    assert recoloured(picture) is picture
    np.testing.assert_array_equal(recoloured(picture, hue=1.0), picture)


@pytest.mark.parametrize(("across", "down"), [(0, 0), (3, 0), (-3, 2), (0, -5), (10, -10), (-20, 20)])
def test_shift_pixel_by_pixel(picture: np.ndarray, across: int, down: int):
    height, width, _ = picture.shape
    found = shifted(picture, across, down)
    for i in range(height):
        for j in range(width):
            source = picture[min(max(i - down, 0), height - 1), min(max(j - across, 0), width - 1)]
            np.testing.assert_array_equal(found[i, j], source)


@pytest.mark.parametrize(("left", "top"), [(0.0, 0.0), (1.0, 1.0), (0.3, 0.8)])
def test_crop_is_bilinear_sampling(picture: np.ndarray, left: float, top: float):
    height, width, _ = picture.shape
    found, side = cropped(picture, 0.9, left, top), 0.9**0.5
    for i in range(height):
        for j in range(width):
            y = top * height * (1 - side) + (i + 0.5) * side - 0.5
            x = left * width * (1 - side) + (j + 0.5) * side - 0.5
            value = np.zeros(3)
            for row in (int(np.floor(y)), int(np.floor(y)) + 1):
                for column in (int(np.floor(x)), int(np.floor(x)) + 1):
                    weight = (1 - abs(y - row)) * (1 - abs(x - column))
                    value += weight * picture[min(max(row, 0), height - 1), min(max(column, 0), width - 1)]
            assert np.abs(found[i, j] - value).max() <= 1.01  # Pillow rounds after each direction


def test_a_picture_depends_on_seed_step_and_place_alone():
    pictures = np.random.default_rng(1).integers(0, 256, (8, 16, 16, 3)).astype(np.uint8)
    for augmentation in (BRIDGE, CALVIN):
        whole = augment(pictures, augmentation, 3, 7)
        parts = [augment(pictures[i : i + 2], augmentation, 3, 7, first=i) for i in (6, 0, 2, 4)]
        np.testing.assert_array_equal(np.concatenate([parts[k] for k in (1, 2, 3, 0)]), whole)
        for seed, step in ((4, 7), (3, 8)):
            other = augment(pictures, augmentation, seed, step)
            assert (other != whole).any(axis=(1, 2, 3)).all()
        same = augment(np.repeat(pictures[:1], 8, 0), augmentation, 3, 7)
        assert len({one.tobytes() for one in same}) == 8  # every place has draws of its own


def test_the_paper_s_ranges_are_covered_and_kept():
    """10,000 shifts are uniform on -10..10; a uniform grey picture shows the brightness that was drawn."""
    ramp = np.zeros((1, 41, 41, 3), np.uint8)
    ramp[0, :, :, 0], ramp[0, :, :, 1] = np.arange(41)[:, None], np.arange(41)
    seen = np.array([augment(ramp, CALVIN, 0, step)[0, 20, 20, :2].astype(int) - 20 for step in range(4000)])
    counts = np.stack([np.bincount(10 - seen[:, k], minlength=21) for k in range(2)])
    assert counts.shape == (2, 21)
    assert (((counts - 4000 / 21) ** 2 / (4000 / 21)).sum(1) < 45).all()  # chi-squared, 20 degrees: p = 0.001
    grey = np.full((500, 4, 4, 3), 128, np.uint8)
    light = augment(grey, BRIDGE, 0, 0)[:, 0, 0, 0] / 255 - 128 / 255
    assert np.abs(light).max() <= 0.2 + 1 / 255
    assert light.min() < -0.19 < 0.19 < light.max()


def test_one_option_does_not_change_the_draws_of_another(picture: np.ndarray):
    both = augment(picture[None], Augmentation(shift=2, brightness=0.1), 0, 0)
    apart = augment(augment(picture[None], Augmentation(shift=2), 0, 0), Augmentation(brightness=0.1), 0, 0)
    np.testing.assert_array_equal(both, apart)
