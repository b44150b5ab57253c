"""Every setting of a run, as frozen dataclasses; no torch import, so tools can read it instantly.

`cli.py` makes the command line from these fields: `metadata["flags"]` lists the spellings besides
`--field-name`, `metadata["help"]` is the line that `--help` shows.
"""

from dataclasses import dataclass, field
from typing import Any


def option(default: Any, help: str, *flags: str, choices: tuple[str, ...] = ()) -> Any:
    """A dataclass field that is also a command-line flag."""
    return field(default=default, metadata={"help": help, "flags": flags, "choices": choices})


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


@dataclass(frozen=True)
class ModelConfig:
    vision: VisionConfig = VisionConfig()
    language: LanguageConfig = LanguageConfig()
    image_token_id: int = -1  # -1: taken from the tokenizer


@dataclass(frozen=True)
class DataConfig:
    datasets: str | None = option(None, "GMAI-VL list file (JSON): data sets, ratios, folders")
    shards: str | None = option(None, "folder of WebDataset shards with an index")
    dset_cache_dir: str | None = option(None, "where shards made from --datasets are kept")
    dset_from_cache: bool = option(False, "use the shards in --dset-cache-dir; never build them")
    tokenizer: str | None = option(None, "sentencepiece model file, or a folder that holds one")
    chat_template: str = option(
        "internlm2", "conversation format", choices=("internlm2", "qwen", "llama3_chat")
    )
    max_length: int = option(2048, "tokens per pack")
    dset_pack_level: str = option(
        "soft", "how samples share a pack", choices=("soft", "hard", "none")
    )
    group_by_length: bool = option(False, "samples of like length share a step")
    num_workers: int = option(0, "loader processes per data-parallel rank")
    pad_to_square: bool = option(True, "pad images with the mean colour before resizing")
    max_rejected: float = option(0.01, "share of unusable samples past which the run stops")


@dataclass(frozen=True)
class ParallelConfig:
    tensor_model_parallel_size: int = option(1, "ranks that share each layer", "--tp")
    pipeline_model_parallel_size: int = option(1, "pipeline stages", "--pp")
    sequence_parallel: bool = option(False, "split activations over the TP ranks between layers")
    use_distributed_optimizer: bool = option(False, "shard optimizer state over DP ranks (ZeRO-1)")
    shard_strategy: str | None = option(
        None, "GMAI-VL's name for it: zero1 and zero2 mean --use-distributed-optimizer",
        choices=("zero1", "zero2", "full"),
    )
    overlap_grad_reduce: bool = option(False, "reduce gradients during the backward pass")
    overlap_param_gather: bool = option(False, "gather parameters during the forward pass")


@dataclass(frozen=True)
class TrainConfig:
    micro_batch_size: int = option(1, "packs per forward pass", "--mirco-batch-size")
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
    warmup_ratio: float = option(0.03, "share of the steps that warm up linearly")
    freeze_vit: bool = option(False, "do not train the vision tower")
    freeze_llm: bool = option(False, "do not train the language model")
    freeze_projector: bool = option(False, "do not train the projector")
    selective_recompute: float = option(0.0, "share of decoder layers recomputed in backward")
    recompute_granularity: str | None = option(
        None, "Megatron's activation recomputation", choices=("full", "selective")
    )
    recompute_method: str | None = option(
        None, "with full recomputation", choices=("uniform", "block")
    )
    recompute_num_layers: int | None = option(None, "with --recompute-method")
    seed: int = option(42, "seed of initialisation and data order")


@dataclass(frozen=True)
class RunConfig:
    work_dir: str = option("runs/train", "metrics, checkpoints, logs and the saved config")
    save: str | None = option(None, "checkpoint folder (default: WORK_DIR/checkpoints)")
    load: str | None = option(None, "start from the weights of this checkpoint")
    llava: str | None = option(None, "start from Hugging Face weights (original or transformers)")
    resume: bool = option(False, "continue from the newest whole checkpoint of this work dir")
    checkpoint_interval: float = option(
        -1, "below 1: share of the run; 1 and more: steps; -1: at the end", "--save-interval"
    )
    checkpoint_drop_optimizer: bool = option(False, "save weights only; such a run cannot resume")
    log_interval: int = option(10, "steps between progress lines")
    tensorboard_dir: str | None = option(None, "default: WORK_DIR/tensorboard")
    device: str = option("auto", "where to run", choices=("auto", "cpu", "cuda"))
    dtype: str = option(
        "auto", "auto: bf16 on GPU, fp32 on CPU", choices=("auto", "bf16", "fp16", "fp32")
    )
    distributed_timeout_minutes: float = option(10.0, "time-out of every collective")


@dataclass(frozen=True)
class Config:
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    parallel: ParallelConfig = ParallelConfig()
    train: TrainConfig = TrainConfig()
    run: RunConfig = RunConfig()
