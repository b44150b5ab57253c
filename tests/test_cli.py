"""The command line: GMAI-VL's names, Megatron's names, presets, notes and mistakes."""

import shlex
from pathlib import Path

import pytest

from megatron_gmai.cli import build_parser, parse
from megatron_gmai.config import Config

# The training command in the README of the original GMAI-VL, its shell variables filled in.
GMAI_VL_README = """
    --freeze-llm --freeze-vit --llava base_model/ --chat-template internlm2
    --datasets examples/examples_list.json --num-workers 6 --mirco-batch-size 4
    --global-batch-size 128 --lr 1e-5 --wd 0 --dset-pack-level soft --shard-strategy 'zero2'
    --group-by-length --resume --max-length 2048 --checkpoint-interval 500 --log-interval 10
    --work-dir work/ --dset-cache-dir work/cache/ --dset-from-cache
"""
# The flags of the original that its README does not use.
GMAI_VL_OTHERS = """
    --tokenizer t.model --dtype bf16 --selective-recompute 0.5 --max-grad-norm 0.5 --epochs 2
    --warmup-ratio 0.1 --checkpoint-drop-optimizer --seed 7
"""
MEGATRON = """
    --tensor-model-parallel-size 2 --pipeline-model-parallel-size 4 --sequence-parallel
    --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather
    --recompute-granularity full --recompute-method uniform --recompute-num-layers 1 --bf16
    --micro-batch-size 2 --global-batch-size 64 --seq-length 4096 --train-iters 100 --lr 3e-4
    --min-lr 3e-5 --weight-decay 0.1 --clip-grad 2 --adam-beta1 0.8 --adam-beta2 0.95
    --adam-eps 1e-6 --lr-warmup-fraction 0.2 --save s --load l --save-interval 50
    --tensorboard-dir tb --tokenizer-model t.model --distributed-timeout-minutes 30
"""


def config_of(line: str) -> Config:
    return parse(shlex.split(line)).config


class TestNames:
    def test_the_readme_command_of_gmai_vl_parses_unchanged(self) -> None:
        config = config_of(GMAI_VL_README)
        data, train, run = config.data, config.train, config.run
        assert (train.freeze_llm, train.freeze_vit, train.freeze_projector) == (True, True, False)
        assert (train.micro_batch_size, train.global_batch_size) == (4, 128)
        assert (train.lr, train.wd) == (1e-5, 0.0)
        assert (run.llava, run.work_dir, run.resume) == ("base_model/", "work/", True)
        assert (run.checkpoint_interval, run.log_interval) == (500, 10)
        assert (data.datasets, data.num_workers) == ("examples/examples_list.json", 6)
        assert (data.dset_pack_level, data.group_by_length, data.max_length) == ("soft", True, 2048)
        assert (data.dset_cache_dir, data.dset_from_cache) == ("work/cache/", True)
        assert config.parallel.use_distributed_optimizer

    def test_its_other_flags_parse_too(self) -> None:
        config = config_of(GMAI_VL_OTHERS)
        assert (config.data.tokenizer, config.run.dtype) == ("t.model", "bf16")
        assert (config.train.selective_recompute, config.train.max_grad_norm) == (0.5, 0.5)
        assert (config.train.epochs, config.train.warmup_ratio, config.train.seed) == (2, 0.1, 7)
        assert config.run.checkpoint_drop_optimizer

    def test_megatrons_names_set_the_same_fields(self) -> None:
        config = config_of(MEGATRON)
        parallel, train, run = config.parallel, config.train, config.run
        assert parallel.tensor_model_parallel_size == 2
        assert parallel.pipeline_model_parallel_size == 4
        assert parallel.sequence_parallel and parallel.use_distributed_optimizer
        assert parallel.overlap_grad_reduce and parallel.overlap_param_gather
        assert (train.recompute_granularity, train.recompute_method) == ("full", "uniform")
        assert (train.recompute_num_layers, train.train_iters) == (1, 100)
        assert (train.micro_batch_size, train.global_batch_size) == (2, 64)
        assert (train.lr, train.min_lr, train.wd) == (3e-4, 3e-5, 0.1)
        assert (train.adam_beta1, train.adam_beta2, train.adam_eps) == (0.8, 0.95, 1e-6)
        assert (train.max_grad_norm, train.warmup_ratio) == (2, 0.2)
        assert (config.data.max_length, config.data.tokenizer) == (4096, "t.model")
        assert (run.save, run.load, run.checkpoint_interval) == ("s", "l", 50)
        assert (run.dtype, run.tensorboard_dir) == ("bf16", "tb")
        assert run.distributed_timeout_minutes == 30

    @pytest.mark.parametrize(
        ("short", "long"),
        [
            ("--tp 2", "--tensor-model-parallel-size 2"),
            ("--pp 2", "--pipeline-model-parallel-size 2"),
            ("--fp16", "--dtype fp16"),
            ("--recompute-activations", "--recompute-granularity selective"),
        ],
    )
    def test_short_names(self, short: str, long: str) -> None:
        assert config_of(short) == config_of(long)

    def test_a_switch_that_is_on_can_be_turned_off(self) -> None:
        assert config_of("").data.pad_to_square
        assert config_of("--pad-to-square").data.pad_to_square
        assert not config_of("--no-pad-to-square").data.pad_to_square

    def test_a_negative_number_is_a_value(self) -> None:
        assert config_of("--checkpoint-interval -1").run.checkpoint_interval == -1


