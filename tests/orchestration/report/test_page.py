"""The page of `tinyemo report`: what it says, how it is built, and how a browser shows it at two widths."""

from __future__ import annotations

import functools
import html
import http.server
import itertools
import json
import re
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from browser import SCREENSHOTS, require_chromium
from made_models import bias, evaluation, finding, make_folder

from orchestration.report.page import MAX_BYTES, render, write_report
from orchestration.report.subject import SizeFacts, Subject, find_subject
from orchestration.search.trials import TrialRecord

HOSTILE = "<script>alert(1)</script>"


class Page(HTMLParser):
    """The structure of a page: its tags with attributes, and the text of its headings."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.headings: list[tuple[int, str]] = []
        self.text = ""
        self._is_heading = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if re.fullmatch(r"h[1-6]", tag):
            self._is_heading = True
            self.headings.append((int(tag[1]), ""))

    def handle_endtag(self, tag: str) -> None:
        self._is_heading &= not re.fullmatch(r"h[1-6]", tag)

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._is_heading:
            level, text = self.headings[-1]
            self.headings[-1] = level, text + data

    def all(self, *names: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name in names]


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    """A projector of random weights with an evaluation that leaked, a bias report, a family and a search."""
    folder = tmp_path_factory.mktemp("models") / "made"
    made = make_folder(folder, llm_weights="random")
    evaluation(made, 0.7, leaked=2)
    findings = [finding(1, -0.2), finding(2, 0.12), finding(3, 0.3, part="slices")]
    findings[1]["title"] = f"recall of {HOSTILE} against the rest"
    bias(made, findings, {"groups-1": "confirmed"})
    names = {"smollm2-135m": "", "tinyemo-700m": "random LLM weights", "tinyemo-3.2b": "random LLM weights"}
    sizes = [
        SizeFacts(name, f"family-{name}", note, "emotion6", (0.7, 0.66, 0.74), 2.0 + place, None, 0.1, "900 samples/s",
                  is_champion=not note)
        for place, (name, note) in enumerate(names.items())
    ]  # fmt: skip
    trials = [
        TrialRecord(place, {"loss.temperature": 0.07}, [{"val/top1_accuracy": 0.5 + place / 100}],
                    "finished" if place % 3 else "stopped", "", 0.0, 1.0)
        for place in range(20)
    ]  # fmt: skip
    found = find_subject(str(folder))
    return replace(found, family="pair", sizes=sizes, search="search", search_metric="val/top1_accuracy", trials=trials)


@pytest.fixture(scope="module")
def page(subject: Subject) -> str:
    return render(subject)


def test_every_figure_stands_beside_what_is_not_real_or_leaked(page: str) -> None:
    found = Page(page)
    texts = dict.fromkeys(text for _, text in found.headings)
    for section in ("What it is and how it was made", "Accuracy", "Bias", "Search history", "Samples"):
        (heading,) = [text for text in texts if text.startswith(section)]
        assert "random LLM weights" in heading
    assert "emotion6, 400 images random LLM weights LEAKED test data" in [" ".join(text.split()) for text in texts]
    captions = re.findall(r"<caption><span>(.*?)</span>", page)
    named = [caption for caption in captions if caption.startswith(("Measures", "Recall", "Confusion", "Groups"))]
    assert len(named) == 4
    assert all("random LLM weights" in caption for caption in named)
    titles = re.findall(r"<title id=.*?>(.*?)</title>", page)
    assert len(titles) == 8
    assert all("random LLM weights" in title for title in titles)


def test_the_page_holds_the_figures_of_its_documents(page: str) -> None:
    text = " ".join(Page(page).text.split())
    for expected in (
        "70.0 % [66.0, 74.0]", "80 of theme", "linear probe", "+2.1 [-1.2, +5.3]", "arXiv 2410.07062, table 2",
        "-0.200 [-0.250, -0.150]", "confirmed: looked at",
        "Since the report before new: recall of theme 1", "not decided", "LEAKED", "t0", "same image",
        "13 trials finished, 7 were stopped early", "0.12", "smollm2-135m (best by validation)", "Confident and wrong",
        "tinyemo promote made --name NAME --to champion",
    ):  # fmt: skip
        assert expected in text, expected


def test_text_of_others_is_never_markup(page: str) -> None:
    assert HOSTILE not in page
    assert html.escape(HOSTILE) in page
    assert not Page(page).all("script", "iframe", "object", "link") or Page(page).all("link") == [
        {"rel": "icon", "href": "data:,"}
    ]


def test_the_page_is_built_for_keyboards_and_screen_readers(page: str) -> None:
    found = Page(page)
    levels = [level for level, _ in found.headings]
    assert levels[0] == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
    assert found.all("html") == [{"lang": "en"}]
    assert {name for name, _ in found.tags} >= {"header", "nav", "main", "footer"}
    assert page.count("<table") == page.count("<caption>") > 8
    assert all(attributes.get("alt") for attributes in found.all("img"))
    charts = found.all("svg")
    assert charts
    assert all(attributes["role"] == "img" and attributes["aria-labelledby"] for attributes in charts)
    identities = [attributes["id"] for _, attributes in found.tags if "id" in attributes]
    assert len(identities) == len(set(identities))
    targets = {str(attributes["href"])[1:] for attributes in found.all("a") if str(attributes["href"]).startswith("#")}
    assert targets <= set(identities)


def test_sections_without_documents_name_the_command_that_makes_them(tmp_path: Path) -> None:
    made = make_folder(tmp_path / "bare")
    text = " ".join(Page(render(find_subject(made.folder))).text.split())
    assert "There is no evaluation of this model. tinyemo evaluate RECIPE makes one" in text
    assert "There is no bias report. tinyemo bias MODEL --data ... --groups ... makes one" in text
    assert "Samples come with an evaluation" in text
    assert "random" not in text
    evaluation(made)
    (made_config := tmp_path / "bare" / "config.json").write_text(made_config.read_text() + "\n")
    assert "1 of the documents below" in render(find_subject(made.folder))


@pytest.fixture
def server_folder(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A folder and the address where a web server on loopback shows its files."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(tmp_path)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield tmp_path, f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


FRAME = """<!DOCTYPE html><link rel="icon" href="data:,"><title>frame</title><body style="margin: 0">
<iframe src="report.html" style="width: {width}px; height: 800px; border: 0"></iframe><pre id="found">waiting</pre>
<script>document.querySelector("iframe").onload = event => {{
  const page = event.target.contentDocument.documentElement;
  document.getElementById("found").textContent = "widths " + page.scrollWidth + " " + page.clientWidth;
}}</script>"""


@pytest.mark.parametrize(("name", "width"), [("desktop", 1280), ("phone", 360)])
def test_a_browser_shows_the_page_without_requests_errors_or_overflow(
    subject: Subject, server_folder: tuple[Path, str], name: str, width: int
) -> None:
    browser, (folder, address) = require_chromium(), server_folder
    assert write_report(subject, folder / "report.html") < MAX_BYTES
    (folder / "frame.html").write_text(FRAME.format(width=width))
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    command = [
        browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", f"--user-data-dir={folder / 'profile'}",
        "--enable-logging=stderr", f"--log-net-log={folder / 'net.json'}",
    ]  # fmt: skip

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*command, *arguments], capture_output=True, text=True, check=True, timeout=90)

    run(f"--screenshot={SCREENSHOTS / f'report-{name}.png'}", f"--window-size={width},9000", f"{address}/report.html")
    framed = run("--dump-dom", f"--window-size={width + 100},900", f"{address}/frame.html")
    widths = re.search(r"widths (\d+) (\d+)", framed.stdout)
    assert widths is not None, framed.stdout
    assert (int(widths[1]), int(widths[2])) == (width, width)
    assert "CONSOLE" not in framed.stderr
    # Chromium has requests of its own; those of a page name it as their initiator. The frame asked for the report.
    requests = [event["params"] for event in json.loads((folder / "net.json").read_text())["events"]
                if "initiator" in event.get("params", {})]  # fmt: skip
    assert {item["url"] for item in requests if item["initiator"] == address} == {f"{address}/report.html"}
