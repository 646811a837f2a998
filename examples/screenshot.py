"""The README's picture of the page: base, adapter and a mix of two answer one prompt in headless Chromium.

The programs chromium and chromedriver must be there, and mlora's extras serve and test.

    python examples/screenshot.py [--prompt TEXT] [--out docs/page.png]
"""

from __future__ import annotations

import argparse
import shutil
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import Select, WebDriverWait

ROOT = Path(__file__).resolve().parent.parent
ADAPTERS = ("sql", "json", "pirate", "emoji")
SECONDS = 120  # for the server to start, and for answers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt", default="How many museums are there per country?")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "page.png")
    args = parser.parse_args()
    if missing := [tool for tool in ("chromium", "chromedriver") if shutil.which(tool) is None]:
        parser.error(f"{' and '.join(missing)} must be on the path")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folders = [option for name in ADAPTERS for option in ("--adapter", ROOT / "examples" / "adapters" / name)]
    server = subprocess.Popen([sys.executable, "-m", "mlora", "serve", "--port", str(port), *map(str, folders)])
    browser = started()
    try:
        wait = WebDriverWait(browser, SECONDS)
        wait.until(lambda _: server.poll() is not None or answers(f"http://127.0.0.1:{port}/health"))
        if server.poll() is not None:
            raise SystemExit("the server ended; what it said is above")
        browser.get(f"http://127.0.0.1:{port}")
        wait.until(lambda _: len(browser.find_elements(By.CSS_SELECTOR, ".column")) == 3)
        browser.find_element(By.ID, "prompt").send_keys(args.prompt)
        Select(browser.find_elements(By.CSS_SELECTOR, "[aria-label=Entry]")[1]).select_by_value("sql")
        for _ in range(2):  # the first answers are those of a model that has not run yet
            ask = browser.find_element(By.ID, "ask")
            ask.click()
            wait.until(lambda _: ask.is_enabled())  # noqa: B023
        browser.save_screenshot(str(args.out))
    finally:
        browser.quit()
        server.terminate()
        server.wait()
    print(args.out)


def started() -> Any:
    options = webdriver.ChromeOptions()
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1240,860"):
        options.add_argument(flag)
    options.binary_location = shutil.which("chromium") or ""
    return webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=1) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


if __name__ == "__main__":
    main()
