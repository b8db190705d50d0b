"""tools.demo: the tabs show what the model computes, in a browser that is used as by a person, and
nothing leaves the machine.
"""

import argparse
import functools
import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from conftest import ROOT, contents
from helpers.launch import free_port
from PIL import Image

from dataset.build import build_dataset
from inference.index import find_images, open_index, read_index, search, update_index
from models.albef import Ranking
from tools import demo
from visualize import draw

TEXT = "a red circle"


@pytest.fixture(scope="module")
def page():
    pytest.importorskip("gradio", reason="needs Gradio: pip install -r requirements-demo.txt")
    from tools import demo_page

    return demo_page


@pytest.fixture(scope="module")
def index(models, photos, tmp_path_factory):
    """The folder of an index of the photos by the model of retrieval."""
    folder = tmp_path_factory.mktemp("index")
    images, *_ = find_images([Path(photos[0]).parent])
    update_index(folder, open_index(folder), models["retrieval"], images)
    return folder


@pytest.fixture
def run(run_main):
    """Runs the tool; returns (exit status, stdout, stderr)."""
    return functools.partial(run_main, "tools.demo", "--device", "cpu")


@pytest.fixture
def port():
    """A free port."""
    return free_port()


@pytest.mark.parametrize("task", ["pretrain", "vqa", "ve", "nlvr"])
def test_a_tab_shows_the_numbers_and_the_heat_of_the_model(page, models, photos, task, monkeypatch):
    draw_heat_maps = mock.Mock(wraps=draw.draw_heat_maps)
    monkeypatch.setattr(draw, "draw_heat_maps", draw_heat_maps)
    model, image = models[task], photos[0]
    if task == "pretrain":
        answer, match = page.show_match(model, image, TEXT), model.match(image, TEXT)
        expected = {"match": match, "no match": 1 - match}
        assert f"{model.similarity(image, TEXT):.2f}" in answer.note
    elif task == "vqa":
        answer = page.show_answers(model, image, TEXT)
        expected = dict(model.answer(image, TEXT, model.config.answer_list))
    elif task == "ve":
        answer, expected = page.show_entailment(model, image, TEXT), model.entails(image, TEXT)
    else:
        answer, true = page.show_truth(model, *photos[:2], TEXT), model.true_of(photos[:2], TEXT)
        expected = {"True": true, "False": 1 - true}
    assert answer.result == pytest.approx({text or "(empty)": p for text, p in expected.items()})
    drawn = draw_heat_maps.call_args.args
    assert [label for label, _ in drawn[1]] == [
        "whole question" if task == "vqa" else "whole text",
        *TEXT.split(),
    ]
    assert len(drawn[0]) == (2 if task == "nlvr" else 1)
    assert answer.heat.width > 500 and np.asarray(answer.heat).std() > 1


def test_pseudo_targets_are_five_words_for_each_and_unknown_words_are_named(page, models, photos):
    answer = page.show_pseudo_targets(models["pretrain"], photos[0], "a red щ circle")
    words = models["pretrain"].fill_in(photos[0], "a red щ circle")
    assert [row[0] for row in answer.result] == ["a", "red", "щ [UNK]", "circle"]
    for row, (_, candidates) in zip(answer.result, words, strict=True):
        assert row[1:] == [f"{c.text} {c.score:.1%}{' ✓' if c.hit else ''}" for c in candidates]
    assert "not in the vocabulary, so the model reads each as [UNK]: щ" in answer.note


def test_a_search_ranks_as_the_model_and_says_what_its_numbers_are(page, models, index, photos):
    model, call = models["retrieval"], page.find(read_index(index), models["retrieval"])
    pictures, note, found = call(TEXT, None, False)
    ranked = model.rank(photos, TEXT, page.TOP, rerank=0)
    assert found == [photos[i] for i, _ in ranked] and "ranked by ITC" in note
    assert [caption.split()[0] for _, caption in pictures] == [f"{p:.1%}" for _, p in ranked]
    pictures, note, found = call(TEXT, None, True)
    count = min(page.TOP, len(photos))  # k_test is 3, but all shown images have a probability
    assert set(found) == {photos[i] for i, _ in model.rank(photos, TEXT, count)} and "ITM" in note
    probs = model.match(found, TEXT).tolist()
    names = [f"{p:.1%} · {Path(f).name}" for p, f in zip(probs, found, strict=True)]
    assert [caption for _, caption in pictures] == names
    pictures, note, found = call(" ?! ", None, True)
    assert pictures == found == [] and "nothing is left of it" in note
    assert "nothing to search for" in call("", None, True)[1]


