"""A data set ready to train on: shards, token lengths and plan, read as packs."""

import hashlib
import math
import os
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from megatron_gmai.config import DataConfig, VisionConfig
from megatron_gmai.data.images.decode import load_image
from megatron_gmai.data.ledger import BadSample, Ledger, Rejection, read_ledger, visible
from megatron_gmai.data.loading.augment import Tone, choose_tone
from megatron_gmai.data.loading.batch import BatchBuilder, MicroBatch, SampleImage, Segment
from megatron_gmai.data.plan.packing import Piece
from megatron_gmai.data.plan.plan import Bookmark, Plan
from megatron_gmai.data.plan.windows import PlanSettings, Windows
from megatron_gmai.data.shards.index import REJECTED_FILE
from megatron_gmai.data.shards.lengths import token_lengths
from megatron_gmai.data.shards.reader import Shards
from megatron_gmai.data.sources.mixture import Use, read_uses
from megatron_gmai.data.text.encoder import Encoder, make_encoder
from megatron_gmai.data.text.tokenizer import Tokenizer
from megatron_gmai.layout import ImageShare

# Part r of n of a micro-batch's images: r, n. None: no images at all.
ALL_IMAGES = ImageShare()
TOLD = 5  # rejections in the message that ends a run
TOO_LONG = re.compile(r"(?:the images end at token )?(\d+)(?: tokens)?, more than --max-length")
NumberedPack = tuple[int, list[Piece]]  # its number in the stream decides about augmentation


