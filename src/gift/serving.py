"""Serving the page of `gift explore`: to whom, what is refused, what is left behind.

Nothing is asked from outside, and no file is served but the pictures that were drawn.
"""

import getpass
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import gradio as gr
from gradio import processing_utils
from gradio.themes import Default

from gift.explain.exploring import Explorer
from gift.explorer import CSS, make_page

MAX_FILE_BYTES, MAX_WAITING, MAX_SESSIONS = 20_000_000, 40, 100
LOCAL = ("127.0.0.1", "localhost", "::1")
PASSWORD = "GIFT_EXPLORER_PASSWORD"  # the variable of the environment


async def _download_nothing(url: str, cache_dir: str) -> str:
    raise gr.Error("Addresses are not fetched: drop a file.", print_exception=False)


# Gradio would fetch what a request gives as the address of a file.
processing_utils.async_ssrf_protected_download = _download_nothing


def explore(explorer: Explorer, host: str = LOCAL[0], port: int | None = None, user: str | None = None) -> None:
    """Serve the page until Ctrl-C; the arguments and errors are those of `serving`."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # so that nothing is left behind
    with serving(explorer, host, port, user) as (url, page):
        print(f"Open {url} in a browser. Ctrl-C ends it.", flush=True)
        page.block_thread()


@contextmanager
def serving(
    explorer: Explorer, host: str = LOCAL[0], port: int | None = None, user: str | None = None
) -> Iterator[tuple[str, gr.Blocks]]:
    """Serve the page and give its address.

    Args:
        explorer: What answers.
        host: Address to listen on.
        port: Port to listen on; by default the first free one from 7860 on.
        user: Name to log in with. The password is that of GIFT_EXPLORER_PASSWORD, else it is asked for.

    Raises:
        ValueError: If others could reach it and no user is given, the password is empty, or the port is taken.
    """
    check_address(host, port, user)
    auth = None if user is None else (user, _password(user))
    with tempfile.TemporaryDirectory(prefix="gift-explorer-", ignore_cleanup_errors=True) as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder  # uploads and drawn pictures, gone at the end
        page = make_page(explorer)
        page.queue(max_size=MAX_WAITING, api_open=False)
        try:
            _, url, _ = page.launch(
                server_name=f"[{host}]" if ":" in host else host,  # it makes the address of this
                server_port=port,
                auth=auth,
                max_file_size=MAX_FILE_BYTES,
                state_session_capacity=MAX_SESSIONS,
                theme=Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
                css=CSS,
                prevent_thread_lock=True,
                quiet=True,
                share=False,
                ssr_mode=False,
                pwa=False,
                mcp_server=False,
                enable_monitoring=False,
                footer_links=[],
            )
            yield url, page
        finally:
            page.close(verbose=False)


def check_address(host: str, port: int | None, user: str | None) -> None:
    """Raise ValueError if a page cannot or must not be served there; see `serving`."""
    if user is None and host not in LOCAL:
        raise ValueError(f"{host} can be reached by others: give a user, who then needs a password (--user NAME).")
    if port is not None and not 1 <= port <= 65535:
        raise ValueError(f"port must lie between 1 and 65535, got {port}: choose another, or leave it out.")
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port or 0))
    except OSError as error:
        taken = f"Port {port} of {host}" if port else host
        raise ValueError(
            f"{taken} cannot be listened on: {error.strerror}. Choose another, or leave it out."
        ) from error


def _password(user: str) -> str:
    password = os.environ.get(PASSWORD) or getpass.getpass(f"Password for {user}: ")
    if not password:
        raise ValueError(f"The password of {user} must not be empty: set {PASSWORD}, or type one.")
    return password
