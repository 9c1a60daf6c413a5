"""MLflow's pages on a finished study, in a real browser: what a person sees who opens it, finds it and asks it."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.figure
import pytest

from study import views
from study.tracking_uri import ui_command
from tests.study.mirrored_study import DELIVERY_S, Study, empty_store, job, record, until

SNR_SIGMOID = {
    "lambda_kind": "snr_sigmoid",
    "lambda_lo": 0.5,
    "lambda_hi": 0.9,
    "lambda_k": -0.2,
    "lambda_s0_db": 0.0,
    "lambda_k_shape": "constant",
    "curriculum_kind": "fixed",
    "snr_db": 0.0,
    "weighting_kind": "fixed",
    "w_tag": 0.1,
    "w_mix": 1.0,
    "learning_rate": 0.002,
    "align_level": "tokens",
    "spec_time_fraction": 0.1,
    "spec_mel_fraction": 0.0,
}
RAMP = {"lambda_kind": "ramp", "curriculum_kind": "uniform", "weighting_kind": "dwa"}
DATA = {
    "name": "factory",
    "digest": "0123456789ab",
    "source": {"code": "trainables/data/factory.py", "seed": 0},
    "counts": {"search": {"clips": 40}, "confirm": {"clips": 20}},
}
FILTER = 'params.lambda_kind = "snr_sigmoid" and metrics."low/official" > 60'  # as README gives it
LOW = {"t0001": 58.0, "t0002": 64.0, "t0003": 71.0}
WAIT_S = 90.0  # for a page on busy cores; a quiet machine takes one or two seconds


@dataclass
class Pages:
    """The study, the server that shows it, and a browser. Elements are found by CSS selectors."""

    study: Study
    address: str
    driver: Any

    def open(self, path: str) -> None:
        self.driver.get("about:blank")  # else a change behind the # is no new page
        self.driver.get(f"{self.address}/{path}")

    def find(self, selector: str) -> list[Any]:
        return list(self.driver.find_elements("css selector", selector))

    def texts(self, selector: str) -> list[str]:
        """All at once, because the pages draw themselves again while one reads."""
        script = "return [...document.querySelectorAll(arguments[0])].map(e => e.textContent.trim())"
        return list(self.driver.execute_script(script, selector))

    def wait(self, condition: Callable[[], Any], what: str) -> Any:
        from selenium.common.exceptions import StaleElementReferenceException
        from selenium.webdriver.support.ui import WebDriverWait

        waiting = WebDriverWait(self.driver, WAIT_S, ignored_exceptions=[StaleElementReferenceException])
        return waiting.until(lambda _: condition(), f"{what}; the page says: {self.texts('body')}")

    def click(self, selector: str, text: str = "") -> None:
        """On the first element with ``text``, whatever hint of MLflow's may lie over it."""
        script = """const found = [...document.querySelectorAll(arguments[0])]
            .find(e => e.textContent.trim() === arguments[1] || !arguments[1]);
            if (found) found.click(); return !!found"""
        self.wait(lambda: self.driver.execute_script(script, selector, text), f"{selector} {text}")

    def follow(self, text: str) -> None:
        """A link of a description. A click would open it in another tab."""
        script = """return [...document.querySelectorAll('a')]
            .filter(e => e.textContent.trim() === arguments[0]).map(e => e.getAttribute('href'))"""
        self.open(self.wait(lambda: self.driver.execute_script(script, text), f"the link {text}")[0])

    def rows(self) -> list[str]:
        """The jobs in the table of runs, from top to bottom."""
        script = """return [...document.querySelectorAll('.ag-pinned-left-cols-container .ag-row a')]
            .map(a => [a.getBoundingClientRect().top, a.textContent]).sort((a, b) => a[0] - b[0]).map(a => a[1])"""
        return [name.split()[0] for name in self.driver.execute_script(script)]

    def headings(self) -> list[str]:
        """What the columns of the table of runs are called, from left to right."""
        script = """return [...document.querySelectorAll('.ag-header-cell')].filter(e => e.textContent.trim())
            .map(e => [e.getBoundingClientRect().left, e.textContent.trim()]).sort((a, b) => a[0] - b[0])
            .map(e => e[1])"""
        return list(self.driver.execute_script(script))


def needed(program: str) -> str:
    found = shutil.which(program)
    if found is None:
        reason = f"no {program}: apt-get install chromium chromium-driver"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    return str(found)


def finished_study(root: Path) -> Study:
    (root / "mlflow.db").write_bytes(empty_store())
    study = Study(root)
    study.json["data"] = DATA
    study.json["config"] |= {"confirm": {"seeds": 1, "recipes": ["paper"]}}
    study.tracker.start(study.json, "3 trials of retain on factory.")
    for job_id, low in LOW.items():
        params = RAMP if job_id == "t0003" else SNR_SIGMOID
        words = f"{params['lambda_kind']}, {params['curriculum_kind']}, {params['weighting_kind']}"
        trial = job(job_id, params=params, label=words)
        trial["trial"] = {**trial["trial"], "params": params}
        tell(study, trial, low)
    confirmation = job("c-best-s0", role="confirm", label="best", params=SNR_SIGMOID)
    confirmation["trial"] = {**confirmation["trial"], "split": "confirm"}
    tell(study, confirmation, 63.0)
    figure = root / "snr-curves.png"
    axes = matplotlib.figure.Figure(figsize=(3, 2)).subplots()
    axes.plot([-10, 0, 10], [60, 70, 90])
    axes.figure.savefig(figure)
    study.tracker.log_artifacts([figure])
    study.tracker.finish("FINISHED")
    assert study.tracker.close(DELIVERY_S) == 0
    return study


