"""Lets the modules of a chunk tell the counter where the step is, forward and backward."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_gmai.dry_run.counter import DeviceCounter
from megatron_gmai.model.gmai_vl import GMAIVL


def watch(chunks: Sequence[GMAIVL], counter: DeviceCounter) -> None:
    """Register hooks that label what follows them. A module's backward pass begins where the
    gradient of its output is there."""
    for chunk in chunks:
        layers = chunk.language_model.decoder.layers
        # A chunk without layers returns what it was given, or the merged embeddings.
        _watch(chunk, counter, "activations", "embedding", backward=len(layers) == 0)
        for layer, module in zip(chunk.chunk.layers, layers, strict=True):
            _watch(module, counter, "activations", f"decoder layer {layer}")
        if chunk.chunk.has_vision:
            _watch(chunk.vision_model, counter, "vision", "ViT")
            for layer, module in enumerate(chunk.vision_model.decoder.layers):
                _watch(module, counter, "vision", f"ViT layer {layer}")
            _watch(chunk.projector, counter, "vision", "projector", then="merge of the images")
        if chunk.post_process:
            loss = chunk.language_model.output_layer
            _watch(loss, counter, "loss", "output layer and loss")
            loss.register_forward_pre_hook(_Input(counter, "final norm"))


def _watch(
    module: torch.nn.Module,
    counter: DeviceCounter,
    kind: str,
    place: str,
    then: str | None = None,
    backward: bool = True,
) -> None:
    def before(module: torch.nn.Module, arguments: Any) -> None:
        counter.kind, counter.place = kind, f"forward pass, {place}"

    def after(module: torch.nn.Module, arguments: Any, output: Any) -> None:
        if then is not None:
            counter.kind, counter.place = "activations", f"forward pass, {then}"
        if backward:
            _on_gradient(output, counter, kind, place)

    module.register_forward_pre_hook(before)
    module.register_forward_hook(after)


class _Input:
    """Labels what follows a module in the backward pass: the gradient of its input is there."""

    def __init__(self, counter: DeviceCounter, place: str) -> None:
        self.counter, self.place = counter, place

    def __call__(self, module: torch.nn.Module, arguments: Any) -> None:
        _on_gradient(arguments, self.counter, "activations", self.place)


def _on_gradient(output: Any, counter: DeviceCounter, kind: str, place: str) -> None:
    tensor = output[0] if isinstance(output, tuple) else output
    if not isinstance(tensor, Tensor) or not tensor.requires_grad:
        return

    def mark(gradient: Tensor) -> None:
        counter.kind, counter.place = kind, f"backward pass, {place}"

    tensor.register_hook(mark)
