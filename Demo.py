"""Try trained models on a page in the browser of this machine, with a tab for each task.

The tabs are search in images, matching with heat maps, questions, entailment, statements on two
images and the pseudo-targets of Figure 2. No data leaves the machine, and no other machine can open
the page.
"""

import importlib.util
import os
import socket

from configs.flags import Flags
from engine.launch import begin_script, interruptible, run_script
from utils import InputError, printable

flags = Flags(__doc__, "output/quickstart output/shapes/VQA --images photos/")
HOST = "127.0.0.1"
flags.add_argument(
    "checkpoint",
    nargs="+",
    help="the folder of a run, a weight file, or a hub repository, of any task",
)
flags.add_argument(
    "--images",
    metavar="FOLDER",
    help="the images to search in (default: the images of the checkpoint's test_file)",
)
flags.add_argument("--port", type=int, default=7860, help=f"port of http://{HOST}")
flags.add_argument("--device", help="cuda, cuda:1, ... or cpu (default: cuda if there is a GPU)")


def check_gradio_and_port():
    """Raise InputError if Gradio is missing or the port is not free, before slow imports."""
    if importlib.util.find_spec("gradio") is None:
        raise InputError("Demo.py needs Gradio: pip install -r requirements-demo.txt")
    port = flags.parse_args().port
    if not 0 < port < 65536:
        raise InputError(f"--port {port}: a port is a number from 1 to 65535")
    try:
        socket.create_server((HOST, port)).close()
    except OSError as error:
        raise InputError(
            f"--port {port}: {os.strerror(error.errno)}: end what listens there, or name another port"
        ) from None


if __name__ == "__main__":
    begin_script(flags)
    run_script(check_gradio_and_port)

import tempfile
import threading

from dataset.build import build_dataset
from dataset.images import ImageError, load_image
from demo.page import TABS, build_page, launch, those_of
from inference import load_model
from inference.index import find_images
from models import ALIGNED


def load_models(sources, device):
    """Return the models of checkpoints for which there is a tab, by the names given.

    Raises InputError where there is none.
    """
    models = {}
    for source in (source.rstrip("/") for source in sources):
        print(f"loading {source}", flush=True)
        model = load_model(source, device)
        if any(model.task in tab.tasks for tab in TABS):
            models[source] = model
        else:
            print(
                f"note: {source} is left out: it is of task {model.task}, for which there is no tab"
            )
    if not models:
        raise InputError(
            "none of the checkpoints has a tab: give one of pre-training, retrieval, VQA, VE or NLVR2"
        )
    return models


def read_test_data(models):
    """Return the test data of the models' configurations by model name, if it exists."""
    data = {}
    for name, model in models.items():
        try:
            data[name] = build_dataset(model.task, "test", model.config)
        except InputError:  # on another machine, or of grounding
            pass
    return data


def find_usable(folder):
    """Return the paths of the images in a folder and below that can be used; the others are named.

    Raises InputError.
    """
    images, problems, _ = find_images([folder])
    usable = []
    for path in images:
        try:
            load_image(path)
            usable.append(path)
        except ImageError as error:
            problems.append((path, error.problem))
    for path, problem in problems:
        print(f"note: left out: {printable(path)}: {problem}")
    if not usable:
        raise InputError(f"--images {folder}: none of its images can be used")
    return usable


def embed(models, paths):
    """Return the features of images by each of the models."""
    features = {}
    for name, model in models.items():
        print(f"embedding {len(paths)} images with {name}", flush=True)
        features[name] = model.embed_images(paths)
    return features


def main():
    args = flags.parse_args()
    models = load_models(args.checkpoint, args.device)
    data, searching = read_test_data(models), those_of(models, ALIGNED)
    paths = []
    if args.images and not searching:
        raise InputError(
            f"--images {args.images}: none of the checkpoints can search: add one of pre-training or retrieval"
        )
    if args.images:
        paths = find_usable(args.images)
    elif dataset := next((data[name] for name in searching if name in data), None):
        paths = [os.path.abspath(dataset.files(i)[0]) for i in range(len(dataset))]
    elif searching:
        print(
            "note: no tab to search in, as --images is not given and the checkpoint's test_file is out of reach"
        )
    features = embed(searching, paths) if paths else {}
    with tempfile.TemporaryDirectory(prefix="albef-demo-") as folder:
        # copies of shown images and uploads, including unfinished uploads
        tempfile.tempdir = os.environ["GRADIO_TEMP_DIR"] = folder
        page = build_page(models, data, paths, features)
        with interruptible("the page is closed"):
            launch(page, HOST, args.port)
            print(f"open http://{HOST}:{args.port} in a browser; Ctrl-C ends it", flush=True)
            threading.Event().wait()


if __name__ == "__main__":
    run_script(main)
