"""Puts one-line mistakes into the core, one at a time, and runs the tests of their module: `make
mutants`.

    python tests/mutants.py [FILE ...] [--processes N]

A mistake that the tests notice is killed, others survive. The table below is the list of mistakes;
an equivalent one changes nothing that can be observed, and says why. FILE: only the mistakes in
these files.
"""

import argparse
import collections
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT = 600  # seconds; what hangs is noticed as well


class Mutant(NamedTuple):
    file: str
    old: str  # occurs once in the file
    new: str
    equivalent: str = ""  # the reason


# of each file, the test files that have to notice a mistake in it, the fastest first
TESTS = {
    "models/losses.py": "losses pretrain_model trajectory",
    "models/contrastive.py": "pretrain_model retrieval_model evaluation trajectory loop retrieval",
    "models/pretrain.py": "pretrain_model trajectory loop",
    "models/retrieval.py": "retrieval_model loop",
    "models/bert.py": "head pretrain_model retrieval_model vqa_model classification_models loop compile",
    "models/vit.py": "pretrain_model sizes",
    "models/decoder.py": "vqa_model",
    "models/vqa.py": "vqa_model classification_models loop",
    "models/classification.py": "classification_models loop tasks",
    "models/nlvr.py": "classification_models loop",
    "models/gradcam.py": "gradcam",
    "models/momentum.py": "losses pretrain_model trajectory",
    "models/weights.py": "checkpoint released_weights",
    "models/conversions.py": "checkpoint released_weights",
    "optim/__init__.py": "sizes config trajectory loop recovery",
    "scheduler/__init__.py": "config trajectory loop",
    "engine/precision.py": "device compile loop",
    "engine/trainer.py": "trajectory loop engine retrieval recovery",
    "engine/metric_logger.py": "trajectory loop engine recovery",
    "engine/checkpointing.py": "retrieval errors engine recovery tasks",
    "engine/distributed.py": "recovery",
    "engine/run.py": "retrieval tasks",
    "engine/configuration.py": "tasks",
    "evaluation/metrics/recall.py": "metrics",
    "evaluation/metrics/vqa.py": "metrics",
    "evaluation/metrics/grounding.py": "metrics",
    "evaluation/distributed.py": "evaluation",
    "evaluation/attributes.py": "attributes",
    "evaluation/relevance.py": "tasks",
    "dataset/attributes.py": "attributes",
    "evaluation/retrieval.py": "evaluation retrieval",
    "dataset/loading.py": "data engine",
    "dataset/text.py": "text data",
    "dataset/transforms.py": "transforms",
    "dataset/vqa.py": "data tasks",
    "dataset/caption.py": "data loop",
    "dataset/refer.py": "metrics refer",
    "dataset/base.py": "data data_faults",
}