def test_a_search_finds_by_an_example(page, models, index, photos, tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    model, call = models["retrieval"], page.find(read_index(index), models["retrieval"])
    example = shutil.copy(photos[3], tmp_path / "example.jpg")
    pictures, note, found = call("", example, True)
    assert found[0] == photos[3] and "ranked by ITC" in note
    both = call(TEXT, example, False)[2]
    options = {"k": page.TOP, "rerank": 0}
    assert both == [hit.path for hit in search(read_index(index), model, TEXT, example, **options)]
    (tmp_path / "a.jpg").write_text("a text")
    for image, message in (
        (tmp_path / "a.jpg", "a.jpg: this is not an image"),
        (photos[3], "upl"),
    ):
        pictures, note, found = call(TEXT, str(image), True)
        assert pictures == found == [] and message in note and str(tmp_path) not in note


@pytest.mark.parametrize("by", ["itc", "itm"])
def test_the_search_begins_with_the_ranking_that_was_measured_to_be_better(
    page, models, index, monkeypatch, by
):
    model = models["retrieval"]
    monkeypatch.setattr(model, "ranking", Ranking(by, 3, 30.0, 20.0))
    blocks = page.build_page({"r": model}, {}, read_index(index), "r").blocks.values()
    (box,) = (block for block in blocks if type(block).__name__ == "Checkbox")
    assert box.value == (by == "itm")
    note = page.find(read_index(index), model)(TEXT, None, False)[1]
    assert "30.0% by ITC and 20.0% by ITM" in note


def test_errors_are_notes_without_folders(page, models, photos, tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    match, two = (
        page.ask(next(tab for tab in page.TABS if tab.name == name), models)
        for name in ("Match", "Two images")
    )
    (tmp_path / "a.jpg").write_text("no image")
    Image.new("1", (20000, 10000)).save(tmp_path / "huge.png")
    photo = shutil.copy(photos[0], tmp_path / "photo.jpg")
    assert "no image yet" in match("pretrain", None, TEXT).note
    assert "no image yet" in two("nlvr", photo, None, TEXT).note
    for image, text, expected in (
        (photo, "", "no caption yet"),
        (photo, "?!", "nothing is left of it after clean-up"),
        (tmp_path / "a.jpg", TEXT, "a.jpg: this is not an image"),
        (tmp_path / "huge.png", TEXT, "huge.png: too large"),
    ):
        result, note, heat = match("pretrain", str(image), text)
        assert result is None and not heat and expected in note and str(tmp_path) not in note


def test_the_tabs_are_those_that_the_checkpoints_can_fill(page, models, index):
    def tabs(*tasks, index=None, searching=""):
        chosen = {task: models[task] for task in tasks}
        blocks = page.build_page(chosen, {}, index, searching).blocks.values()
        return [block.label for block in blocks if type(block).__name__ == "Tab"]

    assert tabs("vqa") == ["Ask"] and tabs("retrieval", "ve") == ["Match", "Entailment"]
    names = ["Search", "Match", "Two images", "Pseudo-targets"]
    chosen = "nlvr", "pretrain", "retrieval"
    assert tabs(*chosen, index=read_index(index), searching="retrieval") == names


def test_the_model_of_an_index_is_loaded_once(models, files, index):
    args = argparse.Namespace(index=str(index), device="cpu", checkpoint=[])
    chosen = {task: models[task] for task in ("ve", "retrieval")}
    found, name = demo.load_index(args, chosen)
    assert name == "retrieval" and len(chosen) == 2 and found.task == "retrieval"
    del chosen["retrieval"]
    _, name = demo.load_index(args, chosen)
    assert name == str(files["retrieval"]) and chosen[name].can("rank")


def test_bad_input_is_one_line(run, page, files, tmp_path, port):
    with socket.create_server(("127.0.0.1", 0)) as other:
        cases = {
            (files["ve"], "--port", other.getsockname()[1]): "Address already in use",
            (files["ve"], "--port", 99999): "--port 99999",
            (tmp_path / "no.pth",): "no.pth does not exist",
            (files["nlvr_pretrain"],): "none of the checkpoints has a tab",
            (files["ve"], "--index", tmp_path): "no index there",
            (files["ve"], "--prot", 1): "did you mean --port?",
            (): "name a checkpoint",
        }
        for arguments, message in cases.items():
            status, _, err = run(*([] if "--port" in arguments else ["--port", port]), *arguments)
            last = err.splitlines()[-1]
            assert status == 2 and last.startswith("error: ") and message in last, err


def test_without_gradio_there_is_one_line_at_once():
    code = (
        "import runpy, sys; sys.modules['gradio'] = None; sys.argv = ['demo', 'a']; "
        "runpy.run_module('tools.demo', run_name='__main__')"
    )
    command = [sys.executable, "-X", "importtime", "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    lines = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    assert done.returncode == 2 and "torch" not in done.stderr
    assert lines == ["error: Gradio is missing; run pip install -r requirements-demo.txt"]


def test_it_serves_this_machine_alone_asks_no_other_and_leaves_nothing(
    run, page, files, port, tmp_path, monkeypatch
):
    asked, look_up, seen = set(), socket.getaddrinfo, {}
    monkeypatch.setattr(
        socket,
        "getaddrinfo",
        lambda host, *more, **keys: (asked.add(host), look_up(host, *more, **keys))[1],
    )
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.chdir(tmp_path)

    def visit():
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/") as answer:
            seen.update(answer.headers.items(), page=answer.read().decode())
        os.kill(os.getpid(), signal.SIGINT)

    def launch(*arguments):
        serve(*arguments)
        threading.Thread(target=visit).start()

    serve = page.launch
    monkeypatch.setattr(page, "launch", launch)
    status, out, err = run(files["vqa"], files["nlvr_pretrain"], "--port", port)
    assert status == 130 and err.splitlines()[-1] == "SIGINT: the page is closed"
    assert f"open http://127.0.0.1:{port}" in out and "nlvr_pretrain.pth is left out" in err
    assert "default-src 'self'" in seen["content-security-policy"]
    assert not re.search(r"<(?:link|script)[^>]*\"(?:https?:)?//(?!127.0.0.1)", seen["page"])
    assert {str(host) for host in asked} <= {"127.0.0.1", "b'127.0.0.1'"} and asked
    assert not list(tmp_path.iterdir()) and not list((ROOT / "tools").glob("*.pyi"))


# --------------------------------------------------------------------------------------------------
# over HTTP


class Client:
    """HTTP client of a page that serves one model, like a program or a script of another site."""

    def __init__(self, port, name, uploads):
        self.port, self.name, self.uploads = port, name, uploads

    def request(self, method, path, body=None, **headers):
        """Return (status, headers, body); keyword arguments replace headers."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request(
                method,
                path,
                body,
                {name.replace("_", "-"): value for name, value in headers.items()},
            )
            response = connection.getresponse()
            return response.status, response.headers, response.read()
        finally:
            connection.close()

    def ask(self, image, text=TEXT):
        """Call the function of the tab for an image as the browser names it.

        Return its last message.
        """
        return self.call(0, [self.name, image, text])

    def call(self, function, data, event=None, session="one"):
        """Call a function of the page. Return its last message."""
        body = json.dumps(
            {"data": data, "fn_index": function, "session_hash": session, "event_data": event}
        )
        assert (
            self.request("POST", "/gradio_api/queue/join", body, Content_Type="application/json")[0]
            == 200
        )
        events = self.request("GET", f"/gradio_api/queue/data?session_hash={session}")[2].decode()
        messages = [json.loads(line.removeprefix("data: ")) for line in events.splitlines() if line]
        return next(message for message in messages if message["msg"] == "process_completed")

    def upload(self, content, **headers):
        """Return the status and body of an upload."""
        body = (
            b'--b\r\nContent-Disposition: form-data; name="files"; filename="a.jpg"\r\n\r\n'
            + content
            + b"\r\n--b--\r\n"
        )
        headers = {"Content_Type": "multipart/form-data; boundary=b", **headers}
        status, _, answer = self.request("POST", "/gradio_api/upload", body, **headers)
        return status, answer


@pytest.fixture(scope="module")
def client(page, models, tmp_path_factory):
    """A client of a page with the tab Entailment."""
    uploads = tmp_path_factory.mktemp("uploads")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(uploads))
        patch.setattr(page, "UPLOAD", 2**21)
        blocks = page.build_page({"ve": models["ve"]}, {}, None)
        page.launch(blocks, "127.0.0.1", port := free_port())
        yield Client(port, "ve", uploads)
        blocks.close(verbose=False)


META = {"_type": "gradio.FileData"}


def test_only_what_was_uploaded_is_opened(client, photos, tmp_path):
    status, answer = client.upload(Path(photos[0]).read_bytes())
    uploaded = json.loads(answer)[0]
    assert status == 200
    assert "entailment" in str(client.ask({"path": uploaded, "meta": META})["output"]["data"])
    os.mkfifo(fifo := tmp_path / "fifo")
    os.symlink(photos[0], link := Path(uploaded).parent / "link.jpg")
    answers = {True: set(), False: set()}
    for path in (
        photos[0],
        fifo,
        link,
        tmp_path / "none.jpg",
        tmp_path,
        "/dev/zero",
        "/etc/passwd",
        f"{uploaded}/../../../x",
        "a\0b",
        "",
        os.path.relpath(photos[0]),
    ):
        for image in ({"path": str(path)}, {"path": str(path), "meta": META}):
            answer = str(client.ask(image)["output"].get("data"))
            assert "entailment" not in answer, image
            answers["meta" in image].add(answer)
    # the answer does not reveal whether a file exists
    assert len(answers[True]) == len(answers[False]) == 1
    assert "entailment" in str(client.ask({"path": uploaded})["output"]["data"])


def test_a_found_image_of_any_folder_opens_in_match(
    page, models, photos, index, port, tmp_path, monkeypatch
):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    # the photos are neither below tmp_path nor in the working directory
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    blocks = page.build_page({"r": models["retrieval"]}, {}, read_index(index), "r")
    page.launch(blocks, "127.0.0.1", port)
    try:
        client = Client(port, "r", tmp_path)
        functions = json.loads(client.request("GET", "/config")[2])["dependencies"]
        searching, choosing = (
            next(i for i, function in enumerate(functions) if function["targets"][0][1] == event)
            for event in ("click", "select")
        )
        found = client.call(searching, [TEXT, None, False, None])["output"]["data"][0]
        assert len(found["value"]) == min(page.TOP, len(photos))
        event = {"index": 0, "value": None}
        answer = client.call(choosing, [None, TEXT], event)["output"]["data"]
        image = answer[2]
        assert Path(image["path"]).read_bytes() in [Path(photo).read_bytes() for photo in photos]
        assert "no match" in str(client.call(choosing + 1, ["r", image, TEXT])["output"]["data"])
    finally:
        blocks.close(verbose=False)


def test_other_hosts_and_origins_are_refused(client):
    port = client.port
    for host in (f"127.0.0.1:{port}", f"localhost:{port}"):
        for headers in ({}, {"Origin": f"http://{host}"}):
            assert client.request("GET", "/config", Host=host, **headers)[0] == 200
            assert client.upload(b"abc", Host=host, **headers)[0] == 200
    own = f"127.0.0.1:{port}"
    for host, origin in (
        ("evil.example", None),
        (f"evil.example:{port}", f"http://evil.example:{port}"),
        (own, "http://evil.example"),
        (own, "null"),
        (own, "http://127.0.0.1:1"),
        ("127.0.0.1", None),
        (own, f"https://{own}"),
        (f"127.0.0.1:{port}1", None),
    ):
        headers = {"Host": host} | ({"Origin": origin} if origin else {})
        for method, path in (
            ("GET", "/"),
            ("GET", "/config"),
            ("POST", "/gradio_api/queue/join"),
            ("OPTIONS", "/config"),
        ):
            status, found, body = client.request(
                method, path, **headers, Access_Control_Request_Method="POST"
            )
            assert (
                status == 403
                and "access-control-allow-origin" not in found
                and b"gradio" not in body
            ), (host, origin, method)
        assert client.upload(b"abc", **headers)[0] == 403


def test_too_large_an_upload_is_refused_and_not_kept(client, page, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert client.upload(b"x" * 2**20)[0] == 200
    before = contents(client.uploads)
    assert client.upload(b"x" * (page.UPLOAD + 1))[0] == 413
    assert contents(client.uploads) == before and not contents(tmp_path)


# --------------------------------------------------------------------------------------------------
# in a browser


@pytest.fixture(scope="module")
def address(page, models, index, shapes):
    """The address of a page with every tab, and examples in each."""
    chosen = {task: models[task] for task in ("pretrain", "retrieval", "vqa", "ve", "nlvr")}
    data = {}
    for task, model in chosen.items():
        name = "test" if model.can("rank") else f"{task}_test"
        paths = {"test_file": [str(shapes / f"{name}.json")], "vqa_root": str(shapes)}
        data[task] = build_dataset(task, "test", {**model.config.to_dict(), **paths})
    blocks = page.build_page(chosen, data, read_index(index), "retrieval")
    page.launch(blocks, "127.0.0.1", port := free_port())
    yield f"http://127.0.0.1:{port}/"
    blocks.close(verbose=False)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """A headless Chromium."""
    webdriver = pytest.importorskip(
        "selenium.webdriver", reason="needs Selenium: pip install -r requirements-dev.txt"
    )
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and driver):
        pytest.skip("needs a browser: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (
        "headless",
        "no-sandbox",
        "disable-gpu",
        "disable-quic",
        "no-first-run",
        "disable-background-networking",
        "disable-component-update",
        "disable-sync",
        f"user-data-dir={tmp_path_factory.mktemp('chromium')}",
        "window-size=1300,1100",
    ):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield browser
    browser.quit()


def see(browser, selector, count=1, text=""):
    """Waits for that many visible elements of a CSS selector with a text, and returns them."""
    from selenium.common.exceptions import StaleElementReferenceException
    from selenium.webdriver.support.ui import WebDriverWait

    def visible(browser):
        found = browser.find_elements("css selector", selector)
        found = [element for element in found if element.is_displayed() and text in element.text]
        return len(found) >= count and found

    wait = WebDriverWait(browser, 60, 0.1, [StaleElementReferenceException])
    return wait.until(visible, f"no {count} x {selector} with {text!r}")


def write(browser, text):
    """Replaces the text of the field and presses Enter."""
    field, *_ = see(browser, "textarea:not([disabled])")
    field.clear()
    field.send_keys(text, "\n")


def has_note(browser, text):
    """Waits for a note with a text."""
    from selenium.webdriver.support.ui import WebDriverWait

    def noted(browser):
        notes = browser.find_elements("css selector", "textarea[disabled]")
        return any(text in note.get_property("value") for note in notes if note.is_displayed())

    WebDriverWait(browser, 60, 0.1).until(noted, f"no note with {text!r}")


def test_every_tab_in_a_browser(address, browser, photos, tmp_path):
    browser.get(address)
    write(browser, TEXT)
    captions = [found.text for found in see(browser, ".caption-label", min(12, len(photos)))]
    probability, _, name = captions[0].partition(" · ")
    assert any(path.endswith(name) for path in photos)
    see(browser, ".thumbnail-item")[0].click()  # opens the tab Match
    has_note(browser, "(Grad-CAM)")
    assert float(probability[:-1]) / 100 == pytest.approx(first_share(browser, "match"), abs=0.01)
    see(browser, "img[src$='.png']")
    write(browser, "?!")
    has_note(browser, "nothing is left of it after clean-up")
    (tmp_path / "broken.jpg").write_text("no image")
    see(browser, "button[aria-label='Remove Image']")[0].click()
    uploads = browser.find_elements("css selector", "input[type=file]")
    uploads[1].send_keys(str(tmp_path / "broken.jpg"))  # the first one is in Search
    see(browser, "button[aria-label='Remove Image']")
    has_note(browser, "broken.jpg: this is not an image")
    write(browser, TEXT)
    has_note(browser, "broken.jpg: this is not an image")
    for tab, text in (
        ("Ask", "(Grad-CAM)"),
        ("Entailment", "(Grad-CAM)"),
        ("Two images", "(Grad-CAM)"),
        ("Pseudo-targets", "soft targets"),
    ):
        see(browser, "button[role=tab]", text=tab)[0].click()
        see(browser, "tr.tr-body")[0].click()
        has_note(browser, text)
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = {
        message["params"]["request"]["url"]
        for message in messages
        if message["method"] == "Network.requestWillBeSent"
        and message["params"]["documentURL"].startswith(address)
    }
    assert asked and all(url.startswith((address, "data:", "blob:")) for url in asked), asked
    refused = [
        entry for entry in browser.get_log("browser") if entry["source"] in ("security", "network")
    ]
    assert not refused, refused


def test_results_are_marked_when_a_setting_changes(address, browser, photos):
    browser.get(address)
    write(browser, TEXT)
    see(browser, ".caption-label")
    for change, undo in (
        (lambda: see(browser, "textarea:not([disabled])")[0].send_keys("s"), "\b"),
        (lambda: see(browser, "input[type=checkbox]")[0].click(), None),
    ):
        change()
        has_note(browser, "outdated: ")
        see(browser, "label", text="images (outdated)")
        if undo:
            see(browser, "textarea:not([disabled])")[0].send_keys(undo)
        else:
            change()
        has_note(browser, "ITM: ")
    browser.find_element("css selector", "input[type=file]").send_keys(photos[2])
    has_note(browser, "outdated: ")
    write(browser, TEXT)
    has_note(browser, "ITM: ")


def test_the_page_is_no_wider_than_a_telephone(address, browser):
    metrics = {"width": 420, "height": 900, "deviceScaleFactor": 1, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    browser.get(address)
    write(browser, TEXT)
    for picture in see(browser, ".thumbnail-item", 4):
        assert 100 < picture.size["width"] and picture.rect["x"] + picture.size["width"] <= 420
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 420
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def first_share(browser, label):
    """The share of a label among the probabilities."""
    line = next(row.text for row in see(browser, ".confidence-set") if row.text.startswith(label))
    return float(re.search(r"(\d+)%", line)[1]) / 100
