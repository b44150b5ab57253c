"""Every setting of a run, as frozen dataclasses; no torch import, so tools can read it instantly.

`cli.py` makes the command line from these fields: `metadata["flags"]` lists the spellings besides
`--field-name`, `metadata["help"]` is the line that `--help` shows. The defaults are GMAI-VL's sizes
and the recipe's third phase; `presets.py` names complete sets, `validation.py` judges a set.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from typing import Any, get_args, get_type_hints


def option(default: Any, help: str, *flags: str, choices: tuple[str, ...] = ()) -> Any:
    """A dataclass field that is also a command-line flag."""
    return field(default=default, metadata={"help": help, "flags": flags, "choices": choices})


# Pixel statistics of OpenAI's CLIP, in units of the 0..1 range.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
IGNORE_INDEX = -100  # label of a position that is not supervised
PRESET_NAMES = ("gmai-vl-7b", "gmai-vl-tiny")


@dataclass(frozen=True)
class VisionConfig:
    """CLIP vision transformer (`clip_vision_model` in transformers' config)."""

    num_layers: int = 24
    hidden_size: int = 1024
    num_attention_heads: int = 16
    ffn_hidden_size: int = 4096
    patch_size: int = 14
    image_size: int = 336
    layernorm_eps: float = 1e-5

    @property
    def tokens_per_image(self) -> int:
        """Feature vectors that one image contributes to the sequence (class token dropped)."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def layers_used(self) -> int:
        """Features are `hidden_states[-2]`, so the last layer never runs."""
        return self.num_layers - 1


@dataclass(frozen=True)
class LanguageConfig:
    """InternLM2 decoder: RMSNorm, SwiGLU, grouped-query attention, rotate-half RoPE, no biases."""

    num_layers: int = 32
    hidden_size: int = 4096
    num_attention_heads: int = 32
    num_query_groups: int = 8
    ffn_hidden_size: int = 14336
    vocab_size: int = 0  # 0: taken from the tokenizer (or from the start weights)
    rmsnorm_eps: float = 1e-5
    rope_theta: float = 1e6
    max_position_embeddings: int = 32768
    rope_scaling_factor: float = 1.0  # dynamic NTK past the line above; only exports use it
    tie_word_embeddings: bool = False  # the output layer is the embedding


@dataclass(frozen=True)
class ModelConfig:
    vision: VisionConfig = VisionConfig()
    language: LanguageConfig = LanguageConfig()
    image_token_id: int = -1  # -1: taken from the tokenizer


@dataclass(frozen=True)
class DataConfig:
    datasets: str | None = option(None, "GMAI-VL list file (JSON): data sets, ratios, folders")
    shards: str | None = option(None, "folder of WebDataset shards with an index")
    valid_shards: str | None = option(
        None, "folder of shards that are held out: their loss is taken every --eval-interval steps"
    )
    dset_cache_dir: str | None = option(
        None, "where shards made from --datasets are kept (default: WORK_DIR/shards)"
    )
    dset_from_cache: bool = option(
        False, "take the shards in --dset-cache-dir as they are; built first only where none are"
    )
    tokenizer: str | None = option(
        None,
        "sentencepiece model, or a folder that holds tokenizer.model (default: the folder of "
        "--llava, of the shards or of --load)",
        "--tokenizer-model",
    )
    chat_template: str = option(
        "internlm2", "conversation format", choices=("internlm2", "qwen", "llama3_chat")
    )
    max_length: int = option(2048, "tokens per pack", "--seq-length")
    dset_pack_level: str = option(
        "soft", "how samples share a pack", choices=("soft", "hard", "best-fit", "none")
    )
    max_images_per_pack: int | None = option(
        None, "images in a pack at most; a sample with more is rejected (default: no limit)"
    )
    group_by_length: bool = option(False, "samples of like length share a step")
    num_workers: int = option(0, "loader processes per data-parallel rank")
    tiff_pages: str = option(
        "first",
        "of a TIFF of several pages in --datasets: the first is its image, or all are images",
        choices=("first", "all"),
    )
    image_root: str | None = option(
        None,
        "folder into which absolute image names and links of --datasets may lead (default: none)",
    )
    pad_to_square: bool = option(True, "pad images with the mean colour before resizing")
    max_rejected: float = option(0.01, "share of unusable samples past which the run stops")


@dataclass(frozen=True)
class ParallelConfig:
    tensor_model_parallel_size: int = option(1, "ranks that share each layer", "--tp")
    pipeline_model_parallel_size: int = option(1, "pipeline stages", "--pp")
    context_parallel_size: int = option(1, "ranks that share the tokens of a micro-batch", "--cp")
    num_virtual_stages_per_pipeline_rank: int = option(
        1, "chunks of layers per pipeline rank, run interleaved", "--vpp"
    )
    num_layers_per_virtual_pipeline_stage: int | None = option(
        None, "the same, said by the decoder layers of a chunk"
    )
    pipeline_layout: str | None = option(
        None,
        "decoder layers of each chunk in model order, as 6,9,9,8, or auto: balanced with ViT and "
        "loss (default: even)",
    )
    sequence_parallel: bool = option(False, "split activations over the TP ranks between layers")
    use_distributed_optimizer: bool = option(False, "shard optimizer state over DP ranks (ZeRO-1)")
    vision_phase: str = option(
        "first-stage",
        "who encodes images: the first pipeline stage, as micro-batches pass, or all ranks of the "
        "pipeline, a whole step's images before its first micro-batch",
        choices=("first-stage", "all-ranks"),
    )
    shard_strategy: str | None = option(
        None,
        "GMAI-VL's name for the same: each value turns --use-distributed-optimizer on",
        choices=("zero1", "zero2", "full"),
    )
    overlap_grad_reduce: bool = option(False, "reduce gradients during the backward pass")
    overlap_param_gather: bool = option(False, "gather parameters during the forward pass")
    ddp_bucket_size: int | None = option(
        None, "parameters per bucket of an overlapped reduction (default: Megatron's, 40 million)"
    )


@dataclass(frozen=True)
class TrainConfig:
    micro_batch_size: int = option(
        1, "packs per forward pass (the second spelling is GMAI-VL's)", "--mirco-batch-size"
    )
    global_batch_size: int = option(512, "packs per optimizer step")
    epochs: float = option(1.0, "passes over the data; ignored with --train-iters")
    train_iters: int | None = option(None, "optimizer steps, instead of --epochs")
    lr: float = option(1e-5, "peak learning rate")
    min_lr: float = option(0.0, "learning rate at the end of the cosine")
    wd: float = option(0.0, "weight decay", "--weight-decay")
    adam_beta1: float = option(0.9, "AdamW beta 1")
    adam_beta2: float = option(0.999, "AdamW beta 2")
    adam_eps: float = option(1e-8, "AdamW epsilon")
    max_grad_norm: float = option(1.0, "clip the global gradient norm", "--clip-grad")
    warmup_ratio: float = option(
        0.03, "share of the steps that warm up linearly", "--lr-warmup-fraction"
    )
    freeze_vit: bool = option(False, "do not train the vision tower")
    freeze_llm: bool = option(False, "do not train the language model")
    freeze_projector: bool = option(False, "do not train the projector")
    selective_recompute: float = option(
        0.0, "share of the decoder layers, 0 to 1, that are recomputed in the backward pass"
    )
    vit_micro_batch_size: int = option(
        32, "images that the vision tower encodes at once; of more, activations are recomputed"
    )
    recompute_vit: bool = option(
        False,
        "keep only features of images and recompute ViT and projector in the backward pass, "
        "--vit-micro-batch-size images at a time; decoder layers have settings of their own",
    )
    recompute_granularity: str | None = option(
        None, "Megatron's activation recomputation", choices=("full", "selective")
    )
    recompute_method: str | None = option(
        None, "with full recomputation", choices=("uniform", "block")
    )
    recompute_num_layers: int | None = option(None, "with --recompute-method")
    loss_implementation: str = option(
        "fused-linear",
        "fused-linear: no full logits; fused: kernels on full logits; torch: plain torch",
        choices=("fused-linear", "fused", "torch"),
    )
    seed: int = option(42, "seed of initialisation and data order")


@dataclass(frozen=True)
class RunConfig:
    preset: str | None = option(
        None, "model sizes and fitting defaults; flags given beside it win", choices=PRESET_NAMES
    )
    work_dir: str = option("runs/train", "metrics, checkpoints, logs and the saved config")
    save: str | None = option(None, "checkpoint folder (default: WORK_DIR/checkpoints)")
    load: str | None = option(None, "start a new phase from the weights of this checkpoint")
    llava: str | None = option(None, "start from Hugging Face weights (original or transformers)")
    llm: str | None = option(
        None, "start from this language model (InternLM2, Llama), --vision and a new projector"
    )
    vision: str | None = option(None, "CLIP, to go with --llm")
    resume: bool = option(
        False,
        "continue from the newest whole checkpoint of this run; where there is none, start as told",
    )
    checkpoint_interval: float = option(
        -1, "below 1: share of the run; 1 and more: steps; -1: at the end", "--save-interval"
    )
    checkpoint_drop_optimizer: bool = option(False, "save weights only; such a run cannot resume")
    async_save: bool = option(
        False, "write checkpoints from a copy in host memory while training goes on"
    )
    keep_last: int | None = option(
        None, "checkpoints that stay; older ones are removed once a new one is whole (default: all)"
    )
    keep_every: int | None = option(
        None, "with --keep-last: checkpoints of every N-th step stay as well"
    )
    max_skipped_steps: int = option(
        10, "steps in a row with a loss or gradient that is not finite, after which the run stops"
    )
    log_interval: int = option(10, "steps between progress lines")
    eval_interval: int = option(1000, "with --valid-shards: steps between validations")
    eval_iters: int = option(
        100, "with --valid-shards: global batches of each data set at most in a validation"
    )
    tensorboard_dir: str | None = option(None, "event files (default: WORK_DIR/tensorboard)")
    wandb_project: str | None = option(None, "send metrics to this project of Weights & Biases")
    wandb_exp_name: str | None = option(None, "name of the run there (default: WORK_DIR's)")
    mlflow_experiment: str | None = option(
        None, "send metrics to this experiment of MLflow (MLFLOW_TRACKING_URI says where)"
    )
    profile: bool = option(False, "write torch's traces of some steps to WORK_DIR/profile")
    profile_step_start: int = option(10, "with --profile: the first step of a trace")
    profile_step_end: int = option(12, "with --profile: the step at which it ends")
    profile_ranks: str = option("0", "with --profile: ranks that write one, as 0,8")
    device: str = option("auto", "where to run", choices=("auto", "cpu", "cuda"))
    dtype: str = option(
        "auto", "auto: bf16 on GPU, fp32 on CPU", choices=("auto", "bf16", "fp16", "fp32")
    )
    transformer_impl: str = option(
        "auto",
        "linears, norms and rotary by Transformer Engine, or local: Megatron-Core's linears, this "
        "project's norms (auto: Transformer Engine where it can run)",
        choices=("auto", "transformer_engine", "local"),
    )
    attention_backend: str = option(
        "auto",
        "attention over packs by Transformer Engine, the flash-attn package, "
        "torch.nn.attention.varlen, or sdpa: one call a segment (auto: the first that can run)",
        choices=("auto", "transformer_engine", "flash_attn", "torch_varlen", "sdpa"),
    )
    dry_run: int | None = option(
        None,
        "take one step as N processes on devices that do not exist, tell memory, messages and "
        "waits, and end",
    )
    distributed_timeout_minutes: float = option(10.0, "time-out of every collective")


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters of a tower's linears; its own weights then stay as they are."""

    llm_use_lora: bool = option(False, "train low-rank adapters in the language model's place")
    vit_use_lora: bool = option(
        False, "train low-rank adapters in the vision tower's place, with the same settings"
    )
    lora_rank: int = option(16, "rank of the adapters", "--lora-r")
    lora_alpha: float = option(32.0, "the adapters' output is scaled by alpha / rank")
    lora_dropout: float = option(0.0, "dropout before the adapters")
    lora_targets: str = option(
        "qkv,proj,fc1,fc2", "linears with an adapter: qkv, proj (attention), fc1, fc2 (MLP)"
    )

    @property
    def towers(self) -> tuple[str, ...]:
        """The towers that train adapters, by their names in `weights.py`."""
        towers = {"vision_model": self.vit_use_lora, "language_model": self.llm_use_lora}
        return tuple(tower for tower, has_adapters in towers.items() if has_adapters)

    @property
    def flags(self) -> str:
        """What turned them on, as it is typed; empty without adapters."""
        flags = {"--llm-use-lora": self.llm_use_lora, "--vit-use-lora": self.vit_use_lora}
        return " ".join(flag for flag, is_on in flags.items() if is_on)

    def targets_in(self, tower: str) -> tuple[str, ...]:
        """The linears of each of its layers that have an adapter."""
        return tuple(self.lora_targets.split(",")) if tower in self.towers else ()


@dataclass(frozen=True)
class Config:
    model: ModelConfig = ModelConfig()
    lora: LoraConfig = LoraConfig()
    data: DataConfig = DataConfig()
    parallel: ParallelConfig = ParallelConfig()
    train: TrainConfig = TrainConfig()
    run: RunConfig = RunConfig()

    def to_json(self) -> str:
        """This configuration as an indented JSON object, one member per section."""
        return json.dumps(asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Config":
        """Reads what `to_json` wrote; keys left out keep their defaults.

        Raises ValueError, naming every place, for text that is not JSON, unknown keys and values
        of the wrong type.
        """
        try:
            tree = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"the configuration is not JSON: {error}") from error
        if problems := list(_problems(cls, tree, "")):
            raise ValueError("the configuration cannot be read:\n  " + "\n  ".join(problems))
        return _build(cls, tree)


def scalar_type(hint: Any) -> type:
    """`int` for the annotation `int` as well as for `int | None`."""
    return next((kind for kind in get_args(hint) if kind is not type(None)), hint)


def _problems(section: type, tree: Any, path: str) -> Iterator[str]:
    if not isinstance(tree, dict):
        yield f"{path or 'the whole'}: an object was expected, not {tree!r}"
        return
    hints = get_type_hints(section)
    for key, value in tree.items():
        where = f"{path}.{key}" if path else key
        if key not in hints:
            yield f"{where}: unknown key; known here: {', '.join(hints)}"
        elif is_dataclass(hints[key]):
            yield from _problems(hints[key], value, where)
        elif not _fits(value, hints[key]):
            yield f"{where}: {value!r} is not {scalar_type(hints[key]).__name__}"


def _fits(value: Any, hint: Any) -> bool:
    if value is None:
        return type(None) in get_args(hint)
    kind = scalar_type(hint)
    if isinstance(value, bool):  # Python counts True as an int
        return kind is bool
    return isinstance(value, (int, float) if kind is float else kind)


def _build(section: Any, tree: dict[str, Any]) -> Any:
    hints = get_type_hints(section)
    values = {
        item.name: _build(hints[item.name], tree[item.name])
        if is_dataclass(hints[item.name])
        else tree[item.name]
        for item in fields(section)
        if item.name in tree
    }
    return section(**values)