MUTANTS = [
    Mutant(
        "models/losses.py",
        "return (1 - alpha) * hard + alpha * soft, hard",
        "return alpha * hard + (1 - alpha) * soft, hard",
    ),
    Mutant(
        "models/losses.py",
        "return (1 - alpha) * hard + alpha * soft, hard",
        "return (1 - alpha) * hard + alpha * soft, soft",
    ),
    Mutant("models/losses.py", "return (i2t.mean() + t2i.mean()) / 2,", "return i2t.mean(),"),
    Mutant("models/losses.py", "draw < probability", "draw < 0.15"),
    Mutant("models/losses.py", " & (input_ids != special_ids.cls)", ""),
    Mutant("models/losses.py", "(input_ids != special_ids.pad) & ", ""),
    Mutant(
        "models/losses.py",
        "chosen & (kind < 0.8)",
        "chosen & (kind < 0.9)",
        "what of it is from 0.8 on becomes a random token in the next line",
    ),
    Mutant("models/losses.py", "(kind >= 0.8) & (kind < 0.9)", "(kind >= 0.8) & (kind < 1)"),
    Mutant(
        "models/losses.py",
        "-torch.empty_like(log_weights).exponential_().log()",
        "torch.zeros_like(log_weights)",
    ),
    Mutant("models/losses.py", ".masked_fill(positives, -torch.inf)", ""),
    Mutant("models/losses.py", "weight.sum().clamp(min=1)", "len(weight)"),
    Mutant(
        "models/losses.py", "weight = valid.repeat(3).float()", "weight = torch.ones_like(loss)"
    ),
    Mutant("models/losses.py", "return loss.sum() / max(1, labels.shape[0])", "return loss.mean()"),
    Mutant(
        "models/losses.py",
        "torch.cat([valid.new_ones(batch), valid.new_zeros(2 * batch)])",
        "torch.cat([valid.new_zeros(batch), valid.new_ones(2 * batch)])",
    ),
    Mutant(
        "models/contrastive.py",
        "self.hard_negatives = config.hard_negatives",
        "self.hard_negatives = True",
    ),
    Mutant(
        "models/contrastive.py",
        "distillable * distilled if isinstance",
        "distillable if isinstance",
    ),
    Mutant("models/contrastive.py", 'if "itc" in self.distilled:', "if self.distilled:"),
    Mutant("models/contrastive.py", "self.temp.clamp_(*TEMP_RANGE)", "pass"),
    Mutant("models/contrastive.py", "        if update_momentum:\n", "        if True:\n"),
    Mutant("models/contrastive.py", "config.queue_size)", "65536)"),
    Mutant(
        "models/contrastive.py",
        "self.image_queue.clone(), self.text_queue.clone()",
        "self.text_queue.clone(), self.image_queue.clone()",
    ),
    Mutant(
        "models/contrastive.py",
        "negative_image, _ = sample_negatives(t2i[:, :batch], positives)",
        "negative_image, _ = sample_negatives(i2t[:, :batch], positives)",
    ),
    Mutant(
        "models/contrastive.py",
        "TextRows(negative_embeds, attention_mask[negative_text], cls_only=True)",
        "TextRows(negative_embeds, attention_mask, cls_only=True)",
    ),
    Mutant(
        "models/contrastive.py",
        "return math.log(candidates) - itc_onehot.detach()",
        "return itc_onehot.detach()",
    ),
    Mutant(
        "models/contrastive.py",
        "top = sim.topk(min(k, sim.shape[1]), dim=1)",
        "top = sim.topk(sim.shape[1], dim=1)",
    ),
    Mutant("models/contrastive.py", "t2i = top_candidates(sim.T, k).T", "t2i = i2t"),
    Mutant(
        "models/contrastive.py",
        "scores = torch.zeros(*pairs.shape",
        "scores = torch.full(pairs.shape, NO_CANDIDATE",
    ),
    Mutant("models/pretrain.py", "self.config.mlm_probability", "0.15"),
    Mutant(
        "models/pretrain.py",
        "targets = torch.arange(batch, device=image.device)",
        "targets = torch.zeros(batch, dtype=torch.long)",
    ),
    Mutant(
        "models/pretrain.py",
        'distilled = masked if "mlm" in self.distilled else None',
        "distilled = masked",
    ),
    Mutant("models/pretrain.py", "            self.enqueue(features_m)\n", ""),
    Mutant(
        "models/pretrain.py",
        "mutual_information_bound(onehot, contrast.i2t.shape[1])",
        "mutual_information_bound(onehot, batch)",
    ),
    Mutant(
        "models/retrieval.py",
        "positives = idx[:, None] == idx",
        "positives = torch.eye(len(idx), dtype=torch.bool)",
    ),
    Mutant(
        "models/retrieval.py",
        "targets = matches / matches.sum(dim=1, keepdim=True)",
        "targets = matches",
    ),
    Mutant("models/retrieval.py", "idx_queue=idx[:, None]", "idx_queue=0 * idx[:, None]"),
    Mutant("models/momentum.py", "base, 1 - momentum)", "base, momentum)"),
    Mutant("models/momentum.py", "param_m.requires_grad_(False)", "pass"),
    Mutant(
        "models/momentum.py",
        "ptr.copy_((ptr + count) % size)",
        "ptr.copy_((ptr + count).clamp(max=size - 1))",
    ),
    Mutant("models/momentum.py", ".isfinite().all(dim=1)", ".isnan().all(dim=1).logical_not()"),
    Mutant(
        "models/bert.py", "enabled=False", "enabled=torch.is_autocast_enabled(input.device.type)"
    ),
    Mutant(
        "models/bert.py",
        "self.dropout = nn.Dropout(config.hidden_dropout_prob)\n        self.register_buffer",
        "self.dropout = nn.Dropout(0)\n        self.register_buffer",
    ),
    Mutant(
        "models/bert.py",
        "self.dropout = nn.Dropout(config.hidden_dropout_prob)\n\n",
        "self.dropout = nn.Dropout(0)\n\n",
    ),
    Mutant(
        "models/bert.py", "dropout = self.dropout_prob if self.training else 0.0", "dropout = 0.0"
    ),
    Mutant("models/bert.py", "if self.training else 0.0", ""),
    Mutant(
        "models/bert.py",
        "self.LayerNorm(self.dropout(self.dense(hidden)) + residual)",
        "self.LayerNorm(self.dropout(self.dense(hidden) + residual))",
    ),
    Mutant(
        "models/bert.py",
        "self.dropout(self.LayerNorm(embeds))",
        "self.LayerNorm(self.dropout(embeds))",
    ),
    Mutant(
        "models/bert.py",
        "OrderedDict(dense=dense, gelu=nn.GELU())",
        'OrderedDict(dense=dense, gelu=nn.GELU("tanh"))',
    ),
    Mutant("models/bert.py", "cross_attention=i >= config.fusion_layer", "cross_attention=True"),
    Mutant("models/bert.py", "[start : start + input_ids.shape[1]]", "[: input_ids.shape[1]]"),
    Mutant(
        "models/bert.py",
        "key=lambda number: parts[number].image_index is not None",
        "key=lambda number: 0",
    ),
    Mutant("models/bert.py", "queries = 1 if cls_only else None", "queries = None"),
    Mutant(
        "models/bert.py",
        "if self.gradient_checkpointing and self.training and torch.is_grad_enabled():",
        "if False:",
    ),
    Mutant("models/bert.py", "nn.init.normal_(module.weight, std=std)", "pass"),
    Mutant("models/vit.py", "depth=config.vision_depth", "depth=2"),
    Mutant("models/vit.py", "nn.init.trunc_normal_(weight, std=2 * initializer_range)", "pass"),
    Mutant("models/decoder.py", ".tril(before)", ".tril()"),
    Mutant("models/decoder.py", ".tril(before)", ""),
    Mutant(
        "models/vqa.py",
        "at_least = (lengths[:, None] >= widths)",
        "at_least = (lengths[:, None] > widths)",
    ),
    Mutant("models/vqa.py", "< flat_lengths[part, None]", "<= flat_lengths[part, None]"),
    Mutant("models/vqa.py", "[part, 1:width]", "[part, :width]"),
    Mutant(
        "models/vqa.py",
        "(weights * per_answer).sum() / len(image)",
        "per_answer.sum() / len(image)",
    ),
    Mutant(
        "models/vqa.py",
        "(weights * per_answer).sum() / len(image)",
        "(weights * per_answer).mean()",
    ),
    Mutant("models/vqa.py", "scores = 2 * first.log()", "scores = first.log()"),
    Mutant("models/vqa.py", "                if update_momentum:\n", "                if True:\n"),
    Mutant(
        "models/vqa.py",
        "labels = answer.input_ids[:, 1:].masked_fill(~is_token, -100)",
        "labels = answer.input_ids[:, 1:]",
        "the losses of padding are multiplied by 0 in the next line but one",
    ),
    Mutant("models/vqa.py", "log_probs[..., ids.eos].masked_fill_(ended, 0.0)", "pass"),
    Mutant(
        "models/classification.py",
        "                if update_momentum:\n",
        "                if True:\n",
    ),
    Mutant("models/classification.py", "logits_m, alpha)[0].mean()", "logits_m, alpha)[1].mean()"),
    Mutant("models/nlvr.py", 'if share == "all":', 'if share == "none":'),
    Mutant("models/nlvr.py", "fill_diagonal_(0)", "contiguous()"),
    Mutant("models/nlvr.py", "torch.randint(3 if batch > 2 else 2,", "torch.randint(2,"),
    Mutant("models/nlvr.py", "loss if len(image) > 1 else 0 * loss", "loss"),
    Mutant(
        "models/nlvr.py",
        "torch.where(label == 0, negatives[:, 0], negatives[:, -1])",
        "negatives[:, 0]",
    ),
    Mutant("models/gradcam.py", "gradient.clamp(min=0)", "gradient"),
    Mutant("models/gradcam.py", "/ model.temp, maps)", ", maps)"),
    Mutant("models/weights.py", "mmap=is_zip", "mmap=False"),
    Mutant(
        "models/weights.py", "                _refuse_compressed(path)\n", "                pass\n"
    ),
    Mutant("models/weights.py", "weights_only=True, mmap", "weights_only=False, mmap"),
    Mutant("models/weights.py", "        verify_hash(path)\n", ""),
    Mutant("models/conversions.py", 'mode="bicubic"', 'mode="bilinear"'),
    Mutant("models/weights.py", " and (keep_queues or name not in QUEUES)", ""),
    Mutant("models/weights.py", "allow_missing or module not in in_file", "True"),
    Mutant("models/weights.py", "_is_optional(name) or may_be_new(name)", "may_be_new(name)"),
    Mutant("models/weights.py", "    if unused:\n", "    if False:\n"),
    Mutant("models/weights.py", "if twin != in_file:", "if False:"),
    Mutant(
        "models/weights.py",
        "if target.is_floating_point() and not target.isfinite().all():",
        "if False:",
    ),
    Mutant("models/weights.py", "if complete else ()", "if False else ()"),
    Mutant(
        "models/conversions.py", 'if to_pairs and name.split(".")[0].endswith("_m"):', "if False:"
    ),
    Mutant("models/conversions.py", "lambda layer: fusion + layer", "lambda layer: layer"),
    Mutant("models/conversions.py", "fusion + (block - fusion) // 2", "block // 2"),
    Mutant(
        "models/conversions.py",
        "for known in (name, with_bert, without)",
        "for known in (name, with_bert)",
    ),
    Mutant(
        "models/conversions.py",
        'without = re.sub(r"^(text_encoder(_m)?\\.)bert\\.", r"\\1", name)',
        'without = re.sub(r"^(text_encoder\\.)bert\\.", r"\\1", name)',
    ),
    Mutant("models/conversions.py", "known.setdefault(head + name, known[twin])", "pass"),
    Mutant("models/weights.py", " and not has_head", ""),
    Mutant("models/weights.py", "if old != name:", "if True:"),
    # optimizer and schedule
    Mutant(
        "optim/__init__.py", 'param.ndim == 1 or name.endswith(".bias")', 'name.endswith(".bias")'
    ),
    Mutant("optim/__init__.py", 'if name == "temp":', "if False:"),
    Mutant("optim/__init__.py", "1.0 if name in pretrained else config.new_lr_scale", "1.0"),
    Mutant("optim/__init__.py", "optimizer.found_inf = (~norm.isfinite()).float()", "pass"),
    Mutant("optim/__init__.py", "    elif norm.isfinite():\n", "    else:\n"),
    Mutant("scheduler/__init__.py", "epoch / schedule.epochs", "(epoch + 1) / schedule.epochs"),
    Mutant(
        "scheduler/__init__.py", "max(0, iteration - 1) // WARMUP_STEP", "iteration // WARMUP_STEP"
    ),
    Mutant("scheduler/__init__.py", "done = epoch * iterations + iteration", "done = iteration"),
    Mutant(
        "scheduler/__init__.py", "config.alpha * min(1.0, iteration / iterations)", "config.alpha"
    ),
    Mutant("scheduler/__init__.py", "if config.warm_up and epoch == 0:", "if epoch == 0:"),
    Mutant(
        "scheduler/__init__.py", "math.sqrt(global_batch / reference)", "global_batch / reference"
    ),
    Mutant(
        "engine/trainer.py",
        "(sum(losses.values()) / config.accumulate).backward()",
        "sum(losses.values()).backward()",
    ),
    Mutant("engine/trainer.py", "value.detach() / config.accumulate", "value.detach()"),
    Mutant("engine/trainer.py", "    if config.clip_grad:\n", "    if False:\n"),
    Mutant("engine/trainer.py", "update_momentum=micro == 0)", "update_momentum=True)"),
    Mutant(
        "engine/trainer.py",
        "distillation_weight(state.config, state.epoch, state.iteration, state.iterations)",
        "state.config.alpha",
    ),
    Mutant(
        "engine/trainer.py",
        "lr = learning_rate(state.schedule, state.epoch, state.iteration, state.iterations)",
        "lr = learning_rate(state.schedule, state.epoch + 1, state.iteration, state.iterations)",
    ),
    Mutant("engine/trainer.py", 'lr * group["lr_scale"]', "lr"),
    Mutant(
        "engine/trainer.py",
        "seed_everything(state.seed, state.epoch, state.iteration, micro, rank())",
        "seed_everything(state.seed, state.epoch, state.iteration, micro)",
    ),
    Mutant(
        "engine/trainer.py",
        "seed_everything(state.seed, state.epoch, state.iteration, micro, rank())",
        "seed_everything(state.seed, state.epoch, state.iteration, 0, rank())",
    ),
    Mutant(
        "engine/trainer.py",
        "seed_everything(state.seed, state.epoch, state.iteration, micro, rank())",
        "seed_everything(state.seed, state.epoch, micro, rank())",
    ),
    Mutant("engine/trainer.py", "last = micro == config.accumulate - 1", "last = False"),
    Mutant(
        "engine/trainer.py",
        "    state.optimizer.zero_grad(set_to_none=True)\n    return Step",
        "    return Step",
    ),
    Mutant("engine/distributed.py", "        buffer.copy_(value)\n", "        pass\n"),
    Mutant("engine/trainer.py", "    state.model.train()\n", ""),
    Mutant("engine/precision.py", '"highest" if config.deterministic else "high"', '"high"'),
    Mutant("engine/precision.py", "optimize_ddp = False", "optimize_ddp = True"),
    Mutant("engine/precision.py", "use_duck_shape = False", "use_duck_shape = True"),
    Mutant("engine/precision.py", "module.compile(dynamic=True, ", "module.compile("),
    Mutant("engine/precision.py", "and not config.deterministic if automatic", "if automatic"),
    Mutant("engine/precision.py", "suppress_errors = automatic", "suppress_errors = False"),
    Mutant("models/bert.py", "length + -length % 64", "length + -length % 8"),
    Mutant("engine/precision.py", "enable_cudnn_sdp(False)", "enable_cudnn_sdp(True)"),
    Mutant(
        "engine/precision.py", 'enabled = config.precision == "bf16" and', "enabled = False and"
    ),
    Mutant("engine/trainer.py", "        param.requires_grad_(False)\n", "        pass\n"),
    Mutant("scheduler/__init__.py", "if reference else 1", "if False else 1"),
    Mutant("engine/trainer.py", "score > state.best.score", "score >= state.best.score"),
    Mutant("engine/trainer.py", "state.best is None or score > state.best.score", "True"),
    Mutant("engine/metric_logger.py", "            mean /= world_size()\n", ""),
    Mutant("engine/metric_logger.py", "total / max(1, progress.counted)", "total"),
    Mutant(
        "engine/checkpointing.py",
        "        setattr(state, name, getattr(saved, name))\n",
        "        setattr(state, name, None if name == 'best' else getattr(saved, name))\n",
    ),
    Mutant(
        "engine/checkpointing.py",
        "self.skipped_steps_before += self.skipped_steps",
        "self.skipped_steps_before += self.skipped_steps; self.best = None",
    ),
    Mutant("engine/checkpointing.py", "self.skipped_steps_before += self.skipped_steps", "pass"),
    Mutant(
        "engine/checkpointing.py",
        '"param_groups": groups}',
        '"param_groups": content["optimizer"]["param_groups"]}',
    ),
    Mutant("engine/checkpointing.py", "['epoch'] - keep:02d", "['epoch'] - keep - 1:02d"),
    Mutant("engine/checkpointing.py", "key=_progress, reverse=True", "key=_progress"),
    Mutant("engine/checkpointing.py", '= value.to("cpu", non_blocking=True, copy=True)', "= value"),
    Mutant(
        "engine/trainer.py",
        "signum, late, failed = stop.agree(checkpointer.is_late(), checkpointer.has_failed())",
        "(signum, failed), late = stop.agree(checkpointer.has_failed()), checkpointer.is_late()",
    ),
    Mutant(
        "engine/checkpointing.py",
        "        if failure := self._wait():",
        '        if failure := "":',
    ),
    Mutant("engine/trainer.py", "    if failed:\n        checkpointer.finish()\n", ""),
    Mutant(
        "engine/checkpointing.py",
        "return msgspec.convert(content.get(key), kind)",
        "return content[key]",
    ),
    Mutant("engine/checkpointing.py", "    if saved.seed != state.seed:\n", "    if False:\n"),
    Mutant("engine/checkpointing.py", "return file.testzip() is None", "return True"),
    Mutant("engine/run.py", "        load_checkpoint(model, file, complete=True)\n", ""),
    Mutant("engine/run.py", "        if found != task.name:\n", "        if False:\n"),
    Mutant(
        "engine/run.py", '        output_dir /= "evaluation"\n', "        output_dir = output_dir\n"
    ),
    Mutant(
        "engine/run.py",
        "for split in task.files if args.split in (None, split)",
        "for split in task.files",
    ),
    Mutant("engine/configuration.py", '"schedular" not in saved and ', ""),
    Mutant(
        "engine/configuration.py", "task_of_checkpoint(content, task, checkpoint) == task", "True"
    ),
    Mutant(
        "engine/configuration.py",
        "{**load_config(default).to_dict(), **model}",
        "load_config(default).to_dict()",
    ),
    Mutant(
        "evaluation/distributed.py",
        "[merged[index] for index in sorted(merged)]",
        "[merged[index] for index in merged]",
    ),
    Mutant(
        "evaluation/distributed.py",
        "indices = range(rank(), len(dataset), world_size())",
        "indices = range(rank(), len(dataset) - len(dataset) % world_size(), world_size())",
    ),
    Mutant(
        "evaluation/retrieval.py", "text_feat[part] = feat", "text_feat[start : start + 256] = feat"
    ),
    Mutant(
        "evaluation/retrieval.py",
        "text_embeds[part, :length] = embeds",
        "text_embeds[start : start + 256, :length] = embeds",
    ),
    Mutant("evaluation/retrieval.py", "features[indices] = ", "features[: len(indices)] = "),
    Mutant("evaluation/retrieval.py", "    model.eval()\n", ""),
    Mutant("evaluation/metrics/recall.py", "int((others == best).sum())", "0"),
    Mutant(
        "evaluation/metrics/recall.py",
        "best, others = row[own].max()",
        "best, others = row[own].min()",
    ),
    Mutant("evaluation/metrics/vqa.py", "(sum(equal) - left_out) / 3", "sum(equal) / 3"),
    Mutant("dataset/refer.py", "if width <= 1 or height <= 1:", "if width <= 0 or height <= 0:"),
    Mutant("evaluation/metrics/grounding.py", "/ (w * h) ** alpha", ""),
    Mutant("evaluation/metrics/grounding.py", 'mode="bicubic"', 'mode="nearest"'),
    Mutant("evaluation/attributes.py", ".clamp(min=0)", ""),
    Mutant("evaluation/attributes.py", "known = label >= 0", "known = label >= -1"),
    Mutant("evaluation/attributes.py", 'attribute.type.replace(" tone", "")', "attribute.type"),
    Mutant("evaluation/relevance.py", "logits[:, 1] - logits[:, 0]", "logits[:, 0] - logits[:, 1]"),
    Mutant("evaluation/relevance.py", "(index + len(self) // 2) % len(self)", "index"),
    Mutant("models/classification.py", '"itm_head", Head', '"cls_head", Head'),
    Mutant("dataset/attributes.py", "annotation.area < MIN_AREA", "annotation.area <= MIN_AREA"),
    Mutant("dataset/text.py", 'replace("<person>", "person")', 'replace("<person>", "")'),
    Mutant("dataset/transforms.py", "        if keep\n    ]", "    ]"),
    Mutant("dataset/transforms.py", "if torch.rand(()) < 0.5 else image", ""),
    Mutant("dataset/base.py", "seed_of(self.seed, self.epoch, index)", "seed_of(self.seed, index)"),
]


