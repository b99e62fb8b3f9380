"""Passwords in URLs are hidden; everything else stays as it is."""

from stages.runtime.passwords import hide_passwords

import pytest


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://me:secret@host/path", "http://***@host/path"),
        ("'http://me:sec@ret@host', twice http://a:b@c", "'http://***@host', twice http://***@c"),
        ("postgresql+psycopg://secret@db:5432/x", "postgresql+psycopg://***@db:5432/x"),
        ("https://h/x?X-Amz-Signature=secret&part=2", "https://h/x?X-Amz-Signature=***&part=2"),
        ("s3://b/x?access_key=secret", "s3://b/x?access_key=***"),
        *((text, text) for text in ("s3://bucket/a@2x.png", "a@b.c", "http://host/?page=2", "λ")),
    ],
)
def test_only_secrets_are_hidden(text: str, shown: str):
    assert hide_passwords(text) == shown
