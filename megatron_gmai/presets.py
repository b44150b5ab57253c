"""Named configurations for `--preset`. A flag that the user gives wins over its preset."""

from megatron_gmai.config import (
    Config,
    DataConfig,
    LanguageConfig,
    ModelConfig,
    RunConfig,
    TrainConfig,
    VisionConfig,
)


def preset(name: str | None) -> Config:
    """The configuration called `name`; the defaults for None. Raises ValueError for other names."""
    if name is None:
        return Config()
    presets = {"gmai-vl-7b": _gmai_vl_7b, "gmai-vl-tiny": _gmai_vl_tiny}
    if name not in presets:
        raise ValueError(f"--preset {name}: unknown; choose from {', '.join(presets)}")
    return presets[name]()


def _gmai_vl_7b() -> Config:
    """CLIP ViT-L/14-336 and InternLM2.5-7B, as in the paper (arXiv 2411.14522)."""
    return Config(run=RunConfig(preset="gmai-vl-7b"))


def _gmai_vl_tiny() -> Config:
    """The same architecture at 2 million parameters: for laptops, tests and the quick start."""
    vision = VisionConfig(
        num_layers=5, hidden_size=128, num_attention_heads=4, ffn_hidden_size=384, image_size=84
    )
    language = LanguageConfig(
        num_layers=4,
        hidden_size=128,
        num_attention_heads=4,
        num_query_groups=2,
        ffn_hidden_size=320,
        max_position_embeddings=2048,
    )
    return Config(
        model=ModelConfig(vision=vision, language=language),
        data=DataConfig(max_length=512),
        train=TrainConfig(lr=1e-3, global_batch_size=8),
        run=RunConfig(preset="gmai-vl-tiny"),
    )
