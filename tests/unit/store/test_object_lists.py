from __future__ import annotations

from typing import Any
from urllib.parse import quote
from xml.sax.saxutils import escape

import boto3
import pytest
from botocore.awsrequest import AWSResponse

from icce_ray.store import object_lists

KEYS = ["plain.jpg", "a b+c%20.png", "<&>\"'.gif", "\u00e4/\u65e5\U0001f600.webp", "line\nbreak", ""]


def page(keys: list[str], xmlns: str, written: str = "") -> bytes:
    quote_of = {"numbers": "&#34;", "raw quotes": '"'}.get(written, "&quot;")
    contents = "".join(
        f"<Contents><ETag>{quote_of}{number:032x}{quote_of}</ETag><Key>{_written(key, written)}</Key>"
        f"<Size>{number}</Size><LastModified>2026-01-02T03:04:05.000Z</LastModified><Owner><ID>x</ID></Owner></Contents>"
        for number, key in enumerate(keys)
    )
    prefixes = f"<CommonPrefixes><Prefix>{quote('d e/')}</Prefix></CommonPrefixes>"
    more = "<IsTruncated>true</IsTruncated><NextContinuationToken>next</NextContinuationToken>"
    coded = "" if written in ("numbers", "names", "cdata") else "<EncodingType>url</EncodingType>"
    contents = contents.replace("<Contents>", "\n  <Contents>") if written == "on lines" else contents
    contents = contents.replace("Contents>", "Contents >") if written == "spaces in tags" else contents
    ends = f"{coded}<Prefix>{quote('a b')}</Prefix>"
    return f'<?xml version="1.0"?><ListBucketResult{xmlns}>{contents}{prefixes}{more}{ends}</ListBucketResult>'.encode()


def _written(key: str, written: str) -> str:
    if written == "numbers":
        return "".join(f"&#x{ord(letter):X};" if index % 2 else f"&#{ord(letter)};" for index, letter in enumerate(key))
    if written == "cdata":
        return f"<![CDATA[{key}]]>"
    return escape(key, {"'": "&apos;", '"': "&quot;"}) if written == "names" else escape(quote(key))


def answer(body: bytes, status: int, *, ours: bool) -> dict[str, Any]:
    """What a client makes of an answer of the store, with our handler or without."""
    client = boto3.client("s3", region_name="us-east-1", aws_access_key_id="x", aws_secret_access_key="x")
    raw = type("Raw", (), {"stream": lambda self, *_: iter([body])})()
    client.meta.events.register("before-send.s3", lambda request, **_: AWSResponse(request.url, status, {}, raw))
    if ours:
        client.meta.events.register_first(object_lists.EVENT, object_lists.take_contents)
    return dict(client.list_objects_v2(Bucket="photos"))


@pytest.mark.parametrize("xmlns", ["", ' xmlns="http://s3.amazonaws.com/doc/2006-03-01/"'])
@pytest.mark.parametrize("keys", [KEYS, []], ids=["several", "none"])
@pytest.mark.parametrize("written", ["usual", "numbers", "names", "raw quotes", "on lines", "spaces in tags", "cdata"])
def test_a_page_is_read_as_botocore_reads_it(keys: list[str], xmlns: str, written: str) -> None:
    expected, found = (answer(page(keys, xmlns, written), 200, ours=ours) for ours in (False, True))
    is_ours = written not in ("spaces in tags", "cdata")
    assert all(("Owner" in entry) != is_ours for entry in found.get("Contents", ()))
    for entry in expected.get("Contents", ()) if is_ours else ():
        del entry["LastModified"], entry["Owner"]
    assert [entry["Key"] for entry in found.get("Contents", ())] == keys
    assert found == expected


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"<Error><Code>NoSuchBucket</Code></Error>", 404),
        (b"<ListBucketResult><Cont", 200),
        (page(["x"], "").replace(b"<Key>x", b"<Key>&nothing;"), 200),
        (page(["x"], "").replace(b"<Key>x", b"<Key>\xff"), 200),
    ],
)
def test_errors_stay_those_of_botocore(body: bytes, status: int) -> None:
    errors = []
    for ours in (False, True):
        with pytest.raises(Exception, match=r".") as caught:
            answer(body, status, ours=ours)
        errors.append((type(caught.value), str(caught.value)[:40]))
    assert errors[0] == errors[1]
