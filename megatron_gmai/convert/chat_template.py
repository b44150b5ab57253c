"""Jinja chat templates that give exactly the tokens that training saw.

Training encodes an answer apart from the text that opens it; a leading space stands for the dummy
prefix that sentencepiece puts before the answer. Names of special tokens inside a message are
broken up with a mark that the exported tokenizer takes out again after it has looked for special
tokens, so no message can forge the end of a turn, and the name is spelled out as in training.
Images of a user message come before its text, each on a line of its own, unless the message places
them between words.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass

from megatron_gmai.chat_formats import CHAT_FORMATS, chat_format
from megatron_gmai.convert.tokenizer import IMAGE_TOKEN, MARK


@dataclass(frozen=True)
class Format:
    """What stands before and after the messages of each role."""

    system: tuple[str, str]
    user: tuple[str, str]
    assistant: tuple[str, str]
    opening_text: str  # the plain text right before an answer
    end_of_answer: str


# One {{ }} a message; every tag strips the whitespace around it, so only quoted newlines count.
_JINJA = """\
{%- set openings = OPENINGS -%}
{%- set closings = CLOSINGS -%}
{%- for message in messages -%}
  {%- set role = message['role'] -%}
  {%- if role not in openings -%}
    {{- raise_exception('role must be system, user or assistant, not ' ~ role) -}}
  {%- endif -%}
  {%- set ns = namespace(text='') -%}
  {%- if message['content'] is string -%}
    {%- set ns.text = message['content'] -%}
  {%- else -%}
    {%- for part in message['content'] -%}
      {%- if part['type'] == 'image' -%}
        {%- set ns.text = ns.text ~ IMAGE -%}
      {%- elif part['type'] == 'text' -%}
        {%- set ns.text = ns.text ~ part['text'] -%}
      {%- else -%}
        {{- raise_exception('content must be text or image, not ' ~ part['type']) -}}
      {%- endif -%}
    {%- endfor -%}
  {%- endif -%}
  {%- set ns.text = (ns.text | trim).replace(MARK, MARK ~ MARK) -%}
  {%- for name in SPECIALS -%}
    {%- if role != 'user' or name != IMAGE -%}
      {%- set ns.text = ns.text.replace(name, name[0] ~ MARK ~ name[1:]) -%}
    {%- endif -%}
  {%- endfor -%}
  {%- if role == 'user' -%}
    {%- set pieces = ns.text.split(IMAGE) -%}
    {%- set words = pieces | map('trim') | select | list -%}
    {%- if words | length < 2 -%}
      {%- set ns.text = (IMAGE ~ '\\n') * (pieces | length - 1) ~ words | join -%}
    {%- endif -%}
  {%- endif -%}
  {{- openings[role] ~ ns.text ~ closings[role] -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- PROMPT -}}
{%- endif -%}
"""


def get_format(name: str) -> Format:
    """The format of a `--chat-template` name, as whole strings. Raises ValueError for others."""
    pieces = chat_format(name)
    return Format(
        system=("".join(pieces.system[0]), "".join(pieces.system[1])),
        user=("".join(pieces.user[0]), "".join(pieces.user[1])),
        assistant=("".join(pieces.answer_opening), pieces.end_of_answer + pieces.separator),
        opening_text=pieces.answer_opening[-1],
        end_of_answer=pieces.end_of_answer,
    )


def jinja_template(name: str, special_tokens: Iterable[str], add_dummy_prefix: bool) -> str:
    """Content of `chat_template.jinja`.

    Args:
        name: a `--chat-template` name.
        special_tokens: names that may not be spelled in a message.
        add_dummy_prefix: whether sentencepiece puts a space before every text.
    """
    form = get_format(name)
    prompt, end = form.assistant
    openings = _openings(form, " " if add_dummy_prefix else "")
    closings = {"system": form.system[1], "user": form.user[1], "assistant": end}
    values = {
        "OPENINGS": openings,
        "CLOSINGS": closings,
        "IMAGE": IMAGE_TOKEN,
        "SPECIALS": sorted(special_tokens),
        "PROMPT": prompt,
    }
    literals = {key: _literal(value) for key, value in values.items()}
    literals["MARK"] = json.dumps(MARK)  # escaped, because nobody would see it in the file
    return re.sub(rf"\b({'|'.join(literals)})\b", lambda match: literals[match[1]], _JINJA)


def template_name(jinja: str) -> str | None:
    """The `--chat-template` name that gives the same tokens as this content of
    `chat_template.jinja`; None if training knows none that does."""
    for name in CHAT_FORMATS:
        form = get_format(name)
        if any(f"set openings = {_literal(_openings(form, p))} -%}}" in jinja for p in ("", " ")):
            return name
    return None


def _openings(form: Format, dummy_prefix: str) -> dict[str, str]:
    """What stands before the text of each role."""
    system, user, assistant = form.system[0], form.user[0], form.assistant[0]
    return {"system": system, "user": user, "assistant": assistant + dummy_prefix}


def _literal(value: object) -> str:
    # JSON strings, lists and objects are Jinja literals too.
    return json.dumps(value, ensure_ascii=False)
