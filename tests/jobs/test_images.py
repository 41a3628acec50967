"""Tests of turning bytes into pixels."""

from __future__ import annotations

import base64
import io
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from jobs.images import BadImageError, cut_margin, decode_rgb, encode_image, fit_square, render_svg, to_pixels


def encoded(image: Image.Image, image_format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def one_pixel(image: Image.Image) -> tuple[int, ...]:
    return tuple(int(value) for value in to_pixels(image)[0, 0])


def picture_or_reason(data: bytes) -> str:
    try:
        return decode_rgb(data, max_pixels=1_000_000).mode
    except BadImageError as error:
        return str(error)


def test_palette_grey_and_cmyk_become_their_colours() -> None:
    """The stored colours come out, not palette numbers or ink values."""
    red = Image.new("RGB", (4, 4), (255, 0, 0))
    assert one_pixel(decode_rgb(encoded(red.convert("P")))) == (255, 0, 0)
    assert one_pixel(decode_rgb(encoded(Image.new("L", (4, 4), 77)))) == (77, 77, 77)
    assert one_pixel(decode_rgb(encoded(Image.new("1", (4, 4), 1)))) == (255, 255, 255)
    cmyk = one_pixel(decode_rgb(encoded(red.convert("CMYK"), "JPEG", quality=100)))
    assert cmyk[0] > 240
    assert max(cmyk[1:]) < 15


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_pixels_show_the_background(mode: str) -> None:
    """Dropping the alpha channel instead would show whatever colour hides under it, mostly black."""
    image = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    image = image.quantize() if mode == "P" else image.convert(mode)  # a palette whose colours carry alpha
    assert image.mode == mode
    assert one_pixel(decode_rgb(encoded(image), background="#00ff00")) == (0, 255, 0)


def test_half_transparent_pixels_are_mixed() -> None:
    """Half a black over white is grey."""
    assert one_pixel(decode_rgb(encoded(Image.new("RGBA", (2, 2), (0, 0, 0, 128))), background="#ffffff")) == (
        127,
        127,
        127,
    )


def test_sixteen_bit_grey_keeps_its_shades() -> None:
    """Pillow's own conversion clips at 255, which turns a picture of 16 bits nearly all white."""
    ramp = np.array([[0, 0x4000, 0x8000, 0xFFFF]], dtype=np.uint16)
    pixels = to_pixels(decode_rgb(encoded(Image.fromarray(ramp))))
    assert pixels[0, :, 0].tolist() == [0, 64, 128, 255]


def test_the_orientation_in_exif_is_applied() -> None:
    """A phone's upright photograph, stored lying, comes out upright."""
    image = Image.new("RGB", (8, 4))
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees to view
    assert decode_rgb(encoded(image, "JPEG", exif=exif)).size == (4, 8)


def test_an_animation_is_bad_unless_its_first_frame_is_wanted() -> None:
    """Which frame of an animation is the picture is for a person to say."""
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue", "lime")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    with pytest.raises(BadImageError, match="3 frames"):
        decode_rgb(data)
    assert one_pixel(decode_rgb(data, animated=True)) == (255, 0, 0)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"hello, world", "not an image"),
        (b"\x89PNG\r\n\x1a\n", "damaged|not an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "SVG"),
        (encoded(Image.new("F", (4, 4)), "TIFF"), "no agreed range"),
    ],
)
def test_what_is_no_usable_picture_gives_a_reason(data: bytes, reason: str) -> None:
    """Each kind of unusable bytes has a reason that a person understands."""
    with pytest.raises(BadImageError, match=reason):
        decode_rgb(data)


@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "WEBP", "GIF", "TIFF"])
def test_a_picture_cut_off_anywhere_is_bad(image_format: str) -> None:
    """Half a picture is not a picture with a grey half."""
    noise = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    data = encoded(Image.fromarray(noise), image_format)
    for share in (0.3, 0.6, 0.9):
        with pytest.raises(BadImageError):
            decode_rgb(data[: int(len(data) * share)])


