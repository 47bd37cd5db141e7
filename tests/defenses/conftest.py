"""The federation of three clients that the tests of the round loop use."""

from tests.fedgc.conftest import federation, parties  # noqa: F401
