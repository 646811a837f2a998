"""The page, driven in headless Chromium. The oracle is `generate` of each column's entry alone."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from http_serving import Access, Served, serving, wait_for

import mlora

pytest.importorskip("selenium", reason="the page is driven through selenium")
if not shutil.which("chromium") or not shutil.which("chromedriver"):
    pytest.skip("no chromium, or no chromedriver", allow_module_level=True)

from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import Select

TOKENS = 6


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1400,1000"):
        options.add_argument(flag)
    options.binary_location = shutil.which("chromium") or ""
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        yield driver
    finally:
        driver.quit()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    access = Access(keys=["secret"], admin_key="admin")
    with serving(tmp_path_factory.mktemp("page"), access=access, runtime_adapters=True) as served:
        yield served


class Page:
    def __init__(self, browser: Any, url: str) -> None:
        self.browser = browser
        browser.get(url)

    def find(self, css: str) -> Any:
        return self.browser.find_element(By.CSS_SELECTOR, css)

    def all(self, css: str) -> list[Any]:
        return list(self.browser.find_elements(By.CSS_SELECTOR, css))

    def set(self, css: str, value: Any) -> None:
        self.put(self.find(css), value)

    def put(self, element: Any, value: Any) -> None:
        """As a person who moves or types does."""
        self.browser.execute_script(
            "arguments[0].value = arguments[1]; for (const name of ['input', 'change']) "
            "arguments[0].dispatchEvent(new Event(name, { bubbles: true }))",
            element, str(value),
        )  # fmt: skip

    def ask(self) -> list[str]:
        self.find("#ask").click()
        wait_for(lambda: self.find("#ask").is_enabled())
        return [answer.text for answer in self.all(".answer")]

    def feet(self) -> list[str]:
        return [foot.text for foot in self.all(".foot")]


@pytest.fixture
def page(browser: Any, served: Served) -> Page:
    page = Page(browser, served.url)
    page.set("#key", "secret")
    wait_for(lambda: len(page.all(".column")) == 3)
    page.set("#prompt", "hello")
    page.set("#tokens", TOKENS)
    if page.find("#chat").is_selected():
        page.find("#chat").click()
    return page


def test_the_key_is_asked_for(browser: Any, served: Served) -> None:
    page = Page(browser, served.url)
    browser.execute_script("sessionStorage.clear()")
    browser.refresh()
    wait_for(lambda: "401" in page.find("#trouble").text)
    assert not page.all(".column") and not page.all("#adapters tr")
    page.set("#key", "secret")
    wait_for(lambda: len(page.all("#adapters tr")) == 4)
    assert page.find("#trouble").text == "" and page.find("#model").text == "tiny"


def test_entries_side_by_side(page: Page, served: Served) -> None:
    """A base, an adapter and a mix; then a merge, one of whose weights is moved."""
    want = [served.text("hello", entry, max_new_tokens=TOKENS) for entry in (None, "a", {"a": 0.5, "b": 0.5})]
    assert page.ask() == want and len(set(want)) == 3
    assert all(foot.startswith(f"length: {TOKENS} tokens, first after") for foot in page.feet())
    Select(page.all("[aria-label=Strategy]")[0]).select_by_value("ties")
    page.put(page.all("[aria-label=weight]")[1], 1.25)
    page.put(page.all("[aria-label=density]")[0], 0.7)
    assert [output.text for output in page.all("output")] == ["0.70", "0.50", "1.25"]
    merge = mlora.Merge(["a", "b"], [0.5, 1.25], combination_type="ties", density=0.7)
    assert page.ask() == [*want[:2], served.text("hello", merge, max_new_tokens=TOKENS)]
    page.find("#add").click()
    Select(page.all("[aria-label=Entry]")[3]).select_by_value("d")
    page.all("[title='Remove the column']")[1].click()
    assert page.ask()[2] == served.text("hello", "d", max_new_tokens=TOKENS)
    page.find("#chat").click()
    prompt = served.tokenizer.apply_chat_template(
        [{"role": "user", "content": "hello"}], add_generation_prompt=True, tokenize=False
    )
    assert page.ask()[0] == served.text(prompt, None, max_new_tokens=TOKENS)


def test_what_goes_wrong_is_shown_in_its_column(page: Page, served: Served) -> None:
    Select(page.all("[aria-label=Entry]")[1]).select_by_value("c")
    body = {"lora_name": "c"}
    assert served.post("/v1/unload_lora_adapter", body, "admin").status_code == 200
    try:
        answers = page.ask()
        assert answers[0] == served.text("hello", None, max_new_tokens=TOKENS) and answers[1] == ""
        assert "404" in page.feet()[1] and "'c'" in page.feet()[1]
        assert "error" in page.all(".foot")[1].get_attribute("class")
        wait_for(lambda: len(page.all("#adapters tr")) == 3)  # the table looks again by itself
    finally:
        body |= {"lora_path": str(served.folders["c"])}
        assert served.post("/v1/load_lora_adapter", body, "admin").status_code == 200
    page.set("#tokens", 100000)
    page.ask()
    assert all("400" in foot for foot in page.feet())


def test_stopping_frees_the_places(page: Page, served: Served) -> None:
    page.set("#tokens", 200)
    page.find("#ask").click()
    wait_for(lambda: served.engine.stats().running == 3)
    page.find("#stop").click()
    wait_for(lambda: page.feet() == ["stopped"] * 3)
    wait_for(lambda: served.engine.stats().running == 0)


def test_nothing_comes_from_outside(page: Page, served: Served) -> None:
    page.ask()
    loaded = page.browser.execute_script("return performance.getEntriesByType('resource').map((entry) => entry.name)")
    assert loaded and all(name.startswith((served.url, "data:")) for name in loaded)
    log = page.browser.get_log("browser")
    said = [line for line in log if line["level"] in ("WARNING", "SEVERE") and "status of 40" not in line["message"]]
    assert not said, said


def test_the_table(page: Page, served: Served) -> None:
    rows = [[cell.text for cell in row.find_elements(By.TAG_NAME, "td")] for row in page.all("#adapters tr")]
    infos = served.engine.runtime.adapters
    assert [row[0] for row in rows] == [name for name in infos if not infos[name].made_of]
    for name, kind, rank, modules, size, where, error, running, waiting in rows:
        info = infos[name]
        assert (kind, rank, modules, size) == (
            info.variant or info.peft_type, str(info.rank), str(len(info.modules)), f"{info.bytes:,}"
        )  # fmt: skip
        assert where in ("device", "host") and (error, running, waiting) == ("exact", "0", "0")


def test_the_page_is_in_the_package() -> None:
    import mlora.serve.http as home

    assert (Path(home.__file__).parent / "page.html").is_file()