def applied(mutant):
    """The text of the mutant's file with its mistake.

    Raises SystemExit where the table is stale.
    """
    text = (ROOT / mutant.file).read_text()
    if text.count(mutant.old) != 1:
        sys.exit(
            f"error: {mutant.file} has {mutant.old!r} {text.count(mutant.old)} times, it must be once; correct tests/mutants.py"
        )
    return text.replace(mutant.old, mutant.new)


def copy_repository(folder):
    """Copies the files that git tracks."""
    tracked = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in filter(None, tracked.stdout.split("\0")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)


def run(mutant):
    """The outcome of a mutant's tests in a copy of the repository, and the test that failed."""
    if mutant.equivalent:
        return "equivalent", mutant.equivalent
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    tests = [f"tests/test_{name}.py" for name in TESTS[mutant.file].split()]
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--no-header", "-p", "no:cacheprovider"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        copy_repository(folder)
        (folder / mutant.file).write_text(applied(mutant))
        try:
            ended = subprocess.run(
                [*command, *tests],
                cwd=folder,
                env=environment,
                capture_output=True,
                text=True,
                timeout=TIMEOUT,
            )
        except subprocess.TimeoutExpired:
            return "killed", "timeout"
    if ended.returncode == 0:
        return "survived", ""
    lines = ended.stdout.strip().splitlines()
    failed = [line.split(" ")[1] for line in lines if line.startswith(("FAILED", "ERROR"))]
    return "killed", [*failed, lines[-1]][0]


def shown(mutant):
    """The mutant as one line."""
    return f"{mutant.file}: {mutant.old.strip()!r} -> {mutant.new.strip()!r}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("files", nargs="*", help="only the mistakes in these files")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    args = parser.parse_args()
    chosen = [mutant for mutant in MUTANTS if not args.files or mutant.file in args.files]
    for mutant in chosen:  # a stale table is an error at once
        applied(mutant)
    start, states = time.monotonic(), []
    with ThreadPoolExecutor(args.processes) as pool:
        for mutant, (state, detail) in zip(chosen, pool.map(run, chosen), strict=True):
            print(f"{state:10} {shown(mutant)}  {detail}", flush=True)
            states.append(state)
    print("\nsurvived:")
    for mutant, state in zip(chosen, states, strict=True):
        if state == "survived":
            print(f"  {shown(mutant)}")
    counts = collections.Counter(states)
    share = 100 * counts["killed"] / max(1, counts["killed"] + counts["survived"])
    print(
        f"{counts['killed']} killed, {counts['survived']} survived, "
        f"{counts['equivalent']} equivalent: {share:.0f}% killed, "
        f"{(time.monotonic() - start) / 60:.0f} minutes"
    )


if __name__ == "__main__":
    main()
