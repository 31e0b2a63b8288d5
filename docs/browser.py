"""The page of a run in a real browser: open it, click through it, photograph it; attack it.

Needs Chromium and its driver (Debian: apt install chromium chromium-driver), and only here. The
driver is spoken to in its own protocol, WebDriver: JSON over HTTP.

Run it:  python docs/browser.py runs/mapo runs/grpo      # screenshots in runs/browser/; 30 s
         python docs/browser.py                          # only the hostile page
         python docs/browser.py --picture runs/mapo      # docs/page.png too
"""
import argparse
import base64
import json
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from show import write_page
from test_show import hostile_run

FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync",
         "--disable-background-networking", "--disable-component-update", "--disable-quic"]
DESKTOP, PHONE = (1280, 900), (390, 844)
# What is true of a page on any screen.
WIDER = "return document.documentElement.scrollWidth - innerWidth"
SMALLEST = """return Math.min(...[...document.querySelectorAll('section')]
                     .map(section => section.getBoundingClientRect().height))"""
VALUES = "return [...document.querySelectorAll('.charts .bar')].map(bar => bar.innerText)"


class Browser:
    """A session of Chromium: `with Browser() as browser: browser.open(..)`."""

    def __init__(self, port: int = 9515):
        self.address = f"http://127.0.0.1:{port}"
        self.driver = subprocess.Popen(["chromedriver", f"--port={port}"],
                                       stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def __enter__(self) -> "Browser":
        self.profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        options = {"args": [*FLAGS, f"--user-data-dir={self.profile.name}"]}
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        for _ in range(100):
            try:
                self.post("/status", method="GET")
                break
            except OSError:
                time.sleep(.1)
        session = self.post("/session", {"capabilities": {"alwaysMatch": wanted}})
        self.address += f"/session/{session['sessionId']}"
        return self

    def __exit__(self, *_) -> None:
        self.post("", method="DELETE")          # the session: else Chromium outlives its driver
        self.driver.terminate()
        self.driver.wait()
        self.profile.cleanup()

    def post(self, path: str, body: dict | None = None, method: str = "POST"):
        data = None if method == "GET" else json.dumps(body or {}).encode()
        request = urllib.request.Request(self.address + path, data, method=method)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)["value"]

    def devtools(self, command: str, **parameters) -> dict:
        return self.post("/goog/cdp/execute", {"cmd": command, "params": parameters})

    def open(self, file: Path, size: tuple[int, int], dark: bool = False) -> None:
        self.devtools("Emulation.setDeviceMetricsOverride", width=size[0], height=size[1],
                      deviceScaleFactor=1, mobile=size == PHONE)
        self.devtools("Emulation.setTouchEmulationEnabled", enabled=size == PHONE)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.devtools("Emulation.setEmulatedMedia", features=[scheme])
        self.post("/url", {"url": "about:blank"})
        self.post("/url", {"url": file.resolve().as_uri()})

    def run(self, script: str):
        """The value that a script returns."""
        return self.post("/execute/sync", {"script": script, "args": []})

    def choose(self, menu: str, word: str) -> None:
        option = self.run(f"return document.querySelector('#{menu} option[value=\"{word}\"]')")
        self.post(f"/element/{next(iter(option.values()))}/click")

    def press(self, key: str) -> None:
        for kind in ("keyDown", "keyUp"):
            text = {"text": key} if len(key) == 1 and kind == "keyDown" else {}
            self.devtools("Input.dispatchKeyEvent", type=kind, key=key, **text)

    def point(self, x: float, y: float, touch: bool) -> None:
        """Move the mouse there, or touch it and lift the finger."""
        if touch:
            points = [{"x": x, "y": y}]
            self.devtools("Input.dispatchTouchEvent", type="touchStart", touchPoints=points)
            self.devtools("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])
        else:
            self.devtools("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def photograph(self, file: Path, sections: tuple[str, str] | None = None,
                   scale: int = 1) -> None:
        """The whole page, or from the first to the last of two sections, as PNG. With scale 2 a
        pixel of the page is 2 x 2 of the picture."""
        width, top, end = self.run("return [innerWidth, 0, document.documentElement.scrollHeight]")
        if sections:
            first, last = (f"document.getElementById('{name}')" for name in sections)
            top, end = self.run(f"return [{first}.offsetTop - 12, "
                                f"{last}.offsetTop + {last}.offsetHeight + 12]")
        clip = {"x": 0, "y": top, "width": width, "height": end - top, "scale": scale}
        taken = self.devtools("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)
        file.write_bytes(base64.b64decode(taken["data"]))

    def complaints(self) -> list[str]:
        """Errors and refusals since the last call: of scripts, of the page's policy, of loading."""
        return [entry["message"] for entry in self.post("/se/log", {"type": "browser"})]


def check(browser: Browser, size: tuple[int, int], runs: int) -> None:
    """Click through a page: every part is there, nothing is wider than the screen."""
    assert browser.run(WIDER) <= 0, f"wider than {size[0]} by {browser.run(WIDER)}"
    assert browser.run(SMALLEST) > 30 and browser.run("return STORIES.length") > 0
    assert browser.run("return document.querySelectorAll('.charts svg').length") == 8
    browser.run("document.querySelector('#count').scrollIntoView()")
    arrow = "return document.querySelector('[aria-label=next]').getBoundingClientRect().top"
    tops = []
    for i in range(40):                                  # the arrow stays under the pointer
        tops.append(browser.run(arrow))
        assert browser.run("return at") == i % browser.run("return STORIES.length")
        browser.press("ArrowRight")
    assert max(tops) - min(tops) < 1, tops
    kinds = browser.run("return [...document.querySelectorAll('#show option')].map(o => o.value)")
    for name in kinds[1:]:
        browser.choose("show", name)
        count = f"return STORIES.filter(story => kinds(story).includes('{name}')).length"
        assert browser.run("return count.innerText") == f"1 of {browser.run(count)}"
    browser.choose("show", "all")
    last = browser.run("const strip = document.querySelector('.strip');"
                       "const edge = element => element.getBoundingClientRect().right;"
                       "return edge(strip.lastChild) - edge(strip)")
    assert last <= 1, "the last step is outside the strip"
    cards = browser.run("return document.querySelectorAll('.strip .card').length")
    assert cards >= runs
    assert browser.run("return document.querySelectorAll('.strip .overview').length") == cards
    chart = browser.run("const chart = document.querySelector('.charts svg');"
                        "chart.scrollIntoView({block: 'center'});"
                        "const box = chart.getBoundingClientRect();"
                        "return [box.left + box.width / 2, box.top + box.height / 2]")
    before = browser.run(VALUES)
    browser.point(*chart, touch=size == PHONE)
    assert all(old != new for old, new in zip(before, browser.run(VALUES), strict=True))


def attack(browser: Browser, folder: Path) -> None:
    """A page of hostile trajectories runs nothing, fetches nothing, and can be read."""
    page = write_page([hostile_run(folder)])
    for size in (DESKTOP, PHONE):
        browser.open(page, size)
        assert browser.run("return window.hacked") is None
        assert browser.run(WIDER) <= 0, f"the hostile page is wider than {size[0]}"
        stories = browser.run("return STORIES.length")
        assert stories > 5
        for _ in range(stories):
            browser.press("ArrowRight")
        assert browser.run("return window.hacked") is None
        tags = "return document.querySelectorAll('script, iframe, b[onclick], img[onerror]').length"
        assert browser.run(tags) == 2                    # the data, and the page's own script
    assert not browser.complaints(), "the page tried something"
    print(f"hostile page: {page.stat().st_size:,} bytes, {stories} trajectories, nothing ran")


def take_picture(browser: Browser, page: Path, file: Path, width: int, sections: tuple[str, str],
                 scale: int = 1) -> None:
    """Sections of a page that is `width` pixels wide, in few colours: a small file for docs/."""
    browser.open(page, (width, 900))
    browser.photograph(file, sections, scale)
    Image.open(file).convert("RGB").quantize(256).save(file, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="*", type=Path, help="folders of runs of train.py")
    parser.add_argument("--picture", action="store_true", help="make docs/page.png")
    args = parser.parse_args()
    folders, out = args.runs, ROOT / "runs/browser"
    with Browser() as browser, tempfile.TemporaryDirectory() as aside:
        attack(browser, Path(aside))
        if not folders:
            return
        page = write_page(folders)
        out.mkdir(parents=True, exist_ok=True)
        for name, size, dark in (("desktop", DESKTOP, False), ("phone", PHONE, False),
                                 ("dark", DESKTOP, True)):
            browser.open(page, size, dark)
            check(browser, size, len(folders))
            browser.open(page, size, dark)
            browser.photograph(out / f"{name}.png")
        if args.picture:
            take_picture(browser, page, ROOT / "docs/page.png", 1100, ("watched", "stories"))
        assert not browser.complaints()
        print(f"{page}: {page.stat().st_size:,} bytes; screenshots in {out}")


if __name__ == "__main__":
    main()
