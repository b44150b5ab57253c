"""A configuration: presets, JSON, parallel arithmetic, and the one validation."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from megatron_gmai.config import Config, TrainConfig
from megatron_gmai.presets import preset
from megatron_gmai.tokenizer_file import find_tokenizer
from megatron_gmai.validation import validate


def change(config: Config, **sections: dict[str, Any]) -> Config:
    """`config` with fields of some sections replaced: `change(config, train={"lr": 0.1})`."""
    parts = {
        name: dataclasses.replace(getattr(config, name), **values)
        for name, values in sections.items()
    }
    return dataclasses.replace(config, **parts)


@pytest.fixture
def tiny(tmp_path: Path) -> Config:
    """The tiny preset with shards and a tokenizer that exist."""
    (tmp_path / "tokenizer.model").write_bytes(b"")
    return change(preset("gmai-vl-tiny"), data={"shards": str(tmp_path)})


class TestPresets:
    def test_7b_has_the_sizes_of_the_paper(self) -> None:
        model = preset("gmai-vl-7b").model
        assert model.vision.tokens_per_image == 576
        assert model.vision.layers_used == 23
        assert (model.language.num_layers, model.language.hidden_size) == (32, 4096)

    def test_tiny_is_small_in_every_way_and_sets_a_fitting_batch(self) -> None:
        config = preset("gmai-vl-tiny")
        assert config.model.vision.tokens_per_image == 36
        assert config.model.vision.layers_used == 4
        assert config.data.max_length == 512
        assert (config.train.lr, config.train.global_batch_size) == (1e-3, 8)

    def test_an_unknown_name_is_refused_with_the_known_ones(self) -> None:
        with pytest.raises(ValueError, match="gmai-vl-8b.*gmai-vl-7b, gmai-vl-tiny"):
            preset("gmai-vl-8b")


class TestJson:
    def test_what_is_written_is_read_back_equal(self) -> None:
        config = change(preset("gmai-vl-tiny"), data={"shards": "s"}, train={"train_iters": 20})
        assert Config.from_json(config.to_json()) == config

    def test_keys_left_out_keep_their_defaults(self) -> None:
        assert Config.from_json('{"train": {"lr": 1}}') == Config(train=TrainConfig(lr=1))

    @pytest.mark.parametrize(
        ("section", "key", "value", "told"),
        [
            ("train", "learning_rate", 1e-3, "train.learning_rate: unknown key"),
            ("train", "global_batch_size", 8.5, "train.global_batch_size: 8.5 is not int"),
            ("train", "global_batch_size", True, "train.global_batch_size: True is not int"),
            ("train", "seed", None, "train.seed: None is not int"),
            ("data", "group_by_length", 1, "data.group_by_length: 1 is not bool"),
            ("data", "shards", ["a"], r"data.shards: \['a'\] is not str"),
        ],
    )
    def test_unknown_keys_and_wrong_types_are_named(
        self, section: str, key: str, value: object, told: str
    ) -> None:
        with pytest.raises(ValueError, match=told):
            Config.from_json(json.dumps({section: {key: value}}))

    def test_all_places_are_told_at_once(self) -> None:
        with pytest.raises(ValueError, match=r"(?s)run: an object.*model\.vision\.depth"):
            Config.from_json('{"run": [], "model": {"vision": {"depth": 1}}}')

    def test_text_that_is_not_json_is_refused(self) -> None:
        with pytest.raises(ValueError, match="not JSON.*line 1"):
            Config.from_json("{")


class TestTokenizerPath:
    def test_the_flag_comes_before_the_shards(self, tiny: Config, tmp_path: Path) -> None:
        other = tmp_path / "other.model"
        other.write_bytes(b"")
        assert find_tokenizer(tiny) == tmp_path / "tokenizer.model"
        assert find_tokenizer(change(tiny, data={"tokenizer": str(other)})) == other

    def test_a_folder_stands_for_the_file_in_it(self, tmp_path: Path) -> None:
        (tmp_path / "tokenizer.model").write_bytes(b"")
        config = change(Config(), data={"tokenizer": str(tmp_path)})
        assert find_tokenizer(config) == tmp_path / "tokenizer.model"

    def test_none_where_there_is_no_file(self, tmp_path: Path) -> None:
        assert find_tokenizer(change(Config(), run={"llava": str(tmp_path)})) is None


# (processes, changed fields by section, parts of the message)
PROBLEMS: list[tuple[int, dict[str, dict[str, Any]], str]] = [
    (1, {"train": {"lr": 0.0}}, "--lr 0.0: out of range"),
    (1, {"train": {"lr": float("nan")}}, "--lr nan: out of range"),
    (1, {"train": {"warmup_ratio": 1.5}}, "--warmup-ratio 1.5: out of range; .* from 0 to 1"),
    (1, {"train": {"selective_recompute": -0.1}}, "--selective-recompute -0.1"),
    (1, {"train": {"adam_beta2": 1.0}}, "--adam-beta2 1.0: out of range"),
    (1, {"train": {"train_iters": 0}}, "--train-iters 0: .* at least 1"),
    (1, {"train": {"epochs": 0.0}}, "--epochs 0.0: out of range"),
    (1, {"train": {"min_lr": 0.1}}, "--min-lr 0.1: is above the peak, --lr 0.001"),
    (1, {"data": {"num_workers": -1}}, "--num-workers -1"),
    (1, {"run": {"log_interval": 0}}, "--log-interval 0"),
    (1, {"run": {"checkpoint_interval": 0}}, "--checkpoint-interval 0"),
    (1, {"run": {"checkpoint_interval": 2.5}}, "--checkpoint-interval 2.5: neither"),
    (1, {"data": {"max_length": 36}}, "--max-length 36: one image alone takes 36 tokens"),
    (1, {"data": {"max_length": 4096}}, "--max-length 4096: the language model knows 2048"),
    (6, {"parallel": {"tensor_model_parallel_size": 4}}, "does not divide the 6 processes"),
    (4, {"parallel": {"tensor_model_parallel_size": 4}}, "4: does not divide the query groups, 2"),
    (3, {"parallel": {"tensor_model_parallel_size": 3}}, "3: does not divide the attention heads"),
    (3, {"parallel": {"tensor_model_parallel_size": 3}}, "3: does not divide the feed-forward"),
    (3, {"parallel": {"pipeline_model_parallel_size": 3}}, "3: does not divide the 4 decoder"),
    (1, {"parallel": {"tensor_model_parallel_size": 0}}, "numbers of at least 1"),
    (1, {"parallel": {"sequence_parallel": True}}, "--sequence-parallel: there are no tensor"),
    (
        2,
        {
            "parallel": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
            "data": {"max_length": 511},
        },
        "--max-length 511: 511 tokens of a micro-batch do not divide by TP = 2",
    ),
    (2, {"train": {"global_batch_size": 9}}, "9: is no multiple of micro-batch 1 x DP 2 = 2"),
    (1, {"data": {"shards": None}}, "no data: nothing to train on"),
    (1, {"data": {"datasets": "gone.json"}}, "--datasets and --shards: two sources"),
    (1, {"data": {"datasets": "gone.json"}}, "--datasets gone.json: there is no such list file"),
    (1, {"data": {"shards": "gone"}}, "--shards gone: there is no such folder"),
    (1, {"data": {"shards": None}}, "no tokenizer: .* give --tokenizer FILE"),
    (1, {"data": {"tokenizer": "gone.model"}}, "--tokenizer gone.model: there is no such"),
    (1, {"data": {"dset_from_cache": True}}, "--dset-from-cache: no cache is named"),
    (
        1,
        {"data": {"shards": None, "dset_from_cache": True, "dset_cache_dir": "gone"}},
        "--dset-cache-dir gone: there is no such folder",
    ),
    (1, {"run": {"load": "gone"}}, "--load gone: there is no such folder"),
    (1, {"run": {"llava": "gone"}}, "--llava gone: there is no such folder"),
    (1, {"run": {"load": "a", "llava": "b"}}, "--load and --llava: two sets of start weights"),
    (1, {"run": {"llava": "b", "llm": "c"}}, "--llava and --llm: two sets of start weights"),
    (1, {"run": {"load": "a", "vision": "d"}}, "--load and --llm: two sets of start weights"),
    (1, {"run": {"llm": "c"}}, "--llm without --vision: half a set of start weights; add --vision"),
    (1, {"run": {"vision": "d"}}, "--vision without --llm: half a set of start weights; add --llm"),
    (1, {"run": {"llm": "gone", "vision": "d"}}, "--llm gone: there is no such folder"),
    (1, {"run": {"resume": True, "checkpoint_drop_optimizer": True}}, "--resume with"),
    (
        1,
        {"train": {"freeze_vit": True, "freeze_llm": True, "freeze_projector": True}},
        "nothing is left to train",
    ),
    (1, {"run": {"dtype": "fp16"}}, "--dtype fp16: .* train in bf16 or fp32"),
    (1, {"lora": {"lora_rank": 4}}, "they belong to adapters; add --llm-use-lora or --vit-use"),
    (
        1,
        {"lora": {"vit_use_lora": True}, "train": {"freeze_vit": True}},
        "--vit-use-lora with --freeze-vit: adapters train the vision tower",
    ),
    (1, {"lora": {"vit_use_lora": True, "lora_targets": "qkv,up"}}, "'up' is no linear of a layer"),
    (1, {"parallel": {"overlap_param_gather": True}}, "add --use-distributed-optimizer and"),
    (
        1,
        {"parallel": {"overlap_param_gather": True, "use_distributed_optimizer": True}},
        "add --use-distributed-optimizer and --overlap-grad-reduce",
    ),
    (1, {"train": {"recompute_granularity": "full"}}, "full: which layers is not said"),
    (1, {"train": {"recompute_method": "block"}}, "they belong to full recomputation"),
    (
        1,
        {"train": {"selective_recompute": 0.5, "recompute_granularity": "selective"}},
        "--selective-recompute and --recompute-granularity",
    ),
    (
        2,
        {
            "train": {
                "recompute_granularity": "full",
                "recompute_method": "block",
                "recompute_num_layers": 3,
            },
            "parallel": {"pipeline_model_parallel_size": 2},
        },
        "--recompute-num-layers 3: a pipeline stage has 2 layers",
    ),
    (
        4,
        {"parallel": {"context_parallel_size": 4, "tensor_model_parallel_size": 2}},
        "TP 2 x CP 4 x PP 1 = 8 ranks per model: does not divide the 4 processes",
    ),
    (
        3,
        {"parallel": {"context_parallel_size": 3}},
        "--context-parallel-size 3: does not divide the 4 attention heads and 2 query groups",
    ),
    (
        4,
        {
            "parallel": {
                "context_parallel_size": 2,
                "tensor_model_parallel_size": 2,
                "sequence_parallel": True,
            },
            "data": {"max_length": 510},
        },
        "--max-length 510: 510 tokens of a micro-batch do not divide by TP x CP = 4",
    ),
    (
        2,
        {
            "parallel": {
                "pipeline_model_parallel_size": 2,
                "num_virtual_stages_per_pipeline_rank": 3,
            }
        },
        "PP x 3 virtual stages = 6 does not divide the 4 decoder layers",
    ),
    (
        1,
        {"parallel": {"num_virtual_stages_per_pipeline_rank": 2}},
        "2 virtual stages: there is one pipeline rank",
    ),
    (
        2,
        {
            "parallel": {
                "pipeline_model_parallel_size": 2,
                "num_virtual_stages_per_pipeline_rank": 2,
            },
            "train": {"global_batch_size": 3},
        },
        "2 virtual stages with 3 micro-batches a step: .* multiples of PP 2; choose "
        "--global-batch-size as a multiple of 2",
    ),
    (
        2,
        {
            "parallel": {
                "pipeline_model_parallel_size": 2,
                "num_virtual_stages_per_pipeline_rank": 2,
                "num_layers_per_virtual_pipeline_stage": 1,
            }
        },
        "two ways to say one thing",
    ),
    (
        2,
        {"parallel": {"pipeline_model_parallel_size": 2, "pipeline_layout": "3,x"}},
        "--pipeline-layout 3,x: 2 numbers .* that sum to 4 layers are needed",
    ),
    (1, {"parallel": {"ddp_bucket_size": 0}}, "--ddp-bucket-size 0: out of range"),
]

# (tower, its fields, part of the message): sizes come from files of start weights, not from flags
WRONG_SIZES: list[tuple[str, dict[str, int], str]] = [
    ("vision", {"patch_size": 15}, "image size 84: does not divide by the patch size 15"),
    ("vision", {"hidden_size": 130}, "vision hidden size 130: does not divide by 4"),
    ("vision", {"num_layers": 1}, "features are taken before the last layer"),
    ("language", {"hidden_size": 190}, "language hidden size 190: does not divide by 4"),
    ("language", {"num_query_groups": 3}, "4 attention heads: do not divide by 3 query groups"),
]


class TestValidate:
    @pytest.mark.parametrize(
        ("world_size", "parallel"),
        [
            (1, {}),
            (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
            (2, {"pipeline_model_parallel_size": 2}),
            (8, {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}),
        ],
    )
    def test_layouts_that_divide_pass(
        self, tiny: Config, world_size: int, parallel: dict[str, Any]
    ) -> None:
        validate(change(tiny, parallel=parallel), world_size)

    @pytest.mark.parametrize(("world_size", "changes", "told"), PROBLEMS)
    def test_problem(
        self, tiny: Config, world_size: int, changes: dict[str, dict[str, Any]], told: str
    ) -> None:
        with pytest.raises(ValueError, match=told):
            validate(change(tiny, **changes), world_size)

    @pytest.mark.parametrize(("tower", "sizes", "told"), WRONG_SIZES)
    def test_wrong_size(self, tiny: Config, tower: str, sizes: dict[str, int], told: str) -> None:
        changed = dataclasses.replace(getattr(tiny.model, tower), **sizes)
        with pytest.raises(ValueError, match=told):
            validate(change(tiny, model={tower: changed}), world_size=1)

    def test_every_problem_is_told_in_one_error(self, tiny: Config) -> None:
        config = change(tiny, train={"lr": 0.0}, data={"shards": "gone"}, run={"load": "gone"})
        with pytest.raises(ValueError) as caught:
            validate(config, world_size=1)
        lines = str(caught.value).splitlines()
        assert lines[0] == "4 problems in the configuration:"
        assert [line.split(":")[0] for line in lines[1:]] == [
            "  - --lr 0.0",
            "  - --shards gone",
            "  - --load gone",
            "  - no tokenizer",
        ]

    def test_a_path_that_is_nearly_right_is_corrected(self, tiny: Config, tmp_path: Path) -> None:
        (tmp_path / "example_list.json").write_text("{}")
        wrong = str(tmp_path / "examples_list.json")
        with pytest.raises(ValueError, match=r"did you mean .*/example_list\.json\?"):
            validate(change(tiny, data={"datasets": wrong, "shards": None}), world_size=1)

    def test_start_weights_beside_resume_are_fine(self, tiny: Config, tmp_path: Path) -> None:
        validate(change(tiny, run={"resume": True, "load": str(tmp_path)}), world_size=1)
