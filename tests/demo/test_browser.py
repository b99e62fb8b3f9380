"""The page in a browser: what it shows, and that neither the browser nor the server leaves here."""

import base64
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from contradiff.pretrained.model import ContraDiff
from tests.cli.conftest import exported as exported  # noqa: PLC0414  # fixtures
from tests.cli.conftest import photos as photos  # noqa: PLC0414
from tests.pretrained.conftest import project as project  # noqa: PLC0414

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
CHROMIUM = os.environ.get("CONTRADIFF_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), "")
OPTIONS = "no-sandbox disable-gpu disable-quic no-first-run disable-background-networking"
OPTIONS += " disable-component-update disable-sync"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not CHROMIUM,
        reason="no Chromium: install it, or set CONTRADIFF_CHROMIUM to the path of its program",
    ),
]
NO_WAITING = "!document.querySelector('.exhibit .wait')"
WATCHED = """
import sys
def note(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo"):
        address = arguments[event == "socket.connect"]
        print("reached", address[0] if isinstance(address, tuple) else address, flush=True)
sys.addaudithook(note)
from contradiff.cli.app import app
app()
"""


@contextmanager
def running(folder: Path, log: Path, *arguments: str | Path) -> Generator[tuple[int, str]]:
    """Run `contradiff demo` in a folder; yield its process number and its address.

    A proxy that does not answer is set. The process ends by Ctrl-C, and leaves no file.
    """
    temporary = log.with_suffix(".tmp")
    temporary.mkdir()
    gone = "http://127.0.0.1:9"
    environment = {key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"}
    environment |= {"http_proxy": gone, "https_proxy": gone, "TMPDIR": str(temporary)}
    environment["PYTHONPATH"] = str(Path(__file__).resolve().parents[2])
    command = [sys.executable, "-c", WATCHED, "demo", "--device", "cpu", *map(str, arguments)]
    with log.open("w") as output:
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=output, stderr=output
        )
    try:
        address = None
        while address is None:
            assert process.poll() is None, log.read_text()
            time.sleep(0.2)
            address = re.search(r"http://127\.0\.0\.1:\d+/", log.read_text())
        yield process.pid, address[0]
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130, log.read_text()
    finally:
        process.kill()
    assert list(temporary.glob("contradiff-demo-*")) == []
    reached = re.findall(r"reached (.*)", log.read_text())
    assert set(reached) == {"127.0.0.1"}


@contextmanager
def opened(address: str, *, width: int) -> Generator[Any]:
    """Open the page in a browser. At the end, every request must have gone to `address`."""
    from playwright.sync_api import sync_playwright

    options = [f"--{name}" for name in OPTIONS.split()]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=options)
        page, requests = browser.new_page(viewport={"width": width, "height": 800}), list[str]()
        page.on("request", lambda request: requests.append(request.url))
        page.set_default_timeout(180_000)
        page.goto(address)
        yield page
        browser.close()
    assert len(requests) > 10
    others = [url for url in requests if not url.startswith((address, "data:", "blob:"))]
    assert others == []


def drop(page: Any, content: bytes, name: str) -> None:
    """Drop a file on the page, as a mouse does."""
    data = page.evaluate_handle(
        """([content, name]) => {
            const bytes = Uint8Array.from(atob(content), (each) => each.charCodeAt(0));
            const data = new DataTransfer();
            data.items.add(new File([bytes], name, {type: "image/png"}));
            return data;
        }""",
        [base64.b64encode(content).decode(), name],
    )
    page.locator("#image button").first.dispatch_event("drop", {"dataTransfer": data})


def pictures(page: Any, kind: str) -> list[str]:
    """Return the images of one kind, of which all must have been decoded."""
    found = page.locator(f".exhibit img[alt^='{kind}: ']")
    assert found.evaluate_all("all => all.every((each) => each.naturalWidth === 32)")
    return found.evaluate_all("all => all.map((each) => each.src)")


def check_bars(page: Any, expected: Any) -> None:
    rows = page.locator(".exhibit .bars tr").all_inner_texts()
    names, values = zip(*(row.split() for row in rows), strict=True)
    assert names == expected.classes
    shown = [float(value.rstrip("%")) for value in values]
    np.testing.assert_allclose(shown, 100 * np.array(expected.probabilities), atol=0.1)


def test_an_image_is_dropped(project: Path, photos: Path, tmp_path: Path):
    model = ContraDiff.from_project(project, device="cpu")
    image = photos / "b/1.png"
    with running(project, tmp_path / "log.txt") as (pid, address):
        listening = psutil.Process(pid).net_connections("inet")
        places = [each.laddr for each in listening if each.status == psutil.CONN_LISTEN]
        assert [f"http://{place.ip}:{place.port}/" for place in places] == [address]
        with opened(address, width=1366) as page:
            page.get_by_text("Here you will see the image's classes").wait_for()
            drop(page, b"no image", "notes.png")
            fault = page.locator(".exhibit [role='alert']")
            fault.wait_for()
            assert fault.inner_text() == "notes.png: not a readable image (unknown format)"

            page.reload()
            page.get_by_text("Here you will see the image's classes").wait_for()
            drop(page, image.read_bytes(), "b.png")
            page.locator(".bars").wait_for()
            check_bars(page, model.classify(image)[0])
            page.wait_for_function(NO_WAITING)
            assert page.get_by_text("Nearest of 8 validation images").is_visible()
            assert len(pictures(page, "neighbour")) == 6
            assert len(pictures(page, "noised image")) == 3
            first = pictures(page, "variation")
            assert len(set(first)) == len(first) == 12

            page.get_by_text("Other variations").click()
            page.locator("img[alt='variation: noise 7']").nth(2).wait_for()
            assert len({*first, *pictures(page, "variation")}) == 24

            # The second example, which is c/2.png, stops the variations of the first one.
            page.locator("img[src$='example-0.png']").first.click()
            page.get_by_text("Making variations, row 1").wait_for()
            page.locator("img[src$='example-2.png']").first.click()
            page.locator("img[alt='variation: noise 3']").nth(2).wait_for()
            page.wait_for_function(NO_WAITING)
            check_bars(page, model.classify(photos / "c/2.png")[0])


def test_two_models_are_side_by_side(exported: Path, photos: Path, tmp_path: Path):
    shutil.copytree(exported, other := tmp_path / "<b>other")
    arguments = ["--model", exported, "--model", other, "--images", photos, "--steps", "2"]
    with (
        running(tmp_path, tmp_path / "log.txt", *arguments) as (_, address),
        opened(address, width=1366) as page,
    ):
        drop(page, (photos / "a/0.png").read_bytes(), "a.png")
        page.locator("img[alt='variation: noise 3']").nth(5).wait_for()
        page.wait_for_function(NO_WAITING)
        assert page.locator(".exhibit h2").all_inner_texts() == [str(exported), str(other)]
        left, right = (box.bounding_box() for box in page.locator(".exhibit h2").all())
        assert left["x"] + left["width"] <= right["x"]
        page.set_viewport_size({"width": 390, "height": 800})
        left, right = (box.bounding_box() for box in page.locator(".exhibit h2").all())
        assert left["y"] + left["height"] <= right["y"]
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
