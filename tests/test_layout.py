"""How ranks, layers and images divide."""

import math

import pytest

from megatron_gmai.config import Config, ParallelConfig, TrainConfig
from megatron_gmai.layout import (
    Chunk,
    ImageShare,
    Layout,
    Recompute,
    chunks_of_rank,
    layers_of_chunks,
    virtual_stages,
)
from tests.test_config import change


class TestLayout:
    def test_a_world_is_tensor_times_pipeline_times_data(self) -> None:
        parallel = change(
            Config(),
            parallel={"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2},
        ).parallel
        layout = Layout.of(parallel, world_size=16)
        assert (layout.model, layout.data) == (4, 4)

    def test_recipe_stage_1_accumulates_twice(self) -> None:
        train = TrainConfig(micro_batch_size=8, global_batch_size=512)
        assert Layout(world_size=32, tensor=1, pipeline=1).micro_batches(train) == 2

    def test_remainders_are_errors(self) -> None:
        with pytest.raises(ValueError, match="6 processes do not divide by 4"):
            _ = Layout(world_size=6, tensor=2, pipeline=2).data
        with pytest.raises(ValueError, match="9 packs"):
            Layout(world_size=2, tensor=1, pipeline=1).micro_batches(
                TrainConfig(global_batch_size=9)
            )
        with pytest.raises(ValueError, match="32 layers"):
            layers_of_chunks(ParallelConfig(pipeline_model_parallel_size=3), 32)


class TestChunks:
    def test_layers_spread_evenly_over_the_stages(self) -> None:
        parallel = ParallelConfig(pipeline_model_parallel_size=4)
        assert layers_of_chunks(parallel, 32) == (8, 8, 8, 8)
        (chunk,) = chunks_of_rank(parallel, 32, rank=1)
        assert chunk == Chunk(range(8, 16), is_first=False, is_last=False, has_vision=False)

    def test_virtual_stages_take_turns_over_the_ranks(self) -> None:
        parallel = ParallelConfig(
            pipeline_model_parallel_size=2, num_virtual_stages_per_pipeline_rank=2
        )
        assert chunks_of_rank(parallel, 8, rank=0) == (
            Chunk(range(0, 2), is_first=True, is_last=False, virtual=0),
            Chunk(range(4, 6), is_first=False, is_last=False, virtual=1, has_vision=False),
        )
        assert chunks_of_rank(parallel, 8, rank=1)[-1].is_last

    @pytest.mark.parametrize(("phase", "with_tower"), [("first-stage", 1), ("all-ranks", 2)])
    def test_each_rank_that_encodes_has_one_tower(self, phase: str, with_tower: int) -> None:
        parallel = ParallelConfig(
            pipeline_model_parallel_size=2,
            num_virtual_stages_per_pipeline_rank=2,
            vision_phase=phase,
        )
        ranks = [chunks_of_rank(parallel, 8, rank) for rank in (0, 1)]
        assert [any(c.has_vision for c in chunks) for chunks in ranks].count(True) == with_tower
        assert not any(chunk.has_vision for _, chunk in ranks)

    def test_megatrons_other_flag_says_the_same(self) -> None:
        by_layers = ParallelConfig(
            pipeline_model_parallel_size=2, num_layers_per_virtual_pipeline_stage=2
        )
        assert virtual_stages(by_layers, 8) == 2

    def test_a_list_gives_every_chunk_its_layers(self) -> None:
        parallel = ParallelConfig(pipeline_model_parallel_size=2, pipeline_layout="0,5")
        assert [chunks_of_rank(parallel, 5, rank)[0].layers for rank in (0, 1)] == [
            range(0, 0),
            range(0, 5),
        ]

    @pytest.mark.parametrize("listed", ["1,2,2", "2,2", "-1,6"])
    def test_a_list_that_does_not_add_up_is_refused(self, listed: str) -> None:
        parallel = ParallelConfig(pipeline_model_parallel_size=2, pipeline_layout=listed)
        with pytest.raises(ValueError, match="2 numbers .* that sum to 5 layers"):
            layers_of_chunks(parallel, 5)


class TestImageShare:
    @pytest.mark.parametrize("ranks", [1, 2, 3, 8])
    @pytest.mark.parametrize("images", [0, 1, 2, 7, 16])
    def test_every_image_has_one_rank_and_no_rank_more_than_the_others_fill_up_to(
        self, images: int, ranks: int
    ) -> None:
        shares = [ImageShare(index, ranks).after(3) for index in range(ranks)]
        numbers = [number for share in shares for number in share.own(images)]
        assert sorted(numbers) == list(range(images))
        length = max(1, math.ceil(images / ranks))
        assert all(share.length(images) == length for share in shares)
        assert max(len(share.own(images)) for share in shares) <= length

    def test_few_images_a_micro_batch_come_out_even_over_a_step(self) -> None:
        totals = [
            sum(len(ImageShare(index, 4).after(first).own(1)) for first in range(8))
            for index in range(4)
        ]
        assert totals == [2, 2, 2, 2]


class TestRecompute:
    CHUNK = Chunk(range(8))

    def test_nothing_is_recomputed_unless_asked(self) -> None:
        assert Recompute.of(Config(), self.CHUNK) == Recompute(None, None, None)

    def test_a_share_becomes_a_number_of_layers_of_each_chunk(self) -> None:
        config = change(Config(), train={"selective_recompute": 0.5})
        assert Recompute.of(config, self.CHUNK) == Recompute("full", "block", 4)

    def test_megatrons_own_settings_pass_through(self) -> None:
        config = change(Config(), train={"recompute_granularity": "selective"})
        assert Recompute.of(config, self.CHUNK) == Recompute("selective", None, None)
