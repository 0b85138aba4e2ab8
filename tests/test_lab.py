"""JupyterLab opens a chapter in a real browser and runs it from end to end."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
from selenium.webdriver.support.ui import WebDriverWait

from conftest import NBS, ROOT

CHAPTER = "11_hooks.ipynb"


@pytest.fixture
def lab(tmp_path):
    "JupyterLab on a copy of the chapters: its address and its folder."
    folder = tmp_path / "project" / "nbs"  # its last cell exports: into the copy
    for name in ("nbs", "avss_nb"):
        shutil.copytree(
            ROOT / name, folder.parent / name, ignore=shutil.ignore_patterns("results", "__pycache__"), symlinks=True
        )
    for name in ("settings.ini", "setup.py", "pyproject.toml"):
        shutil.copy(ROOT / name, folder.parent / name)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    homes = {name: str(tmp_path / name) for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR")}
    options = [
        "--no-browser",
        "--allow-root",
        "--expose-app-in-browser",
        f"--port={port}",
        "--ServerApp.port_retries=0",
        "--IdentityProvider.token=",
        f"--ServerApp.root_dir={folder}",
        "--LabApp.extension_manager=readonly",
        "--LabApp.news_url=",
        "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
    ]
    with (tmp_path / "lab.log").open("w") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", *options], cwd=ROOT, env=os.environ | homes, stdout=log, stderr=log
        )
    try:
        for _ in range(120):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/api", timeout=5).close()
            except OSError:
                time.sleep(0.5)
            else:
                break
        else:
            pytest.fail((tmp_path / "lab.log").read_text()[-3000:])
        yield f"http://127.0.0.1:{port}/lab/tree/{CHAPTER}?reset", folder
    finally:
        server.terminate()
        server.wait(30)


RUN = """const wait = ms => new Promise(next => setTimeout(next, ms));
(async () => {
  const app = window.jupyterapp, panel = () => app.shell.currentWidget;
  await app.restored;
  while (!panel()?.sessionContext) await wait(200);
  await panel().context.ready;
  await panel().sessionContext.ready;
  await app.commands.execute('notebook:run-all-cells');
  await panel().context.save();
  window.ran = panel().title.label;
})().catch(error => { window.ran = 'failed: ' + error; });"""


@pytest.mark.slow
def test_a_chapter_runs_in_the_browser(lab, browser):
    url, folder = lab
    for cell in (notebook := json.loads((folder / CHAPTER).read_text()))["cells"]:
        cell.pop("outputs", None) is None or cell.update(outputs=[], execution_count=None)
    (folder / CHAPTER).write_text(json.dumps(notebook))
    browser.get(url)
    WebDriverWait(browser, 120).until(lambda b: b.execute_script("return !!window.jupyterapp"))
    browser.execute_script(RUN)
    assert (
        WebDriverWait(browser, 300, poll_frequency=1).until(lambda b: b.execute_script("return window.ran")) == CHAPTER
    )
    ran = [c for c in json.loads((folder / CHAPTER).read_text())["cells"] if c["cell_type"] == "code"]
    stored = {c["id"]: c for c in json.loads((NBS / CHAPTER).read_text())["cells"]}
    errors = ["".join(o["traceback"]) for c in ran for o in c["outputs"] if o["output_type"] == "error"]
    assert not errors, re.sub(r"\x1b\[[\d;]*m", "", errors[0])

    def kinds(cell: dict) -> set[str]:
        return {kind for o in cell["outputs"] for kind in o.get("data", {})} - {"text/plain"}

    assert all(c["execution_count"] and kinds(c) >= kinds(stored[c["id"]]) for c in ran)
    assert any("image/png" in kinds(c) for c in ran)
    assert browser.execute_script("return document.querySelectorAll('.jp-OutputArea-output img').length") > 0
