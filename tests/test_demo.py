"""Demo.py: the tabs show what the model computes, in a browser that is used as by a person, and
nothing leaves the machine.
"""

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

import pytest
from conftest import ROOT, contents, exit_status
from PIL import Image
from test_inference import files, models, photos  # noqa: F401, fixtures

from dataset.build import build_dataset
from demo import results

TEXT = "a red circle"


def percentages(html):
    """Text and percentage of each bar."""
    return re.findall(r"<span>([^<]*)</span><b>([\d.]+%)</b>", html)


@pytest.mark.parametrize("task", ["pretrain", "vqa", "ve", "nlvr"])
def test_a_tab_shows_the_numbers_and_the_heat_of_the_model(models, photos, task):  # noqa: F811
    model, image = models[task], photos[0]
    if task == "pretrain":
        html, expected = (
            results.show_match(model, image, TEXT),
            [("match", model.match(image, TEXT))],
        )
        assert f"features is {model.similarity(image, TEXT):.2f}" in html
    elif task == "vqa":
        html, expected = (
            results.show_answers(model, image, TEXT),
            model.answer(image, TEXT, model.config["answer_list"]),
        )
    elif task == "ve":
        html, expected = (
            results.show_entailment(model, image, TEXT),
            list(model.entails(image, TEXT).items()),
        )
    else:
        html, true = results.show_truth(model, *photos[:2], TEXT), model.true_of(photos[:2], TEXT)
        expected = [("True", true), ("False", 1 - true)]
    assert sorted(percentages(html)) == sorted((text, f"{p:.1%}") for text, p in expected)
    words = re.findall(r"<label><input[^>]*><span>([^<]*)</span>", html)
    assert words == ["whole question" if task == "vqa" else "whole text", "a", "red", "circle"]
    pictures = re.findall(r"src='data:image/jpeg;base64,([^']*)'", html)
    assert len(pictures) == 4 * (1 + (task == "nlvr")) and html.count(" checked") == 1


def test_words_are_escaped_and_marked_where_the_vocabulary_lacks_them(models, photos):  # noqa: F811
    for show in results.show_match, results.show_pseudo_targets:
        html = show(models["pretrain"], photos[0], "a <b>red</b> щ circle")
        assert "<b>red" not in html and "&lt;" in html
        assert (
            re.search("<span class='unknown'[^>]*>щ</span>", html)
            and "not in the vocabulary, all the same to" in html
        )


def test_pseudo_targets_are_five_words_for_each(models, photos):  # noqa: F811
    html = results.show_pseudo_targets(models["pretrain"], photos[0], TEXT)
    expected = [
        candidate
        for _, candidates in models["pretrain"].fill_in(photos[0], TEXT)
        for candidate in candidates
    ]
    assert len(expected) == 15
    assert percentages(html) == [
        (f"{c.text}{' ✓' if c.hit else ''}", f"{c.score:.1%}") for c in expected
    ]


# --------------------------------------------------------------------------------------------------
# with Gradio


@pytest.fixture(scope="module")
def page():
    pytest.importorskip("gradio", reason="needs Gradio: pip install -r requirements-demo.txt")
    import demo.page

    return demo.page


@pytest.fixture
def run(page, monkeypatch, capsys):
    """Runs Demo.py; returns (exit status, stdout, stderr)."""
    import Demo

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["Demo.py", "--device", "cpu", *map(str, arguments)])
        status = exit_status(Demo.check_gradio_and_port) or exit_status(Demo.main)
        return status, *capsys.readouterr()

    return call


