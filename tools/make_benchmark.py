"""Writes a benchmark as one TSV, as VLMEvalKit keeps them, from the files it is published in.

    python tools/make_benchmark.py vqa-rad --source FOLDER --output DIR

docs/evaluation.md tells where each comes from and what its folder must hold. Records that cannot be
used are named in DIR/NAME.rejected.jsonl.
"""

import argparse
import sys
from pathlib import Path

from megatron_gmai.data.files import write_atomically
from megatron_gmai.data.ledger import dump_line, visible
from megatron_gmai.evaluate.native.convert import Converted, convert
from megatron_gmai.evaluate.native.registry import SOURCES


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0, or 2 after a mistake that the message explains."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("benchmark", choices=list(SOURCES))
    parser.add_argument("--source", type=Path, required=True, help="folder of its own files")
    parser.add_argument("--output", type=Path, required=True, help="folder of the TSV")
    parser.add_argument("--split", help="default: the one that papers report")
    parser.add_argument("--language", help="only questions in it (SLAKE: en or zh)")
    parser.add_argument("--name", help="of the TSV, without suffix (default: the benchmark's)")
    flags = parser.parse_args(argv)
    source = SOURCES[flags.benchmark]
    split = flags.split or source.split
    path = flags.output / f"{flags.name or source.name}.tsv"
    try:
        converted = convert(source, flags.source, split, path, flags.language)
    except (ValueError, OSError) as error:
        print(f"make_benchmark: {error}", file=sys.stderr)
        return 2
    if converted.rejections:
        lines = "".join(map(dump_line, converted.rejections))
        write_atomically(path.with_suffix(".rejected.jsonl"), lines.encode())
    print(report(converted, path))
    return 0


def report(converted: Converted, path: Path) -> str:
    """What was written, and what a reader of scores must know of it."""
    lines = [f"{converted.written} questions: {path}"]
    if converted.expected not in (None, converted.written):
        lines.append(f"papers count {converted.expected}: scores are not comparable with theirs")
    if converted.rejections:
        first = converted.rejections[0]
        reason = visible(f"{first.key}: {first.reason}")
        lines.append(f"{len(converted.rejections)} rejected; {reason}")
    if converted.seen_as_missing:
        lines.append(
            f'{converted.seen_as_missing} options or answers read "None", "NA" or the like: '
            "pandas, and so VLMEvalKit, takes them for missing"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
