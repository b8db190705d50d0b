"""The page of tools.demo: a tab for each method of the models, served to this machine alone."""

import contextlib
import os
import tempfile
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, NamedTuple

import gradio as gr
from gradio.processing_utils import save_file_to_cache
from gradio.utils import get_upload_folder
from PIL import Image, UnidentifiedImageError
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse

from dataset.base import evenly
from dataset.images import FORMATS
from dataset.vqa import reachable_answers
from inference.index import Index, describe_scores, search
from inference.inputs import read_image
from inference.model import HeatMap, Inference
from utils import InputError, percent
from visualize.explain import unknown_words

# Gradio passes the file of an image unchanged, and the framework's decoder reports its faults.
# If this were a subclass, Gradio would write a stub file beside this module.
gr.Image.preprocess = lambda self, given: given and given.path  # ty: ignore[invalid-assignment]
# the browser refuses all requests of Gradio to other hosts (fonts, scripts)
POLICY = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; frame-ancestors 'none'"
TOP = 12  # images that a search shows
RERANKED = 32  # largest number of candidates that a search re-ranks, so that the answer comes soon
COLUMNS = 6  # of found images
# on a telephone, the columns of Gradio's gallery would be wider than the screen
NARROW = """@media (max-width: 640px) {
  .found .grid-container { grid-template-columns: repeat(2, minmax(0, 1fr)) !important; }
}"""
HEIGHT = 400  # largest height and width of found images in pixels
PICTURE: dict[str, Any] = {"sources": ["upload", "clipboard"], "buttons": [], "height": 260}
EXAMPLES = 4
SHOWN = 5  # answers and candidates
UPLOAD = 50 * 2**20  # largest size of a file in bytes
SESSIONS = 100  # browsers whose last search is kept
# seconds between two cleanings; age in seconds at which they delete an uploaded file
CLEANING = (600, 3600)
# other programs cannot call these functions by name
QUIET: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
# one call at a time, to limit memory and cores
ONE_AT_A_TIME: dict[str, Any] = {
    "api_visibility": "private",
    "concurrency_id": "models",
    "concurrency_limit": 1,
}


class Answer(NamedTuple):
    """Content that a tab shows.

    Attributes:
        result: Probabilities by text, or the rows of a table.
        note: Lines of text.
        heat: Picture of heat maps.
    """

    result: Any
    note: str
    heat: Image.Image | None = None


def explain(result: dict[str, float], heat: HeatMap, *lines: str) -> Answer:
    """Return a result with notes and the picture of a heat map."""
    lines += (f"The picture shows which patches lead to “{heat.verdict}” (Grad-CAM).",)
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "heat.png")
        heat.draw(path)
        picture = Image.open(path)
        picture.load()
    return Answer(result, "\n".join(lines), picture)


def show_match(model: Inference, image: str, text: str) -> Answer:
    """Answer with the probability of a match."""
    match, similarity = model.match(image, text), model.similarity(image, text)
    note = f"Cosine similarity of image and text (ITC), from −1 to 1: {similarity:.2f}."
    return explain({"match": match, "no match": 1 - match}, model.heat_map(image, text), note)


def show_answers(model: Inference, image: str, question: str) -> Answer:
    """Answer with the best answers to a question."""
    answers = reachable_answers(model.config)
    found = model.answer(image, question, answers)
    note = (
        f"The {len(found)} likeliest of {len(answers)} answers."
        if answers
        else "The answer is generated."
    )
    result = {text or "(empty)": probability for text, probability in found}
    return explain(result, model.heat_map(image, question, answers), note)


def show_entailment(model: Inference, image: str, text: str) -> Answer:
    """Answer with the probabilities of the classes of visual entailment."""
    return explain(model.entails(image, text), model.heat_map(image, text))


def show_truth(model: Inference, first: str, second: str, text: str) -> Answer:
    """Answer with the probability that a text is true of two images."""
    images = [first, second]
    true = model.true_of(images, text)
    return explain({"True": true, "False": 1 - true}, model.heat_map(images, text))


