"""Images as numpy arrays: decode, encode and the one way this project resizes.

Trap: decoders and resizers differ by several grey levels between libraries, which is enough to move a policy.
So every image that is trained on, probed or rolled out goes through these functions and no others.
JPEG through libjpeg-turbo's accurate integer transform (simplejpeg); resizing through Pillow's bicubic
filter, which widens with the reduction (antialiasing) and works in 8 bits.
"""

from __future__ import annotations

import io

import numpy as np

JPEG_MAGIC = b"\xff\xd8"
BLACK = 3  # grey levels: an image nowhere brighter than this holds nothing (JPEG noise included)


def resize(images: np.ndarray, size: int) -> np.ndarray:
    """Resize to squares of `size` pixels; the aspect ratio is not kept, as in OpenVLA and VLM4VLA.

    images: uint8 (B, H, W, 3). Returns uint8 (B, size, size, 3), the very same array when nothing is to be done.
    Raises ValueError on any other shape or dtype.
    """
    if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8:
        raise ValueError(f"expected uint8 images (B, H, W, 3), got {images.dtype} {images.shape}")
    if images.shape[1:3] == (size, size):
        return images
    from PIL import Image

    out = np.empty((len(images), size, size, 3), np.uint8)
    for index, image in enumerate(images):
        out[index] = np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC))
    return out


def rotate_180(images: np.ndarray) -> np.ndarray:
    """Images (..., H, W, C) turned by 180 degrees (upside down and left to right), as LIBERO's OpenGL renders need.

    Returns a contiguous array of the same type.
    """
    return np.ascontiguousarray(images[..., ::-1, ::-1, :])


def decode(data: bytes | memoryview) -> np.ndarray:
    """One encoded image as RGB uint8 (H, W, 3): JPEG through simplejpeg, anything else through Pillow.

    Raises ValueError when the bytes are no whole image.
    """
    view = memoryview(data).cast("B")
    if bytes(view[:2]) == JPEG_MAGIC:
        import simplejpeg

        return simplejpeg.decode_jpeg(view, colorspace="RGB")
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(view)) as image:
            return np.asarray(image.convert("RGB"))
    except UnidentifiedImageError:  # its own text names a buffer's address
        raise ValueError(f"{len(view)} bytes of no known image format") from None
    except (OSError, SyntaxError) as error:
        raise ValueError(str(error)) from None


def decode_into(data: bytes | memoryview, out: np.ndarray) -> None:
    """`decode` into an array that is there: uint8 (H, W, 3), contiguous. data: bytes or a view of unsigned bytes.

    Raises ValueError when the bytes are no whole image of that size.
    """
    if data[:2] != JPEG_MAGIC:
        image = decode(data)
        if image.shape != out.shape:
            raise ValueError(f"an image of {image.shape}, expected {out.shape}")
        out[:] = image
        return
    import simplejpeg

    image = simplejpeg.decode_jpeg(data, colorspace="RGB", buffer=out.reshape(-1))  # ValueError when it does not fit
    if image.shape != out.shape:
        raise ValueError(f"an image of {image.shape}, expected {out.shape}")


def encode(image: np.ndarray, *, quality: int = 95, full_colour: bool = False) -> bytes:
    """One RGB uint8 image (H, W, 3) as JPEG. full_colour keeps colour at full resolution (4:4:4, for renders)."""
    import simplejpeg

    subsampling = "444" if full_colour else "420"
    return simplejpeg.encode_jpeg(
        np.ascontiguousarray(image), quality=quality, colorspace="RGB", colorsubsampling=subsampling
    )
