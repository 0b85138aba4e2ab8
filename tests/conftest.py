"""What several test files use: the project's folders, a browser that looks at pages, and the order in which several
processes take the tests."""

import gc
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from urllib.parse import urlsplit

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test asks the hub; read when transformers is imported
if (
    workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
) > 1:  # threads of more processes than cores wait for each other
    os.environ["OMP_NUM_THREADS"] = str(max(1, os.cpu_count() // workers))

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.support.ui import WebDriverWait
from xdist.scheduler import LoadScopeScheduling

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / "nbs"
NO_BROWSER = "pages are looked at in a browser: apt-get update && apt-get install -y chromium chromium-driver"
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1400,1000",
]

# The text that a reader sees outside of code: formulas left as TeX would stand there.
PROSE = """
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), parts = [];
for (let node = walker.nextNode(); node; node = walker.nextNode())
  if (!node.parentElement.closest('pre, code, script, style, noscript, template, math annotation')) \
parts.push(node.data);
return parts.join('\\n');
"""
BROKEN_IMAGES = (
    "return [...document.images].filter(i => !(i.complete && i.naturalWidth > 0)).map(i => i.src.slice(0, 120));"
)


def run(*command, cwd: Path, **environment) -> str:
    "What a command says; it must not fail."
    done = subprocess.run(
        [str(c) for c in command], cwd=cwd, env=os.environ | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def copy_sources(folder: Path, *more: str, ignore: tuple[str, ...] = ()) -> None:
    "Copy what the package is built from, and more files by name, into a folder."
    left_out = shutil.ignore_patterns("__pycache__", *ignore)
    for name in ("nbs", "avss_nb"):
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=left_out)
    made_from = ("settings.ini", "setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE")
    for name in (*made_from, "optional-models.txt", *more):
        shutil.copy(ROOT / name, folder / name)


def check_page(browser, url: str) -> list[str]:
    "Open a page (http://… or file://…) and list what is wrong with it; an empty list is a good page."
    for kind in ("browser", "performance"):
        browser.get_log(kind)  # what earlier pages left
    browser.get(url)
    WebDriverWait(browser, 60).until(lambda b: b.execute_script("return document.readyState") == "complete")
    problems = [f"broken image {src}" for src in browser.execute_script(BROKEN_IMAGES)]
    prose = browser.execute_script(PROSE)
    if len(prose.split()) < 5:
        problems.append("the page is empty")
    problems += [
        f"TeX in the text: {tex}"
        for tex in re.findall(r"\\[A-Za-z]{2,}.{0,40}|\$[^$\s][^$\n]*\$|\\[(\[].{0,40}", prose)
    ]
    problems += [
        f"console: {entry['message']}"
        for entry in browser.get_log("browser")
        if entry["level"] == "SEVERE" and "favicon.ico" not in entry["message"]
    ]
    for entry in browser.get_log("performance"):
        event = json.loads(entry["message"])["message"]
        if event["method"] != "Network.requestWillBeSent":
            continue
        asked = event["params"]["request"]["url"]
        if urlsplit(asked).scheme in ("http", "https", "ws", "wss") and urlsplit(asked).netloc != urlsplit(url).netloc:
            problems.append(f"asks another host: {asked}")
    return problems


LONGEST = ("23_importance", "35_decoding", "24_certainty", "25_healing", "34_ablations", "22_pruning", "33_contrastive")
LONGEST += ("96_families", "test_report", "test_endurance", "test_wrappers", "test_data", "test_run_folders")
LONGEST += ("test_contrastive", "test_scale", "test_tasks")


def pytest_collection_modifyitems(items):
    "The longest chapters and files first, then the other chapters: what is short fills the gaps at the end."

    def place(item):
        chapter = item.path.stem == "test_notebooks"
        name = item.callspec.id if chapter else item.path.stem
        return LONGEST.index(name) if name in LONGEST else len(LONGEST) + (not chapter)

    items.sort(key=place)


def pytest_collection_finish():
    "The libraries are loaded: to search them for garbage again and again would take a seventh of the time."
    settle()


def settle() -> None:
    "What is loaded stays; new objects are looked through less often."
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


class ByFile(LoadScopeScheduling):
    """Each chapter wherever there is room; all tests of another file in one process, since they share what was made
    for them."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.split("::")[0]
        return nodeid if file.endswith("test_notebooks.py") else file


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config) -> int:
    "One more than there are cores: a quarter of the time goes into waiting for files, processes and the browser."
    return (os.cpu_count() or 1) + 1


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    return ByFile(config, log)


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    "A headless Chromium with an empty profile."
    chromium, driver = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
    if not (chromium and driver):
        (pytest.fail if os.environ.get("CI") else pytest.skip)(NO_BROWSER)
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in [*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    browser = webdriver.Chrome(options=options, service=Service(driver))
    yield browser
    browser.quit()
