r"""Draw Figures 2 and 4 to 6 of the paper for the first six images of a test file.

  python -m experiments.figures 4 --checkpoint output/paper/grounding/seed0 \
      --data data/paper/tasks --output figure4.png

Figure 2: words that the momentum model expects in place of the last word of a caption.
Figure 4: boxes of referring expressions.
Figure 5: answers to questions.
Figure 6: heat maps of the words of a caption.

The examples are not selected: a figure shows the first entry of each image. Figures mark right and
wrong predictions.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.cli import Parser
from engine.launch import run_script
from utils import percent

if TYPE_CHECKING:
    from inference import Inference
    from visualize.draw import Panel

IMAGES = 6
COLUMNS = 3  # of Figures 2, 4 and 5
WORDS = 8  # columns of Figure 6
FILES = {2: "test.json", 4: "grounding_test.json", 5: "vqa_test.json", 6: "test.json"}

parser = Parser(__doc__)
parser.add_argument("figure", type=int, choices=list(FILES), help="number of the figure")
parser.add_argument(
    "--checkpoint", required=True, help="checkpoint of the task that the figure shows"
)
parser.add_argument("--data", type=Path, required=True, help="folder of a shapes data set")
parser.add_argument("--output", required=True, help="picture to write")


def first_entries(file: Path) -> list[dict[str, Any]]:
    """Return the first entry of each of the first images of a file. Raises InputError."""
    from dataset.entries import read_json_list

    found: dict[str, dict[str, Any]] = {}
    for entry in read_json_list(file):
        found.setdefault(entry["image"], entry)
    return list(found.values())[:IMAGES]


def expected_words(model: "Inference", data: Path, entries: list[dict]) -> "Iterator[list[Panel]]":
    """Yield a panel of each image with the expected last words of its caption (Figure 2)."""
    from dataset.images import load_image
    from visualize.draw import Panel

    for entry in entries:
        path, caption = data / entry["image"], entry["caption"][0]
        word, candidates = model.fill_in(path, caption)[-1]
        before = caption.rsplit(" ", 1)[0]
        words = ", ".join(f"{found.text} {percent(found.score)}" for found in candidates[:3])
        picture = load_image(str(path)).permute(1, 2, 0).numpy()
        title = f"{before} [{word}]:\n{words}"
        yield [Panel(picture, None, title, right=candidates[0].hit)]


def expressions(model: "Inference", data: Path, entries: list[dict]) -> "Iterator[list[Panel]]":
    """Yield a panel of each image with the box of an expression (Figure 4)."""
    from dataset.refer import box_iou, load_detections, load_refer
    from evaluation.metrics.grounding import RIGHT_IOU
    from visualize.draw import Panel

    refer = load_refer(str(data))
    detected = load_detections(str(data / "refcoco+/dets.json"), refer)
    for entry in entries:
        path, text, ref_id = data / entry["image"], entry["text"], entry["ref_id"]
        candidates = [box[:4] for box in detected[int(refer.refs[ref_id]["image_id"])]]
        best, _ = model.ground(path, text, candidates)[0]
        boxes = [best, refer.boxes[ref_id]]
        heat, right = model.heat_map(path, text), box_iou(*boxes) >= RIGHT_IOU
        yield [Panel(heat.pictures[0], heat.whole, text, right=right, boxes=boxes)]


def questions(model: "Inference", data: Path, entries: list[dict]) -> "Iterator[list[Panel]]":
    """Yield a panel of each image with the answer to a question (Figure 5)."""
    from experiments.baselines import usual_answer
    from visualize.draw import Panel

    answers = str(data / "answer_list.json")
    for entry in entries:
        path, question = data / entry["image"], entry["question"]
        answer, true = model.answer(path, question, answers)[0][0], usual_answer(entry)
        heat = model.heat_map(path, question, answers)
        title = f"{question} {answer}" + f" (true: {true})" * (answer != true)
        yield [Panel(heat.pictures[0], heat.whole, title, right=answer == true)]


def words(model: "Inference", data: Path, entries: list[dict]) -> "Iterator[list[Panel]]":
    """Yield a row for each image with the heat maps of the words of its caption (Figure 6)."""
    from visualize.draw import Panel

    for entry in entries:
        heat = model.heat_map(data / entry["image"], entry["caption"][0])
        (picture,), hottest = heat.pictures, heat.by_word.max()
        maps = zip(heat.words[:WORDS], heat.by_word, strict=False)
        panels = [Panel(picture, of_word, word, hottest=hottest) for word, of_word in maps]
        yield [Panel(picture, None, ""), *panels]


FIGURES = {2: expected_words, 4: expressions, 5: questions, 6: words}


def main() -> None:
    """Draw a figure."""
    args = parser.parse_args()
    from inference import load_model
    from visualize.draw import draw_panels

    entries = first_entries(args.data / FILES[args.figure])
    rows = list(FIGURES[args.figure](load_model(args.checkpoint), args.data, entries))
    if args.figure != 6:  # one panel for an image
        panels = [panel for row in rows for panel in row]
        rows = [panels[i : i + COLUMNS] for i in range(0, len(panels), COLUMNS)]
    draw_panels(rows, args.output)
    print(f"wrote {args.output}")


if __name__ == "__main__":
    run_script(main)