def tell(study: Study, a_job: dict[str, Any], low: float) -> None:
    study.begin(a_job)
    for epoch in (1, 2, 3):
        value = record(epoch, **{"low/official": low - 3 + epoch, "high/official": 90.0, "gap_closed": 0.1})
        study.folder.append_record(a_job["id"], value)
        study.tracker.job_reported(a_job, value)
    ended = {"state": "finished", "reason": None, "epoch": 3, "metrics": value["metrics"], "duration_s": 41.0}
    study.end(a_job, ended)


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pages]:
    programs = [needed("chromium"), needed("chromedriver")]
    root = tmp_path_factory.mktemp("pages")
    study = finished_study(root)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    with open(root / "server.log", "wb") as log:
        server = subprocess.Popen(
            f"{ui_command(study.uri, root)} --port {port}",
            shell=True,
            stdout=log,
            stderr=log,
            env=environment,
            cwd=root,
            start_new_session=True,
        )
    try:
        address = f"http://127.0.0.1:{port}"
        until(lambda: server.poll() is not None or answers(address), timeout_s=180)
        assert server.poll() is None, (root / "server.log").read_text()
        driver = browser(*programs, profile=root / "profile")
        try:
            yield Pages(study, address, driver)
        finally:
            driver.quit()
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=5):
            return True
    except OSError:
        return False


def browser(chromium: str, chromedriver: str, profile: Path) -> Any:
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    options.page_load_strategy = "none"  # what a page has to show is waited for, not its last request
    for word in (
        "--headless=new",
        "--no-sandbox",  # root, as in a container, has none
        "--disable-dev-shm-usage",
        "--disable-gpu",
        "--window-size=1600,1000",
        "--no-first-run",
        "--disable-background-networking",
        "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
        f"--user-data-dir={profile}",
    ):
        options.add_argument(word)
    driver = webdriver.Chrome(options=options, service=Service(chromedriver))
    driver.set_script_timeout(WAIT_S)
    return driver


def test_the_study_is_found_and_its_trials_lie_under_it(pages: Pages) -> None:
    pages.open("#/experiments")
    pages.click("a", "quick")
    pages.follow(views.TITLES[views.NESTED])  # the description leads there, wherever MLflow's pages begin
    pages.wait(lambda: pages.rows() == ["quick"], "the parent alone")
    wanted = ["system", "lambda_kind", "curriculum_kind", "weighting_kind", "official", "low/official"]
    pages.wait(lambda: pages.headings()[2 : 2 + len(wanted)] == wanted, f"columns in the order {wanted}")
    pages.click(".ag-pinned-left-cols-container .ag-row button")
    below = ["c-best-s0", "t0003", "t0002", "t0001"]
    pages.wait(lambda: pages.rows() == ["quick", *below], "the children, nested")
    script = "return [...document.querySelectorAll('.ag-pinned-left-cols-container .ag-row a')].map(a => a.offsetLeft)"
    parent, *children = pages.driver.execute_script(script)
    assert parent < min(children)  # indented


def test_every_child_can_be_searched_for_on_its_own(pages: Pages) -> None:
    experiment = pages.study.experiment.experiment_id
    found = pages.study.client.search_runs([experiment], FILTER)
    assert sorted(run.info.run_name.split()[0] for run in found) == ["c-best-s0", "t0002"]

    from selenium.webdriver.common.keys import Keys

    pages.open(views.link(experiment, views.RANKING))
    pages.wait(lambda: sorted(pages.rows()) == ["t0001", "t0002", "t0003"], "the trials alone")
    box = pages.wait(lambda: pages.find("[data-testid=search-box]"), "the search box")[0]
    box.send_keys(Keys.CONTROL, "a")
    box.send_keys(FILTER, Keys.ENTER)
    pages.wait(lambda: sorted(pages.rows()) == ["c-best-s0", "t0002"], "what the filter finds")


def test_the_charts_show_the_trials(pages: Pages) -> None:
    pages.open("#/experiments/" + pages.study.experiment.experiment_id)
    pages.follow("Charts")
    pages.wait(lambda: len(pages.find(".js-plotly-plot")) >= 3, "charts")
    axes = ".js-plotly-plot .xtitle, .js-plotly-plot .ytitle"
    pages.wait(lambda: {"high/official", "low/official"} <= set(pages.texts(axes)), "low against high SNR")
    pages.wait(lambda: len(pages.find(".js-plotly-plot .scatterlayer .trace")) >= 6, "a line for each trial")


def test_a_child_says_what_was_run_on_what_data_and_what_came_out(pages: Pages) -> None:
    run = pages.study.runs()["t0002"]
    pages.open(f"#/experiments/{pages.study.experiment.experiment_id}/runs/{run.info.run_id}")
    said = ["Lambda 0.5..0.9, falling with SNR", "Official score 63.0", "factory-search", "0123456789ab"]

    def all_said() -> bool:
        page = " ".join(pages.texts("body"))
        return all(words in page for words in said)

    pages.wait(all_said, "description and data set")
    pages.open(f"#/experiments/{pages.study.experiment.experiment_id}/runs/{run.info.run_id}/model-metrics")
    pages.wait(
        lambda: len(pages.find(".js-plotly-plot .scatterlayer .trace")) >= 3, "its metrics over epochs"
    )


def test_the_figures_of_the_report_are_seen(pages: Pages) -> None:
    run_id = pages.study.runs()["quick"].info.run_id
    experiment = pages.study.experiment.experiment_id
    pages.open(f"#/experiments/{experiment}/runs/{run_id}/artifacts/snr-curves.png")
    script = "return Math.max(0, ...[...document.images].map(i => i.naturalWidth))"
    pages.wait(lambda: pages.driver.execute_script(script) >= 200, "the figure")
