"""Fine-tunes ALBEF on image-text pairs alone and grounds referring expressions by Grad-CAM (Section
5).
"""

from configs.flags import task_flags
from utils import begin_script, run_script

flags = task_flags(__doc__, "configs/Grounding.yaml", "--checkpoint refcoco.pth --evaluate")
flags.add_argument(
    "--gradcam_mode",
    choices=["itm", "itc"],
    default="itm",
    help="itm: cross-attention of the multimodal encoder; itc: self-attention of the image encoder",
)
flags.add_argument(
    "--block_num",
    type=int,
    help="block whose attention is used; by default the third multimodal layer "
    "(8 of 12, the last where there are fewer) for itm, the last of the ViT for itc",
)
if __name__ == "__main__":
    begin_script(flags)

import functools

from engine import autocast
from engine.task import run_task
from evaluation.divide import divide, gather
from evaluation.metrics import chance_grounding, grounding_accuracy
from models.gradcam import check_block, text_gradcam
from Retrieval import step


def heat_maps(model, dataset, tokenizer, config, device, mode, block_num):
    """Return (ref_id, heat map [h, w]) of every expression, on all processes.

    mode: itm, matching on the cross-attention of a multimodal layer, the mean over tokens, or itc,
    similarity on the self-attention of a ViT block; block_num: the layer, None for the usual one.
    """
    model.eval()
    found = {}
    collate = functools.partial(dataset.collate, tokenizer=tokenizer)
    for indices, batch in divide(dataset, config, device, "expressions", collate):
        with autocast(config, device):
            maps = text_gradcam(model, batch.image, batch.text, mode, block_num)
        found.update(zip(indices, zip(batch.ref_ids, maps.cpu().numpy())))
    return gather(found)


def evaluate(model, dataset, tokenizer, config, device, report=None, *, mode, block_num):
    """Return the percentage of expressions whose best detected box is right, for each split of the
    refs in the data set.

    Report a line for each, with the percent of a random box.
    """
    maps = heat_maps(model, dataset, tokenizer, config, device, mode, block_num)
    shares = grounding_accuracy(maps, *dataset.refer, dataset.detections)
    if report:
        refer = dataset.refer
        chance = chance_grounding(
            refer.refs, refer.boxes, dataset.detections, [ref_id for ref_id, _ in maps]
        )
        for name, share in shares.items():
            split = name.removesuffix("_d")
            print(
                f"grounding, {report.title}: {split} {100 * share:.2f}% (a random box: {100 * chance[name]:.1f}%)"
            )
    return {name: 100 * share for name, share in shares.items()}


def main():
    args = flags.parse_args()
    mode, block_num = args.gradcam_mode, args.block_num

    def check(model):
        if block_num is not None:
            check_block(model, block_num, mode)

    find = functools.partial(evaluate, mode=mode, block_num=block_num)
    run_task("grounding", args, step, find, "val_d", check=check)


if __name__ == "__main__":
    run_script(main)
