"""The page: a tab for each thing that the given checkpoints can do, served on this machine alone."""

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

# versions that have it keep what was asked in the browser
os.environ["GRADIO_RUN_HISTORY"] = "False"

import gradio as gr
from gradio.processing_utils import save_file_to_cache
from gradio.utils import get_upload_folder
from PIL import Image
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse

from dataset.base import evenly
from demo import results
from inference.inputs import read_image
from models import ALIGNED
from utils import InputError

# Gradio passes the file of an image unchanged, and the framework's decoder reports what is wrong
# with it. If this were a subclass, Gradio would write a stub file beside this module.
gr.Image.preprocess = lambda self, given: given and given.path
# the browser refuses all requests of Gradio to other hosts (fonts, scripts)
POLICY = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; frame-ancestors 'none'"
TOP = 12  # images that a search shows
RERANKED = 32  # largest number of candidates that a search re-ranks, so that the answer comes soon
THUMBNAIL = 400  # pixels
EXAMPLES = 4
UPLOAD = 50 * 2**20  # largest size of a file in bytes
SESSIONS = 100  # browsers whose last search is kept
# seconds between two cleanings; age in seconds at which they delete an uploaded file
CLEANING = (600, 3600)


class Tab(NamedTuple):
    """A question that the page answers about one or two images."""

    name: str
    tasks: tuple  # whose checkpoints can do it
    about: str
    labels: tuple  # of the images, of the text and of the button
    show: Callable  # (model, an image or two, text) -> HTML


TABS = (
    Tab(
        "Match",
        ALIGNED,
        "Do the image and the caption belong together, and what in the image says so?",
        ("image", "caption", "Match"),
        results.show_match,
    ),
    Tab(
        "Ask",
        ("vqa",),
        "What is the answer to a question about the image, and what in the image says so?",
        ("image", "question", "Ask"),
        results.show_answers,
    ),
    Tab(
        "Entailment",
        ("ve",),
        "Does the statement follow from the image, contradict it, or neither?",
        ("image", "statement", "Judge"),
        results.show_entailment,
    ),
    Tab(
        "Two images",
        ("nlvr",),
        "Is the statement true of the two images together?",
        ("first image", "second image", "statement", "Judge"),
        results.show_truth,
    ),
    Tab(
        "Pseudo-targets",
        ("pretrain",),
        "Which words does the momentum model expect in place of each word of the caption?",
        ("image", "caption", "Fill in"),
        results.show_pseudo_targets,
    ),
)


class LocalOnly:
    """Refuse requests that name another host or come from another site, and add POLICY to every
    response.

    Without it a site that makes its name resolve to this machine could use the page (DNS
    rebinding).
    """

    def __init__(self, app, port):
        self.app, self.hosts = app, [f"{name}:{port}" for name in ("127.0.0.1", "localhost")]

    async def __call__(self, scope, receive, send):
        async def send_with_policy(message):
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["content-security-policy"] = POLICY
            await send(message)

        app, headers = self.app, Headers(scope=scope)
        origin = headers.get("origin", f"http://{self.hosts[0]}")
        if (
            headers.get("host") not in self.hosts
            or origin.removeprefix("http://") not in self.hosts
        ):
            app = PlainTextResponse("this page is for the browser of its own machine\n", 403)
        await app(scope, receive, send_with_policy)


def those_of(models, tasks):
    """Return the models of some tasks by name."""
    return {name: model for name, model in models.items() if model.task in tasks}


def is_uploaded(path):
    """Return whether a path is a file in the page's own folder; any program on this machine can
    send a path.
    """
    return os.path.isfile(path) and Path(os.path.realpath(path)).is_relative_to(
        os.path.realpath(get_upload_folder())
    )


def ask(tab, models):
    """Return the function of a tab: (name of a model, images, text) -> HTML, or the message of an
    InputError.
    """

    def call(name, *given):
        *images, text = given
        try:
            if None in images:
                raise InputError(
                    "There is no image yet: drop one in its field, or click an example."
                )
            if not all(map(is_uploaded, images)):
                raise InputError(
                    "The image was not uploaded to this page, or too long ago: drop it in its field again."
                )
            return tab.show(models[name], *images, text)
        # the message names images in folders of Gradio that the user does not know
        except InputError as error:
            message = str(error)
            for image in filter(None, images):
                message = message.replace(f"{Path(image).parent}{os.sep}", "")
            return results.show_error(message)

    return call


def search(models, paths, features):
    """Return the function of the search: (name of a model, text, whether to re-rank) -> (captioned
    pictures, paths, HTML).

    paths: of the images; features: of the images for each model.
    """

    def call(name, text, rerank):
        model = models[name]
        count = min(max(TOP, min(RERANKED, model.config["k_test"])), len(paths)) if rerank else 0
        try:
            best = model.rank(paths, text, TOP, count, image_features=features[name])
            found, said = (
                [paths[index] for index, _ in best],
                "similarity of image and text (ITC), from −1 to 1",
            )
            scores = [f"{score:.2f}" for _, score in best]
            if rerank:
                said = f"probability that image and text match (ITM), of the {count} most similar images (ITC)"
                probabilities = model.match(found, text).tolist()
                found, probabilities = zip(
                    *sorted(zip(found, probabilities), key=lambda pair: -pair[1])
                )
                scores = [f"{probability:.1%}" for probability in probabilities]
            pictures = [
                (_thumbnail(path), f"{score} · {Path(path).name}")
                for path, score in zip(found, scores)
            ]
        except InputError as error:
            return [], [], results.show_error(error)
        said = f"The best of {len(paths)} images, with the {said}. Click one to see what in it matches."
        return pictures, found, results.show_lines(said)

    return call


