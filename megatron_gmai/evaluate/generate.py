"""Generation for a changing batch of prompts, in any tensor- and pipeline-parallel layout.

Shapes: B answers under way, T tokens of a step (of all new prompts, or one an answer), N images of
all prompts, H hidden, V vocabulary.

Steps are packs, as in training: prompts and new tokens of all answers lie one behind the other, so
nothing is padded, and prompts may join and answers leave between two steps.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_gmai.evaluate.sampling import GREEDY, Drawing, Sampling, choose
from megatron_gmai.model.attention import Segments
from megatron_gmai.model.cache import KeyValueCache
from megatron_gmai.model.gmai_vl import GMAIVL


@dataclass(frozen=True)
class Prompt:
    """Token ids up to where the answer begins, and the images that placeholders stand for."""

    tokens: Tensor  # int64 [L]
    image_starts: Tensor  # int64 [n], first placeholder of each image
    pixels: Tensor  # uint8 [n, 3, I, I]


def generate(
    model: GMAIVL,
    prompts: Sequence[Prompt],
    stop_id: int,
    max_new_tokens: int,
    sampling: Sequence[Sampling] | None = None,
) -> list[list[int]]:
    """Ids of each answer, without `stop_id`; greedy unless `sampling` says otherwise.

    All ranks that share the model (tensor- and pipeline-parallel) call it with the same prompts and
    get the same answers. The longest prompt and its answer must not exceed the positions that the
    model knows.
    """
    answers: list[list[int]] = [[] for _ in prompts]
    under_way = Decoding(model)
    rows = list(range(len(prompts)))
    most = [max_new_tokens] * len(prompts)
    chosen = under_way.admit(prompts, most, sampling or [GREEDY] * len(prompts))
    while True:
        going_on = []
        for row_index, (row, token) in enumerate(zip(rows, chosen, strict=True)):
            if token != stop_id:
                answers[row].append(token)
            if token != stop_id and len(answers[row]) < max_new_tokens:
                going_on.append(row_index)
        if not going_on:
            return answers
        under_way.keep(going_on)
        rows = [rows[row_index] for row_index in going_on]
        chosen = under_way.advance()


class Decoding:
    """Answers under way, in rows; every rank that shares the model calls the same methods."""

    def __init__(self, model: GMAIVL) -> None:
        """In eval mode, one chunk a rank, without context or sequence parallelism."""
        self.model = model
        self.device = next(model.parameters()).device
        self.cache = KeyValueCache((), ())
        self.tokens: list[int] = []  # the last of each answer
        self.drawings: list[Drawing] = []

    @torch.no_grad()
    def admit(
        self, prompts: Sequence[Prompt], most: Sequence[int], sampling: Sequence[Sampling]
    ) -> list[int]:
        """The first tokens of new answers, whose rows come behind those under way. `most` is how
        many tokens each may get."""
        lengths = [len(prompt.tokens) for prompt in prompts]
        rooms = [length + tokens for length, tokens in zip(lengths, most, strict=True)]
        cache = KeyValueCache(lengths, rooms)
        bounds = torch.tensor([0, *lengths]).cumsum(0)
        starts = [p.image_starts + at for p, at in zip(prompts, bounds.tolist(), strict=False)]
        hidden = self.hidden_states(
            torch.cat([prompt.tokens for prompt in prompts]),
            torch.cat([torch.arange(length) for length in lengths]),
            self._segments(lengths, cache),
            torch.cat([prompt.pixels for prompt in prompts]),
            torch.cat(starts),
        )
        drawings = [Drawing(one) for one in sampling]
        chosen = self._choose(hidden[bounds[1:] - 1], drawings)
        # Not before all of it has worked: a prompt that fails does no harm to the others.
        if self.tokens:
            self.cache.join(cache)
        else:
            self.cache = cache
        self.tokens += chosen
        self.drawings += drawings
        return chosen

    @torch.no_grad()
    def advance(self) -> list[int]:
        """The next token of every answer."""
        positions = torch.tensor(self.cache.lengths)
        self.cache.begin_step(self.device)
        segments = self._segments([1] * len(self.tokens), self.cache)
        hidden = self.hidden_states(torch.tensor(self.tokens), positions, segments)
        self.tokens = self._choose(hidden, self.drawings)
        return self.tokens

    def keep(self, rows: Sequence[int]) -> None:
        """Only the answers in these rows go on, in this order."""
        if list(rows) != list(range(len(self.tokens))):
            self.cache.keep(rows)
            self.tokens = [self.tokens[row] for row in rows]
            self.drawings = [self.drawings[row] for row in rows]

    def hidden_states(
        self,
        tokens: Tensor,
        positions: Tensor,
        segments: Segments,
        pixels: Tensor | None = None,
        image_starts: Tensor | None = None,
    ) -> Tensor:
        """[T] tokens through this rank's layers, from and to its neighbours in the pipeline ->
        [T, 1, H]."""
        model, pp = self.model, self.model.groups.pp
        embeddings = None
        if model.pre_process:
            embeddings = model.language_model.embed(tokens.to(self.device)[None])
            if pixels is not None and image_starts is not None:
                features = model.encode(pixels.to(self.device))
                embeddings = model.merge(embeddings, features, image_starts.to(self.device))
        else:
            shape = (len(tokens), 1, model.config.hidden_size)
            received = torch.empty(shape, dtype=model.config.pipeline_dtype, device=self.device)
            dist.recv(received, dist.get_global_rank(pp, pp.rank() - 1), group=pp)
            model.set_input_tensor(received)
        hidden = model.language_model(embeddings, positions.to(self.device), segments)
        if not model.post_process:
            dist.send(hidden, dist.get_global_rank(pp, pp.rank() + 1), group=pp)
        return hidden

    def _segments(self, lengths: Sequence[int], cache: KeyValueCache) -> Segments:
        bounds = torch.tensor([0, *lengths]).cumsum(0).int()
        segments = Segments.from_cu_seqlens(bounds, max(lengths), self.device)
        return dataclasses.replace(segments, cache=cache)

    def _choose(self, hidden: Tensor, drawings: Sequence[Drawing]) -> list[int]:
        """[B, 1, H] of the last stage -> a token each, on all ranks."""
        pp = self.model.groups.pp
        chosen = torch.empty(len(drawings), dtype=torch.int64, device=self.device)
        if self.model.post_process:
            # Logits are the same on all tensor-parallel ranks, bit by bit: they are gathered.
            chosen = choose(self.model.language_model.output_layer(hidden)[:, 0], drawings)
        if pp.size() > 1:
            dist.broadcast(chosen, dist.get_global_rank(pp, pp.size() - 1), group=pp)
        return chosen.tolist()
