"""Judges a configuration before anything is built: every problem is found, then told at once.

Each rule is a line: what was given, why it cannot work, what to change.
"""

import difflib
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from megatron_gmai.config import Config, LoraConfig
from megatron_gmai.layout import layers_of_chunks
from megatron_gmai.layout_rules import Problem, batch_problems, layout_problems
from megatron_gmai.tokenizer_file import find_tokenizer
from megatron_gmai.weights import LORA_TARGETS


def validate(config: Config, world_size: int) -> None:
    """Checks `config` for a run of `world_size` processes; reads the file system, changes nothing.

    The sizes must be the final ones: those of the start weights where a run has some. Raises one
    ValueError that lists all problems.
    """
    _judge(
        (
            _ranges,
            _profiled_ranks,
            _model_sizes,
            layout_problems,
            batch_problems,
            _inputs,
            _start,
            _memory,
            _lora,
        ),
        config,
        world_size,
    )


def validate_settings(config: Config, world_size: int) -> None:
    """`validate` without what the disk tells: for a run whose start is still to be made."""
    rules = (_ranges, _profiled_ranks, layout_problems, batch_problems, _memory, _lora)
    _judge(rules, config, world_size)


def validate_layout(config: Config, world_size: int) -> None:
    """Checks only that model and processes divide by the layout: for programs that do not train."""
    _judge((layout_problems,), config, world_size)


def _judge(
    rules: Sequence[Callable[[Config, int], Iterator[Problem]]], config: Config, world_size: int
) -> None:
    problems = [str(problem) for rule in rules for problem in rule(config, world_size)]
    if problems:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise ValueError("\n  - ".join([f"{count} in the configuration:", *problems]))


def _ranges(config: Config, world_size: int) -> Iterator[Problem]:
    data, train, run = config.data, config.train, config.run
    bounds = [  # flag, value, lowest, highest
        ("--micro-batch-size", train.micro_batch_size, 1, math.inf),
        ("--global-batch-size", train.global_batch_size, 1, math.inf),
        ("--vit-micro-batch-size", train.vit_micro_batch_size, 1, math.inf),
        ("--train-iters", train.train_iters, 1, math.inf),
        ("--wd", train.wd, 0, math.inf),
        ("--min-lr", train.min_lr, 0, math.inf),
        ("--max-grad-norm", train.max_grad_norm, 0, math.inf),
        ("--warmup-ratio", train.warmup_ratio, 0, 1),
        ("--selective-recompute", train.selective_recompute, 0, 1),
        ("--seed", train.seed, 0, 2**32 - 1),
        ("--max-rejected", data.max_rejected, 0, 1),
        ("--num-workers", data.num_workers, 0, math.inf),
        ("--log-interval", run.log_interval, 1, math.inf),
        ("--profile-step-start", run.profile_step_start, 1, math.inf),
        ("--profile-step-end", run.profile_step_end, run.profile_step_start + 1, math.inf),
        ("--eval-interval", run.eval_interval, 1, math.inf),
        ("--eval-iters", run.eval_iters, 1, math.inf),
        ("--keep-last", run.keep_last, 1, math.inf),
        ("--keep-every", run.keep_every, 1, math.inf),
        ("--max-skipped-steps", run.max_skipped_steps, 1, math.inf),
    ]
    for flag, value, lowest, highest in bounds:
        if value is not None and not lowest <= value <= highest:
            span = f"at least {lowest}" if highest == math.inf else f"from {lowest} to {highest}"
            yield Problem(f"{flag} {value}", "out of range", f"give a number {span}")
    positive = [
        ("--lr", train.lr),
        ("--epochs", train.epochs),
        ("--adam-eps", train.adam_eps),
        ("--distributed-timeout-minutes", run.distributed_timeout_minutes),
    ]
    for flag, value in positive:
        if not 0 < value < math.inf:
            yield Problem(f"{flag} {value}", "out of range", "give a number above 0")
    for flag, value in (("--adam-beta1", train.adam_beta1), ("--adam-beta2", train.adam_beta2)):
        if not 0 <= value < 1:
            yield Problem(f"{flag} {value}", "out of range", "give a number from 0 to below 1")
    yield from _checkpoint_interval(run.checkpoint_interval)


def _profiled_ranks(config: Config, world_size: int) -> Iterator[Problem]:
    ranks = config.run.profile_ranks
    words = ranks.split(",")
    if not all(word.isdecimal() and int(word) < world_size for word in words):
        yield Problem(
            f"--profile-ranks {ranks}",
            f"the world has ranks 0 to {world_size - 1}",
            "give numbers of ranks, as 0,8",
        )