def show_pseudo_targets(model: Inference, image: str, text: str) -> Answer:
    """Answer with the momentum model's words in place of each word (Figure 2)."""
    words = model.fill_in(image, text)
    table = [
        [word, *(f"{c.text} {c.score:.1%}{' ✓' * c.hit}" for c in candidates)]
        for word, candidates in words
    ]
    note = "In training, these are the soft targets of a masked word. ✓ marks the caption's word."
    return Answer(table, "\n".join([note, *unknown_words(word for word, _ in words)]))


class Tab(NamedTuple):
    """A question that the page answers about one or two images.

    Attributes:
        name: Name of the tab.
        method: Method that models need for it, in configs/tasks.py.
        about: The question.
        labels: Labels of the images, of the text and of the button.
        show: Function (model, images, text) -> Answer.
    """

    name: str
    method: str
    about: str
    labels: tuple[str, ...]
    show: Callable[..., Answer]


TABS = (
    Tab(
        "Match",
        "match",
        "Do the image and the caption belong together, and which patches decide?",
        ("image", "caption", "Match"),
        show_match,
    ),
    Tab(
        "Ask",
        "answer",
        "What is the answer to a question about the image, and which patches decide?",
        ("image", "question", "Ask"),
        show_answers,
    ),
    Tab(
        "Entailment",
        "entails",
        "Does the statement follow from the image, contradict it, or neither?",
        ("image", "statement", "Judge"),
        show_entailment,
    ),
    Tab(
        "Two images",
        "true_of",
        "Is the statement true of the two images together?",
        ("first image", "second image", "statement", "Judge"),
        show_truth,
    ),
    Tab(
        "Pseudo-targets",
        "fill_in",
        "Which words does the momentum model expect in place of each word of the caption?",
        ("image", "caption", "Fill in"),
        show_pseudo_targets,
    ),
)


class LocalOnly:
    """Middleware that refuses other hosts and origins, and adds POLICY to every response.

    Without it a site that makes its name resolve to this machine could use the page (DNS
    rebinding).
    """

    def __init__(self, app: Callable, port: int) -> None:
        self.app, self.hosts = app, [f"{name}:{port}" for name in ("127.0.0.1", "localhost")]

    async def __call__(self, scope: Any, receive: Callable, send: Callable) -> None:
        """Respond to a request."""

        async def send_with_policy(message: Any) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["content-security-policy"] = POLICY
            await send(message)

        app, headers = self.app, Headers(scope=scope)
        origin = headers.get("origin", f"http://{self.hosts[0]}").removeprefix("http://")
        if headers.get("host") not in self.hosts or origin not in self.hosts:
            app = PlainTextResponse(f"this page opens only as http://{self.hosts[0]}\n", 403)
        await app(scope, receive, send_with_policy)


def is_uploaded(path: str) -> bool:
    """Return whether a path, which any program may send, is a file in the page's own folder."""
    folder = os.path.realpath(get_upload_folder())
    return os.path.isfile(path) and Path(os.path.realpath(path)).is_relative_to(folder)


def check_pictures(*paths: str | None) -> None:
    """Raise InputError if a file is not on this page or is not an image."""
    for path in (path for path in paths if path is not None):
        if not is_uploaded(path):
            raise InputError(
                "the image was not uploaded to this page, or its upload has expired; upload the"
                " image again"
            )
        try:
            Image.open(path, formats=FORMATS).close()
        except UnidentifiedImageError:
            raise InputError(
                f"{Path(path).name}: this is not an image; drop a file of {', '.join(FORMATS)}"
            ) from None
        except Exception:  # broken in another way, which the decoder names
            continue


def ask(tab: Tab, models: dict[str, Inference]) -> Callable[..., Answer]:
    """Return the function of a tab: (name of a model, images, text) -> Answer."""

    def call(name: str, *given: str | None) -> Answer:
        *fields, text = given
        images = [image for image in fields if image is not None]
        try:
            if len(images) < len(fields):
                raise InputError("no image yet; drop one in its field, or click an example")
            check_pictures(*images)
            if not text:
                raise InputError(f"no {tab.labels[-2]} yet; write one in its field")
            return tab.show(models[name], *images, text)
        except InputError as error:
            return Answer(None, describe_error(error, *images))

    return call


