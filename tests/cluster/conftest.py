"""The small data set of the training tests serves here too."""

from tests.training.conftest import shards  # noqa: F401