@pytest.fixture
def port():
    """A free port."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


# noqa: F811
def test_a_search_ranks_as_the_model_and_says_what_its_numbers_are(page, models, photos):
    model = models["retrieval"]
    call = page.search({"r": model}, photos, {"r": model.embed_images(photos)})
    pictures, found, said = call("r", TEXT, False)
    assert (
        found == [photos[i] for i, _ in model.rank(photos, TEXT, page.TOP, rerank=0)]
        and "(ITC)" in said
    )
    pictures, found, said = call("r", TEXT, True)
    probabilities = model.match(found, TEXT).tolist()
    count = min(page.TOP, len(photos))  # k_test is 3, but all shown images have a probability
    assert (
        set(found) == {photos[i] for i, _ in model.rank(photos, TEXT, count)}
        and f"the {count} most similar images" in said
    )
    assert probabilities == sorted(probabilities, reverse=True)
    assert [caption for _, caption in pictures] == [
        f"{p:.1%} · {Path(f).name}" for p, f in zip(probabilities, found)
    ]
    assert (
        call("r", " ?! ", True)[:2] == ([], [])
        and "nothing is left of it after clean-up" in call("r", " ?! ", True)[2]
    )


# noqa: F811
def test_errors_are_sentences_without_folders(page, models, photos, tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    match, two = (
        page.ask(next(tab for tab in page.TABS if tab.name == name), models)
        for name in ("Match", "Two images")
    )
    (tmp_path / "a.jpg").write_text("no image")
    Image.new("1", (20000, 10000)).save(tmp_path / "huge.png")
    photo = shutil.copy(photos[0], tmp_path / "photo.jpg")
    assert "no image yet" in match("pretrain", None, TEXT) and "no image yet" in two(
        "nlvr", photo, None, TEXT
    )
    for image, text, expected in (
        (photo, "", "nothing is left of it after clean-up"),
        (tmp_path / "a.jpg", TEXT, ">a.jpg: not an image"),
        (tmp_path / "huge.png", TEXT, ">huge.png: too large"),
    ):
        html = match("pretrain", str(image), text)
        assert (
            "role='alert'" in html
            and expected in html
            and str(tmp_path) not in html
            and "img" not in html
        )


def test_the_tabs_are_those_that_the_checkpoints_can_fill(page, models, photos):  # noqa: F811
    def tabs(*tasks, paths=()):
        blocks = page.build_page(
            {task: models[task] for task in tasks}, {}, paths, {}
        ).blocks.values()
        return [block.label for block in blocks if type(block).__name__ == "Tab"]

    assert tabs("vqa") == ["Ask"] and tabs("retrieval", "ve") == ["Match", "Entailment"]
    assert tabs("nlvr", "pretrain", paths=photos) == [
        "Search",
        "Match",
        "Two images",
        "Pseudo-targets",
    ]


# noqa: F811
def test_broken_images_of_a_folder_are_named_and_left_out(page, photos, tmp_path, capsys):
    import Demo

    (tmp_path / "deep").mkdir()
    shutil.copy(photos[0], tmp_path / "deep/b.JPG")
    (tmp_path / "a.png").write_text("no image")
    (tmp_path / "notes.txt").write_text("no image either")
    assert Demo.find_usable(str(tmp_path)) == [str(tmp_path / "deep/b.JPG")]
    assert capsys.readouterr().out.count("\n") == 1


def test_bad_input_is_one_line(run, files, shapes, tmp_path, port):  # noqa: F811
    (tmp_path / "empty").mkdir()
    with socket.create_server(("127.0.0.1", 0)) as other:
        cases = {
            (files["ve"], "--port", other.getsockname()[1]): "Address already in use",
            (files["ve"], "--port", 99999): "a port is a number from 1 to 65535",
            (tmp_path / "no.pth",): "no.pth does not exist",
            (files["nlvr_pretrain"],): "none of the checkpoints has a tab",
            (files["ve"], "--images", shapes): "none of the checkpoints can search",
            (
                files["retrieval"],
                "--images",
                tmp_path / "none",
            ): "none: does not exist, name a folder of images",
            (
                files["retrieval"],
                "--images",
                tmp_path / "empty",
            ): "empty: no image in it or below (by the suffixes of JPEG, PNG",
            (files["ve"], "--prot", 1): "did you mean --port?",
            (): "checkpoint",
        }
        for arguments, message in cases.items():
            status, _, err = run(
                *(arguments if "--port" in arguments else (*arguments, "--port", port))
            )
            assert status == 2 and err.count("\n") == 1 and message in err, err


def test_without_gradio_there_is_one_line_at_once():
    code = (
        "import runpy, sys; sys.modules['gradio'] = None; sys.argv = ['Demo.py', 'a']; "
        "runpy.run_path('Demo.py', run_name='__main__')"
    )
    told = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", code], cwd=ROOT, capture_output=True, text=True
    )
    said = [line for line in told.stderr.splitlines() if not line.startswith("import time:")]
    assert told.returncode == 2 and said == [
        "error: Demo.py needs Gradio: pip install -r requirements-demo.txt"
    ]
    assert "torch" not in told.stderr


# noqa
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
        page.launch(*arguments)
        threading.Thread(target=visit).start()

    monkeypatch.setattr("Demo.launch", launch)
    status, out, err = run(files["vqa"], files["nlvr_pretrain"], "--port", port)
    assert status == 130 and err == "SIGINT: the page is closed\n"
    assert f"open http://127.0.0.1:{port}" in out and "nlvr_pretrain.pth is left out" in out
    assert "default-src 'self'" in seen["content-security-policy"]
    assert not re.search(r"<(?:link|script)[^>]*\"(?:https?:)?//(?!127.0.0.1)", seen["page"])
    assert {str(host) for host in asked} <= {"127.0.0.1", "b'127.0.0.1'"} and asked
    assert not list(tmp_path.iterdir()) and not list((ROOT / "demo").glob("*.pyi"))


# --------------------------------------------------------------------------------------------------
# over HTTP


class Client:
    """HTTP client of a page that serves one model, like a program or a script of another site."""

    def __init__(self, port, name):
        self.port, self.name = port, name

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


@pytest.fixture
def client(page, models, port, tmp_path, monkeypatch):  # noqa: F811
    """A client of a page with the tab Entailment."""
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "uploads"))
    monkeypatch.setattr(page, "UPLOAD", 2**21)
    blocks = page.build_page({"ve": models["ve"]}, {}, [], {})
    page.launch(blocks, "127.0.0.1", port)
    yield Client(port, "ve")
    blocks.close(verbose=False)


META = {"_type": "gradio.FileData"}


def test_only_what_was_uploaded_is_opened(client, photos, tmp_path):  # noqa: F811
    status, answer = client.upload(Path(photos[0]).read_bytes())
    uploaded = json.loads(answer)[0]
    assert status == 200
    assert "bars" in str(client.ask({"path": uploaded, "meta": META})["output"]["data"])
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
            assert "bars" not in answer, image
            answers["meta" in image].add(answer)
    # the answer does not reveal whether a file exists
    assert len(answers[True]) == len(answers[False]) == 1
    assert "bars" in str(client.ask({"path": uploaded})["output"]["data"])


# noqa: F811
def test_a_found_image_of_any_folder_opens_in_match(
    page, models, photos, port, tmp_path, monkeypatch
):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    # the photos are neither below tmp_path nor in the working directory
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    model = models["retrieval"]
    blocks = page.build_page({"r": model}, {}, photos, {"r": model.embed_images(photos)})
    page.launch(blocks, "127.0.0.1", port)
    try:
        client = Client(port, "r")
        functions = json.loads(client.request("GET", "/config")[2])["dependencies"]
        searching, choosing = (
            next(i for i, function in enumerate(functions) if function["targets"][0][1] == event)
            for event in ("click", "select")
        )
        assert len(client.call(searching, ["r", TEXT, False])["output"]["data"][0]) == len(photos)
        _, _, image, _ = client.call(choosing, ["r", None, TEXT], {"index": 0, "value": None})[
            "output"
        ]["data"]
        assert Path(image["path"]).read_bytes() in [Path(photo).read_bytes() for photo in photos]
        assert "bars" in str(client.call(choosing + 1, ["r", image, TEXT])["output"]["data"])
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
    before = contents(tmp_path)
    assert client.upload(b"x" * (page.UPLOAD + 1))[0] == 413
    assert contents(tmp_path) == before


# --------------------------------------------------------------------------------------------------
# in a browser


@pytest.fixture
def address(page, models, photos, shapes, port):  # noqa: F811
    """The address of a page with every tab, and examples in each."""
    chosen = {task: models[task] for task in ("pretrain", "retrieval", "vqa", "ve", "nlvr")}
    # noqa: F811
    files = {
        "pretrain": "test",
        "retrieval": "test",
        "vqa": "vqa_test",
        "ve": "ve_test",
        "nlvr": "nlvr_test",
    }
    data = {}
    for task, model in chosen.items():
        config = {
            **model.config,
            "test_file": [str(shapes / f"{files[task]}.json")],
            "vqa_root": str(shapes),
        }
        data[task] = build_dataset(task, "test", config)
    features = {task: models[task].embed_images(photos) for task in page.ALIGNED}
    blocks = page.build_page(chosen, data, photos, features)
    page.launch(blocks, "127.0.0.1", port)
    yield f"http://127.0.0.1:{port}/"
    blocks.close(verbose=False)


@pytest.fixture
def browser(tmp_path):
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
        f"user-data-dir={tmp_path / 'chromium'}",
        "window-size=1300,1100",
    ):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield browser
    browser.quit()


class Person:
    """Looks at what is visible of a page and uses it."""

    def __init__(self, browser):
        self.browser = browser

    def see(self, selector, count=1, text=""):
        """Wait for that many elements of a CSS selector with a text, and return them."""
        from selenium.common.exceptions import StaleElementReferenceException
        from selenium.webdriver.support.ui import WebDriverWait

        def visible(browser):
            found = browser.find_elements("css selector", selector)
            found = [
                element for element in found if element.is_displayed() and text in element.text
            ]
            return len(found) >= count and found

        wait = WebDriverWait(self.browser, 60, 0.1, [StaleElementReferenceException])
        return wait.until(visible, f"no {count} x {selector} with {text!r}")

    def open(self, tab):
        self.see("button[role=tab]", text=tab)[0].click()

    def write(self, text):
        """Replace the text of the field and press Enter."""
        (field,) = self.see("textarea")
        field.clear()
        field.send_keys(text, "\n")

    def bars(self, count):
        return [tuple(bar.text.split("\n")) for bar in self.see(".bar", count)]

    def heat(self):
        """Return what lies on top where the heat maps are."""
        return self.browser.execute_script(
            "const heat = [...document.querySelectorAll('.heat')].find(heat => heat.offsetParent);"
            "heat.scrollIntoView(); const box = heat.getBoundingClientRect();"
            "return document.elementFromPoint(box.left + 40, box.bottom - 40).alt"
        )


def test_every_tab_in_a_browser(address, browser, models, photos, tmp_path):  # noqa: F811
    from selenium.webdriver import ActionChains

    person = Person(browser)
    browser.get(address)
    person.see("label", text="retrieval")[0].click()
    person.write(TEXT)
    captions = [
        caption.text for caption in person.see("#found .caption-label", min(12, len(photos)))
    ]
    probability, _, name = captions[0].partition(" · ")
    assert any(path.endswith(name) for path in photos)
    person.see("#found .thumbnail-item")[0].click()  # opens the tab Match
    assert person.bars(1) == [("match", probability)]
    assert person.heat() == "heat map of whole text"
    _, word, other, _ = person.see(".heat label")
    ActionChains(browser).move_to_element(word).perform()
    assert person.heat() == "heat map of a"
    word.click()
    ActionChains(browser).move_to_element(other).perform()
    assert person.heat() == "heat map of red"
    ActionChains(browser).move_to_element(person.see("h1")[0]).perform()
    assert person.heat() == "heat map of a"
    person.write("?!")
    person.see(".sentence", text="nothing is left of it after clean-up")
    (tmp_path / "broken.jpg").write_text("no image")
    person.see("button[aria-label='Remove Image']")[0].click()
    browser.find_elements("css selector", "input[type=file]")[0].send_keys(
        str(tmp_path / "broken.jpg")
    )
    person.see("button[aria-label='Remove Image']")
    person.write(TEXT)
    person.see(".sentence", text="broken.jpg: not an image")
    person.open("Ask")
    person.see("tr.tr-body")[0].click()
    assert len(person.bars(1)) == 1 and person.heat() == "heat map of whole question"
    person.open("Entailment")
    person.see("tr.tr-body")[0].click()
    assert {text for text, _ in person.bars(3)} == {"entailment", "neutral", "contradiction"}
    person.open("Two images")
    person.see("tr.tr-body")[0].click()
    assert [text for text, _ in person.bars(2)] == ["True", "False"]
    person.open("Pseudo-targets")
    person.see("tr.tr-body")[0].click()
    assert len(person.bars(5)) % 5 == 0
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