def test_a_flipped_bit_in_a_png_is_noticed() -> None:
    """Decoding alone skips the checksums of pixel data; the chunk's CRC tells."""
    data = bytearray(encoded(Image.fromarray(np.arange(3072, dtype=np.uint8).reshape(32, 32, 3)), compress_level=0))
    data[len(data) // 2] ^= 1
    with pytest.raises(BadImageError):
        decode_rgb(bytes(data))


def test_a_decompression_bomb_is_refused_by_its_header() -> None:
    """A few hundred bytes that claim 10 gigapixels cost no memory and no warning."""
    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    chunks = b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in ((b"IHDR", header), (b"IDAT", zlib.compress(bytes(100))), (b"IEND", b""))
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(BadImageError, match="pixels"):
            decode_rgb(b"\x89PNG\r\n\x1a\n" + chunks)
    with pytest.raises(BadImageError, match="100x100 is more than 9999 pixels"):
        decode_rgb(encoded(Image.new("L", (100, 100))), max_pixels=9_999)


@settings(max_examples=300, deadline=None)
@given(
    prefix=st.sampled_from(
        [b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", b"GIF89a", b"RIFF\0\0\0\0WEBPVP8 ", b"II*\0", b"BM", b"P6 "]
    ),
    rest=st.binary(max_size=300),
)
def test_any_bytes_give_a_picture_or_a_reason(prefix: bytes, rest: bytes) -> None:
    """Nothing but BadImageError comes out of a decoder, whatever goes in."""
    assert picture_or_reason(prefix + rest)


@settings(max_examples=150, deadline=None)
@given(
    image_format=st.sampled_from(["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"]),
    place=st.floats(0, 1),
    noise=st.binary(min_size=1, max_size=40),
)
def test_a_damaged_picture_gives_a_picture_or_a_reason(image_format: str, place: float, noise: bytes) -> None:
    """Damage deep inside a well-begun file reaches other parts of the decoders; they too answer with a reason."""
    data = bytearray(encoded(Image.radial_gradient("L").resize((24, 24)).convert("RGB"), image_format))
    at = int(place * (len(data) - 1))
    data[at : at + len(noise)] = noise
    assert picture_or_reason(bytes(data))


@given(
    width=st.integers(1, 200),
    height=st.integers(1, 200),
    size_px=st.integers(4, 64),
    fit=st.sampled_from(["crop", "pad", "stretch"]),
)
@settings(deadline=None)
def test_every_picture_fits_the_square(width: int, height: int, size_px: int, fit: str) -> None:
    """The result has the wanted size whatever the shape."""
    assert fit_square(Image.new("RGB", (width, height)), size_px, fit=fit).size == (size_px, size_px)  # type: ignore[arg-type]


def test_crop_keeps_the_middle_and_pad_keeps_everything() -> None:
    """A wide picture with coloured ends: a crop shows its middle only, a pad both ends under bars of the background."""
    wide = Image.new("RGB", (40, 10), "white")
    wide.paste((255, 0, 0), (0, 0, 10, 10))
    wide.paste((0, 0, 255), (30, 0, 40, 10))
    assert set(to_pixels(fit_square(wide, 10, fit="crop")).reshape(-1).tolist()) == {255}
    padded = to_pixels(fit_square(wide, 40, fit="pad", background="#00ff00"))
    assert padded[0, 20].tolist() == [0, 255, 0]
    assert padded[20, 2].tolist() == [255, 0, 0]
    assert padded[20, 37].tolist() == [0, 0, 255]


def test_a_large_jpeg_is_decoded_small_when_that_will_do() -> None:
    """A JPEG decoded at 1/8 is several times quicker, and never smaller than asked for."""
    data = encoded(Image.new("RGB", (1600, 800), "teal"), "JPEG")
    assert decode_rgb(data, at_least_px=64).size == (200, 100)
    assert decode_rgb(data).size == (1600, 800)


def test_png_gives_back_the_very_pixels() -> None:
    """PNG is the default for shards because it changes nothing."""
    pixels = np.random.default_rng(1).integers(0, 255, (16, 16, 3), dtype=np.uint8)
    assert (to_pixels(decode_rgb(encode_image(Image.fromarray(pixels), "png", quality=1))) == pixels).all()


@pytest.mark.parametrize("image_format", ["png", "jpeg", "webp"])
def test_the_same_picture_gives_the_same_bytes(image_format: str) -> None:
    """Shards are compared byte by byte after an interruption, so encoders must add no time and no chance."""
    image = Image.radial_gradient("L").resize((48, 48)).convert("RGB")
    first = encode_image(image, image_format, quality=90)  # type: ignore[arg-type]
    assert encode_image(image.copy(), image_format, quality=90) == first  # type: ignore[arg-type]


def test_an_svg_is_drawn_at_size_on_the_background() -> None:
    """A drawing has no pixels of its own: it is drawn at the size wanted, and its holes show the background."""
    svg = b"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 10 10'><rect width='5' height='10' fill='#ff0000'/></svg>"
    pixels = to_pixels(render_svg(svg, 20, background="#00ff00"))
    assert pixels.shape == (20, 20, 3)
    assert pixels[10, 2].tolist() == [255, 0, 0]
    assert pixels[10, 17].tolist() == [0, 255, 0]


def test_a_flat_svg_is_drawn_large_enough_for_a_crop() -> None:
    """Cropped to a square, a drawing of 4:1 must not be scaled up from a quarter of the height."""
    svg = b"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 40 10'><rect width='40' height='10'/></svg>"
    assert min(render_svg(svg, 32, fit="crop").size) >= 32
    assert render_svg(svg, 32, fit="pad").size == (32, 8)


@pytest.mark.parametrize(
    "data", [b"", b"no svg", b"\xff\xfe", b"<svg", b"<svg xmlns='http://www.w3.org/2000/svg' width='0' height='0'/>"]
)
def test_a_damaged_svg_gives_a_reason(data: bytes) -> None:
    """As other pictures do."""
    with pytest.raises(BadImageError):
        render_svg(data, 16)


@pytest.mark.parametrize(
    "body",
    [
        "<image width='10' height='10' href='{path}'/>",
        "<image width='10' height='10' xlink:href = '{path}'/>",
        '<image width="10" height="10" href="file://{path}"/>',
        "<s:image width='10' height='10' href='{path}'/>",
        "<image width='10' height='10' href='&#47;{path}'/>",
        "&drawn;",
    ],
)
def test_an_svg_reads_no_other_file(tmp_path: Path, body: str) -> None:
    """A drawing from somebody else must not show what lies on our disks."""
    secret = tmp_path / "secret.png"
    Image.new("RGB", (10, 10), "black").save(secret)
    entity = f"&#60;image width='10' height='10' href='{secret}'/>"
    svg = (
        f'<!DOCTYPE svg [<!ENTITY drawn "{entity}">]>' * (body == "&drawn;")
        + "<svg xmlns='http://www.w3.org/2000/svg' xmlns:s='http://www.w3.org/2000/svg' "
        + "xmlns:xlink='http://www.w3.org/1999/xlink' viewBox='0 0 10 10'>"
        + body.format(path=secret)
        + "</svg>"
    )
    with pytest.raises(BadImageError, match="another file"):
        render_svg(svg.encode(), 10)


def test_an_svg_may_show_a_picture_that_it_holds() -> None:
    """A picture inside the drawing needs no other file."""
    inside = base64.b64encode(encoded(Image.new("RGB", (2, 2), "black"))).decode()
    svg = (
        "<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 10 10'>"
        f"<image width='10' height='10' href='data:image/png;base64,{inside}'/></svg>"
    )
    assert set(to_pixels(render_svg(svg.encode(), 10)).reshape(-1).tolist()) == {0}


def test_cut_margin_takes_the_middle() -> None:
    """The middle pixels come out as they are, and a picture that is small already stays."""
    image = Image.fromarray(np.arange(36, dtype=np.uint8).reshape(6, 6))
    assert np.asarray(cut_margin(image, 2)).tolist() == [[14, 15], [20, 21]]
    assert cut_margin(image, 9).size == (6, 6)
