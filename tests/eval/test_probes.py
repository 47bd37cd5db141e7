"""What was read of strangers, scored: exact rows are reached, random directions are not."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from eval.probes import Read, score_probe

D, STRANGERS = 32, 20


def world(guesses: torch.Tensor, classes: list[int]) -> Read:
    rows = strangers()
    return Read(guesses, tuple(classes), 3.0 * rows, F.normalize(rows + 0.05, dim=1))


def strangers() -> torch.Tensor:
    return F.normalize(torch.randn(STRANGERS, D, generator=torch.Generator().manual_seed(0)), dim=1)


def score(*rounds: Read) -> tuple:
    scores = score_probe(rounds, range(100, 120), {100 + i: i for i in range(STRANGERS)}, np.random.default_rng(0))
    return scores, {name: m["value"] for name, m in scores.metrics.items()}


def test_rows_themselves_are_reached_and_named() -> None:
    scores, values = score(world(strangers()[[3, 3, 7]], [0, 1, 2]))
    assert values == {
        "embedding_cosine": 1.0,
        "reached": 1.0,
        "strangers_reached": 0.1,
        "rank1": 1.0,
        "rank5": 1.0,
    } or (abs(values["embedding_cosine"] - 1) < 1e-6 and values["strangers_reached"] == 0.1 and values["rank1"] == 1.0)
    assert [s["nearest"] for s in scores.samples] == [103, 103, 107]


def test_random_directions_are_at_chance() -> None:
    draw = torch.randn(200, D, generator=torch.Generator().manual_seed(5))
    scores, values = score(world(draw, list(range(200))))
    assert values["reached"] == 0
    assert abs(values["embedding_cosine"] - scores.metrics["embedding_cosine"]["chance"]) < 0.02
    assert scores.metrics["rank1"]["chance"] == scores.baselines["random-embedding"]["rank1"]["value"]


def test_a_blurred_answer_is_told_from_a_stranger() -> None:
    blurred = strangers().mean(dim=0).expand(4, D)
    scores, values = score(world(blurred, [0, 1, 2, 3]))
    assert values["reached"] == 0
    assert abs(scores.baselines["mean-stranger"]["embedding_cosine"]["value"] - values["embedding_cosine"]) < 1e-6


def test_rounds_add_up_and_one_row_is_one_cluster() -> None:
    scores, values = score(world(strangers()[[1, 2]], [0, 1]), world(strangers()[[3, 2]], [0, 1]))
    assert values["strangers_reached"] == 3 / STRANGERS
    assert scores.metrics["embedding_cosine"]["n"] == 2
    assert [s["target"] for s in scores.samples] == [0, 1, 2, 3]


def test_a_stranger_without_photos_is_not_ranked() -> None:
    scores = score_probe([world(strangers()[[1, 2]], [0, 1])], range(100, 120), {}, np.random.default_rng(0))
    assert "rank1" not in scores.metrics
    assert scores.metrics["reached"]["value"] == 1.0