def _checkpoint_interval(interval: float) -> Iterator[Problem]:
    share, steps = 0 < interval < 1, interval >= 1 and interval == int(interval)
    if not (share or steps or interval == -1):
        yield Problem(
            f"--checkpoint-interval {interval:g}",
            "neither a share of the run nor a number of steps",
            "give a number between 0 and 1, a whole number of steps, or -1 for the end only",
        )


def _model_sizes(config: Config, world_size: int) -> Iterator[Problem]:
    vision, language = config.model.vision, config.model.language
    for name, tower in (("vision", vision), ("language", language)):
        if tower.hidden_size % tower.num_attention_heads:
            yield Problem(
                f"{name} hidden size {tower.hidden_size}",
                f"does not divide by {tower.num_attention_heads} attention heads",
                "correct the model's sizes",
            )
    if language.num_attention_heads % language.num_query_groups:
        yield Problem(
            f"{language.num_attention_heads} attention heads",
            f"do not divide by {language.num_query_groups} query groups",
            "correct the model's sizes",
        )
    if vision.image_size % vision.patch_size:
        yield Problem(
            f"image size {vision.image_size}",
            f"does not divide by the patch size {vision.patch_size}",
            "correct the model's sizes",
        )
    if vision.num_layers < 2:
        yield Problem(
            f"{vision.num_layers} vision layer(s)",
            "features are taken before the last layer",
            "use a vision tower of at least 2 layers",
        )
    length = config.data.max_length
    if length <= vision.tokens_per_image:
        yield Problem(
            f"--max-length {length}",
            f"one image alone takes {vision.tokens_per_image} tokens",
            "give a longer pack or a smaller image size",
        )
    if length > language.max_position_embeddings:
        yield Problem(
            f"--max-length {length}",
            f"the language model knows {language.max_position_embeddings} positions",
            "give a shorter pack",
        )


def _inputs(config: Config, world_size: int) -> Iterator[Problem]:
    data, run = config.data, config.run
    if data.datasets and data.shards:
        yield Problem("--datasets and --shards", "two sources of data", "give one of them")
    cached = data.dset_from_cache and data.dset_cache_dir
    if not (data.datasets or data.shards or cached):
        yield Problem("no data", "nothing to train on", "give --datasets LIST.json or --shards DIR")
    if data.dset_from_cache and not data.dset_cache_dir:
        yield Problem("--dset-from-cache", "no cache is named", "give --dset-cache-dir DIR")
    if data.datasets and not Path(data.datasets).is_file():
        yield _missing("--datasets", data.datasets, "list file")
    if cached and not data.datasets and not Path(data.dset_cache_dir or "").is_dir():
        yield _missing("--dset-cache-dir", data.dset_cache_dir, "folder")
    for flag, folder in (
        ("--shards", data.shards),
        ("--valid-shards", data.valid_shards),
        ("--llava", run.llava),
        ("--llm", run.llm),
        ("--vision", run.vision),
        ("--load", run.load),
    ):
        if folder and not Path(folder).is_dir():
            yield _missing(flag, folder, "folder")
    trained_on = data.shards or data.dset_cache_dir
    valid = data.valid_shards
    if valid and trained_on and Path(valid).resolve() == Path(trained_on).resolve():
        yield Problem(
            f"--valid-shards {valid}",
            "the run trains on these very shards",
            "hold samples out: make shards of a list of their own",
        )
    if data.tokenizer and not find_tokenizer(config):
        yield _missing("--tokenizer", data.tokenizer, "tokenizer.model file")
    elif not find_tokenizer(config):
        yield Problem(
            "no tokenizer",
            "there is no tokenizer.model beside the start weights or the shards",
            "give --tokenizer FILE",
        )


def _missing(flag: str, path: str | None, what: str) -> Problem:
    near = _neighbour(Path(path or ""))
    remedy = f"did you mean {near}?" if near else "correct the path"
    return Problem(f"{flag} {path}", f"there is no such {what}", remedy)


def _neighbour(path: Path) -> Path | None:
    """What lies in the same folder under nearly the same name."""
    names = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    found = difflib.get_close_matches(path.name, names, n=1, cutoff=0.8)
    return path.parent / found[0] if found else None


