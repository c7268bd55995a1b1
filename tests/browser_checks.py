"""Pages as a browser shows them: axe finds nothing serious, nothing is asked of another machine, nothing is cut off.

`make test-browser` builds the site and the pages of reports (browser_pages.py) into BROWSER_PAGES, and runs this with
Debian's Chromium (CHROMIUM: another one).  Pictures of all pages are left in screenshots/ there, to be looked at.
"""

import functools
import http.server
import os
import threading
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import sync_playwright

FOLDER = Path(os.environ.get("BROWSER_PAGES", "runs/browser"))
CHROMIUM = os.environ.get("CHROMIUM", "/usr/bin/chromium")
QUIET = ["disable-gpu", "disable-quic", "no-first-run", "disable-background-networking", "disable-component-update"]
PAGES = {
    "site": "site/index.html",
    "page-of-the-site": "site/solvers.html",
    "demo": "demo/report.html",
    "passport": "passport.html",
    "compare": "comparison.html",
}
SIZES = {"desktop": (1280, 800), "phone": (390, 844)}


@pytest.fixture(scope="module")
def address():
    class Silent(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    serve = functools.partial(Silent, directory=FOLDER)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), serve) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as play:
        options = ["--no-sandbox", "--disable-sync", *(f"--{name}" for name in QUIET)]
        with play.chromium.launch(executable_path=CHROMIUM, args=options) as browser:
            yield browser


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", PAGES)
def test_a_page(name, size, scheme, address, browser):
    width, height = SIZES[size]
    asked = []
    with browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme) as context:
        page = context.new_page()
        page.on("request", lambda request: asked.append(request.url))
        assert page.goto(f"{address}/{PAGES[name]}", wait_until="networkidle").ok
        (FOLDER / "screenshots").mkdir(exist_ok=True)
        page.screenshot(path=FOLDER / "screenshots" / f"{name}-{size}-{scheme}.png", full_page=True)
        wide = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        found = Axe().run(page).response["violations"]
    assert [url for url in asked if not url.startswith((address, "data:", "blob:"))] == []
    assert wide <= 0, f"{wide} pixels lie beside the page"
    serious = [
        f"{rule['id']}: {rule['help']}: {node['target']} {node['failureSummary']}"
        for rule in found
        if rule["impact"] in ("serious", "critical")
        for node in rule["nodes"][:3]
    ]
    assert serious == []
