"""Chat formats: what stands around the texts of a conversation. Training renders samples by them,
an export writes its chat template from them. No torch."""

from dataclasses import dataclass

Pieces = tuple[str, ...]


@dataclass(frozen=True)
class ChatFormat:
    """Pieces are special tokens (`<|...|>`) or plain text."""

    name: str
    system: tuple[Pieces, Pieces]
    user: tuple[Pieces, Pieces]
    answer_opening: Pieces
    end_of_answer: str  # supervised, and what stops generation
    separator: str  # after an answer, not supervised


def _chatml(name: str) -> ChatFormat:
    return ChatFormat(
        name=name,
        system=(("<|im_start|>", "system\n"), ("<|im_end|>", "\n")),
        user=(("<|im_start|>", "user\n"), ("<|im_end|>", "\n")),
        answer_opening=("<|im_start|>", "assistant\n"),
        end_of_answer="<|im_end|>",
        separator="\n",
    )


def _llama3_opening(role: str) -> Pieces:
    return ("<|start_header_id|>", role, "<|end_header_id|>", "\n\n")


CHAT_FORMATS = {
    "internlm2": _chatml("internlm2"),
    "qwen": _chatml("qwen"),
    "llama3_chat": ChatFormat(
        name="llama3_chat",
        system=(_llama3_opening("system"), ("<|eot_id|>",)),
        user=(_llama3_opening("user"), ("<|eot_id|>",)),
        answer_opening=_llama3_opening("assistant"),
        end_of_answer="<|eot_id|>",
        separator="",
    ),
}


def chat_format(name: str) -> ChatFormat:
    """The format called `name`. Raises ValueError for other names."""
    if name not in CHAT_FORMATS:
        raise ValueError(f"unknown chat template {name!r}; known are {', '.join(CHAT_FORMATS)}")
    return CHAT_FORMATS[name]
