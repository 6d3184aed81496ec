"""Takes docs/images/arena.png: a real server, answers of a run's own iterates, a real Chromium.

    make demo arena-picture
    python -m docs.images.take_arena runs/demo --out docs/images/arena.png    # the same picture of any run

Answers are the first that come: one question, one draw. Nobody reads them, so the vote is a tie unless ``--verdict``
says otherwise. It goes to a database that is deleted afterwards: the run keeps the votes of people alone.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
from playwright.sync_api import Page

from tests.support.chromium import CHROMIUM, headless
from tests.support.paths import ROOT
from tests.support.ray_head import free_port

START_S, ANSWER_S, PAGE_S, STOP_S = 900, 300, 60, 120
"""Patience with the server's engines, with two answers, with the page, and with the server's end."""
MODELS = "sft,latest"


class Failed(Exception):
    """No picture; the message says what was waited for."""


def take(url: str, prompt: str, verdict: str, out: Path, check: Callable[[], None]) -> str:
    """Asks, votes and saves the page as ``out``; returns what the page says of the vote.

    Raises:
        Failed: an answer or the vote did not come. ``check`` raises it if the server has ended.
    """
    with headless() as browser:
        page = browser.new_page(viewport={"width": 1180, "height": 760})
        page.set_default_timeout(PAGE_S * 1000)
        page.goto(url)
        wait("the page's list of iterates", PAGE_S, lambda: page.locator("#first option").count() > 2, check)
        page.get_by_label("Prompt").fill(prompt)
        page.keyboard.press("Control+Enter")
        ballot = page.locator(f"[data-verdict={verdict}]")
        wait("two whole answers", ANSWER_S, lambda: ballot.is_enabled() or bool(trouble_of(page)), check)
        if trouble := trouble_of(page):
            raise Failed(f"the page says: {trouble}")
        ballot.click()
        outcome = page.get_by_role("status")
        wait("the names of both sides", PAGE_S, lambda: outcome.inner_text().startswith("Your vote:"), check)
        out.parent.mkdir(parents=True, exist_ok=True)
        page.screenshot(path=out, full_page=True)
        return outcome.inner_text()


def trouble_of(page: Page) -> str:
    """Returns what went wrong in the page's own words, of the page and of both sides; empty if nothing did."""
    told = [page.locator(place) for place in ("#error", ".failed .status", "#outcome")]
    return " ".join(text for each in told for text in each.all_inner_texts() if text)


@contextmanager
def server(run: Path, folder: Path) -> Iterator[tuple[str, Callable[[], None]]]:
    """Runs ``spin-ray serve``; yields its URL and a check that raises Failed once the server has ended."""
    port, log = free_port(), folder / "server.log"
    command = [
        sys.executable, "-m", "spin_ray", "serve", str(run), "--models", MODELS, "--port", str(port),
        f"--serving.votes=sqlite:///{folder}/votes.sqlite",
    ]  # fmt: skip
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=output)

    def check() -> None:
        if process.poll() is not None:
            raise Failed(f"`spin-ray serve {run}` ended with exit code {process.returncode}")

    try:
        yield f"http://127.0.0.1:{port}", check
    except Exception:
        print("".join(log.read_text(errors="replace").splitlines(keepends=True)[-30:]), file=sys.stderr)
        raise
    finally:
        process.terminate()
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            print(f"the server was killed: it had not stopped {STOP_S} s after SIGTERM", file=sys.stderr)


def wait(what: str, limit_s: float, done: Callable[[], bool], check: Callable[[], None]) -> None:
    """Raises Failed if ``done`` is not true within ``limit_s`` seconds."""
    deadline = time.monotonic() + limit_s
    while not done():
        check()
        if time.monotonic() > deadline:
            raise Failed(f"waited {limit_s:g} s for {what}")
        time.sleep(0.2)


def both_serve(url: str) -> bool:
    """Tells whether two iterates serve.

    Raises:
        Failed: the server says why one of them cannot.
    """
    try:
        listed = httpx.get(f"{url}/v1/models", timeout=30).raise_for_status().json()
    except httpx.HTTPError:
        return False
    if problems := listed.get("problems"):
        raise Failed("; ".join(f"{name} does not serve: {reason}" for name, reason in problems.items()))
    return len({card["iterate"] for card in listed["data"]}) >= 2


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("run", type=Path, help="folder of a run with an iterate beside sft")
    parser.add_argument("--out", type=Path, default=ROOT / "docs/images/arena.png")
    parser.add_argument("--prompt", default="hey, how was your day?")
    parser.add_argument("--verdict", choices=["a", "b", "tie", "both_bad"], default="tie")
    options = parser.parse_args()
    if CHROMIUM is None:
        sys.exit("arena-picture: needs Chromium (Debian: apt-get install chromium)")
    try:
        with tempfile.TemporaryDirectory() as folder, server(options.run.resolve(), Path(folder)) as (url, check):
            wait(f"engines of {MODELS}", START_S, lambda: both_serve(url), check)
            said = take(url, options.prompt, options.verdict, options.out, check)
    except Failed as error:
        sys.exit(f"arena-picture: {error}")
    print(f"{options.out}: {said}")


if __name__ == "__main__":
    main()
