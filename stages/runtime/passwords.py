"""Hides passwords in URLs, so that they enter no log, no file, no MLflow value and no report."""

import re

_USER = re.compile(r"(?<=://)[^/\s'\"]*@")
# MLflow's `viewStateShareKey` is the name of a view, and no secret.
_SECRET = re.compile(
    r"([?&](?!viewStateShareKey=)[^=&\s'\"]*(?:pass|pwd|secret|token|key|credential|signature|sig)[^=&\s'\"]*=)[^&\s'\"]+",
    re.IGNORECASE,
)


def hide_passwords(text: str) -> str:
    """Replace the user and password of each URL, and secret values of its query, by `***`.

    Example:
        >>> hide_passwords("http://me:secret@host/path?token=abc&page=2")
        'http://***@host/path?token=***&page=2'
    """
    return _SECRET.sub(r"\1***", _USER.sub("***@", text))
