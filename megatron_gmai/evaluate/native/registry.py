"""All benchmarks by name."""

from megatron_gmai.evaluate.native.convert import Source
from megatron_gmai.evaluate.native.gmai_mmbench import GMAI_MMBENCH
from megatron_gmai.evaluate.native.mmmu import MMMU
from megatron_gmai.evaluate.native.omnimedvqa import OMNIMEDVQA
from megatron_gmai.evaluate.native.path_vqa import PATH_VQA
from megatron_gmai.evaluate.native.pmc_vqa import PMC_VQA
from megatron_gmai.evaluate.native.records import RECORDS
from megatron_gmai.evaluate.native.slake import SLAKE
from megatron_gmai.evaluate.native.vqa_rad import VQA_RAD

SOURCES: dict[str, Source] = {
    source.name.lower(): source
    for source in (VQA_RAD, SLAKE, PMC_VQA, PATH_VQA, OMNIMEDVQA, MMMU, GMAI_MMBENCH, RECORDS)
}
