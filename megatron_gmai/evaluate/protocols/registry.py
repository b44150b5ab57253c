"""All protocols by name."""

from megatron_gmai.evaluate.protocols.llava_med import LLAVA_MED
from megatron_gmai.evaluate.protocols.lmms_eval import LMMS_EVAL
from megatron_gmai.evaluate.protocols.medevalkit import MEDEVALKIT
from megatron_gmai.evaluate.protocols.mmmu import MMMU
from megatron_gmai.evaluate.protocols.omnimedvqa import OMNIMEDVQA
from megatron_gmai.evaluate.protocols.verdict import Protocol
from megatron_gmai.evaluate.protocols.vlmevalkit import VLMEVALKIT, VLMEVALKIT_2024

# Raised with every change of a rule: scores of different versions are not compared.
RULE_VERSION = 2

PROTOCOLS: dict[str, Protocol] = {
    protocol.name: protocol
    for protocol in (
        VLMEVALKIT,
        VLMEVALKIT_2024,
        MEDEVALKIT,
        LLAVA_MED,
        OMNIMEDVQA,
        MMMU,
        LMMS_EVAL,
    )
}
