"""Image augmentations of the paper: a random shift (CALVIN), or crop, brightness, contrast, saturation and hue.

Every picture's draws are a function of (seed, step, its place in the global batch), so a resumed run, another number of
processes or of workers sees the same pictures. Colours follow TensorFlow's definitions, as OpenVLA's data code uses
them: float arithmetic from the first operation to the last, clipped to the range after each, rounded once.
Trap: Pillow's ImageEnhance means something else by the same words (contrast about the grey mean of the whole picture,
saturation as a mixture with luma).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Augmentation:
    """What is done to a picture, in this order.

    shift: up to so many pixels each way, the border repeated. crop: area of a square crop at a random place, resized
    back (bilinear). brightness: up to so much of the range added. contrast: factor about each channel's mean.
    saturation: factor, as in HSV. hue: up to so many turns of the colour circle.
    """

    shift: int = 0
    crop: float = 1.0
    brightness: float = 0.0
    contrast: tuple[float, float] = (1.0, 1.0)
    saturation: tuple[float, float] = (1.0, 1.0)
    hue: float = 0.0


CALVIN = Augmentation(shift=10)
BRIDGE = Augmentation(crop=0.9, brightness=0.2, contrast=(0.8, 1.2), saturation=(0.8, 1.2), hue=0.05)
AUGMENTATIONS = {"none": Augmentation(), "calvin": CALVIN, "bridge": BRIDGE, "libero": BRIDGE}


def augment(images: np.ndarray, augmentation: Augmentation, seed: int, step: int, *, first: int = 0) -> np.ndarray:
    """A batch of pictures uint8 (B, H, W, 3), each augmented by its own draws; the same shape.

    first: place of images[0] in the global batch (the start of `sampling.rank_slice`). Returns a new array, or the very
    same one when there is nothing to do.
    """
    if augmentation == Augmentation():
        return images
    out = np.empty_like(images)
    for index, image in enumerate(images):
        # All draws are always made, so that one option does not change the draws of another.
        across, down, left, top, light, contrast, saturation, hue = _draws(seed, step, first + index)
        if augmentation.shift:
            span = 2 * augmentation.shift + 1
            image = shifted(image, int(across * span) - augmentation.shift, int(down * span) - augmentation.shift)
        if augmentation.crop < 1:
            image = cropped(image, augmentation.crop, left, top)
        out[index] = recoloured(
            image,
            brightness=(2 * light - 1) * augmentation.brightness,
            contrast=_between(augmentation.contrast, contrast),
            saturation=_between(augmentation.saturation, saturation),
            hue=(2 * hue - 1) * augmentation.hue,
        )
    return out


def _draws(seed: int, step: int, index: int) -> list[float]:
    """Eight numbers in [0, 1)."""
    return np.random.default_rng([seed, step, index, 8]).random(8).tolist()


def _between(limits: tuple[float, float], draw: float) -> float:
    return limits[0] + draw * (limits[1] - limits[0])


def shifted(image: np.ndarray, across: int, down: int) -> np.ndarray:
    """The picture (H, W, 3) moved right and down by whole pixels; what comes in repeats the border."""
    height, width = image.shape[:2]
    rows = np.clip(np.arange(height) - down, 0, height - 1)
    out, across = image[rows], max(-width, min(width, across))
    if across > 0:  # slices, since picking columns one by one takes longer than decoding the picture
        out[:, across:] = out[:, :-across].copy()
        out[:, :across] = image[rows, :1]
    elif across < 0:
        out[:, :across] = out[:, -across:].copy()
        out[:, across:] = image[rows, -1:]
    return out


def cropped(image: np.ndarray, area: float, left: float, top: float) -> np.ndarray:
    """A crop of this share of the area and the picture's own shape, resized back to (H, W, 3) bilinearly.

    left, top: where it lies, 0 to 1 of the room there is. Pixel centres keep their places (half-pixel convention).
    """
    from PIL import Image

    height, width = image.shape[:2]
    side = area**0.5
    x, y = left * width * (1 - side), top * height * (1 - side)
    box = (x, y, x + side * width, y + side * height)
    picture = Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR, box=box)
    return np.asarray(picture)


def recoloured(
    image: np.ndarray, *, brightness: float = 0.0, contrast: float = 1.0, saturation: float = 1.0, hue: float = 0.0
) -> np.ndarray:
    """One picture uint8 (H, W, 3) with brightness added, contrast and saturation scaled, hue turned, in this order.

    brightness: share of the range; contrast about each channel's mean; saturation: of HSV, at most 1; hue: in turns.
    """
    if (brightness, contrast, saturation, hue) == (0.0, 1.0, 1.0, 0.0):
        return image
    planes = np.empty((3, *image.shape[:2]), np.float32)  # red, green, blue
    for channel, plane in enumerate(planes):  # one by one is several times faster than a transposed copy
        plane[...] = image[..., channel]
    if brightness:
        planes += np.float32(255 * brightness)
        np.clip(planes, 0, 255, out=planes)
    if contrast != 1:
        mean = planes.mean((1, 2), dtype=np.float64)
        planes *= np.float32(contrast)
        planes += (mean * (1 - contrast)).astype(np.float32)[:, None, None]
        np.clip(planes, 0, 255, out=planes)
    if (saturation, hue) != (1.0, 0.0):
        _turned(planes, np.float32(saturation), np.float32(hue))
    out = np.empty_like(image)
    for channel, plane in enumerate(planes):
        out[..., channel] = np.rint(plane, out=plane)
    return out


def _turned(planes: np.ndarray, saturation: np.float32, hue: np.float32) -> None:
    """Scale the saturation and turn the hue of float planes (3, H, W) in place.

    HSV in closed form: with the value V (largest) and chroma C (largest minus smallest), a channel is V - C (1 - f), f
    a trapezoid of the hue, which is 1 for the largest channel and 0 for the smallest.
    """
    red, green, blue = planes
    value = np.maximum(np.maximum(red, green), blue)
    chroma = value - np.minimum(np.minimum(red, green), blue)
    safe = np.clip(chroma, 1e-6, 255)  # grey pixels: any hue will do
    wanted = np.minimum(saturation * chroma, value)  # saturation is at most 1
    if not hue:
        planes -= value
        planes *= wanted / safe
        planes += value
        return
    # In sixths of the circle: red at 0, green at 2, blue at 4; between -1 and 5 before the turn.
    angle = red - green + 4 * safe
    np.copyto(angle, blue - red + 2 * safe, where=value == green)
    np.copyto(angle, green - blue, where=value == red)
    angle /= safe
    angle += 6 * hue
    angle -= 6 * np.floor(angle / 6)
    for plane, centre in zip(planes, (3, 2, 4), strict=True):
        np.abs(np.subtract(angle, np.float32(centre), out=plane), out=plane)
        if centre == 3:  # red lies about 0 and 6, so it is away from 3
            plane -= 1
        else:
            np.subtract(np.float32(2), plane, out=plane)
        np.clip(plane, 0, 1, out=plane)
        plane -= 1
        plane *= wanted
        plane += value
