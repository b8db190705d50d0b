"""Compute the scores of rules that see a part of the input, for annotation files of shapes.

  python -m experiments.baselines data/shapes --output_dir output/baselines

A rule sees a part of the input, such as the text. It answers with the most frequent label of the
training entries with the same part. If there is no such entry, it answers with the most frequent
label of all. Scores are in percent.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from configs.cli import Parser
from engine.launch import run_script
from engine.output_dir import make_output_dir
from utils import atomic_write

Entry = dict[str, Any]
Key = Callable[[Entry], Any]

parser = Parser(__doc__)
parser.add_argument("data", type=Path, help="folder of a shapes data set")
parser.add_argument("--output_dir", type=Path, required=True, help="folder of the results")


def apply_rule(train: Iterable[Entry], test: Iterable[Entry], key: Key, label: Key) -> list[Any]:
    """Return the most frequent training label of each test entry's key."""
    counts: dict[Any, Counter] = {}
    total: Counter = Counter()
    for entry in train:
        counts.setdefault(key(entry), Counter())[label(entry)] += 1
        total[label(entry)] += 1
    return [counts.get(key(entry), total).most_common(1)[0][0] for entry in test]


def usual_answer(entry: Entry) -> str:
    """Return the answer that most annotators give."""
    return Counter(entry["answer"]).most_common(1)[0][0]


def entailment(data: Path) -> dict[str, float]:
    """Return the accuracy of rules for visual entailment."""
    from dataset.entries import read_json_list

    covers = {
        f"{split}_covered/{Path(scene['image']).stem}": scene["covered"]
        for split in ("train", "test")
        for scene in read_json_list(data / f"scenes_{split}.json")
    }

    def curtain(entry: Entry) -> str | None:
        return covers["/".join(Path(entry["image"]).parts[-2:])]

    train, test = (read_json_list(data / f"ve_{split}.json") for split in ("train", "test"))
    rules: dict[str, Key] = {
        "majority": lambda entry: None,
        "text": lambda entry: entry["sentence"],
        "curtain": curtain,
        "text_and_curtain": lambda entry: (entry["sentence"], curtain(entry)),
    }
    scores = {}
    for name, key in rules.items():
        guesses = apply_rule(train, test, key, lambda entry: entry["label"])
        right = sum(guess == entry["label"] for guess, entry in zip(guesses, test, strict=True))
        scores[f"ve_{name}"] = 100 * right / len(test)
    return scores


def questions(data: Path) -> dict[str, float]:
    """Return the VQA accuracy of rules."""
    from dataset.entries import read_json_list
    from evaluation.metrics import vqa_accuracy

    train, test = (read_json_list(data / f"vqa_{split}.json") for split in ("train", "test"))
    rules: dict[str, Key] = {
        "majority": lambda entry: None,
        "text": lambda entry: entry["question"],
        "first_words": lambda entry: tuple(entry["question"].split()[:2]),
    }
    scores = {}
    for name, key in rules.items():
        guesses = apply_rule(train, test, key, usual_answer)
        results = [
            {"question_id": entry["question_id"], "answer": guess}
            for entry, guess in zip(test, guesses, strict=True)
        ]
        scores[f"vqa_{name}"] = vqa_accuracy(results, test)["overall"]
    return scores


def objects(data: Path) -> dict[str, float]:
    """Return the grounding accuracy of a random detected box and of a random object."""
    from dataset.entries import read_json_list
    from dataset.refer import load_detections, load_refer
    from evaluation.metrics import chance_grounding

    refer = load_refer(str(data))
    ref_ids = [entry["ref_id"] for entry in read_json_list(data / "grounding_test.json")]
    candidates: dict[int, list] = {}
    instances = json.loads((data / "refcoco+/instances.json").read_bytes())
    for annotation in instances["annotations"]:
        candidates.setdefault(annotation["image_id"], []).append(annotation["bbox"])
    detected = load_detections(str(data / "refcoco+/dets.json"), refer)
    scores = {}
    for name, boxes in {"box": detected, "object": candidates}.items():
        shares = chance_grounding(refer.refs, refer.boxes, boxes, ref_ids)
        scores |= {f"grounding_{name}_{split}": 100 * share for split, share in shares.items()}
    return scores


def main() -> None:
    """Write the scores of the rules to log.txt and print them."""
    args = parser.parse_args()
    make_output_dir(args.output_dir)
    scores = entailment(args.data) | questions(args.data) | objects(args.data)
    with atomic_write(args.output_dir / "log.txt", "w") as file:
        file.write(json.dumps({f"test_{name}": value for name, value in scores.items()}) + "\n")
    for name, value in scores.items():
        print(f"{name:26}{value:6.1f}")


if __name__ == "__main__":
    run_script(main)
