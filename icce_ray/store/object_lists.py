"""Reads the answers to ``ListObjectsV2`` without an XML parser: botocore, which parses each page twice, makes an object
of every date and looks each field up in its model, would take ten times the CPU time."""

import re
from typing import Any

EVENT = "before-parse.*.ListObjectsV2"
"""The asterisk puts our handler before botocore's own, which parses the page to see whether it is an error."""
OBJECT = re.compile(rb"<Contents>.*?</Contents>", re.DOTALL)
FIELDS = [re.compile(rb"<%s>([^<]*)</%s>" % (name, name)) for name in (b"Key", b"Size", b"ETag")]
BETWEEN = b"</Contents><Contents>"
OTHER_ENCODING = re.compile(rb"encoding=.(?!utf-8)", re.IGNORECASE)
ESCAPED = re.compile(r"&(?:#x([0-9a-f]+)|#(\d+)|(\w+));", re.IGNORECASE)
ENTITIES = {"amp": "&", "lt": "<", "gt": ">", "quot": '"', "apos": "'"}


def take_contents(response_dict: dict[str, Any], customized_response_dict: dict[str, Any], **_: Any) -> None:
    """A handler of botocore's EVENT: takes key, size and ETag of the objects, and leaves the rest to botocore. A page
    that is not written as stores do is left as it is."""
    body = response_dict["body"]
    if response_dict["status_code"] != 200 or b"<!" in body or b"\r" in body or OTHER_ENCODING.search(body[:100]):
        return
    number = body.count(b"<Contents>")
    if number and body.count(BETWEEN) == number - 1:
        rest = body[: body.index(b"<Contents>")] + body[body.rindex(b"</Contents>") + len(b"</Contents>") :]
    else:
        rest = OBJECT.sub(b"", body)
    columns = [field.findall(body) for field in FIELDS]
    if any(len(column) != number for column in columns):
        return
    try:
        keys, sizes, etags = (_unescaped(b"\0".join(column).decode()).split("\0") for column in columns)
    except (UnicodeDecodeError, KeyError):
        return
    if number:
        customized_response_dict["Contents"] = [
            {"Key": key, "Size": int(size), "ETag": etag} for key, size, etag in zip(keys, sizes, etags, strict=True)
        ]
        response_dict["body"] = rest


def _unescaped(text: str) -> str:
    """Raises KeyError: XML has no such entity."""
    text = text.replace("&quot;", '"').replace("&#34;", '"')  # around every ETag
    return ESCAPED.sub(_character, text) if "&" in text else text


def _character(escaped: re.Match[str]) -> str:
    hexadecimal, decimal, name = escaped.groups()
    return ENTITIES[name] if name else chr(int(hexadecimal, 16) if hexadecimal else int(decimal))
