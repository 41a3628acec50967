"""Turns whatever bytes claim to be a picture into RGB pixels of the wanted size, or says why not."""

from __future__ import annotations

import io
import re
import warnings
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

Fit = Literal["crop", "pad", "stretch"]
ImageFormat = Literal["png", "jpeg", "webp"]
Pixels = npt.NDArray[np.uint8]

MAX_PIXELS = 64_000_000
"""Pictures beyond 64 megapixels are refused before their pixels are decoded: 200 MB of memory each, or a decompression bomb."""

# Formats that Pillow decodes itself. Others would start programs (EPS runs ghostscript) or read further files.
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
_SVG_MAX_SIDE_PX = 4096
# resvg would read any file that an <image> names. Only pictures inside the drawing (data:) and its own parts (#id) are left.
_SVG_IMAGE = re.compile(r"<\s*(?:[\w.-]+:)?(?:image|feImage)\b")
_SVG_OUTSIDE_REFERENCE = re.compile(r"""href\s*=\s*["']\s*(?!#|data:)""")


class BadImageError(ValueError):
    """A picture cannot be used; the message is the reason, without the name of the file."""


def decode_rgb(
    data: bytes,
    *,
    background: str = "#ffffff",
    max_pixels: int = MAX_PIXELS,
    at_least_px: int | None = None,
    animated: bool = False,
    checked: bool = False,
) -> Image.Image:
    """Decode an image and bring it to upright 8-bit RGB.

    Palettes, grey, CMYK and 16-bit grey are converted; the orientation in EXIF is applied; transparency is laid over
    `background`. Floating-point and 32-bit grey have no agreed range and are refused.

    Args:
        data: The file's content.
        background: What shows through where the picture is transparent; any colour that CSS knows.
        max_pixels: Larger pictures are refused, going by the header alone.
        at_least_px: Lets a large JPEG be decoded at 1/2, 1/4 or 1/8, as long as no side gets shorter than this.
        animated: Take the first frame of an animation instead of refusing it.
        checked: The bytes are known to be those of a sound file, by a checksum: do not check a PNG's own.

    Raises:
        BadImageError: The picture is damaged, cut off, too large, or of a kind that has no right conversion.
    """
    if not data:
        raise BadImageError("empty file")
    if data[:5] == b"<?xml" or data.lstrip()[:4] == b"<svg":
        raise BadImageError("is an SVG under another name; give it the extension .svg")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of odd metadata and of sizes that max_pixels judges
            if not checked and data.startswith(b"\x89PNG"):
                with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
                    _check_size(image, max_pixels)
                    image.verify()  # checks the chunks' CRCs, which decoding does not do for pixels
            with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
                _check_size(image, max_pixels)
                frames = getattr(image, "n_frames", 1)
                if frames > 1 and not animated and image.format != "MPO":
                    raise BadImageError(f"animated or several pages: {frames} frames")
                if at_least_px is not None:
                    image.draft("RGB", (at_least_px, at_least_px))
                image.load()
                return _to_rgb(ImageOps.exif_transpose(image), background, image.format or "")
    except BadImageError:
        raise
    except UnidentifiedImageError as error:
        raise BadImageError(f"not an image of a known format (first bytes {data[:8].hex()})") from error
    except Image.DecompressionBombError as error:
        raise BadImageError(f"more than {max_pixels} pixels ({error})") from error
    except Exception as error:
        # Pillow's decoders answer damaged input with OSError, SyntaxError, ValueError, struct.error, zlib.error, IndexError,
        # KeyError, OverflowError, MemoryError and others: whatever it is, this picture is unusable and the run goes on.
        raise BadImageError(f"damaged or cut off: {type(error).__name__}: {error}"[:300]) from error


