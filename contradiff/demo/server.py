"""The page at an address of this computer alone. Neither the page nor gradio uses the network."""

import os
import socket
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from contradiff.demo.answers import Exhibit

HOST = "127.0.0.1"


def check_port(port: int) -> None:
    """Raise ValueError if another program uses the port, or if you may not use it."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            fault = f"port {port} cannot be used ({error.strerror})"
            raise ValueError(f"--port: {fault}; choose another one, or leave it out") from error


@contextmanager
def serve(exhibits: "Sequence[Exhibit]", *, port: int | None) -> Generator[str]:
    """Serve the page of some models during the block, and yield its address.

    Without a `port`, it is the first free one from 7860. Dropped images are deleted at the end.
    Raises ValueError if the port cannot be used.
    """
    if port is not None:
        check_port(port)
    with TemporaryDirectory(prefix="contradiff-demo-") as folder:
        os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": folder}
        # gradio asks its own server whether it answers; a proxy cannot reach that server.
        os.environ["NO_PROXY"] = ",".join(filter(None, [os.environ.get("NO_PROXY"), HOST]))
        from gradio.themes import Default

        from contradiff.demo.page import build_page

        page = build_page(exhibits, Path(folder))
        _, address, _ = page.launch(
            server_name=HOST,
            server_port=port,
            share=False,
            ssr_mode=False,
            run_history=False,
            footer_links=[],
            show_error=True,
            quiet=True,
            prevent_thread_lock=True,
            theme=Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
            css_paths=Path(__file__).with_name("page.css"),
        )
        try:
            yield address
        finally:
            page.close(verbose=False)
