"""The command line, made from the dataclasses of `config.py`.

GMAI-VL's flag names and Megatron's both work. What a flag of the one turns into in terms of the
other is told in one-line notes, which the entry script logs once.
"""

import argparse
import dataclasses
import difflib
import os
import shlex
from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn, get_type_hints

from megatron_gmai.config import Config, scalar_type
from megatron_gmai.presets import preset

SECTIONS = {
    "run": "start and output",
    "data": "data",
    "train": "training",
    "parallel": "parallelism",
    "lora": "adapters",
}
# Megatron's switches that stand for one value of a field: flag -> (section, field, value)
CONSTANTS = {
    "--bf16": ("run", "dtype", "bf16"),
    "--fp16": ("run", "dtype", "fp16"),
    "--recompute-activations": ("train", "recompute_granularity", "selective"),
}


class Parsed(NamedTuple):
    """The effective configuration, and what to tell the user about how flags were understood."""

    config: Config
    notes: list[str]


def parse(argv: Sequence[str]) -> Parsed:
    """Reads the flags in `argv` (without the program's name).

    Defaults come from the preset, flags given win. Raises ValueError for an unknown flag (with the
    nearest name), a value of the wrong type, and one setting given two values by two names.
    `--help` prints and exits.
    """
    parser = build_parser()
    given, unknown = parser.parse_known_args(list(argv))
    if unknown:
        raise ValueError("\n".join(_unknown(parser, unknown)))
    spellings = vars(given).pop("spellings", {})
    config = preset(vars(given).get("run.preset"))
    for name in SECTIONS:
        values = {
            key.removeprefix(f"{name}."): value
            for key, value in vars(given).items()
            if key.startswith(f"{name}.")
        }
        section = dataclasses.replace(getattr(config, name), **values)
        config = dataclasses.replace(config, **{name: section})
    config = _fill(config)
    return Parsed(config, _notes(config, spellings))


def build_parser() -> argparse.ArgumentParser:
    """One argument group per section. Values not given are absent from the result."""
    parser = _Parser(
        prog="pretrain_gmai_vl.py",
        usage="torchrun ... %(prog)s [--preset NAME] (--datasets LIST.json | --shards DIR) "
        "--work-dir DIR [flags] [@FILE of flags]",
        description="Train GMAI-VL with Megatron-Core's tensor, pipeline and data parallelism.",
        allow_abbrev=False,
        fromfile_prefix_chars="@",
        argument_default=argparse.SUPPRESS,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=36, width=100),
    )
    for name, title in SECTIONS.items():
        group = parser.add_argument_group(title)
        section = get_type_hints(Config)[name]
        hints = get_type_hints(section)
        for item in dataclasses.fields(section):
            _add_flag(group, name, item, hints[item.name])
        for flag, (where, key, value) in CONSTANTS.items():
            if where == name:
                meaning = f"the same as --{key.replace('_', '-')} {value}"
                group.add_argument(
                    flag, dest=f"{name}.{key}", action=_Once, nargs=0, const=value, help=meaning
                )
    return parser


class _Parser(argparse.ArgumentParser):
    """Raises ValueError where argparse would print and exit: every rank parses, one reports."""

    def error(self, message: str) -> NoReturn:
        if "Errno" in message:  # of a file given as @FILE
            raise ValueError(f"cannot read a file of flags (@FILE): {message.split('] ')[-1]}")
        raise ValueError(f"{message} (--help lists every flag)")

    def convert_arg_line_to_args(self, arg_line: str) -> list[str]:
        """One line of a file given as @FILE: flags and values as on a shell's line, # comments."""
        try:
            return shlex.split(arg_line, comments=True)
        except ValueError as error:
            self.error(f"a line of a file of flags cannot be read: {error}: {arg_line.strip()}")