def fit_square(image: Image.Image, size_px: int, *, fit: Fit = "crop", background: str = "#ffffff") -> Image.Image:
    """Bring an RGB image to `size_px` x `size_px` with LANCZOS: centre crop, pad with `background`, or stretch."""
    if image.size == (size_px, size_px):
        return image
    if fit == "stretch":
        return image.resize((size_px, size_px), Image.Resampling.LANCZOS)
    if fit == "pad":
        return ImageOps.pad(image, (size_px, size_px), Image.Resampling.LANCZOS, color=background)
    return ImageOps.fit(image, (size_px, size_px), Image.Resampling.LANCZOS)


def cut_margin(image: Image.Image, size_px: int) -> Image.Image:
    """Return the middle of an image, at most `size_px` wide and high, its pixels as they are."""
    width, height = min(image.width, size_px), min(image.height, size_px)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def render_svg(data: bytes, size_px: int, *, fit: Fit = "crop", background: str = "#ffffff") -> Image.Image:
    """Render an SVG so that `fit_square` needs to scale it up neither for a crop nor for a pad.

    No fonts are loaded: text in it stays invisible.

    Raises:
        BadImageError: It is not an SVG, has no size, or shows pictures from other files.
    """
    import resvg_py

    if not data:
        raise BadImageError("empty file")
    box_px = size_px
    try:
        text = data.decode("utf-8")
        # Entities may hold markup, and character references may hide it from a search.
        hidden = "<!ENTITY" in text and "&#" in text
        if hidden or (_SVG_IMAGE.search(text) and _SVG_OUTSIDE_REFERENCE.search(text)):
            raise BadImageError("shows a picture from another file; those are not read")
        while True:
            png = resvg_py.svg_to_bytes(
                svg_string=text, width=box_px, height=box_px, background=background, skip_system_fonts=True
            )
            with Image.open(io.BytesIO(png), formats=("PNG",)) as opened:
                image = opened.convert("RGB")
            needed_px = -(-size_px * box_px // max(1, min(image.size)))
            if fit == "pad" or min(image.size) >= size_px or box_px >= _SVG_MAX_SIDE_PX:
                return image
            box_px = min(needed_px, _SVG_MAX_SIDE_PX)
    except BadImageError:
        raise
    except (ValueError, OSError) as error:
        raise BadImageError(f"not an SVG that can be drawn: {error}"[:300]) from error


def encode_image(image: Image.Image, image_format: ImageFormat, *, quality: int) -> bytes:
    """Encode an RGB image. PNG is lossless; `quality` (1-100) is for JPEG and WebP. The same pixels give the same bytes."""
    buffer = io.BytesIO()
    if image_format == "png":
        image.save(buffer, "PNG", optimize=False, compress_level=6)
    elif image_format == "jpeg":
        # 4:4:4: colour at full resolution, for small pictures with hard edges
        image.save(buffer, "JPEG", quality=quality, subsampling=0 if quality >= 90 else 2)
    else:
        image.save(buffer, "WEBP", quality=quality, method=4)
    return buffer.getvalue()


def to_pixels(image: Image.Image) -> Pixels:
    """Return an RGB image as an array of its own, uint8, height x width x 3."""
    return np.array(image, dtype=np.uint8)


def _check_size(image: Image.Image, max_pixels: int) -> None:
    width, height = image.size
    if width * height > max_pixels:
        raise BadImageError(f"{width}x{height} is more than {max_pixels} pixels")
    if width == 0 or height == 0:
        raise BadImageError(f"has no pixels ({width}x{height})")


def _to_rgb(image: Image.Image, background: str, image_format: str) -> Image.Image:
    if image.mode.startswith("I;16") or (image.mode == "I" and image_format in ("PNG", "PPM")):
        # Pillow's own conversion to 8 bits clips at 255 instead of scaling: nearly everything would be white.
        grey = np.asarray(image).astype(np.uint32) >> 8
        return Image.fromarray(np.minimum(grey, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise BadImageError(f"mode {image.mode} (32 bits a pixel) has no agreed range")
    if image.has_transparency_data:
        front = image.convert("RGBA")
        back = Image.new("RGBA", front.size, background)
        return Image.alpha_composite(back, front).convert("RGB")
    return image.convert("RGB")
