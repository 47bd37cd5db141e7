"""Speed and memory beside a reference, in one run on one machine, and exact resume. Never part of the tests."""
