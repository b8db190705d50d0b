"""The page: a tab for each thing that the given checkpoints can do, served on this machine alone."""

import os
import threading
from pathlib import Path
from typing import Callable, NamedTuple

os.environ["GRADIO_RUN_HISTORY"] = "False"  # versions that have it keep what was asked in the browser

import gradio as gr
from PIL import Image
from starlette.middleware import Middleware

from dataset.base import evenly
from demo import results
from inference.inputs import read_image
from utils import InputError, interruptible

HOST = "127.0.0.1"
# whatever a version of Gradio asks other hosts for (fonts, scripts), the browser refuses to
POLICY = b"default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; frame-ancestors 'none'"
ALIKE = ("pretrain", "retrieval")  # tasks whose models embed, match and rank
TOP = 12  # images that a search shows
RERANKED = 32  # candidates that it re-ranks at most: someone waits
THUMBNAIL = 400  # pixels
EXAMPLES = 4


class Tab(NamedTuple):
    """What can be asked about an image, or two."""

    name: str
    tasks: tuple  # whose checkpoints can do it
    labels: tuple  # of the images and, the last, of the text
    show: Callable  # (model, an image or two, text) -> HTML


TABS = (
    Tab("Match", ALIKE, ("image", "caption"), results.show_match),
    Tab("Ask", ("vqa",), ("image", "question"), results.show_answers),
    Tab("Entailment", ("ve",), ("image", "statement"), results.show_entailment),
    Tab("Two images", ("nlvr",), ("first image", "second image", "statement"), results.show_truth),
    Tab("Pseudo-targets", ("pretrain",), ("image", "caption"), results.show_pseudo_targets),
)

from gradio.events import Dependency

class Photo(gr.Image):
    """An image whose file is handed on as it is, for the framework's own decoder and its messages."""

    is_template = True  # to the browser it is an Image

    def preprocess(self, payload):
        return payload and payload.path
    from typing import Callable, Literal, Sequence, Any, TYPE_CHECKING
    from gradio.blocks import Block
    if TYPE_CHECKING:
        from gradio.components import Timer
        from gradio.components.base import Component


