"""Speed and memory beside a reference, in one run on one machine. Never part of the tests."""
