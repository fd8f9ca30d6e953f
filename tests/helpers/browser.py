"""A headless browser that measures how a page is laid out."""

import html
import json
import re
import shutil
import subprocess

import pytest
from helpers.waits import PATIENCE

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "headless_shell")
# The page lies in a frame of the asked width. The frame has no script: the probe around it measures.
PROBE = """<!DOCTYPE html><meta charset="utf-8"><style>iframe {{ border: 0; width: {width}px; height: 900px }}</style>
<iframe srcdoc="{page}"></iframe><pre id="found"></pre>
<script>
window.onload = () => {{
  const page = document.querySelector("iframe").contentDocument, root = page.documentElement;
  const wide = (part) => part.getBoundingClientRect().right > root.clientWidth + 0.5;
  const cells = [...page.querySelectorAll("th, td")].filter((cell) => cell.clientWidth);
  document.getElementById("found").textContent = JSON.stringify({{
    width: root.clientWidth,
    scrolls: root.scrollWidth > root.clientWidth,
    tables: page.querySelectorAll("table").length,
    cells: cells.length,
    wide: [...page.querySelectorAll("table, img, p, h1, h2"), ...cells].filter(wide).length,
    cut: cells.filter((cell) => cell.scrollWidth > cell.clientWidth + 1).length,
    pictures: [...page.images].map((picture) => picture.complete ? picture.naturalWidth : 0),
    scripts: page.scripts.length,
    links: page.querySelectorAll("link, [src]:not([src^='data:'])").length,
    paper: getComputedStyle(page.body).backgroundColor,
    ink: getComputedStyle(page.body).color,
  }});
}};
</script>"""


def browser() -> str:
    """Return the path of a browser, or skip the test."""
    for name in NAMES:
        if found := shutil.which(name):
            return found
    pytest.skip(f"no headless browser: none of {', '.join(NAMES)} is installed")


def laid_out(page: str, folder, width: int, dark: bool = False) -> dict:
    """Return what a browser finds in a page that is ``width`` pixels wide."""
    probe = folder / f"probe-{width}.html"
    probe.write_text(PROBE.format(width=width, page=html.escape(page)), encoding="utf-8")
    scheme = ["--blink-settings=preferredColorScheme=0"] if dark else []
    command = [
        browser(), "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--window-size=1400,1000",
        f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=10000", *scheme, "--dump-dom", probe.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    found = re.search(r'<pre id="found">(\{.*?\})</pre>', done.stdout, re.DOTALL)
    assert found, f"the browser gave no figures: {done.stdout[-500:]} {done.stderr[-1000:]}"
    return json.loads(html.unescape(found.group(1)))
