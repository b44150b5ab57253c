"""Run by an interpreter that has VLMEvalKit's checkout on its path: answers from its own functions.

Reads {"matching": [[answer, options]], "texts": [text], "rows": [row], "name": benchmark} from
standard input and writes what its functions make of them. Its packages' own `__init__` files would
import every data set and need a hundred other packages, so they are not run.
"""

import json
import sys
import tempfile
import types
from pathlib import Path


def bare_package(name: str, folder: Path) -> None:
    package = types.ModuleType(name)
    package.__path__ = [str(folder)]
    sys.modules[name] = package


def main() -> None:
    asked = json.load(sys.stdin)
    root = Path(sys.argv[1]) / "vlmeval"
    sys.path.insert(0, str(root.parent))
    bare_package("vlmeval", root)
    bare_package("vlmeval.dataset", root / "dataset")
    bare_package("vlmeval.dataset.utils", root / "dataset" / "utils")
    import pandas
    from vlmeval.dataset.utils.multiple_choice import mcq_circular_eval, mcq_vanilla_eval
    from vlmeval.dataset.utils.vqa_eval import process_answer
    from vlmeval.dataset.utils.yorn import YOrN_Extraction
    from vlmeval.smp import process_punctuation
    from vlmeval.utils.matching_util import can_infer

    def hits(evaluate: types.FunctionType, folder: str) -> dict[str, float]:
        # Written and read as it does between prediction and evaluation.
        file = f"{folder}/predictions.tsv"
        pandas.DataFrame(asked["rows"]).to_csv(file, sep="\t", index=False)
        data = pandas.read_csv(file, sep="\t")
        data["prediction"] = [str(x) for x in data["prediction"]]
        meta = data[["index", "answer"]]
        done = evaluate(None, data, meta, 1, f"{folder}/{evaluate.__name__}.pkl", asked["name"])
        pairs = zip(done["index"], done["hit"], strict=True)
        return {str(index): float(hit) for index, hit in pairs}

    with tempfile.TemporaryDirectory() as folder:
        told = {
            "matching": [can_infer(a, dict(options)) for a, options in asked["matching"]],
            "yes_no": [YOrN_Extraction(text) for text in asked["texts"]],
            "punctuation": [process_punctuation(text) for text in asked["texts"]],
            "answers": [process_answer(text) for text in asked["texts"]],
            "vanilla": hits(mcq_vanilla_eval, folder),
            "circular": hits(mcq_circular_eval, folder),
        }
    Path(sys.argv[2]).write_text(json.dumps(told))


if __name__ == "__main__":
    main()
