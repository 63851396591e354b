"""The built site in a headless Chromium: `python docs/make/browse.py [FOLDER FOR SCREENSHOTS]`.

Follows the navigation through every page at desktop and phone width, searches, opens the first page in the dark, and
exits with status 1 on a page that the navigation does not reach, a missing image or script, a console error, a request
to elsewhere, or a page that is wider than the phone. Screenshots take most of the time, so they are made on demand.
"""

import functools
import http.server
import shutil
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Browser, Page, sync_playwright

SITE = Path(__file__).parents[2] / "site"
WIDTHS = {"desktop": (1280, 900), "phone": (390, 844)}


class Visit:
    """One browser tab and everything that went wrong in it."""

    def __init__(self, browser: Browser, address: str, width: tuple[int, int], theme: str):
        self.address, self.wrong = address, []
        size = {"width": width[0], "height": width[1]}
        self.page: Page = browser.new_context(viewport=size, color_scheme=theme).new_page()
        self.page.on("console", lambda line: self._note(line.type in ("error", "warning"), f"console: {line.text}"))
        self.page.on("pageerror", lambda error: self._note(True, f"script error: {error}"))
        self.page.on("requestfailed", lambda request: self._note(True, f"failed: {request.url}"))
        self.page.on("response", lambda answer: self._note(answer.status >= 400, f"{answer.status}: {answer.url}"))
        self.page.on("request", lambda request: self._note(self._outside(request.url), f"outside: {request.url}"))

    def open(self, path: str) -> None:
        """Load a page and look at it."""
        self.page.goto(self.address + path, wait_until="load")
        self.look()

    def follow(self) -> Iterator[str]:
        """From the first page by the "next" links to the last one: the path of each, opened and looked at."""
        self.open("")
        yield ""
        while (following := self.page.locator("a.md-footer__link--next")).count():
            following.first.click()
            self.page.wait_for_load_state("load")
            self.look()
            yield self.page.url.removeprefix(self.address)

    def look(self) -> None:
        """Note images that are not shown and a page that is too wide."""
        broken = self.page.eval_on_selector_all("img", "images => images.filter(i => !i.naturalWidth).map(i => i.src)")
        self._note(bool(broken), f"images not shown: {broken}")
        wide = self.page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        self._note(wide > 0, f"wider than the window by {wide} pixels")

    def shoot(self, folder: Path | None, name: str) -> None:
        """Take a picture of the whole page, where a folder is given."""
        if folder is not None:
            self.page.screenshot(path=folder / f"{name}.png", full_page=True)

    def search(self, words: str, folder: str, anchor: str) -> None:
        """Search from the first page, and follow the result to an anchor of a page."""
        self.open("")
        if not self.page.locator("input.md-search__input").is_visible():
            self.page.locator("label[for=__search]").first.click()
        self.page.locator("input.md-search__input").press_sequentially(words)
        result = self.page.locator(f"a.md-search-result__link[href*='{folder}'][href$='#{anchor}']").first
        result.click()
        heading = self.page.locator(f"[id='{anchor}']").first
        heading.wait_for(state="visible")
        self._note(words not in heading.inner_text(), f"search for {words} led to {self.page.url}")

    def _outside(self, url: str) -> bool:
        return not url.startswith((self.address, "data:", "blob:"))

    def _note(self, is_wrong: bool, what: str) -> None:
        if is_wrong:
            self.wrong.append(f"{self.page.url if hasattr(self, 'page') else ''}  {what}")


def main(shots: Path | None) -> int:
    """Number of things that are wrong, each printed."""
    pages = sorted(str(path.relative_to(SITE).parent) + "/" for path in SITE.rglob("index.html"))
    pages = ["" if page == "./" else page for page in pages]
    wrong: list[str] = []
    with served(SITE) as address, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for name, width in WIDTHS.items():
            visit = Visit(browser, address, width, "light")
            missed = set(pages)
            for page in visit.follow():
                missed.discard(page)
                visit.shoot(shots, f"{name}-light-{page.strip('/').replace('/', '-') or 'home'}")
            wrong += [f"{name}, light: {what}" for what in visit.wrong]
            wrong += [f"{name}, navigation: does not reach {page}" for page in sorted(missed)]
            visit = Visit(browser, address, width, "dark")
            visit.open("")
            visit.shoot(shots, f"{name}-dark-home")
            wrong += [f"{name}, dark: {what}" for what in visit.wrong]
            visit = Visit(browser, address, width, "light")
            visit.search("select_blocks", "api/selection/", "flexnsa.select_blocks")
            wrong += [f"{name}, search: {what}" for what in visit.wrong]
    print("\n".join(wrong) or f"{len(pages)} pages at {len(WIDTHS)} widths: nothing wrong")
    return len(wrong)


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """Address of a local server of ``folder``."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    handler = functools.partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


if __name__ == "__main__":
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else None
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    sys.exit(main(folder) > 0)
