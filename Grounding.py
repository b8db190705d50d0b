"""Fine-tunes ALBEF on image-text pairs alone and grounds referring expressions by Grad-CAM (Section 5)."""

from configs.flags import task_flags
from utils import begin_script, run_script

flags = task_flags(__doc__, "configs/Grounding.yaml", "--checkpoint refcoco.pth --evaluate")
flags.add_argument("--gradcam_mode", choices=["itm", "itc"], default="itm",
                   help="itm: cross-attention of the multimodal encoder; itc: self-attention of the image encoder")  # fmt: skip
flags.add_argument("--block_num", type=int, help="block whose attention is used; by default the third multimodal layer "
                   "(8 of 12, the last where there are fewer) for itm, the last of the ViT for itc")  # fmt: skip
if __name__ == "__main__":
    begin_script(flags)

import functools

from Retrieval import step
from engine import autocast
from evaluation.divide import divided, gathered
from engine.task import run_task
from evaluation.metrics import chance_grounding, grounding_accuracy
from models.gradcam import check_block, default_block, itc_gradcam, itm_gradcam
from utils import is_main


def heat_maps(model, dataset, tokenizer, config, device, mode, block_num):
    """(ref_id, heat map [h, w]) of every expression, on all processes.

    mode: itm, matching on the cross-attention of a multimodal layer, the mean over tokens, or itc, similarity on the
    self-attention of a ViT block; block_num: the layer, None for the usual one.
    """
    model.eval()
    found = {}
    block_num = default_block(model, mode) if block_num is None else block_num
    collate = functools.partial(dataset.collate, tokenizer=tokenizer)
    for numbers, batch in divided(dataset, config, device, "expressions", collate):
        with autocast(config, device):
            if mode == "itm":
                maps = itm_gradcam(model, batch.image, batch.text, block_num).mean(dim=1)
            else:
                maps = itc_gradcam(model, batch.image, batch.text, block_num)
        found.update(zip(numbers, zip(batch.ref_ids, maps.float().cpu().numpy())))
    return gathered(found)


def evaluate(model, dataset, tokenizer, config, device, mode, block_num):
    """Percent of expressions whose best detected box is right, for each of RefCOCO+'s splits in the data set; and by chance."""
    maps = heat_maps(model, dataset, tokenizer, config, device, mode, block_num)
    right = grounding_accuracy(maps, *dataset.refer, dataset.detections)
    chance = chance_grounding(dataset.refer.refs, dataset.refer.boxes, dataset.detections, [ref_id for ref_id, _ in maps])
    return tuple({name: 100 * share for name, share in shares.items()} for shares in (right, chance))


def show(output_dir, title, split, epoch, metrics, chance, dataset):
    """A line for each split."""
    if is_main():
        for name, value in metrics.items():
            print(f"grounding, {title}: {name.removesuffix('_d')} {value:.2f}% (a random box: {chance[name]:.1f}%)")


def main():
    args = flags.parse_args()
    mode, block_num = args.gradcam_mode, args.block_num

    def check(model):
        if block_num is not None:
            check_block(model, block_num, mode)

    find = functools.partial(evaluate, mode=mode, block_num=block_num)
    run_task("grounding", args, step, find, "val_d", show, check=check)


if __name__ == "__main__":
    run_script(main)