def _start(config: Config, world_size: int) -> Iterator[Problem]:
    run, train = config.run, config.train
    sources = (("--load", run.load), ("--llava", run.llava), ("--llm", run.llm or run.vision))
    given = [flag for flag, folder in sources if folder]
    if len(given) > 1:
        yield Problem(" and ".join(given), "two sets of start weights", "give one of them")
    if bool(run.llm) != bool(run.vision):
        lone, other = ("--llm", "--vision") if run.llm else ("--vision", "--llm")
        yield Problem(f"{lone} without {other}", "half a set of start weights", f"add {other} DIR")
    if run.resume and run.checkpoint_drop_optimizer:
        yield Problem(
            "--resume with --checkpoint-drop-optimizer",
            "checkpoints without optimizer state cannot be resumed",
            "leave one of them out",
        )
    if train.freeze_vit and train.freeze_llm and train.freeze_projector:
        yield Problem(
            "--freeze-vit --freeze-llm --freeze-projector",
            "nothing is left to train",
            "leave one of them out",
        )
    if train.min_lr > train.lr:
        yield Problem(
            f"--min-lr {train.min_lr:g}",
            f"is above the peak, --lr {train.lr:g}",
            "give a lower one",
        )
    if run.dtype == "fp16":
        yield Problem(
            "--dtype fp16",
            "language model and vision tower have an optimizer each, whose loss scales would part",
            "train in bf16 or fp32",
        )


def _memory(config: Config, world_size: int) -> Iterator[Problem]:
    parallel, train = config.parallel, config.train
    gathers = parallel.use_distributed_optimizer and parallel.overlap_grad_reduce
    if parallel.overlap_param_gather and not gathers:
        yield Problem(
            "--overlap-param-gather",
            "parameters are gathered by the distributed optimizer, behind reduced gradients",
            "add --use-distributed-optimizer and --overlap-grad-reduce",
        )
    granularity, method = train.recompute_granularity, train.recompute_method
    if train.selective_recompute and granularity:
        yield Problem(
            "--selective-recompute and --recompute-granularity",
            "two ways to say what is recomputed",
            "give one of them",
        )
    if granularity == "full" and (method is None or train.recompute_num_layers is None):
        yield Problem(
            "--recompute-granularity full",
            "which layers is not said",
            "add --recompute-method uniform|block and --recompute-num-layers N",
        )
    if granularity != "full" and (method or train.recompute_num_layers is not None):
        yield Problem(
            "--recompute-method and --recompute-num-layers",
            "they belong to full recomputation",
            "add --recompute-granularity full or leave them out",
        )
    yield from _recompute_layers(config)


def _lora(config: Config, world_size: int) -> Iterator[Problem]:
    lora = config.lora
    if not lora.towers and lora != LoraConfig():
        yield Problem(
            "--lora-rank, --lora-alpha, --lora-dropout or --lora-targets",
            "they belong to adapters",
            "add --llm-use-lora or --vit-use-lora, or leave them out",
        )
    if lora.vit_use_lora and config.train.freeze_vit:
        yield Problem(
            "--vit-use-lora with --freeze-vit",
            "adapters train the vision tower, whose own weights they leave as they are",
            "leave one of them out",
        )
    for target in lora.lora_targets.split(",") if lora.towers else ():
        if target not in LORA_TARGETS:
            yield Problem(
                f"--lora-targets {lora.lora_targets}",
                f"{target!r} is no linear of a layer",
                f"choose from {','.join(LORA_TARGETS)}",
            )
    if lora.lora_rank < 1:
        yield Problem(
            f"--lora-rank {lora.lora_rank}", "out of range", "give a number of at least 1"
        )
    if not 0 <= lora.lora_dropout < 1:
        yield Problem(
            f"--lora-dropout {lora.lora_dropout}", "out of range", "give a number from 0 to below 1"
        )
    if not lora.lora_alpha > 0:
        yield Problem(f"--lora-alpha {lora.lora_alpha}", "out of range", "give a number above 0")


def _recompute_layers(config: Config) -> Iterator[Problem]:
    count = config.train.recompute_num_layers
    try:
        most = max(layers_of_chunks(config.parallel, config.model.language.num_layers))
    except ValueError:
        return  # told by layout_problems
    if count is not None and not 1 <= count <= most:
        yield Problem(
            f"--recompute-num-layers {count}",
            f"a pipeline stage has {most} layers" if most > 1 else "a pipeline stage has 1 layer",
            f"give a number from 1 to {most}",
        )