def describe_error(error: InputError, *images: str | None) -> str:
    """Return the message of an error without the folders of Gradio, which users do not know."""
    message = str(error)
    for image in filter(None, images):
        message = message.replace(f"{Path(image).parent}{os.sep}", "")
    return message


def find(index: Index, model: Inference) -> Callable[..., tuple[list, str, list[str]]]:
    """Return the function of a search: (text, example, re-rank) -> (pictures, note, paths)."""

    def call(text: str, image: str | None, rerank: bool) -> tuple[list, str, list[str]]:
        count = max(TOP, min(RERANKED, model.config.k_test)) if rerank else 0
        try:
            check_pictures(image)
            hits = search(index, model, text or None, image, k=TOP, rerank=count)
            pictures = [picture_of(hit.path) for hit in hits]
        except InputError as error:
            return [], describe_error(error, image), []
        names = [f"{percent(hit.score)} · {Path(hit.path).name}" for hit in hits]
        about = describe_scores(model, hits, len(index.paths))
        about.append("Click an image to open it in Match.")
        found = list(zip(pictures, names, strict=True))
        return found, "\n".join(about), [hit.path for hit in hits]

    return call


def picture_of(path: str) -> Image.Image:
    """Read an image and return it at a small size. Raises InputError."""
    picture = Image.fromarray(read_image(path, exif="upright").permute(1, 2, 0).numpy())
    picture.thumbnail((HEIGHT, HEIGHT))
    return picture


# --------------------------------------------------------------------------------------------------
# layout


def build_page(
    models: dict[str, Inference], data: dict[str, Any], index: Index | None, searching: str = ""
) -> gr.Blocks:
    """Build the page.

    Args:
        models: Models by name.
        data: Test data by the name of a model, for examples.
        index: Index to search in, None for no search.
        searching: Name of the model of the index.
    """
    with gr.Blocks(title="ALBEF", analytics_enabled=False, delete_cache=CLEANING) as page:
        gr.Markdown("# ALBEF")
        with gr.Tabs() as tabs:
            if index:
                found, gallery, text = add_search(index, models[searching])
            added = {
                tab.name: add_tab(tab, serving, data)
                for tab in TABS
                if (serving := {name: m for name, m in models.items() if m.can(tab.method)})
            }
        if index:
            inputs, outputs, call = added["Match"]

            def choose(event: gr.SelectData, found: list[str], text: str) -> tuple:
                # a copy in the page's folder, because Gradio serves no file of other folders
                copy = save_file_to_cache(found[event.index], get_upload_folder())
                return gr.Tabs(selected="Match"), searching, copy, text

            chosen = gallery.select(choose, [found, text], [tabs, *inputs], **QUIET)
            chosen.then(call, inputs, outputs, **ONE_AT_A_TIME)
    return page


def add_search(index: Index, model: Inference) -> tuple[gr.State, gr.Gallery, gr.Textbox]:
    """Add the tab of the search; return the state of found paths, the gallery and the text."""
    by_match = model.default_rerank > 0
    with gr.Tab("Search", id="Search"):
        with gr.Row():
            with gr.Column(scale=3):
                text = gr.Textbox(label="description of the images")
                rerank = gr.Checkbox(
                    by_match,
                    label="re-rank the most similar images by matching (ITM), which is slower",
                )
                button = gr.Button("Search", variant="primary")
                note = gr.Textbox(f"{len(index.paths)} images", label="note", interactive=False)
            with gr.Column(scale=1):
                image = gr.Image(label="example image, with or without a text", **PICTURE)
        gallery = gr.Gallery(
            label="images",
            columns=COLUMNS,
            object_fit="contain",
            allow_preview=False,
            buttons=[],
            elem_classes="found",
        )
        found, inputs = gr.State([]), [text, image, rerank]
        add_events(button, text, find(index, model), inputs, [gallery, note, found])
    return found, gallery, text


