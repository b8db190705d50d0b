"""Pre-trains ALBEF on image-caption pairs (Section 3) and, if the configuration names a test_file, evaluates zero-shot."""

from configs.flags import task_flags
from utils import begin_script, run_script

flags = task_flags(__doc__, "configs/Pretrain.yaml", "output/Pretrain", "--set batch_size=32 accumulate=2")
flags.add_argument("--vision_encoder", metavar="VIT", help="ViT weights: timm name, folder, .pth, .safetensors, or random")
if __name__ == "__main__":
    begin_script(flags)

from engine.saving import find_resume_file
from dataset import build_dataset
from engine import train
from engine.processes import init_process_group
from models import build_model
from models.checkpoint import load_checkpoint, load_text_encoder, load_vision_encoder
from models.tokenizer import tokenizer_of
from engine.recorder import write_log
from evaluation.retrieval import evaluate_retrieval, flat, report
from configs.schema import load_config, require, save_config
from utils import InputError, is_main, make_output_dir, seed_everything


def step(model, batch, alpha, update_momentum):
    """The losses of a batch by name."""
    return model(batch.image, batch.text, alpha=alpha, masked=batch.masked, update_momentum=update_momentum)


def initialize(model, args, config):
    """Initial weights: --checkpoint, else BERT and DeiT (Section 3.1); the configuration must ask for random ones."""
    reports = []
    if args.checkpoint:
        reports.append(load_checkpoint(model, args.checkpoint, args.allow_missing))
    else:
        for key, load in (("text_encoder", load_text_encoder), ("vision_encoder", load_vision_encoder)):
            if config[key] != "random":
                reports.append(load(model, config[key]))
    if is_main():
        print(*reports, sep="\n")


def main():
    args = flags.parse_args()
    config = load_config(args.config, args.set)
    for key in ("text_encoder", "vision_encoder", "tokenizer"):
        config[key] = getattr(args, key) or config[key]
    require(config, "batch_size", "bert_config", "image_res")
    device = init_process_group(args.device, args.timeout)
    make_output_dir(args.output_dir, writes=not args.evaluate)
    resume_from = None if args.evaluate else find_resume_file(args.output_dir, args.checkpoint, args.resume)

    tokenizer = tokenizer_of(config)
    train_set = None if args.evaluate else build_dataset("pretrain", config, args.seed)
    test_set = build_dataset("retrieval_test", config) if config["test_file"] else None
    if args.evaluate and not (test_set and args.checkpoint):
        raise InputError("--evaluate needs --checkpoint and the key test_file of the configuration")

    seed_everything(args.seed)
    model = build_model("pretrain", config, tokenizer)
    if not resume_from:
        initialize(model, args, config)
    model.to(device)
    if train_set is not None:
        if is_main():
            save_config(config, args.output_dir)
        train(model, train_set, tokenizer, step, config, args.output_dir, device, args.seed, resume_from)
    if test_set is not None:
        metrics, ranked = evaluate_retrieval(model, test_set, tokenizer, config, device)
        epoch, source = config["scheduler"]["epochs"] - 1, {}
        if args.evaluate:
            epoch, source = None, {"checkpoint": args.checkpoint}
        write_log(args.output_dir, epoch, **source, **{f"test_{name}": value for name, value in flat(metrics).items()})
        report(args.output_dir, "zero-shot retrieval", metrics, ranked, test_set)


if __name__ == "__main__":
    run_script(main)
