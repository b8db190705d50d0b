"""What every fine-tuning script does: load the configuration, the data and the weights, train, keep the best, test it."""

from pathlib import Path

from engine.saving import find_resume_file
from dataset import build_dataset, file_key
from engine import train
from engine.processes import init_process_group
from models import build_model
from models.checkpoint import checkpoint_epoch, load_checkpoint
from models.tokenizer import tokenizer_of
from engine.recorder import write_log
from configs.schema import load_config, require, save_config
from utils import InputError, is_main, make_output_dir, seed_everything


def fine_tune(task, args, step, evaluate, score, report, check=None):
    """Runs a task script from its parsed arguments. --checkpoint is where a new run starts, --resume goes on with output_dir's.

    task: as build_model names it, and the data sets {task}_{train, val, test}.
    step(model, batch, alpha, update_momentum) -> the losses of a batch by name, as train takes it.
    evaluate(model, dataset, tokenizer, config, device) -> (metrics by name, whatever report needs beside), on all processes.
    score: the name of the metric that picks the best epoch where there is validation data.
    report(output_dir, title, split, epoch, metrics, result, dataset): prints and writes what evaluate found, on all processes;
    epoch: of the weights.
    check(model): raises InputError before anything slow if the task's own flags do not fit the model.

    Without validation data the last epoch is the result; with evaluate None there is only training. Metrics go to log.txt
    under their names after the split's, which is left out where they begin with it. Raises InputError.
    """
    config = load_config(args.config, args.set)
    for key in ("text_encoder", "tokenizer"):
        config[key] = getattr(args, key) or config[key]
    require(config, "bert_config", "image_res", *([] if args.evaluate else ["batch_size"]))
    device = init_process_group(args.device, args.timeout)
    make_output_dir(args.output_dir, writes=not args.evaluate)
    resume_from = None if args.evaluate else find_resume_file(args.output_dir, "", args.resume)
    if args.evaluate and args.checkpoint in ("", "random"):
        raise InputError("--evaluate needs --checkpoint, the fine-tuned weights to evaluate")
    if not (args.checkpoint or resume_from):
        raise InputError("--checkpoint is missing: name the pre-trained or fine-tuned weights to start from, or random")

    tokenizer = tokenizer_of(config)
    train_set = None if args.evaluate else build_dataset(f"{task}_train", config, args.seed)
    splits = [split for split in ("val", "test") if evaluate and config[file_key(f"{task}_{split}")]]
    test_sets = {split: build_dataset(f"{task}_{split}", config) for split in splits}
    if args.evaluate and not test_sets:
        raise InputError("--evaluate needs the key test_file or val_file of the configuration" if evaluate else
                         "--evaluate: this task has nothing to evaluate, it only trains")  # fmt: skip

    seed_everything(args.seed)
    model = build_model(task, config, tokenizer)
    if check:
        check(model)
    if not resume_from and args.checkpoint != "random":
        loaded = load_checkpoint(model, args.checkpoint, args.allow_missing, complete=args.evaluate)
        if is_main():
            print(loaded)
    model.to(device)

    def measured(split):
        metrics, result = evaluate(model, test_sets[split], tokenizer, config, device)
        named = {name if name.startswith(split) else f"{split}_{name}": value for name, value in metrics.items()}
        return metrics, result, named

    def validate():
        metrics, _, named = measured("val")
        return named, metrics[score]

    if args.evaluate:
        for split in test_sets:
            metrics, result, named = measured(split)
            write_log(args.output_dir, None, checkpoint=args.checkpoint, **named)
            epoch = checkpoint_epoch(args.checkpoint)
            report(args.output_dir, f"{args.checkpoint}, {split}", split, epoch, metrics, result, test_sets[split])
        return
    if is_main():
        save_config(config, args.output_dir)
    best = train(model, train_set, tokenizer, step, config, args.output_dir, device, args.seed, resume_from,
                 validate if "val" in test_sets else None)  # fmt: skip
    epoch, text = config["scheduler"]["epochs"] - 1, "last epoch"
    if best:
        epoch, text = best["epoch"], f"best epoch by val {score} {best['score']:.4g}"
        load_checkpoint(model, Path(args.output_dir) / "checkpoint_best.pth")
    if "test" in test_sets:
        metrics, result, named = measured("test")
        write_log(args.output_dir, epoch, **named)
        report(args.output_dir, "fine-tuned, test", "test", epoch, metrics, result, test_sets["test"])
    if is_main():
        print(f"{text}: epoch {epoch}")
