"""The report: complete, self-contained, careful in its claims, and without faces where none may be shown."""

from __future__ import annotations

import base64
import csv
import hashlib
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from report_runs import FACES, REASON, both_algorithms, entry, inversion, linkage, refusal, run, value

from eval.claims import overclaims
from eval.figures import face_png
from eval.narrative import verdict
from eval.pictures import grids
from eval.report import build
from eval.results import Spread, cells
from eval.rows import COLUMNS, table
from eval.sections import once
from fedgc.errors import UsageError

VOID = {"meta", "img", "br", "use", "path"}


class Page(HTMLParser):
    """Collects elements and text; fails on a tag that is closed out of order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(html)
        self.close()
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], Page]:
    out = tmp_path_factory.mktemp("report")
    summary = build(both_algorithms(), out, commands=["fedgc-priv demo --out 'my demo'"])
    return out, summary, Page((out / "report.html").read_text())


def page(runs: list[Any], out: Path, **options: Any) -> Page:
    build(runs, out, **options)
    return Page((out / "report.html").read_text())


def test_page_is_well_formed_and_self_contained(built: tuple[Path, dict[str, Any], Page]) -> None:
    out, _, html = built
    assert html.open == []
    source = (out / "report.html").read_text()
    assert "http://" not in source
    assert "https://" not in source
    assert "@import" not in source
    for tag, attributes in html.elements:
        assert tag not in ("link", "iframe", "object", "image")
        assert tag != "script" or not attributes
        for name in ("src", "href", "xlink:href"):
            assert (attributes.get(name) or "#").startswith(("#", "data:image/png;base64,"))
    assert all(a.get("alt") for tag, a in html.elements if tag == "img")
    ids = [a["id"] for _, a in html.elements if a.get("id")]
    assert len(ids) == len(set(ids))


def test_page_has_every_section(built: tuple[Path, dict[str, Any], Page]) -> None:
    _, _, html = built
    sections = [a["id"] for tag, a in html.elements if tag == "section"]
    assert sections == [
        "verdict", "threats", "utility", "attacks", "curves", "pictures", "accounting", "limits", "data", "card", "reproduce",
    ]  # fmt: skip
    for words in (
        "FedAvg", "FedGC", "● granted", "– withheld", "untrained", "realised FAR 0.113", "not supported", "mean face",
        "nearest stranger", "random embedding", "Assumptions behind every figure", "61.0", "the first 4 victims of the manifest",
        "0319", "prv (opacus 1.6.0)", "Image-level is not person-level", "defense.noise_seed", "add-remove", "0.38", "61df",
        "fedgc-priv demo --out 'my demo'", "torch 2.10", "no person is behind them",
    ):  # fmt: skip
        assert words in html.text, words
    assert REASON in html.text  # escaped in the source, whole in the text
    assert "it does not hide them from the server" in html.text


def test_pictures_are_those_of_the_victims_and_owner_only(built: tuple[Path, dict[str, Any], Page]) -> None:
    out, summary, html = built
    shown = [str(a["src"]).partition(",")[2] for tag, a in html.elements if tag == "img"]
    assert len(shown) == 5 * (1 + 4)  # the first four, and the best of the first column
    assert base64.b64decode(shown[0]) == face_png(FACES[0])
    framed = [a.get("class") for tag, a in html.elements if tag == "img" and "reconstruction" in str(a["alt"])]
    assert framed[:4] == [None] * 4  # victim 1: 14 dB, nearest 14.5 dB
    assert framed[4:8] == ["near", None, "near", None]  # victim 2: 15 dB, and above the mean face without defense only
    assert summary["private"]
    assert (out / "report.html").stat().st_mode & 0o777 == 0o600
    assert (out / "results.csv").stat().st_mode & 0o777 == 0o644


def test_without_originals_no_face_is_anywhere(tmp_path: Path) -> None:
    left = tmp_path / "report.html"
    left.write_bytes(face_png(FACES[0]))  # from an earlier report with pictures
    left.chmod(0o600)
    html = page(both_algorithms(), tmp_path, originals=False)
    assert not [tag for tag, _ in html.elements if tag == "img"]
    assert "made to be shared" in html.text
    source = left.read_text()
    assert not re.search(r"data:image|<image|<img|background-image|base64,", source.partition("<main>")[2])
    found = (FACES * 0.9 + 0.05).clamp(0, 1)
    pictures = [face_png(face) for face in (*FACES, *found)]
    needles = [*pictures, *(base64.b64encode(p)[:400] for p in pictures)]
    for file in (f for f in tmp_path.rglob("*") if f.is_file()):
        content = file.read_bytes()
        assert not any(needle in content for needle in needles), file
    assert left.stat().st_mode & 0o777 == 0o644


def test_the_only_script_is_the_one_that_the_policy_names(built: tuple[Path, dict[str, Any], Page]) -> None:
    source = (built[0] / "report.html").read_text()
    [script] = re.findall(r"<script>(.*?)</script>", source, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'" in source
    assert " onclick" not in source


def test_the_page_is_small_and_claims_nothing_that_attacks_cannot_show(
    built: tuple[Path, dict[str, Any], Page],
) -> None:
    out, _, html = built
    assert (out / "report.html").stat().st_size < 5_000_000
    assert overclaims(html.text) == []


def test_tables_have_captions_and_scopes_and_sections_have_names(built: tuple[Path, dict[str, Any], Page]) -> None:
    _, _, html = built
    tags = [tag for tag, _ in html.elements]
    assert tags.count("caption") == tags.count("table") > 8
    assert {tags.count(t) for t in ("header", "nav", "main", "h1")} == {1}
    ids = {a["id"] for _, a in html.elements if a.get("id")}
    assert all(a["aria-labelledby"] in ids for tag, a in html.elements if tag == "section")
    links = {str(a["href"])[1:] for tag, a in html.elements if tag == "a" and str(a["href"]).startswith("#")}
    assert {link for link in links if not link.startswith("attack-")} <= ids
    heads = [a for tag, a in html.elements if tag == "th"]
    assert all(a.get("scope") for a in heads)


def test_the_model_card_says_what_it_is_not_for(built: tuple[Path, dict[str, Any], Page]) -> None:
    text = built[2].text
    for words in (
        "10 Model card",
        "Not for",
        "no threshold here is fit for a decision about a person",
        "350 photos of 50 people",
    ):
        assert words in text


def test_the_best_and_the_worst_are_the_judges(tmp_path: Path) -> None:
    cosines = (0.2, 0.9, 0.5, 0.1, 0.7)
    judge = {"name": "dlib", "auc": value(0.98, 0.97, 0.99), "people": 30, "thresholds": {"fmr=0.01": value(0.6)}}
    judged = inversion(1.0)
    samples = [{**s, "similarity": c} for s, c in zip(judged["samples"], cosines, strict=True)]
    [grid] = grids(cells([run(attacks=[{**judged, "samples": samples, "judge": judge}])]))
    assert grid["names"] == ["victim 1", "victim 2, best", "victim 3", "victim 4, worst"]
    assert [face["framed"] for face in grid["columns"][0]["faces"]] == [False, True, False, False]
    assert grid["columns"][0]["faces"][1]["lines"][-1] == "cosine 0.90"
    text = page([run(attacks=[{**judged, "samples": samples, "judge": judge}])], tmp_path).text
    assert "the judge (dlib) takes for the photo" in text


def test_remarks_that_differ_in_a_number_are_said_once() -> None:
    said = [("D", "lies below 0.111"), ("D", "lies below 0.081"), ("E", "lies below 0.5"), ("D", "another")]
    assert once(said) == [("D", "lies below 0.081 to 0.111"), ("E", "lies below 0.5"), ("D", "another")]


def test_csv_and_json_hold_the_same_rows(built: tuple[Path, dict[str, Any], Page]) -> None:
    out, _, _ = built
    with open(out / "results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    results = json.loads((out / "results.json").read_text())
    assert tuple(rows[0]) == COLUMNS
    assert results["schema"] == 1
    assert len(rows) == len(results["rows"])
    [one] = [r for r in rows if (r["run"], r["attack"], r["threat"], r["metric"], r["baseline"]) ==
             ("runs/fedavg-plain-0", "identity-linkage", "client", "rank1", "")]  # fmt: skip
    assert (one["value"], one["low"], one["high"], one["n"], one["chance"]) == ("0.61", "0.5", "0.71", "40", "0.0125")
    refused = [r for r in rows if r["refused"]]
    assert {(r["algorithm"], r["attack"], r["threat"], r["refused"]) for r in refused} == {
        ("fedgc", "identity-linkage", "client", REASON)
    }
    untrained = [r for r in rows if r["attack"] == "utility" and r["baseline"] == "untrained" and r["metric"] == "auc"]
    assert [r["value"] for r in untrained] == ["0.71"] * 4
    unsupported = next(r for r in rows if r["metric"] == "tar@far=0.01")
    assert unsupported["value"] == ""
    assert unsupported["why"].startswith("not supported")


def test_verdict_names_who_sees_what() -> None:
    client, server, bought = verdict(cells(both_algorithms()))
    assert re.match(r"Under FedAvg a curious client re-identifies 61\.0.% \[50\.0, 71\.0\] of 40 people", client)
    assert "chance 1.2" in client
    assert client.endswith("under FedGC no other client's class embedding reaches it.")
    assert server.startswith(
        "The server receives every client's update and class embeddings under FedAvg and FedGC alike"
    )
    assert "not told from chance" in bought  # 2 % with an interval that includes chance
    assert "0.740 [0.690, 0.790] (not told from untrained 0.710)" in bought
    assert bought.endswith("a failed attack is not a guarantee.")


def test_verdict_claims_nothing_without_figures() -> None:
    assert verdict(cells([run()]))[0].startswith("No attack was run")
    refused = verdict(cells([run("fedpe", None, [refusal("identity-linkage", "server")])]))
    assert refused[1] == "No attack from the server's seat gave a figure."
    assert "No run was trained with differential privacy" in refused[2]
    fedpe = entry("identity-linkage", "server", {"rank1": value(0.5, 0.4, 0.6)}, granted=["client-updates"])
    assert "receives every client's update and class embeddings" not in verdict(cells([run("fedpe", None, [fedpe])]))[1]


@pytest.mark.parametrize(
    "runs",
    [
        [run()],
        [run("centralized", None, [refusal("identity-linkage", "server", "one party holds every photo")])],
        [run("fedgc", 7.83, [refusal("identity-linkage", "client")])],
        [run("fedpe", None, [inversion(1.0)], pictures=False)],
        [
            run("fedavg", 7.83),
            run("fedavg", 3.0),
            run("fedcos", None, [entry("new-attack", "new-seat", {"odd": value(0.1)})]),
        ],
    ],
    ids=["no attacks", "centralized", "refused only", "no pictures", "unknown names"],
)
def test_copes_with_little(runs: list[Any], tmp_path: Path) -> None:
    html = page(runs, tmp_path)
    assert html.open == []
    assert "None" not in html.text


def test_seeds_are_one_cell_with_an_interval_of_all(tmp_path: Path) -> None:
    runs = [run(seed=s, auc=a, attacks=[linkage("server", r, 0.1, 0.9)]) for s, a, r in ((1, 0.9, 0.4), (0, 0.8, 0.2))]
    [cell] = cells(runs)
    assert [r.seed for r in cell.runs] == [0, 1]
    auc = cell.utility("auc")
    assert (auc.value, auc.seeds) == (pytest.approx(0.85), (0.8, 0.9))
    between = 1.959964 * np.std([0.8, 0.9], ddof=1) / np.sqrt(2)
    assert auc.low == pytest.approx(0.85 - np.hypot(0.05, between))
    html = page(runs, tmp_path)
    assert "2 seeds" in html.text
    assert "every other interval averages those of the seeds" in html.text
    assert "seeds 0.800, 0.900" in html.text
    assert "seed 1" in html.text


def test_a_seed_without_a_value_does_not_hide_the_others() -> None:
    spread = Spread.of([value(None, why="diverged"), value(0.5, 0.4, 0.6), None])
    assert (spread.value, spread.low, spread.seeds) == (0.5, 0.4, (0.5,))
    assert Spread.of([value(None, why="diverged"), None]).why == "diverged"


def test_cells_that_would_be_named_alike_get_what_tells_them_apart() -> None:
    one, other = run(), run()
    other = replace(other, path="other", config={**other.config, "federation": {"algorithm": "fedavg", "clients": 8}})
    assert [c.label for c in cells([one, other])] == [
        "FedAvg, no defense, federation.clients = 4",
        "FedAvg, no defense, federation.clients = 8",
    ]


def test_local_steps_are_rows_of_their_own_and_single_steps_lead() -> None:
    changes = {"metrics": {"psnr_gain": value(9.0)}, "targets": 8}
    names = ("batch_size=1,local_steps=5", "batch_size=4,local_steps=5")
    whole = {**inversion(2.0), "variants": dict.fromkeys(names, changes)}
    alone = {**inversion(9.0), **changes, "local_steps": 5}  # the same result as the summary in its own folder has it
    result = run(attacks=[whole, alone])
    sizes = [(e["batch_size"], e.get("local_steps")) for e in result.entries]
    assert sizes == [(1, None), (1, 5), (4, 5)]
    lead = result.leading("gradient-inversion", "server")
    assert lead.get("local_steps") is None
    rows = [r for r in table([result]) if r["attack"] == "gradient-inversion"]
    assert {(r["batch_size"], r["local_steps"]) for r in rows} == set(sizes)


def test_batch_sizes_are_rows_of_their_own_and_the_smallest_leads() -> None:
    whole = {**inversion(2.0), "variants": {"batch_size=4": {"metrics": {"psnr_gain": value(9.0)}, "targets": 8}}}
    result = run(attacks=[whole, inversion(2.0)])  # the same result twice, once with its variants
    assert [(e["batch_size"], e["targets"]) for e in result.entries] == [(1, 5), (4, 8)]
    assert "folder" not in result.entries[1]
    lead = result.leading("gradient-inversion", "server")
    assert lead is not None
    assert lead["batch_size"] == 1
    rows = table([result])
    assert {r["batch_size"] for r in rows if r["attack"] == "gradient-inversion"} == {1, 4}


def test_victims_of_another_manifest_get_a_grid_of_their_own(tmp_path: Path) -> None:
    one, other = run(attacks=[inversion(1.0)]), run("fedgc", attacks=[inversion(1.0)])
    other = replace(other, about={**other.about, "victims": "another"})
    text = page([one, other], tmp_path).text
    assert "0319" in text
    assert "another" in text


def test_real_people_get_a_note_on_consent(tmp_path: Path) -> None:
    html = page([run(source="/data/faces")], tmp_path)
    assert "consent" in html.text
    assert "no person is behind them" not in html.text


def test_no_run_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no run to report"):
        build([], tmp_path)