def add_events(
    button: gr.Button, text: gr.Textbox, call: Callable, inputs: list, outputs: list
) -> tuple[Callable, list]:
    """Call a function by a button or Enter, and mark its results if an input changes afterwards.

    Args:
        button: The button.
        text: Field in which Enter calls the function too.
        call: Function of the inputs that returns the outputs.
        inputs: Components.
        outputs: The component of the results, the note, and other ones.

    Returns:
        The function and its outputs, with the state that the marks need.
    """
    last, label = gr.State(None), outputs[0].label
    outdated = f"outdated: a setting has changed; press {button.value} to update"

    def remember(*given: Any) -> tuple:
        answer = call(*given)
        return gr.update(value=answer[0], label=label), *answer[1:], (given, answer[1])

    def mark(*given: Any) -> tuple:
        *values, before = given
        named = gr.skip()
        if before and tuple(values) == before[0]:
            return gr.update(label=label), before[1]
        if before:
            named = gr.update(label=f"{label} (outdated)")
        try:
            check_pictures(*(v for c, v in zip(inputs, values, strict=True) if type(c) is gr.Image))
        except InputError as error:
            return named, str(error)
        return named, f"{outdated}\n{before[1]}" if before else gr.skip()

    results = [*outputs, last]
    gr.on([button.click, text.submit], remember, inputs, results, **ONE_AT_A_TIME)
    changes = [component.change for component in inputs]
    gr.on(changes, mark, [*inputs, last], outputs[:2], trigger_mode="always_last", **QUIET)
    return remember, results


def add_tab(
    tab: Tab, models: dict[str, Inference], data: dict[str, Any]
) -> tuple[list, list, Callable]:
    """Add a tab of TABS; return its inputs, its outputs and its function."""
    *labels, kind, verb = tab.labels
    with gr.Tab(tab.name, id=tab.name):
        with gr.Row():
            with gr.Column(scale=2):
                name = gr.Radio(
                    [*models], value=[*models][0], label="checkpoint", visible=len(models) > 1
                )
                images = [gr.Image(label=label, **PICTURE) for label in labels]
                text = gr.Textbox(label=kind)
                button = gr.Button(verb, variant="primary")
            with gr.Column(scale=3):
                if tab.method == "fill_in":
                    headers = ["word", *map(str, range(1, SHOWN + 1))]
                    result = gr.Dataframe(headers=headers, label="words")
                else:
                    result = gr.Label(num_top_classes=SHOWN, label="probability")
                note = gr.Textbox(tab.about, label="note", interactive=False)
                heat = gr.Image(
                    label="heat maps",
                    format="png",
                    visible=tab.method != "fill_in",
                    buttons=["fullscreen"],
                )
        inputs = [name, *images, text]
        outputs = [result, note, heat]
        call, outputs = add_events(button, text, ask(tab, models), inputs, outputs)
        dataset = next((data[name] for name in models if name in data), ())
        rows = [
            [*dataset.files(i), min(dataset.entry(i).texts, key=len)]
            for i in evenly(len(dataset), EXAMPLES)
        ]
        if rows:
            examples = gr.Examples(
                rows, inputs[1:], cache_examples=False, label="examples", api_visibility="private"
            )
            examples.load_input_event.then(call, inputs, outputs, **ONE_AT_A_TIME)
    return inputs, outputs, call


# --------------------------------------------------------------------------------------------------
# serving


def launch(page: gr.Blocks, host: str, port: int) -> None:
    """Serve a page from a new thread."""

    @contextlib.asynccontextmanager
    async def guard(app: Any) -> AsyncIterator[None]:
        # outermost, because Gradio's own middleware allows other origins
        app.middleware_stack = LocalOnly(app.middleware_stack, port)
        yield

    page.launch(
        server_name=host,
        server_port=port,
        prevent_thread_lock=True,
        quiet=True,
        footer_links=[],
        share=False,
        enable_monitoring=False,
        ssr_mode=False,
        mcp_server=False,
        pwa=False,
        theme=gr.themes.Default(font="sans-serif", font_mono="monospace"),
        app_kwargs={"lifespan": guard},
        max_file_size=UPLOAD,
        state_session_capacity=SESSIONS,
        css=NARROW,
    )
