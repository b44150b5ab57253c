"""Answers a benchmark's questions over all ranks; goes on where an earlier run was ended.

Every rank appends its answers to a file of its own; what is there when a run starts is not asked
again, in whatever layout it was answered.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_gmai.chat_formats import chat_format
from megatron_gmai.config import DataConfig, ModelConfig
from megatron_gmai.data.files import write_atomically
from megatron_gmai.data.images.decode import decode
from megatron_gmai.data.images.resize import to_square
from megatron_gmai.data.ledger import BadSample
from megatron_gmai.data.text.conversation import parse_conversation
from megatron_gmai.data.text.template import render
from megatron_gmai.data.text.tokenizer import Tokenizer
from megatron_gmai.evaluate.benchmarks.table import Benchmark, Item
from megatron_gmai.evaluate.generate import Prompt, generate
from megatron_gmai.evaluate.prompts import ask
from megatron_gmai.evaluate.questions import Asked, Question, Skipped, batches
from megatron_gmai.evaluate.sampling import GREEDY, Sampling
from megatron_gmai.model.gmai_vl import GMAIVL
from megatron_gmai.runtime.groups import Groups


class BenchmarkQuestions:
    """A benchmark's questions, made into prompts one at a time as training made its samples."""

    def __init__(
        self,
        benchmark: Benchmark,
        style: str,
        data: DataConfig,
        model: ModelConfig,
        tokenizer: Tokenizer,
        max_new_tokens: int,
    ) -> None:
        self.benchmark, self.style, self.tokenizer = benchmark, style, tokenizer
        self.template = chat_format(data.chat_template)
        self.pad_to_square = data.pad_to_square
        self.vision = model.vision
        self.longest_prompt = model.language.max_position_embeddings - max_new_tokens

    def __len__(self) -> int:
        return len(self.benchmark.items)

    def ask(self, number: int) -> Asked | Skipped:
        item = self.benchmark.items[number]
        try:
            prompt = self._prompt(item)
        except BadSample as error:
            return Skipped(number, item.index, str(error))
        question = Question(number, item.index, item.question, item.answer, "", "")
        return Asked(question, prompt)

    def _prompt(self, item: Item) -> Prompt:
        files = self.benchmark.images(item)
        asking = ask(item, self.benchmark.name, self.style, len(files))
        record = {"conversations": [{"from": "human", "value": asking.text}]}
        conversation = parse_conversation(record, len(asking.images), require_answer=False)
        rendered = render(conversation, self.template, self.tokenizer, self.vision.tokens_per_image)
        if len(rendered.tokens) > self.longest_prompt:
            raise BadSample(
                f"the prompt has {len(rendered.tokens)} tokens; beside an answer the model has "
                f"room for {self.longest_prompt}"
            )
        side = self.vision.image_size
        pixels = torch.empty(len(asking.images), 3, side, side, dtype=torch.uint8)
        for image, position in zip(pixels, asking.images, strict=True):
            square = to_square(decode(files[position]), side, self.pad_to_square)
            image.copy_(torch.from_numpy(square))
        return Prompt(
            torch.from_numpy(rendered.tokens), torch.from_numpy(rendered.image_starts), pixels
        )


Predicted = dict[str, dict[str, str]]  # index -> {"prediction"} or {"prediction": "", "skipped"}


def predict(
    model: GMAIVL,
    questions: BenchmarkQuestions,
    groups: Groups,
    batch_size: int,
    max_new_tokens: int,
    answers: Path,
    progress: Callable[[int, int], None],
    sampling: Sampling = GREEDY,
) -> Predicted:
    """Answers all questions; every rank gets them. A question that cannot be asked has the answer
    "" and a reason.

    Args:
        answers: folder that holds the ranks' answers until all are there.
        progress: called after each batch with the questions done by this rank and its share.
        sampling: of all questions; each has a seed of its own, made from its index.
    """
    done = read_answers(answers)
    dist.barrier()  # nobody appends before everybody has read
    items = questions.benchmark.items
    left = [number for number, item in enumerate(items) if item.index not in done]
    share = left[groups.dp.rank() :: groups.dp.size()]
    stop_id = questions.tokenizer.special_id(questions.template.end_of_answer)
    mine: Predicted = {}
    for batch in batches(questions, share, batch_size):
        asked = [one for one in batch if isinstance(one, Asked)]
        prompts = [one.prompt for one in asked]
        seeded = [sampling.of_question(one.question.key) for one in asked]
        ids = generate(model, prompts, stop_id, max_new_tokens, seeded) if asked else []
        new: Predicted = {
            one.key: {"prediction": "", "skipped": one.reason}
            for one in batch
            if isinstance(one, Skipped)
        }
        for one, tokens in zip(asked, ids, strict=True):
            new[one.question.key] = {"prediction": questions.tokenizer.decode(tokens).strip()}
        if groups.tp.rank() == groups.pp.rank() == 0:
            append_answers(answers / f"{groups.dp.rank()}.jsonl", new)
        mine |= new
        progress(len(mine), len(share))
    for part in _from_all_ranks(mine, groups):
        done |= part
    return {item.index: done[item.index] for item in items}


def _from_all_ranks(mine: Predicted, groups: Groups) -> list[Predicted]:
    parts: list[Any] = [None] * groups.dp.size()
    dist.all_gather_object(parts, mine, group=groups.dp)
    return parts


def claim(folder: Path, settings: dict[str, Any]) -> None:
    """Makes the folder of answers, for these settings only. Raises ValueError if what is there was
    answered with others: answers of two models must not be mixed."""
    path = folder / "settings.json"
    content = json.dumps(settings, indent=1, sort_keys=True)
    if path.exists() and path.read_text(encoding="utf-8") != content:
        raise ValueError(
            f"{folder} holds answers of a run with other settings; delete it, or give another "
            "--output"
        )
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(path, content.encode())


def append_answers(path: Path, answers: Predicted) -> None:
    """One JSON line an answer; a kill can cut off no more than the last batch."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps({"index": index, **answer}) + "\n" for index, answer in answers.items())
    with path.open("a", encoding="utf-8") as file:
        file.write("\n" + "".join(lines))  # not behind a line that a kill cut off


def read_answers(folder: Path) -> Predicted:
    """What earlier runs have answered; lines that were cut off are left out."""
    done: Predicted = {}
    for path in sorted(folder.glob("*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                answer = json.loads(line)
                index = str(answer.pop("index"))
                done[index] = {"prediction": str(answer["prediction"]), **answer}
            except (ValueError, KeyError, TypeError, AttributeError):
                continue
    return done


def files_hash(folder: Path) -> str:
    """SHA-256 of a folder's files, names and contents, in the order of their names."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(f"{path.relative_to(folder)}\0{path.stat().st_size}\0".encode())
        with path.open("rb") as file:
            while block := file.read(2**24):
                digest.update(block)
    return digest.hexdigest()