class _Once(argparse.Action):
    """Stores a value; two spellings of one setting must not disagree.

    The same spelling twice is fine and the last wins, so that scripts can append "$@".
    """

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        value = self.const if self.nargs == 0 else values
        flag = option_string or ""
        if flag.startswith("--no-"):
            value = False
        spellings = vars(namespace).setdefault("spellings", {})
        before = spellings.get(self.dest, flag)
        if before != flag and getattr(namespace, self.dest) != value:
            parser.error(f"{before} and {flag} are one setting and disagree: give one of them")
        spellings[self.dest] = flag
        setattr(namespace, self.dest, value)


def _add_flag(
    group: argparse._ArgumentGroup, section: str, item: dataclasses.Field[Any], hint: Any
) -> None:
    kind = scalar_type(hint)
    own = "--" + item.name.replace("_", "-")
    flags = [own, *item.metadata["flags"]]
    settings: dict[str, Any] = {"dest": f"{section}.{item.name}", "action": _Once}
    text = item.metadata["help"].replace("%", "%%")
    if kind is bool:
        settings |= {"nargs": 0, "const": True}
        if item.default:
            flags.append("--no-" + own[2:])
            text += " (default: on)"
    else:
        choices = item.metadata["choices"]
        settings |= {"type": kind, "choices": choices or None}
        if not choices:
            settings["metavar"] = {int: "N", float: "X", str: "PATH"}[kind]
        if item.default is not None:
            text += f" (default: {item.default})"
    group.add_argument(*flags, help=text, **settings)


def _unknown(parser: argparse.ArgumentParser, words: list[str]) -> list[str]:
    known = [flag for action in parser._actions for flag in action.option_strings]
    messages: list[str] = []
    for word in words:
        name = word.split("=")[0]
        if not name.startswith("-"):
            if not messages:  # else it is the value of the unknown flag before it
                messages.append(f"{word}: not a flag, and no flag before it takes a value")
            continue
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]}?" if near else "; --help lists every flag"
        messages.append(f"{name}: unknown flag{hint}")
    return messages


def _fill(config: Config) -> Config:
    """Defaults that follow from other fields, so that the saved configuration states them."""
    run, data, parallel = config.run, config.data, config.parallel
    run = dataclasses.replace(
        run,
        save=run.save or os.path.join(run.work_dir, "checkpoints"),
        tensorboard_dir=run.tensorboard_dir or os.path.join(run.work_dir, "tensorboard"),
    )
    if data.datasets and not data.dset_cache_dir:
        data = dataclasses.replace(data, dset_cache_dir=os.path.join(run.work_dir, "shards"))
    if parallel.shard_strategy:
        parallel = dataclasses.replace(parallel, use_distributed_optimizer=True)
    return dataclasses.replace(config, run=run, data=data, parallel=parallel)


def _notes(config: Config, spellings: dict[str, str]) -> list[str]:
    run, data, train = config.run, config.data, config.train
    strategy = config.parallel.shard_strategy
    notes = []
    if run.preset is None and not (run.llava or run.llm or run.load):
        notes.append(
            "no --preset, --llava, --llm or --load: the sizes of gmai-vl-7b, random weights"
        )
    if strategy:
        shared = "optimizer state and the gradient reduction are sharded over the data ranks"
        notes.append(f"--shard-strategy {strategy} -> --use-distributed-optimizer: {shared}")
    if strategy == "full":
        notes.append(
            "--shard-strategy full: parameters are not sharded over the data ranks; "
            "--tensor-model-parallel-size and --pipeline-model-parallel-size divide them instead"
        )
    if spellings.get("train.micro_batch_size") == "--mirco-batch-size":
        notes.append("--mirco-batch-size -> --micro-batch-size")
    if train.selective_recompute:
        notes.append(
            f"--selective-recompute {train.selective_recompute:g} -> --recompute-granularity full "
            "--recompute-method block over that share of each pipeline stage's layers"
        )
    if data.dset_from_cache and data.datasets:
        notes.append(
            f"--dset-from-cache: shards in {data.dset_cache_dir} are used as they are; "
            "where there are none they are made from --datasets"
        )
    if run.resume and (run.llava or run.llm or run.load):
        start = "--llava" if run.llava else "--llm" if run.llm else "--load"
        notes.append(f"--resume: {start} counts only while {run.save} holds no checkpoint")
    return notes