def _thumbnail(path):
    picture = Image.fromarray(read_image(path).permute(1, 2, 0).numpy())
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    return picture


# --------------------------------------------------------------------------------------------------
# layout


def build_page(models, data, paths, features):
    """Return the page of models by name, as gr.Blocks.

    data: existing test data by model name, for examples; paths, features: as for `search`, empty
    for no search.
    """
    with gr.Blocks(title="ALBEF", analytics_enabled=False, delete_cache=CLEANING) as page:
        gr.HTML(
            f"<h1>ALBEF</h1>{results.show_lines('Align before fuse, tried on ' + ', '.join(models))}"
        )
        with gr.Tabs() as tabs:
            if paths:
                searched, found, gallery, text = add_search(
                    those_of(models, ALIGNED), data, paths, features
                )
            added = {
                tab.name: add_tab(tab, serving, data)
                for tab in TABS
                if (serving := those_of(models, tab.tasks))
            }
        if paths:
            name, image, caption, result, call = added["Match"]

            def choose(event: gr.SelectData, name, found, text):
                # a copy in the page's folder, because Gradio serves no file of other folders
                return (
                    gr.Tabs(selected="Match"),
                    name,
                    save_file_to_cache(found[event.index], get_upload_folder()),
                    text,
                )

            chosen = gallery.select(
                choose, [searched, found, text], [tabs, name, image, caption], **QUIET
            )
            chosen.then(call, [name, image, caption], result, **ONE_AT_A_TIME)
    return page


# one call at a time, to limit memory and cores; other programs cannot call these functions by name
QUIET = {"api_visibility": "private", "show_progress": "hidden"}
ONE_AT_A_TIME = {"api_visibility": "private", "concurrency_id": "models", "concurrency_limit": 1}


def add_search(models, data, paths, features):
    """Add the tab of the search; returns the name of the model, the state of what is found, the
    gallery and the text.
    """
    with gr.Tab("Search", id="Search"):
        name = choice(models)
        with gr.Row():
            text = gr.Textbox(
                show_label=False,
                container=False,
                placeholder="what the images should show",
                scale=6,
            )
            button = gr.Button("Search", variant="primary", scale=1)
        rerank = gr.Checkbox(
            True,
            label="re-rank the most similar ones by matching: slower, but better",
            container=False,
        )
        place, said, found = (
            gr.Column(),
            gr.HTML(results.show_lines(f"{len(paths)} images to search in.")),
            gr.State([]),
        )
        gallery = gr.Gallery(
            elem_id="found",
            show_label=False,
            columns=6,
            object_fit="contain",
            allow_preview=False,
            interactive=False,
            buttons=[],
        )
        with place:
            rows = [[row[-1]] for row in examples(models, data) if os.path.abspath(row[0]) in paths]
            run(
                search(models, paths, features),
                [name, text, rerank],
                [gallery, found, said],
                button,
                text,
                [text],
                rows,
            )
    return name, found, gallery, text


def add_tab(tab, models, data):
    """Add a tab of TABS; returns the name of the model, the last image, the text, the result and
    the function.
    """
    *labels, kind, verb = tab.labels
    with gr.Tab(tab.name, id=tab.name), gr.Row():
        with gr.Column(scale=2, min_width=300):
            name = choice(models)
            with gr.Row():
                images = [
                    gr.Image(
                        label=label,
                        height=260,
                        min_width=140,
                        sources=["upload", "clipboard"],
                        buttons=[],
                    )
                    for label in labels
                ]
            text = gr.Textbox(label=kind)
            button = gr.Button(verb, variant="primary")
            place = gr.Column()
        with gr.Column(scale=3, min_width=400):
            result, call = gr.HTML(results.show_lines(tab.about)), ask(tab, models)
        with place:
            run(
                call,
                [name, *images, text],
                result,
                button,
                text,
                [*images, text],
                examples(models, data),
            )
    return name, images[-1], text, result, call


def choice(models):
    """Add the choice of a model by name, seen where there are several."""
    return gr.Radio(
        list(models), value=next(iter(models)), label="checkpoint", visible=len(models) > 1
    )


def run(function, inputs, outputs, button, text, fields, rows):
    """Have a function run on a button, on Enter in a text, and on examples: rows of values for the
    fields.
    """
    gr.on([button.click, text.submit], function, inputs, outputs, **ONE_AT_A_TIME)
    if rows:
        shown = gr.Examples(
            rows, fields, cache_examples=False, label="examples", api_visibility="private"
        )
        shown.load_input_event.then(function, inputs, outputs, **ONE_AT_A_TIME)


def examples(models, data):
    """Return rows of images and a text: from the test data of the first model that has some, else
    none.
    """
    dataset = next((data[name] for name in models if name in data), ())
    return [
        [*dataset.files(i), min(dataset.entry(i).texts, key=len)]
        for i in evenly(len(dataset), EXAMPLES)
    ]


# --------------------------------------------------------------------------------------------------
# serving


def launch(page, host, port):
    """Serve a page from a new thread. Raises InputError if the port cannot be used."""

    @contextlib.asynccontextmanager
    async def guard(app):
        # outermost, because Gradio's own middleware allows other origins
        app.middleware_stack = LocalOnly(app.middleware_stack, port)
        yield

    try:
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
            theme=gr.themes.Default(primary_hue="blue", font="sans-serif", font_mono="monospace"),
            css_paths=Path(__file__).with_name("page.css"),
            app_kwargs={"lifespan": guard},
            max_file_size=UPLOAD,
            state_session_capacity=SESSIONS,
        )
    except OSError as error:
        raise InputError(f"--port {port}: the page cannot be served there: {error}") from None