class PackDataset:
    """The endless stream of packs of one set of shards. Pickles as its settings."""

    def __init__(
        self,
        shards: Shards,
        encoder: Encoder,
        vision: VisionConfig,
        uses: Sequence[Use],
        settings: PlanSettings,
        pad_to_square: bool,
    ) -> None:
        self.shards, self.encoder, self.vision = shards, encoder, vision
        self.uses, self.settings, self.pad_to_square = tuple(uses), settings, pad_to_square
        self.ledger = Ledger(None)
        self.rejected: set[str] = set()  # keys of the samples that cannot be used, on every rank
        self.max_rejected = 1.0

    def __reduce__(self) -> tuple[type["PackDataset"], tuple[Any, ...]]:
        return PackDataset, (
            self.shards,
            self.encoder,
            self.vision,
            self.uses,
            self.settings,
            self.pad_to_square,
        )

    @cached_property
    def plan(self) -> Plan:
        lengths, _ = token_lengths(self.shards, self.encoder)
        first_rows = self.shards.first_rows
        windows = Windows(
            lengths,
            first_rows,
            self.shards.rows["source"][first_rows[:-1]],
            self.ratios,
            self.settings,
            self.shards.rows["images"],
        )
        return Plan(windows, self.shards.folder / f"plan-{self.fingerprint}")

    @property
    def fingerprint(self) -> str:
        """Changes with everything that the plan depends on."""
        manifest = self.shards.manifest
        parts = [manifest.inputs, manifest.samples, self.encoder.fingerprint, self.ratios]
        return hashlib.sha256(repr([*parts, self.settings]).encode()).hexdigest()[:16]

    @property
    def ratios(self) -> list[float]:
        """Of each data set: how many times an epoch takes it."""
        return [use.sample_ratio for use in self.uses]

    @property
    def num_samples(self) -> int:
        """Samples in the shards, before ratios."""
        return len(self.shards)

    def total_packs(self, epochs: float) -> int:
        """Packs of a run of `epochs` passes; a part of an epoch is rounded up to whole packs."""
        whole = int(epochs)
        packs = sum(self.plan.total(epoch) for epoch in range(whole))
        if epochs > whole:
            packs += math.ceil((epochs - whole) * self.plan.total(whole) - 1e-9)
        return packs

    def bookmark(self, pack: int) -> Bookmark:
        """What a run that goes on at `pack` need not find out again."""
        return self.plan.bookmark(pack, self.fingerprint)

    def open_at(self, bookmark: Bookmark) -> None:
        """Makes the packs behind a bookmark quick to reach. One of other data or settings says
        nothing about this plan and changes nothing."""
        if bookmark.plan == self.fingerprint:
            self.plan.open_at(bookmark)

    def reject(self, rejections: Iterable[Rejection]) -> None:
        """Writes rejections to the ledger. Raises ValueError if the share of the samples that
        cannot be used has come to exceed `max_rejected`, or if none is left.

        All ranks call it with what all of them have found, so that they come to the same decision.
        """
        rejections = list(rejections)
        self.ledger.add(rejections)
        self.rejected |= {rejection.key for rejection in rejections}
        bad = len(self.rejected)
        samples = self.shards.manifest.samples + self.shards.manifest.rejected
        if bad > self.max_rejected * samples or bad >= samples:
            raise ValueError(
                f"{bad} of {samples} samples cannot be used, more than --max-rejected "
                f"{self.max_rejected}:\n{_reasons(rejections)}\n"
                f"all reasons are in {self.ledger.path or 'rejected.jsonl'}"
            )

    def assemble(
        self,
        packs: Sequence[NumberedPack],
        image_share: ImageShare | None = ALL_IMAGES,
        memory: np.ndarray | None = None,
    ) -> MicroBatch:
        """One micro-batch of these packs (one without pieces is all padding). Samples that cannot
        be read become padding, and its `rejections` name them. Pixels are put into `memory`, uint8
        [max_images(packs), I, I, 3], where it is given.

        Raises ValueError if a sample's tokens or images are not what the plan was made for.
        """
        builder = BatchBuilder(len(packs), self.settings.max_length, self.encoder.tokenizer.pad_id)
        for number, pieces in packs:
            segments = [self._segment(piece, number, builder.rejections) for piece in pieces]
            builder.add_pack(segments)
        return builder.build(self._pixels(builder.images, image_share, memory))

    def max_images(self, packs: int) -> int:
        """So many images can be in `packs` packs."""
        fitting = self.settings.max_length // self.vision.tokens_per_image
        return packs * min(fitting, self.settings.max_images or fitting)

    def _segment(self, piece: Piece, pack: int, rejections: list[Rejection]) -> Segment:
        try:
            stored = self.shards.read(piece.sample)
        except BadSample as error:
            location = self.shards.location(piece.sample)
            rejections.append(
                Rejection(location, self.shards.source_name(piece.sample), str(error))
            )
            return Segment(location, None, piece.start, piece.stop)
        rendered = self.encoder.encode(stored.record, len(stored.images))
        # Only a table of other shards differs: samples would be cut anywhere, images left over.
        size, is_cut = len(rendered.tokens), self.encoder.cut
        images_end = rendered.images_end if piece.start == 0 else 0
        if not images_end <= piece.stop <= size or (piece.stop < size and not is_cut):
            raise ValueError(
                f"sample {stored.key} has {size} tokens, images up to {images_end}, the plan "
                f"expects {piece.stop}: delete the lengths-*.npy files in {self.shards.folder}"
            )
        # Images end before any cut, so a sample's first piece holds them all.
        files = stored.images if piece.start == 0 else ()
        tone = self._tone(piece.sample, pack) if files else None
        images = [SampleImage(stored.key, data, tone) for data in files]
        return Segment(stored.key, rendered, piece.start, piece.stop, images)

    def _tone(self, sample: int, pack: int) -> Tone | None:
        source = self.shards.source_of(sample)
        if not self.uses[source].data_augment:
            return None
        return choose_tone(self.settings.seed, pack, sample)

    def _pixels(
        self, images: Sequence[SampleImage], share: ImageShare | None, memory: np.ndarray | None
    ) -> np.ndarray:
        """uint8 [N, 3, I, I], channels last in memory, with this process's share decoded and the
        others black; [0, 3, I, I] for processes that need none."""
        side = self.vision.image_size
        if share is None:
            return np.zeros((0, 3, side, side), dtype=np.uint8)
        if memory is None:
            memory = np.empty((len(images), side, side, 3), dtype=np.uint8)
        pixels = memory[: len(images)]
        own = share.own(len(images))
        for number, image in enumerate(images):
            if number not in own:
                pixels[number] = 0
                continue
            self._decode(image, pixels[number])
        return pixels.transpose(0, 3, 1, 2)

    def _decode(self, image: SampleImage, out: np.ndarray) -> None:
        """Puts the pixels into `out`, uint8 [I, I, 3]. An image was decoded once when the shards
        were made, and the checksum holds, so a failure means another decoder: it ends the run."""
        try:
            load_image(image.data, self.vision.image_size, self.pad_to_square, out)
        except BadSample as error:
            raise ValueError(
                f"sample {image.key}: {error}, though it was decoded when the shards were made; "
                "make the shards again with the installed image libraries"
            ) from error
        if image.tone is not None:
            out[:] = image.tone.apply(out)


