"""The stages as library calls. This package composes the others; nothing composes it but the command line.

train(config, out) -> run directory, attack(run, ...) -> results in it, report(runs, out) -> a page
"""
