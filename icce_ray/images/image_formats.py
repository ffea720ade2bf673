"""The formats that are decoded, and what files of other formats are and what to do about them. Imports no decoder."""

from importlib.util import find_spec

HAS_AVIF = find_spec("PIL._avif") is not None
FORMATS = (
    *("JPEG", "PNG", "WEBP", "BMP", "DIB", "GIF", "TIFF", "JPEG2000", "PPM"),
    *(("AVIF",) if HAS_AVIF else ()),
)
"""Only these of Pillow's decoders are used. EPS, for one, would run Ghostscript."""
IMAGE_ENDINGS = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".bmp", ".dib", ".gif", ".tif", ".tiff"),
    *(".jp2", ".j2k", ".jpx", ".jpf", ".pbm", ".pgm", ".ppm", ".pnm"),
    *((".avif",) if HAS_AVIF else ()),
)

HEIC_REMEDY = "HEIC: not supported; convert to JPEG or PNG, for example with ImageMagick (magick mogrify -format jpg)"
RAW_REMEDY = "RAW: not supported; convert to JPEG or TIFF, for example with darktable-cli or dcraw"
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
LFS_REMEDY = "a Git LFS pointer, not the file; fetch it with git lfs pull"
HEIC_BRANDS = (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1")
UNSUPPORTED = {
    b"%!PS": "EPS: not supported; render to PNG",
    b"%PDF": "PDF: not supported; render to PNG",
    **dict.fromkeys((b"FUJIFILMCCD-RAW", b"IIRO", b"IIU\0"), RAW_REMEDY),
    **dict.fromkeys((b"\xff\x0a", b"\0\0\0\x0cJXL "), "JPEG XL: not supported; convert to JPEG or PNG"),
    **dict.fromkeys((b"<!DOCTYPE html", b"<html"), "a web page, not an image"),
    b"8BPS": "PSD: not supported; convert to PNG or TIFF",
    b"\0\0\1\0": "ICO: not supported; convert to PNG or TIFF",
    b"<svg": "SVG: not supported; render to PNG",
    LFS_POINTER: LFS_REMEDY,
    b"MM\0+": "BigTIFF in big-endian order: not supported; convert to TIFF",
    b"P7\n": "PAM: not supported; convert to PNG or TIFF",
    b"DDS ": "DDS: not supported; convert to PNG or TIFF",
    b"icns": "ICNS: not supported; convert to PNG or TIFF",
    b"\x76\x2f\x31\x01": "OpenEXR: not supported; convert to TIFF",
    b"#?RADIANCE": "HDR: not supported; convert to TIFF",
    b"SIMPLE  =": "FITS: not supported; convert to TIFF",
}
"""Reasons by the first bytes."""


def unsupported_format(data: bytes) -> str | None:
    """Why the file cannot be decoded, and what to do about it. None if the format is not one of those we recognise."""
    if data[4:8] == b"ftyp" and data[8:12] in HEIC_BRANDS:
        return HEIC_REMEDY
    if data[4:12] == b"ftypcrx ":
        return RAW_REMEDY
    if data[128:132] == b"DICM":
        return "DICOM: not supported; convert to PNG or TIFF"
    return next((reason for signature, reason in UNSUPPORTED.items() if data.startswith(signature)), None)