class TestDefaults:
    def test_without_flags_the_sizes_are_the_papers(self) -> None:
        assert config_of("").model == Config().model

    def test_flags_win_over_the_preset_and_the_preset_over_the_defaults(self) -> None:
        config = config_of("--preset gmai-vl-tiny --lr 5e-4")
        assert (config.train.lr, config.train.global_batch_size) == (5e-4, 8)
        assert config.model.language.num_layers == 4
        assert config.run.preset == "gmai-vl-tiny"

    def test_a_flag_that_repeats_the_default_still_wins_over_the_preset(self) -> None:
        default = Config().train.lr
        assert config_of(f"--preset gmai-vl-tiny --lr {default}").train.lr == default

    def test_folders_follow_the_work_dir(self) -> None:
        config = config_of("--datasets list.json --work-dir w")
        assert config.run.save == "w/checkpoints"
        assert config.run.tensorboard_dir == "w/tensorboard"
        assert config.data.dset_cache_dir == "w/shards"

    def test_the_result_survives_the_way_through_json(self) -> None:
        config = config_of(GMAI_VL_README)
        assert Config.from_json(config.to_json()) == config


class TestNotes:
    def test_each_mapped_flag_of_gmai_vl_is_told_in_one_line(self) -> None:
        notes = parse(shlex.split(GMAI_VL_README)).notes
        assert not any("\n" in note for note in notes)
        assert [note.split()[0].rstrip(":") for note in notes] == [
            "--shard-strategy",
            "--mirco-batch-size",
            "--dset-from-cache",
            "--resume",
        ]

    @pytest.mark.parametrize("strategy", ["zero1", "zero2", "full"])
    def test_every_shard_strategy_is_the_distributed_optimizer(self, strategy: str) -> None:
        config, notes = parse(["--preset", "gmai-vl-tiny", "--shard-strategy", strategy])
        assert config.parallel.use_distributed_optimizer
        assert f"--shard-strategy {strategy} -> --use-distributed-optimizer" in notes[0]

    def test_full_sharding_tells_what_takes_its_place(self) -> None:
        notes = parse(["--preset", "gmai-vl-tiny", "--shard-strategy", "full"]).notes
        assert "--tensor-model-parallel-size" in notes[1]

    def test_random_weights_at_full_size_are_told(self) -> None:
        assert "random weights" in parse(["--shards", "s"]).notes[0]
        assert parse(["--shards", "s", "--llava", "base"]).notes == []


class TestMistakes:
    @pytest.mark.parametrize(
        ("line", "told"),
        [
            ("--tensor-parallel-size 2", "unknown flag; did you mean --tensor-model-parallel-size"),
            ("--micro_batch_size 2", "did you mean --micro-batch-size?"),
            ("--global-batch-sise=8", "did you mean --global-batch-size?"),
            ("--qqqqqqqqqqqqqq", "--qqqqqqqqqqqqqq: unknown flag; --help lists every flag"),
            ("stray", "stray: not a flag"),
            ("--learning 1", "--learning: unknown flag"),
            ("--lr fast", "--lr: invalid float value: 'fast'"),
            ("--lr", "--lr: expected one argument"),
            ("--dset-pack-level loose", "invalid choice: 'loose'.*soft"),
            ("--preset gmai-vl-8b", "invalid choice: 'gmai-vl-8b'"),
            ("--bf16 --dtype fp32", "--bf16 and --dtype are one setting and disagree"),
            ("--wd 0 --weight-decay 0.1", "--wd and --weight-decay are one setting"),
            ("--pad-to-square --no-pad-to-square", "are one setting and disagree"),
        ],
    )
    def test_mistake(self, line: str, told: str) -> None:
        with pytest.raises(ValueError, match=told):
            config_of(line)

    def test_all_unknown_flags_are_told_at_once(self) -> None:
        with pytest.raises(ValueError, match=r"(?s)--shard: .*--sead: .*did you mean --seed"):
            config_of("--shard x --sead 1")

    def test_two_spellings_that_agree_are_fine(self) -> None:
        config = config_of("--mirco-batch-size 2 --micro-batch-size 2")
        assert config.train.micro_batch_size == 2

    def test_the_same_spelling_twice_means_the_last(self) -> None:
        assert config_of("--lr 1 --lr 2").train.lr == 2


class TestHelp:
    def test_groups_follow_the_sections(self) -> None:
        text = build_parser().format_help()
        places = [text.index(f"\n{title}:") for title in ("start and output", "data", "training")]
        assert places == sorted(places)

    def test_every_flag_says_what_it_does(self) -> None:
        assert all(action.help for action in build_parser()._actions)

    def test_it_prints_and_leaves(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as left:
            parse(["--help"])
        assert left.value.code == 0
        assert "--mirco-batch-size" in capsys.readouterr().out


class TestFilesOfFlags:
    def test_a_line_reads_as_a_shell_reads_it(self, tmp_path: Path) -> None:
        file = tmp_path / "flags"
        file.write_text("# why\n--lr 1e-4 --freeze-llm  # so\n\n--work-dir 'a folder'\n")
        config = parse([f"@{file}", "--lr", "3"]).config
        assert (config.train.lr, config.train.freeze_llm) == (3, True)
        assert config.run.work_dir == "a folder"

    def test_a_missing_file_and_an_open_quote_are_told(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="file of flags .@FILE.: No such file.*absent"):
            parse([f"@{tmp_path}/absent"])
        (tmp_path / "flags").write_text("--work-dir 'a folder\n")
        with pytest.raises(ValueError, match="cannot be read: No closing quotation: --work-dir"):
            parse([f"@{tmp_path}/flags"])
