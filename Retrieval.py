"""Fine-tunes ALBEF for image-text retrieval (Section 5) and evaluates it: ITC ranking, then ITM re-ranking."""

from pathlib import Path

from dataset import build_dataset
from dataset.transforms import normalize
from engine import find_resume_file, train
from evaluation import evaluate_retrieval, flat, report
from models import build_model
from models.albef import Text
from models.checkpoint import load_checkpoint
from models.tokenizer import tokenizer_of
from utils import (
    InputError, argument_parser, init_process_group, is_main, load_config, make_output_dir, require, run_script, save_config,
    seed_everything,
)  # fmt: skip


def step(device):
    """What a training step computes: batch -> losses by name."""

    def losses(model, batch, alpha, update_momentum):
        image = normalize(batch.image.to(device, non_blocking=True))
        text = Text(batch.input_ids, batch.attention_mask).to(device)
        idx = batch.idx.to(device, non_blocking=True)
        return model(image, text, idx=idx, alpha=alpha, update_momentum=update_momentum)

    return losses


def candidates(values, config):
    """--k_test as whole numbers, the configuration's k_test if the flag is not given."""
    try:
        ks = [int(value) for value in values or [config["k_test"]]]
    except ValueError:
        ks = [0]
    if min(ks) < 1:
        raise InputError(f"--k_test {' '.join(values)}: give whole numbers from 1, the candidates that ITM ranks again")
    return ks


def main():
    parser = argument_parser(__doc__, "configs/Retrieval_flickr.yaml", "output/Retrieval_flickr")
    parser.add_argument("--k_test", nargs="+", help="numbers of candidates to re-rank, each gives a row of the table")
    args = parser.parse_args()
    config = load_config(args.config, args.set)
    for key in ("text_encoder", "tokenizer"):
        config[key] = getattr(args, key) or config[key]
    config["batch_size"] = config["batch_size_train"] or config["batch_size"]
    require(config, "bert_config", "image_res", *([] if args.evaluate else ["batch_size"]))
    ks = candidates(args.k_test, config)
    device = init_process_group(args.device)
    make_output_dir(args.output_dir)
    resume_from = None if args.evaluate else find_resume_file(args.output_dir, "", args.resume)
    if not (args.checkpoint or resume_from):
        raise InputError("--checkpoint is missing: name the pre-trained or fine-tuned weights to start from")

    tokenizer = tokenizer_of(config)
    train_set = None if args.evaluate else build_dataset("retrieval_train", config, args.seed)
    test_sets = {split: build_dataset(f"retrieval_{split}", config) for split in ("val", "test") if config[f"{split}_file"]}
    if args.evaluate and not test_sets:
        raise InputError("--evaluate needs the key test_file or val_file of the configuration")

    seed_everything(args.seed)
    model = build_model("retrieval", config, tokenizer)
    if not resume_from:
        loaded = load_checkpoint(model, args.checkpoint, args.allow_missing)
        if is_main():
            print(loaded)
    model.to(device)

    def evaluate(split):
        return evaluate_retrieval(model, test_sets[split], tokenizer, config, device, ks)

    def validate():
        metrics = flat(evaluate("val")[0])
        return metrics, metrics["r_mean"]

    if args.evaluate:
        for split, test_set in test_sets.items():
            title = f"{args.checkpoint}, {split}"
            report(args.output_dir, title, split, None, *evaluate(split), test_set, checkpoint=args.checkpoint)
        return
    if is_main():
        save_config(config, args.output_dir)
    best = train(model, train_set, tokenizer, step(device), config, args.output_dir, device, args.seed, resume_from,
                 validate if "val" in test_sets else None)  # fmt: skip
    epoch, text = config["scheduler"]["epochs"] - 1, "last epoch"
    if best:
        epoch, text = best["epoch"], f"best epoch by val r_mean {best['score']:.2f}"
        load_checkpoint(model, Path(args.output_dir) / "checkpoint_best.pth")
    if "test" in test_sets:
        title = "fine-tuned retrieval, test"
        report(args.output_dir, title, "test", epoch, *evaluate("test"), test_sets["test"])
    if is_main():
        print(f"{text}: epoch {epoch}")


if __name__ == "__main__":
    run_script(main)
