"""An optional judge model at any OpenAI-shaped address, with its answers kept by hash.

A score that used a judge repeats without it from the file of its answers. The questions to the
judge are this project's own, so its verdicts are not those of the toolkits' judges.
"""

import hashlib
import http.client
import json
import re
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from megatron_gmai.evaluate.benchmarks.table import Item

SECONDS = 120
MAX_REPLY_BYTES = 1_000_000
_LETTER = re.compile(r"\b([A-Z])\b")
_MATCH = """Which option does the answer below mean? Reply with the option's letter alone, or with \
Z if it means none of them or more than one.

Question: {question}
Options:
{options}
Answer: {answer}"""
_SAME = """Does the given answer to a medical question say the same as the right one? Other words \
for the same thing are fine; missing, wrong or contradicting content is not. Reply with yes or no \
alone.

Question: {question}
Right answer: {truth}
Given answer: {answer}"""

# Prompt -> reply.
Ask = Callable[[str], str]


def match_prompt(item: Item, options: dict[str, str], answer: str) -> str:
    lines = "\n".join(f"{letter}. {text}" for letter, text in options.items())
    return _MATCH.format(question=item.question, options=lines, answer=answer)


def same_prompt(item: Item, answer: str) -> str:
    return _SAME.format(question=item.question, truth=item.answer, answer=answer)


def read_letter(reply: str, options: Sequence[str]) -> str | None:
    """The one option that a reply names; None for Z and for anything unclear."""
    letters = set(_LETTER.findall(reply))
    return letters.pop() if len(letters) == 1 and letters <= set(options) else None


def read_yes(reply: str) -> bool | None:
    words = set(re.findall("[a-z]+", reply.lower())) & {"yes", "no"}
    return words == {"yes"} if len(words) == 1 else None


class Judge:
    """Asks each prompt once; replies are appended to a JSON Lines file and read from there."""

    def __init__(self, model: str, store: Path, ask: Ask | None, workers: int = 8) -> None:
        """Without `ask` only stored replies are used; a missing one is an error."""
        self.model, self.store, self.workers = model, store, workers
        self._ask = ask
        self._replies = _read_store(store)

    def replies(self, prompts: Sequence[str]) -> list[str]:
        """Raises ValueError if a reply is neither stored nor to be had."""
        keys = [self._key(prompt) for prompt in prompts]
        new = {k: p for k, p in zip(keys, prompts, strict=True) if k not in self._replies}
        if new and self._ask is None:
            raise ValueError(
                f"{len(new)} of {len(set(keys))} answers of the judge {self.model} are not in "
                f"{self.store}; give --judge URL to ask for them"
            )
        if new and self._ask is not None:
            self.store.parent.mkdir(parents=True, exist_ok=True)
            with ThreadPoolExecutor(self.workers) as pool, self.store.open("a") as file:
                if file.tell():
                    file.write("\n")  # not behind a line that a kill cut off
                for key, reply in zip(new, pool.map(self._ask, new.values()), strict=True):
                    self._replies[key] = reply
                    file.write(json.dumps({"key": key, "reply": reply}) + "\n")
        return [self._replies[key] for key in keys]

    def _key(self, prompt: str) -> str:
        return hashlib.sha256(f"{self.model}\n{prompt}".encode()).hexdigest()


def _read_store(path: Path) -> dict[str, str]:
    replies = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            stored = json.loads(line)
            replies[str(stored["key"])] = str(stored["reply"])
        except (ValueError, KeyError, TypeError):
            continue  # a last line that a kill cut off is asked again
    return replies


def openai_ask(address: str, model: str, key: str | None) -> Ask:
    """Asks `address`/chat/completions, greedily."""
    if not address.startswith(("http://", "https://")):
        raise ValueError(f"--judge {address}: must be an http or https address, such as .../v1")

    def ask(prompt: str) -> str:
        messages = [{"role": "user", "content": prompt}]
        body = {"model": model, "messages": messages, "temperature": 0, "max_tokens": 64}
        headers = {"Content-Type": "application/json"}
        if key:
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(
            f"{address.rstrip('/')}/chat/completions", json.dumps(body).encode(), headers
        )
        try:
            with urllib.request.urlopen(request, timeout=SECONDS) as response:
                return _content(json.loads(response.read(MAX_REPLY_BYTES)))
        except (OSError, ValueError, RecursionError, http.client.HTTPException) as error:
            raise ValueError(f"the judge at {address} gave no answer: {error}") from error

    return ask


def _content(reply: Any) -> str:
    try:
        return str(reply["choices"][0]["message"]["content"])
    except (KeyError, IndexError, TypeError) as error:
        raise ValueError(f"not a chat completion: {str(reply)[:100]}") from error