class LocalOnly:
    """Have every response carry POLICY."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        async def send_with_policy(message):
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", POLICY)]
            await send(message)

        await self.app(scope, receive, send_with_policy)


def those_of(models, tasks):
    """Return the models, by name, that are of one of some tasks."""
    return {name: model for name, model in models.items() if model.task in tasks}


def explain(tab, models):
    """Return the function of a tab: (name of a model, images, text) -> HTML, the sentence of an InputError in its place."""

    def call(name, *given):
        *images, text = given
        try:
            if None in images:
                raise InputError("There is no image yet: drop one in its field, or click an example.")
            return tab.show(models[name], *images, text)
        except InputError as error:  # images are where Gradio has put them, in folders that nobody knows
            message = str(error)
            for image in filter(None, images):
                message = message.replace(f"{Path(image).parent}{os.sep}", "")
            return results.show_error(message)

    return call


def search(models, paths, features):
    """Return the function of the search: (name of a model, text, whether to re-rank) -> (pictures with captions, paths, HTML).

    paths: of the images; features: those of each model.
    """

    def call(name, text, rerank):
        model = models[name]
        count = min(RERANKED, model.config["k_test"]) if rerank else 0
        try:
            best = model.rank(paths, text, TOP, count, image_features=features[name])
            found, said = [paths[index] for index, _ in best], "similarity of image and text (ITC), from −1 to 1"
            scores = [f"{score:.2f}" for _, score in best]
            if rerank:
                said = f"probability that image and text match (ITM), of the {count} most similar ones (ITC)"
                scores = [f"{probability:.1%}" for probability in model.match(found, text)]
            pictures = [(_thumbnail(path), f"{score}  {Path(path).name}") for path, score in zip(found, scores)]
        except InputError as error:
            return [], [], results.show_error(error)
        lines = f"The best of {len(paths)} images; the number is the {said}.", "Click an image to see why it matches."
        return pictures, found, results.show_lines(*lines)

    return call


def _thumbnail(path):
    picture = Image.fromarray(read_image(path).permute(1, 2, 0).numpy())
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    return picture


# ---------------------------------------------------------------------------------------------------------------------
# layout


def build_page(models, data, paths, features):
    """Return the page of models by name, as gr.Blocks.

    data: their test data by name, for examples, where it is within reach; paths, features: as `search` takes them, empty for no
    search.
    """
    with gr.Blocks(title="ALBEF", analytics_enabled=False) as page:
        gr.HTML(f"<h1>ALBEF</h1>{results.show_lines('What ' + ', '.join(models) + ' makes of images and texts.')}")
        with gr.Tabs() as tabs:
            if paths:
                found, gallery, text = add_search(those_of(models, ALIKE), data, paths, features)
            added = {tab.name: add_tab(tab, serving, data) for tab in TABS if (serving := those_of(models, tab.tasks))}
        if paths:
            name, image, caption, result, call = added["Match"]

            def choose(event: gr.SelectData, found, text):
                return gr.Tabs(selected="Match"), found[event.index], text

            chosen = gallery.select(choose, [found, text], [tabs, image, caption], **QUIET)
            chosen.then(call, [name, image, caption], result, **ONE_AT_A_TIME)
    return page


# one thing at a time: Grad-CAM changes a model while it runs; no function is offered to other programs
QUIET = {"api_visibility": "private", "show_progress": "hidden"}
ONE_AT_A_TIME = {"api_visibility": "private", "concurrency_id": "models", "concurrency_limit": 1}


def add_search(models, data, paths, features):
    """Add the tab of the search; returns the paths of what is found (a state), the gallery and the text."""
    with gr.Tab("Search", id="Search"):
        name = choice(models)
        with gr.Row(equal_height=True):
            text = gr.Textbox(label="text", placeholder="what the images should show", scale=6)
            rerank = gr.Checkbox(True, label="re-rank by matching", info="slower, better", scale=2)
            button = gr.Button("Search", variant="primary", scale=1)
        said, found = gr.HTML(), gr.State([])
        gallery = gr.Gallery(show_label=False, columns=6, object_fit="contain", height="auto", allow_preview=False,
                             interactive=False, buttons=[])  # fmt: skip
        outputs = [gallery, found, said]
        run(search(models, paths, features), [name, text, rerank], outputs, button, text, [text], examples(models, data)[-1:])
    return found, gallery, text


def add_tab(tab, models, data):
    """Add a tab of TABS; returns the name of the model, the last image, the text, the result and the function."""
    *labels, kind = tab.labels
    with gr.Tab(tab.name, id=tab.name):
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                name = choice(models)
                with gr.Row():
                    images = [Photo(label=label, height=260, sources=["upload", "clipboard"], buttons=[]) for label in labels]
                text = gr.Textbox(label=kind)
                button = gr.Button(tab.name, variant="primary")
                place = gr.Column()
            with gr.Column(scale=3, min_width=400):
                result = gr.HTML()
        call = explain(tab, models)
        with place:
            run(call, [name, *images, text], result, button, text, [*images, text], examples(models, data))
    return name, images[-1], text, result, call


def choice(models):
    """Add the choice of a model by name, seen where there are several."""
    return gr.Radio(list(models), value=next(iter(models)), label="checkpoint", visible=len(models) > 1)


def run(function, inputs, outputs, button, text, fields, rows):
    """Have a function run on a button, on Enter in a text, and on examples: rows of values for the fields."""
    gr.on([button.click, text.submit], function, inputs, outputs, **ONE_AT_A_TIME)
    if rows:
        shown = gr.Examples(rows, fields, cache_examples=False, label="examples", api_visibility="private")
        shown.load_input_event.then(function, inputs, outputs, **ONE_AT_A_TIME)


def examples(models, data):
    """Return rows of images and a text: from the test data of the first model that has some, else none."""
    dataset = next((data[name] for name in models if name in data), ())
    return [[*dataset.files(i), dataset.entry(i).texts[0]] for i in evenly(len(dataset), EXAMPLES)]


# ---------------------------------------------------------------------------------------------------------------------
# serving


def serve(page, port):
    """Serve a page to this machine until a signal ends it. Raises InputError if the port cannot be used."""
    try:
        page.launch(
            server_name=HOST, server_port=port, share=False, prevent_thread_lock=True, quiet=True, footer_links=[],
            enable_monitoring=False, ssr_mode=False, mcp_server=False, pwa=False, css_paths=Path(__file__).with_name("page.css"),
            theme=gr.themes.Default(font="sans-serif", font_mono="monospace"),
            app_kwargs={"middleware": [Middleware(LocalOnly)]},
        )  # fmt: skip
    except OSError:
        raise InputError(f"--port {port}: cannot listen there, another program may: end it, or name another port") from None
    print(f"open http://{HOST}:{port} in a browser; Ctrl-C ends it", flush=True)
    with interruptible("the page is closed"):
        threading.Event().wait()