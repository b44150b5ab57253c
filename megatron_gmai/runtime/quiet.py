"""What programs ask of libraries before they import Megatron-Core."""

import logging
import os
import warnings


def quiet_libraries() -> None:
    """Ignore Megatron-Core's remarks about packages it can do without, and renamed functions.

    Called by programs before they import Megatron-Core; a library's errors are not affected.
    """
    warnings.filterwarnings("ignore", message=".*Transformer Engine.*|.*Apex.*")
    warnings.filterwarnings("ignore", module=r"megatron\.core\.")
    # A CUDA build of torch without a GPU warns about CUDA_HOME when Megatron-Core loads the builder
    # of C++ extensions. We build none; why there is no GPU is told by `choose_device`.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.")


def without_compiler() -> None:
    """Keep torch's compiler out of a process without a GPU, in which nothing is compiled.

    Megatron-Core loads it to mark functions for it, which takes each process a second.
    """
    import torch  # here: flags are read before anything slow is imported

    if not torch.cuda.is_available():
        os.environ["TORCHDYNAMO_DISABLE"] = "1"
