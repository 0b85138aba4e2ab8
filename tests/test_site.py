"""The site builds, and each of its pages reads in a browser without a network."""

import functools
import http.server
import re
import subprocess
import sys
import threading
from urllib.parse import unquote, urlsplit

import pytest
from nbdev.config import get_config
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from _run import chapters
from conftest import NBS, ROOT, check_page

pytestmark = pytest.mark.slow  # the site takes a minute to build
PAGES = [re.sub(r"^\d+[a-z]?_", "", chapter.stem) + ".html" for chapter in chapters()]


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    "The built site: its folder."
    out = tmp_path_factory.mktemp("site") / "docs"
    build = subprocess.run([sys.executable, NBS / "_site.py", "--out", out], cwd=ROOT, capture_output=True, text=True)
    assert build.returncode == 0, build.stdout[-2000:] + build.stderr[-6000:]
    assert "smalldocs:" not in build.stderr and "Traceback" not in build.stderr, build.stderr
    return out


@pytest.fixture(scope="session")
def url(site):
    "Where the site is served on this machine."
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=site)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize("page", PAGES)
def test_page_reads_well(browser, url, page):
    assert check_page(browser, f"{url}/{page}") == []


def test_page_reads_well_from_the_disk(browser, site):
    assert check_page(browser, (site / "index.html").as_uri()) == []


def test_links_lead_somewhere(site):
    dead = []
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        if f"]({get_config().doc_host}" in text:
            dead.append(f"{page.name} shows a link as Markdown")
        for href in re.findall(r'<a [^>]*?href="([^"]+)"', text):
            link = urlsplit(href)
            if link.scheme or link.netloc:
                continue
            target = (page.parent / unquote(link.path)).resolve() if link.path else page
            if not target.is_file():
                dead.append(f"{page.name}: {href}")
            elif link.fragment and not re.search(
                rf'(?:id|name)="{re.escape(unquote(link.fragment))}"', target.read_text(encoding="utf-8")
            ):
                dead.append(f"{page.name}: {href}")
    assert not dead, "\n".join(dead)


def test_sidebar_is_in_reading_order(browser, url):
    browser.get(f"{url}/index.html")
    links = browser.find_elements(By.CSS_SELECTOR, "#quarto-sidebar a.sidebar-link[href]")
    assert [urlsplit(link.get_attribute("href")).path.lstrip("/") for link in links] == PAGES


def test_search_finds_a_function(browser, url):
    browser.get(f"{url}/index.html")
    browser.find_element(By.CSS_SELECTOR, "#quarto-search input").send_keys("load_model")
    hits = WebDriverWait(browser, 20).until(lambda b: b.find_elements(By.CSS_SELECTOR, "a.search-result"))
    assert f"{url}/models.html#load_model" in [hit.get_attribute("href") for hit in hits]
