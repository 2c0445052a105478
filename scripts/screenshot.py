"""Take the picture of the graph for the README: ``python scripts/screenshot.py docs/graph.png [STUDENT]``.

Starts ``dagster dev`` on this checkout's own history (./.dagster), opens the lineage of a student's report in Chromium and
saves what is painted. Needs the ``dev`` extra and a Chromium; CHROMIUM names another than /usr/bin/chromium.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
CHROMIUM = os.environ.get("CHROMIUM", "/usr/bin/chromium")
START_SECONDS = 120.0
STOP_SECONDS = 30.0


class DagsterDev:
    """``dagster dev`` of this checkout on a free port, with its own process group."""

    def __init__(self, log: Path, environment: Mapping[str, str] | None = None) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = log
        self.environment = {**os.environ, **(environment or {})}

    def __enter__(self) -> "DagsterDev":
        command = [sys.executable, "-W", "ignore", "-m", "dagster", "dev", "-h", "127.0.0.1", "-p", str(self.port)]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command, cwd=REPOSITORY, env=self.environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        try:
            self._wait()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _wait(self) -> None:
        """Until the server answers."""
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end and self.process.poll() is None:
            try:
                with urllib.request.urlopen(f"{self.url}/server_info", timeout=5):
                    return
            except OSError:
                time.sleep(0.3)
        raise RuntimeError(f"dagster dev did not answer within {START_SECONDS:.0f} s:\n{self.log.read_text()[-2000:]}")

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(STOP_SECONDS)
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@contextmanager
def chromium_page(width: int = 1600, height: int = 700) -> Iterator[Any]:
    """A page of a fresh Chromium."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        try:
            yield browser.new_page(viewport={"width": width, "height": height})
        finally:
            browser.close()


def open_page(page: Any, address: str, expected: Any) -> None:
    """Go to a page and wait until a text is painted."""
    page.goto(address)
    page.get_by_text(expected).first.wait_for(timeout=60_000)


def dismiss_greeting(page: Any) -> None:
    """The first visit of a history is greeted by a dialog, some seconds after the page is painted; later ones are not."""
    from playwright.sync_api import TimeoutError as NotGreetedError

    skip = page.get_by_role("button", name="Skip")
    try:
        skip.wait_for(timeout=10_000)
    except NotGreetedError:
        return
    skip.click()
    skip.wait_for(state="hidden")


def lineage_address(server: str, asset: str) -> str:
    """The page that shows an asset with everything it was made from."""
    return f"{server}/assets/{asset}?view=lineage&lineageScope=upstream&lineageDepth=5"


def main() -> None:
    """Save the picture."""
    target, student = Path(sys.argv[1] if len(sys.argv) > 1 else "docs/graph.png"), (sys.argv[2:] or ["kl"])[0]
    if shutil.which(CHROMIUM) is None:
        sys.exit(f"{CHROMIUM} is not there. Install Chromium, or name one in CHROMIUM.")
    asset = f"eval_report__{student}"
    log = Path(tempfile.gettempdir(), "dagster-dev.log")
    with DagsterDev(log) as server, chromium_page() as page:
        open_page(page, lineage_address(server.url, asset), "prompt_pool")
        dismiss_greeting(page)
        page.wait_for_timeout(3000)
        page.screenshot(path=target)
    print(target)


if __name__ == "__main__":
    main()