def open_dataset(
    data: DataConfig,
    tokenizer: Tokenizer,
    vision: VisionConfig,
    seed: int,
    rejected_path: str | os.PathLike[str] | None,
    run: int = 512,
) -> PackDataset:
    """Opens the shards in `data.shards`, and measures token lengths if nobody has yet.

    `rejected_path` is the ledger of the run, None for all ranks but one. `run` is the global batch
    size, which `--group-by-length` needs. Raises ValueError for shards that are not complete, and
    if the share of unusable samples exceeds `data.max_rejected`.
    """
    if data.shards is None:
        raise ValueError("no data: give --shards DIR or --datasets LIST.json")
    shards = Shards(data.shards)
    encoder = make_encoder(data, tokenizer, vision)
    _, too_long = token_lengths(shards, encoder)
    settings = PlanSettings(
        seed,
        data.max_length,
        data.dset_pack_level,
        data.group_by_length,
        run if data.group_by_length else 1,  # so that other global batches keep the plan's name
        max_images=data.max_images_per_pack,
    )
    dataset = PackDataset(
        shards, encoder, vision, uses_of(shards, data), settings, data.pad_to_square
    )
    dataset.ledger, dataset.max_rejected = Ledger(rejected_path), data.max_rejected
    dataset.reject([*read_ledger(shards.folder / REJECTED_FILE), *too_long])
    return dataset


def _reasons(rejections: Sequence[Rejection]) -> str:
    """The first reasons, and how long samples are where that is the matter."""
    lines = ["  " + visible(f"{line.id or line.key}: {line.reason}") for line in rejections[:TOLD]]
    if len(rejections) > TOLD:
        lines.append(f"  and {len(rejections) - TOLD} more")
    lengths = [int(m[1]) for line in rejections if (m := TOO_LONG.match(line.reason))]
    if lengths:
        lines.append(
            f"  {len(lengths)} of them are too long for --max-length; the longest takes "
            f"--max-length {max(lengths)}, the median {sorted(lengths)[len(lengths) // 2]}"
        )
    return "\n".join(lines)


def uses_of(shards: Shards, data: DataConfig) -> list[Use]:
    """A list file given beside the shards decides; it may have changed since.

    Raises ValueError if it names other data sets than the shards hold.
    """
    sources = shards.manifest.sources
    if data.datasets is None:
        return [Use(source.sample_ratio, source.data_augment) for source in sources]
    uses = read_uses(data.datasets)
    names = {source.name for source in sources}
    if names != uses.keys():
        differing = ", ".join(sorted(names ^ uses.keys()))
        raise ValueError(
            f"{data.datasets} and the shards in {shards.folder} differ in their data sets: "
            f"{differing}"
        )
    return [uses[source.name] for source in sources]
