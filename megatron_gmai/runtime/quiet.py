"""Silences library warnings that tell a user nothing: what is optional, and old names in use."""

import warnings


def quiet_libraries() -> None:
    """Ignore Megatron-Core's remarks about packages it can do without, and renamed functions.

    Called by programs before they import Megatron-Core; a library's errors are not affected.
    """
    warnings.filterwarnings("ignore", message=".*Transformer Engine.*|.*Apex.*")
    warnings.filterwarnings("ignore", module=r"megatron\.core\.")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.")
