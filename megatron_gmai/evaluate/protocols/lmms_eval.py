"""lmms-eval's SLAKE (75571cfe, 2026-08-06): short answers must be equal in normal form.

Lower case, nothing in parentheses, no punctuation, English and Chinese words for yes and no. It has
no rule for options here.
"""

import re
import string

from megatron_gmai.evaluate.benchmarks.table import Item
from megatron_gmai.evaluate.protocols.verdict import Protocol, Verdict

_PARENTHESES = (re.compile(r"\([^)]*\)"), re.compile("（[^）]*）"))
_CHINESE_SIGNS = "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～、；：《》【】"
_SIGNS = str.maketrans(dict.fromkeys(string.punctuation + _CHINESE_SIGNS, " "))
_YES = "yes yeah yep true 是 是的 有 包含 可以 能 会 正常"
_NO = "no nope false 否 不是 没有 无 不包含 不能 不会 不可以 不正常 异常"


def normalise(text: str) -> str:
    text = text.strip().lower()
    for pattern in _PARENTHESES:
        text = pattern.sub(" ", text)
    text = " ".join(text.translate(_SIGNS).split())
    if text in ("x ray", "xray"):
        return "xray"
    return "yes" if text in _YES.split() else "no" if text in _NO.split() else text


def _rule(item: Item, answer: str, benchmark: str) -> Verdict | None:
    if item.options:
        return None
    said = normalise(answer)
    return Verdict(float(said == normalise(item.answer)), said, unanswered=not said)


LMMS_EVAL = Protocol("lmms-eval", "lmms-eval 75571cfe (2026-08-06), SLAKE", _rule)
