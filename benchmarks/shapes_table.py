"""One table of all tasks on the built-in shapes, from log.txt of the runs that `make shapes` and `make shapes-scratch` leave.

Chance is a random ranking, class or detected box; for VQA the best answer of the list given to every question. Minutes are
those of training with its validations.

    python benchmarks/shapes_table.py [--runs output/shapes] [--scratch output/shapes-scratch]
"""

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np

from dataset import build_dataset
from engine.curves import read_curves
from evaluation.metrics import chance_grounding, chance_recall, vqa_accuracy
from configs.schema import load_config
from utils import run_script

# folder of a run: its rows, each the metric as printed and its name in log.txt, in percent
RUNS = {
    "Pretrain": [("zero-shot text R@1", "test_txt_r1"), ("zero-shot image R@1", "test_img_r1")],
    "Retrieval": [("text R@1", "test_txt_r1"), ("image R@1", "test_img_r1")],
    "VQA": [("VQA accuracy", "test_acc")],
    "VE": [("accuracy", "test_acc")],
    "NLVR": [("accuracy", "test_acc")],
    "Grounding": [("right box, val", "val_d"), ("right box, testA", "testA_d"), ("right box, testB", "testB_d")],
}
LONGEST_GAP = 120  # seconds between two iterations; a validation takes less, a stopped run more
# text assignment has nothing to evaluate, but takes its time
TIMED = {"NLVR": ["NLVR_pretrain", "NLVR"]}


def read_results(folder):
    """Return the metrics of a run's best epoch by name: of the test, and of the epoch's validation. {} without a run."""
    log = folder / "log.txt"
    lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    return next((line for line in reversed(lines) if any(name.startswith("test") for name in line)), {})


def minutes(folder, run):
    """Return a run's minutes from its TensorBoard files, its stops left out; 0 if it is not there."""
    logs = [folder / name / "tensorboard" for name in TIMED.get(run, [run])]
    times = [read_curves(log).get("lr", ((), (), ()))[2] for log in logs if log.is_dir()]
    return sum(gap for of_run in times for gap in np.diff(of_run) if gap < LONGEST_GAP) / 60


def chances():
    """Return what chance gives: {(run, name in log.txt): percent}."""
    test_set = build_dataset("retrieval_test", load_config(ROOT / "configs/shapes/Retrieval.yaml"))
    recall = chance_recall(len(test_set.images), len(test_set.texts), test_set.img2txt)
    found = {(run, f"test_{name}"): value for run in ("Pretrain", "Retrieval") for name, value in recall.items()}
    questions = build_dataset("vqa_test", load_config(ROOT / "configs/shapes/VQA.yaml"))
    annotations = questions.annotations()
    constant = [
        vqa_accuracy([{"question_id": entry["question_id"], "answer": answer} for entry in annotations], annotations)["overall"]
        for answer in questions.answer_list
    ]
    found["VQA", "test_acc"] = max(constant)
    found["VE", "test_acc"], found["NLVR", "test_acc"] = 100 / 3, 100 / 2
    config = load_config(ROOT / "configs/shapes/Grounding.yaml")
    for split in ("val", "test"):
        expressions = build_dataset(f"grounding_{split}", config)
        refer, ref_ids = expressions.refer, [entry["ref_id"] for entry in expressions.entries]
        boxes = chance_grounding(refer.refs, refer.boxes, expressions.detections, ref_ids)
        found.update({("Grounding", name): 100 * value for name, value in boxes.items()})
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("output/shapes"))
    parser.add_argument("--scratch", type=Path, default=Path("output/shapes-scratch"))
    args = parser.parse_args()
    chance, spent = chances(), {run: minutes(args.runs, run) for run in RUNS}
    print(f"{'task':11}{'metric':20}{'chance':>8}{'from scratch':>14}{'pre-trained':>13}{'minutes':>9}")
    for run, rows in RUNS.items():
        results = [read_results(folder / run) for folder in (args.scratch, args.runs)]
        for metric, name in rows:
            first = metric == rows[0][0]
            scratch, trained = (f"{result[name]:.1f}" if name in result else "-" for result in results)
            time = f"{spent[run]:.1f}" if first and spent[run] else ""
            print(f"{run if first else '':11}{metric:20}{chance[run, name]:8.1f}{scratch:>14}{trained:>13}{time:>9}")
    print(f"minutes of the fine-tuning runs together: {sum(spent.values()) - spent['Pretrain']:.1f}, one core each")


if __name__ == "__main__":
    run_script(main)
