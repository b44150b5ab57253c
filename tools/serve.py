"""Serves a checkpoint behind OpenAI's chat-completions interface, with a chat page at its root.

    python tools/serve.py --load CHECKPOINT [--port 8000] [--examples FOLDER]
    torchrun --nproc-per-node 4 tools/serve.py --load CHECKPOINT --tp 4     a model shared by ranks

Bound to this machine alone unless --host says otherwise; other addresses need a key in
$GMAI_API_KEY, which clients send as "Authorization: Bearer KEY". Research only: no medical device.
"""

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from megatron_gmai.evaluate.loading import add_layout_flags, for_evaluation, tokenizer_for
from megatron_gmai.runtime.quiet import quiet_libraries, without_compiler
from megatron_gmai.training.resilience import run_guarded
from megatron_gmai.validation import validate_layout

if TYPE_CHECKING:
    from starlette.applications import Starlette

    from megatron_gmai.evaluate.server.app import Settings
    from megatron_gmai.evaluate.server.model import ModelGenerator

KEY = "GMAI_API_KEY"
LAST_SECONDS = 25  # for answers under way when a signal comes; Kubernetes kills after 30
SPARE_CONNECTIONS = 128  # for pages, pictures and bodies under way; further ones get status 503


class Parser(argparse.ArgumentParser):
    """Raises where argparse would print."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (--help lists every flag)")


def parser() -> argparse.ArgumentParser:
    flags = Parser(description=(__doc__ or "").split("\n\n")[0])
    flags.add_argument(
        "--load",
        type=Path,
        required=True,
        help="checkpoint, folder of them, or Hugging Face folder",
    )
    flags.add_argument("--name", default="gmai-vl", help="the model's name for clients (gmai-vl)")
    flags.add_argument("--tokenizer", help="sentencepiece model (default: the run's own)")
    flags.add_argument("--host", default="127.0.0.1", help="address to bind to (127.0.0.1)")
    flags.add_argument("--port", type=int, default=8000)
    flags.add_argument("--batch-size", type=int, default=16, help="requests together (16)")
    flags.add_argument("--max-tokens", type=int, default=1024, help="longest answer (1024)")
    flags.add_argument("--examples", type=Path, help="folder of example images for the page")
    flags.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    flags.add_argument("--dtype", choices=("auto", "bf16", "fp16", "fp32"), default="auto")
    add_layout_flags(flags)
    return flags


def main(argv: list[str] | None = None) -> None:
    flags = parser().parse_args(argv)
    if flags.batch_size < 1 or flags.max_tokens < 1:
        raise ValueError("--batch-size and --max-tokens must be at least 1")
    if not 0 < flags.port < 2**16:
        raise ValueError(f"--port {flags.port}: must be from 1 to {2**16 - 1}")
    if flags.examples and not flags.examples.is_dir():
        raise ValueError(f"--examples {flags.examples}: no such folder")
    try:
        from megatron_gmai.evaluate.server.app import LOOPBACK, Settings, build_app
    except ImportError as error:
        raise ValueError("serving needs: pip install 'megatron-gmai[serve]'") from error
    key = os.environ.get(KEY)
    if key and not (key.isascii() and key.isprintable() and key == key.strip()):
        raise ValueError(f"${KEY} must be printable ASCII: no other key arrives in an HTTP header")
    if flags.host not in LOOPBACK and not key:
        raise ValueError(f"--host {flags.host} lets others in: set ${KEY} to a key for them")
    settings = Settings(
        api_key=key,
        batch_size=flags.batch_size,
        most_tokens=flags.max_tokens,
        examples=flags.examples,
    )
    generator = load_generator(flags)
    import torch.distributed as dist

    from megatron_gmai.evaluate.server.sharded import Calls, Leader, follow

    if dist.get_world_size() == 1:
        serve(build_app(generator, settings), flags, settings)
        return
    calls = Calls()
    if dist.get_rank():
        follow(generator, calls)
        return
    leader = Leader(generator, calls)
    serve(build_app(leader, settings), flags, settings)
    leader.end()


def serve(app: "Starlette", flags: argparse.Namespace, settings: "Settings") -> None:
    """Until a signal ends it, and answers under way have ended or `LAST_SECONDS` have passed."""
    import uvicorn

    from megatron_gmai.evaluate.server.connections import Connection

    uvicorn.run(
        app,
        http=Connection,
        host=flags.host,
        port=flags.port,
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=LAST_SECONDS,
        limit_concurrency=settings.batch_size + settings.most_waiting + SPARE_CONNECTIONS,
    )


def load_generator(flags: argparse.Namespace) -> "ModelGenerator":
    """The model of a checkpoint or a Hugging Face folder, or this rank's part of it."""
    quiet_libraries()
    without_compiler()
    from megatron_gmai.evaluate.server.model import ModelGenerator
    from megatron_gmai.runtime.world import open_world
    from megatron_gmai.training.inference import load_for_inference, open_trained

    trained = open_trained(flags.load)
    tp, pp = flags.tensor_model_parallel_size, flags.pipeline_model_parallel_size
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if ranks != tp * pp:
        raise ValueError(
            f"--tp {tp} --pp {pp} is a model for {tp * pp} ranks, but {ranks} were started; "
            f"use torchrun --nproc-per-node {tp * pp}"
        )
    config = for_evaluation(trained.config, flags.device, flags.dtype, tp, pp)
    validate_layout(config, ranks)
    tokenizer = tokenizer_for(config, flags.tokenizer)
    world = open_world(config)
    model = load_for_inference(trained, config, world)
    if world.is_first_rank:
        host = f"[{flags.host}]" if ":" in flags.host else flags.host
        print(f"{trained.path} as {flags.name}: http://{host}:{flags.port}", flush=True)
    return ModelGenerator(flags.name, model, config, tokenizer)


if __name__ == "__main__":
    run_guarded(main)
