"""Serve a page to try trained models in the browser of this machine.

The page has a tab for each use of the checkpoints: search in an index, matching with heat maps,
answers to questions, entailment, statements on two images, and pseudo-targets (Figure 2 of the
paper). No data leaves the machine, and no other machine can open the page.
"""

import argparse
import importlib.util
import os
import socket
import sys
import tempfile
import threading
from typing import Any

from configs.cli import Parser
from engine.launch import interruptible, run_script
from utils import InputError

HOST = "127.0.0.1"

parser = Parser(__doc__, "output/quickstart output/shapes/VQA --index output/search")
parser.add_argument(
    "checkpoint",
    nargs="*",
    metavar="SOURCE",
    help="model of any task: weight file, folder of a run, or hub repository USER/NAME[@REVISION]",
)
parser.add_argument(
    "--index", metavar="INDEX", help="index of images to search in, written by tools.search"
)
parser.add_argument("--port", type=int, default=7860, help=f"port of http://{HOST}")
parser.add_argument("--device", help="cuda, cuda:1, ... or cpu (default: cuda if available)")


def check_environment(args: argparse.Namespace) -> None:
    """Raise InputError if Gradio is missing or the port is not free, before slow imports."""
    if importlib.util.find_spec("gradio") is None:
        raise InputError("Gradio is missing; run pip install -r requirements-demo.txt")
    if not (args.checkpoint or args.index):
        raise InputError("nothing to serve; name a checkpoint or pass --index")
    try:
        socket.create_server((HOST, args.port)).close()
    except (OSError, OverflowError) as error:
        raise InputError(f"--port {args.port}: {error}; name another port") from None


def load_models(args: argparse.Namespace, tabs: Any) -> dict[str, Any]:
    """Return the models of the checkpoints that have a tab, by source. Raises InputError."""
    from inference import load_model

    models = {}
    for source in (source.rstrip("/") for source in args.checkpoint):
        print(f"loading {source}", file=sys.stderr, flush=True)
        model = load_model(source, args.device)
        if any(map(model.can, tabs)):
            models[source] = model
        else:
            print(
                f"note: {source} is left out, because task {model.task} has no tab", file=sys.stderr
            )
    if not (models or args.index):
        raise InputError("none of the checkpoints has a tab; name a checkpoint of another task")
    return models


def load_index(args: argparse.Namespace, models: dict[str, Any]) -> tuple[Any, str]:
    """Read --index and add its model to the models.

    Returns:
        The index, None without the flag, and the name of its model.
    """
    from inference.index import check_model, load_model_of, read_index

    if not args.index:
        return None, ""
    index = read_index(args.index)
    for name, model in models.items():
        if check_model(model, None, args.index) == index.digest:
            return index, name
    models[index.checkpoint] = load_model_of(index, args.index, args.device)
    return index, index.checkpoint


def read_test_data(models: dict[str, Any]) -> dict[str, Any]:
    """Return the test data of the models' configurations by name, for examples, if it exists."""
    from configs.tasks import find_task
    from dataset.build import build_dataset

    data = {}
    for name, model in models.items():
        if find_task(model.task).test_data:
            try:
                data[name] = build_dataset(model.task, "test", model.config)
            except InputError:  # its files are on another machine
                pass
    return data


def main() -> None:
    """Serve the page until a signal ends it."""
    args = parser.parse_args()
    check_environment(args)
    # versions of Gradio that have it keep the inputs in the browser
    os.environ["GRADIO_RUN_HISTORY"] = "False"
    from tools import demo_page

    models = load_models(args, [tab.method for tab in demo_page.TABS])
    index, searching = load_index(args, models)
    with tempfile.TemporaryDirectory(prefix="albef-demo-") as folder:
        # copies of shown images and uploads, including unfinished uploads
        tempfile.tempdir = os.environ["GRADIO_TEMP_DIR"] = folder
        page = demo_page.build_page(models, read_test_data(models), index, searching)
        with interruptible("the page is closed"):
            demo_page.launch(page, HOST, args.port)
            print(
                f"open http://{HOST}:{args.port} in a browser; Ctrl-C ends the server", flush=True
            )
            threading.Event().wait()


if __name__ == "__main__":
    run_script(main)
