"""Pictures as bytes: written in the few ways that are kept, and read from a stranger's file without surprises."""

from __future__ import annotations

import io

from PIL import Image

from sdxl_sae_kit.errors import ArtifactError

IMAGES = ("thumbnails", "webp", "png")
"""How pictures may be kept: small WebP files, or the whole picture as WebP (lossy) or PNG (exact)."""
THUMBNAIL = 160
"""Pixels that a thumbnail is at most wide and high."""
_MOST_PIXELS = 2**25


def encode_picture(image: Image.Image, kind: str) -> bytes:
    """A picture as WebP or PNG bytes; thumbnails are at most 160 pixels wide and high."""
    picture = image.convert("RGB")
    if kind == "thumbnails":
        picture.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    if kind == "png":
        picture.save(buffer, "PNG")
    else:
        picture.save(buffer, "WEBP", quality=90 if kind == "thumbnails" else 95, method=2)
    return buffer.getvalue()


def decode_picture(data: bytes) -> Image.Image:
    """The picture of WebP or PNG bytes.

    Raises:
        ArtifactError: they are none, or a few bytes that would unpack to more than 33 million pixels.
    """
    picture = _open(data)
    try:
        return picture.convert("RGB")
    except Exception as cause:
        raise _refusal(cause) from None


def as_jpeg(data: bytes) -> bytes:
    """The picture of WebP or PNG bytes, on white, as JPEG bytes.

    Raises:
        ArtifactError: as `decode_picture`, or it is wider or higher than JPEG can hold, 65,500 pixels.
    """
    picture, buffer = _open(data), io.BytesIO()
    try:
        paper = Image.new("RGBA", picture.size, "white")
        paper.alpha_composite(picture.convert("RGBA"))
        paper.convert("RGB").save(buffer, "JPEG", quality=90)
    except Exception as cause:
        raise _refusal(cause) from None
    return buffer.getvalue()


def picture_size(data: bytes) -> tuple[int, int]:
    """Width and height of the picture of WebP or PNG bytes, which is not unpacked for it.

    Raises:
        ArtifactError: as `decode_picture`, as far as the head of the bytes tells.
    """
    return _open(data).size


def _open(data: bytes) -> Image.Image:
    try:
        picture = Image.open(io.BytesIO(data), formats=("WEBP", "PNG"))
        if picture.width * picture.height > _MOST_PIXELS:
            raise ValueError(f"it has {picture.width} × {picture.height} pixels")
    except Exception as cause:
        raise _refusal(cause) from None
    return picture


def _refusal(cause: Exception) -> ArtifactError:
    """Pillow raises whatever it trips over."""
    return ArtifactError(f"A picture cannot be read ({cause}). Make or get what it belongs to again.")
