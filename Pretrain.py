"""Pre-trains ALBEF on image-caption pairs (Section 3) and, if the configuration names a test_file, evaluates zero-shot."""

import json
from pathlib import Path

from dataset import build_dataset
from dataset.transforms import normalize
from engine import find_resume_file, train, write_log
from evaluation import evaluate_retrieval
from models import build_model
from models.albef import Text, read_bert_config
from models.checkpoint import load_checkpoint, load_text_encoder, load_vision_encoder
from models.tokenizer import build_tokenizer, check_vocab_size
from utils import (
    InputError, argument_parser, atomic_write, init_process_group, is_main, load_config, make_output_dir, require, run_script,
    save_config, seed_everything,
)  # fmt: skip

METRICS = ["txt_r1", "txt_r5", "txt_r10", "img_r1", "img_r5", "img_r10"]


def step(device):
    """What a training step computes: batch -> losses by name."""

    def losses(model, batch, alpha, update_momentum):
        albef = getattr(model, "module", model)
        # masking on the host: the number of masked tokens is then known without asking the device
        masked = albef.mask(batch.input_ids) if "mlm" in albef.objectives else None
        image = normalize(batch.image.to(device, non_blocking=True))
        text = Text(batch.input_ids, batch.attention_mask).to(device)
        masked = masked and type(masked)(*(x.to(device, non_blocking=True) for x in masked))
        return model(image, text, alpha=alpha, masked=masked, update_momentum=update_momentum)

    return losses


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


def print_results(metrics, test_set):
    """Recall of ITC alone and after ITM re-ranking, beside what chance would give."""
    images, texts = len(test_set.images), len(test_set.texts)
    print(f"zero-shot retrieval, {images} images and {texts} texts, percent")
    print(f"{'':10}" + "".join(f"{name:>9}" for name in METRICS))
    for label, prefix in (("ITC", "itc_"), ("ITC + ITM", "")):
        print(f"{label:10}" + "".join(f"{metrics[prefix + name]:9.1f}" for name in METRICS))
    chance = {f"{d}_r{k}": chance_recall(test_set, d, k) for d in ("txt", "img") for k in (1, 5, 10)}
    print(f"{'chance':10}" + "".join(f"{chance[name]:9.1f}" for name in METRICS))


def chance_recall(test_set, direction, k):
    """Recall at k of a random ranking, in percent."""
    if direction == "img":
        return 100 * min(1, k / len(test_set.images))
    texts = len(test_set.texts)
    misses = []
    for own in test_set.img2txt:
        miss = 1.0
        for draw in range(min(k, texts)):
            miss *= max(0, texts - len(own) - draw) / (texts - draw)
        misses.append(miss)
    return 100 * (1 - sum(misses) / len(misses))


def main():
    parser = argument_parser(__doc__, "configs/Pretrain.yaml", "output/Pretrain")
    parser.add_argument("--vision_encoder", help="ViT weights: timm name, folder, .pth, .safetensors, or random")
    args = parser.parse_args()
    config = load_config(args.config, args.set)
    for key in ("text_encoder", "vision_encoder", "tokenizer"):
        config[key] = getattr(args, key) or config[key]
    require(config, "batch_size", "bert_config", "image_res")
    device = init_process_group(args.device)
    make_output_dir(args.output_dir)
    resume_from = None if args.evaluate else find_resume_file(args.output_dir, args.checkpoint, args.resume)

    tokenizer_source = config["tokenizer"] or default_tokenizer(config["text_encoder"])
    tokenizer = build_tokenizer(tokenizer_source)
    check_vocab_size(tokenizer, read_bert_config(config["bert_config"]), tokenizer_source)
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
        train(model, train_set, tokenizer, step(device), config, args.output_dir, device, args.seed, resume_from)
    if test_set is not None:
        metrics, rankings = evaluate_retrieval(model, test_set, tokenizer, config, device)
        write_log(args.output_dir, config["scheduler"]["epochs"] - 1, **{f"test_{k}": v for k, v in metrics.items()})
        if is_main():
            (Path(args.output_dir) / "result").mkdir(exist_ok=True)
            with atomic_write(Path(args.output_dir) / "result/retrieval.json", "w") as file:
                json.dump(rankings, file)
            print_results(metrics, test_set)


def default_tokenizer(text_encoder):
    """The tokenizer that belongs to text_encoder: the same hub name or folder, or the folder of a weight file."""
    if text_encoder == "random":
        raise InputError("text_encoder is random, so the key tokenizer must name a vocab file, a folder or a hub name")
    return str(Path(text_encoder).parent) if Path(text_encoder).is_file() else text_encoder


if __name__ == "__main__":
    run_script(main)
