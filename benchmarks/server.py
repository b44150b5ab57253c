"""The server under load: `python benchmarks/server.py`, 500 requests, 20 at a time.

Writes runs/bench/server.json. Exits with 1 if a bar is missed: no request lost, memory flat, and at
least three times the tokens a second of one request at a time. The model is of the quick start's
size with random weights, so that its answers have their full length.
"""

import argparse
import base64
import dataclasses
import io
import json
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from kernel_figures import Figure, at_least, at_most, show, write
from PIL import Image
from small_tokenizer import train_tokenizer

from megatron_gmai.convert.huggingface import write_pretrained
from megatron_gmai.convert.seeded import SeededWeights
from megatron_gmai.data.text.tokenizer import load_tokenizer
from megatron_gmai.presets import preset

TOKENS = 48  # of each answer
MEMORY_BAR_MB = 50.0
SPEED_BAR = 3.0
STARTS_WITHIN_S = 600.0


def main() -> int:
    """Returns 1 if a bar is missed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--load", type=Path, help="checkpoint (default: one with random weights)")
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--at-once", type=int, default=20)
    parser.add_argument("--alone", type=int, default=20, help="requests one at a time")
    parser.add_argument("--port", type=int, default=8123)
    parser.add_argument("--output", default="runs/bench/server.json")
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        load = flags.load or random_model(Path(folder))
        with served(load, flags.port, flags.at_once) as process:
            figures = list(load_figures(flags, process))
    show(figures)
    write(Path(flags.output), figures, [])
    return int(any(figure.holds is False for figure in figures))


def random_model(folder: Path) -> Path:
    """A Hugging Face folder of the quick start's sizes, untrained."""
    file = train_tokenizer(folder)
    tokenizer = load_tokenizer(file)
    config = preset("gmai-vl-tiny")
    language = dataclasses.replace(config.model.language, vocab_size=tokenizer.vocab_size)
    model = dataclasses.replace(
        config.model, language=language, image_token_id=tokenizer.image_token_id
    )
    write_pretrained(
        folder / "hf",
        model,
        SeededWeights(model, seed=0),
        tokenizer_model=file,
        special_tokens=tokenizer.special_tokens,
        reserved=tokenizer.reserved,
        chat_template="internlm2",
        dtype=torch.float32,
        max_shard_bytes=1 << 62,
    )
    return folder / "hf"


@contextmanager
def served(load: Path, port: int, batch_size: int) -> Iterator[psutil.Process]:
    """tools/serve.py in a process of its own."""
    words = [sys.executable, "tools/serve.py", "--load", str(load), "--device", "cpu"]
    words += ["--port", str(port), "--name", "model", "--batch-size", str(batch_size)]
    process = subprocess.Popen(words)
    try:
        begun = time.monotonic()
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health"):
                    break
            except OSError:
                if process.poll() is not None or time.monotonic() - begun > STARTS_WITHIN_S:
                    raise
                time.sleep(0.2)
        yield psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait()


def load_figures(flags: argparse.Namespace, process: psutil.Process) -> Iterator[Figure]:
    def ask(number: int) -> int:
        return answered_tokens(flags.port, number)

    with ThreadPoolExecutor(flags.at_once) as pool:
        list(pool.map(ask, range(2 * flags.at_once)))  # warm: allocators, first batches
        begun = time.perf_counter()
        alone = sum(map(ask, range(flags.alone))) / (time.perf_counter() - begun)
        before = process.memory_info().rss
        begun = time.perf_counter()
        counts = list(pool.map(ask, range(flags.requests)))
        together = sum(counts) / (time.perf_counter() - begun)
    grown = (process.memory_info().rss - before) / 1e6
    name = f"{flags.requests} requests, {flags.at_once} at a time"
    yield at_most(f"{name}: lost", sum(count == 0 for count in counts), "requests", 0)
    yield at_most(f"{name}: memory of the server grows by", grown, "MB", MEMORY_BAR_MB)
    yield Figure("one at a time", alone, "tokens/s")
    yield Figure(name, together, "tokens/s")
    yield at_least(f"{name}, against one at a time", together / alone, "x", SPEED_BAR)


def answered_tokens(port: int, number: int) -> int:
    """Tokens of the answer to one question about one image; 0 if there is none."""
    content = [{"type": "image_url", "image_url": {"url": image_url(number)}}]
    text = {"type": "text", "text": f"Which modality is shown in image {number}?"}
    message: dict[str, Any] = {"role": "user", "content": [*content, text]}
    body = {"model": "model", "messages": [message], "max_tokens": TOKENS, "temperature": 1.0}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/chat/completions",
        json.dumps(body | {"seed": number}).encode(),
        {"Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=300) as answer:
            return int(json.load(answer)["usage"]["completion_tokens"])
    except OSError:
        return 0


def image_url(number: int) -> str:
    pixels = np.random.default_rng(number).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


if __name__ == "__main__":
    sys.exit(main())
