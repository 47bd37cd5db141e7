"""Words and number formats of the report: what each grant, attack, baseline and assumption is called."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from eval.results import METRICS, Spread

NO_GUARANTEE = "a failed attack is not a guarantee"
MINUS = "\N{MINUS SIGN}"
THIN = "\N{NARROW NO-BREAK SPACE}"

GRANTS = {
    "public-constants": "The public constants of training: network, learning rates, batch size, the defense's parameters",
    "global-model": "The shared backbone after aggregation",
    "client-updates": "Every client's own update, before aggregation",
    "aggregate": "The mean update of all other clients (the change of the shared model, less one's own share)",
    "class-embeddings": "Class embeddings of other parties' people",
    "own-class-embeddings": "Class embeddings of one's own people, as the server returns them",
    "correction": "The server's correction of one's own class embeddings",
    "auxiliary-faces": "Photos of strangers, owned by the attacker, from no training person",
    "gallery": "Other photos of candidate people, the trained ones among them, owned by the attacker",
    "probes": "Rows that the attacker chose and uploaded in place of its class embeddings",
    "suspects": "Photos of people some of whom were trained on, by other photos (given to the attack that asks for it)",
    "candidates": "The photos behind an update, among decoys; which they are is not told (given to the attack that asks for it)",
    "canaries": "The candidates of an audit, with class and client of each; which were trained on is not told (given to the "
    "attack that asks for it)",
    "acquaintances": "Whose some of the class embeddings are (given to the attack that asks for it, and left out of its figures)",
}
ATTACKS = {
    "label-inference": "Which classes the photos behind an update belong to, read from the head's gradient.",
    "gradient-inversion": "Photos from the update of one optimiser step, by matching its gradient. The figure that counts is the "
    "gain in PSNR over the mean of the attacker's own faces, which needs no update at all.",
    "identity-linkage": "Which person of a gallery a class embedding belongs to.",
    "feature-inversion": "Photos from the features that the last layers of an update give away, and from nothing else.",
    "embedding-recovery": "The network's feature of each photo behind an update of one optimiser step: all that a recogniser "
    "knows of a face. One photo's needs no class embedding, and clipping does not hinder it.",
    "template-inversion": "A face for each class embedding, from that and the shared backbone. There is no photo that it should "
    "equal: pixels are compared with other photos of the person. Ranks and cosines are in the attacked model's own eyes, which "
    "the search pleases by design; how far that goes, the class embedding itself tells, which has no pixels.",
    "correction-probe": "Other clients' class embeddings from what the server sends back of one's own: guesses within cosine "
    "0.9 of a stranger's class embedding, and whether photos name that stranger.",
    "membership-inference": "Who was trained on, by other photos of them; beside it the same guess on a model that knows nobody.",
    "candidate-match": "Which of the candidate photos a step was made from, by likelihood under the defense's clipping and "
    "noise. The ceiling is what no attack on the same steps can exceed under that noise; the others of a batch count as known.",
    "canary-inference": "Which canaries a run was trained on: images of nobody, each put among a client's photos by a fair coin. "
    "The right guesses bound ε from below; the ceiling is that bound if all of them were right.",
}
SHORT = {  # metrics where space is short, after their value
    "psnr_gain": "over the mean face", "psnr_oracle_restart": "of the best restart, chosen by the truth",
    "label_accuracy": "of labels found", "auc": "AUC", "epsilon_lower_bound": "ε at least",
    "sar1@fmr=0.01": "accepted as the photo", "sar2@fmr=0.01": "accepted as the person",
}  # fmt: skip
HARMS = {  # what each attack is after, in the order of harm
    "identity-linkage": "Names the people behind class embeddings",
    "template-inversion": "Faces of people, from class embeddings",
    "gradient-inversion": "Photos rebuilt, from one step on one photo",
    "feature-inversion": "Photos rebuilt, from the last layers of that step",
    "embedding-recovery": "The template of each photo, from that step",
    "candidate-match": "Which known photo was trained on in that step",
    "label-inference": "Whose photos that step was made from",
    "membership-inference": "Who was trained on at all",
    "correction-probe": "Other parties' class embeddings, from the correction",
    "canary-inference": "Which planted images were trained on",
}
WHO = {  # who sits in each seat
    "server": "the server", "server-secagg": "a server behind secure aggregation", "client": "another client",
    "probing-client": "a client that probes", "outsider": "an outsider",
}  # fmt: skip
BRIEF = {  # names beside points in figures
    "identity-linkage": "people", "template-inversion": "faces", "gradient-inversion": "photos", "feature-inversion": "photos",
    "embedding-recovery": "templates", "candidate-match": "known photo", "label-inference": "labels",
    "membership-inference": "membership", "correction-probe": "correction", "canary-inference": "canaries",
}  # fmt: skip
BASELINES = {
    "mean-face": "mean face", "nearest-auxiliary-face": "nearest stranger", "noise": "noise",
    "random-labels": "random labels", "random-embedding": "random embedding", "mean-stranger": "mean stranger",
    "nearest-class-embedding": "nearest class embedding",
    "another-update": "another client's update", "another-victim": "a photo of another victim",
    "another-class": "another person's face", "class-embedding": "the class embedding itself",
    "another-reconstruction": "another victim's reconstruction", "genuine-photo": "a photo of the person itself",
    "model-that-knows-nobody": "a model that knows nobody", "absent-image": "an image that is not there",
}  # fmt: skip
CAPTIONS = {
    "privacy-utility": "Utility above, the best attack of each seat below, over the ε of the whole run. 0 is a guess, 100 always "
    "right; the small words say what the best attack got. Filled markers: the server; open markers: another client. Bars are "
    "95 % intervals. Attacks are lower bounds: a point at chance is a failed attack, not a guarantee. "
    "Where canaries were planted, the last panel shows the ε that they prove beside the promised one; wedges are what they would "
    "prove if every guess were right.",
    "leakage-utility": "Each point is one configuration, labelled with its ε; crosses are 95 % intervals. Useful and "
    "tight-lipped is up and to the left. The grey line is the front of those configurations that no other beats in both; points "
    "whose crosses overlap may trade places on it.",
    "attacks": "Each attack over ε. Filled markers: what the server found; open markers: what another client found. Bars are "
    "95 % intervals. Where there are wedges, no attack on these steps can get more, and a short bar is the most for one photo in "
    "the whole run; both come from the analysis, not from an attack.",
}
LEDGER = (
    (
        "Labels",
        "Never given. Image attacks use labels inferred from the same update, and right and wrong inferences both count.",
    ),
    (
        "Single steps",
        "Photos are attacked through one recorded optimiser step on few photos, from the parameters of that round. That is the "
        "worst case for a photo: the update of a whole round adds up many steps and is harder to read.",
    ),
    (
        "Batch size",
        "Shown in each row. The figure an attack is summed up with is that of its smallest batch. From a client's seat "
        "the photos of all other clients are mixed into one aggregate.",
    ),
    (
        "Auxiliary faces",
        "Every attacker owns photos of people who were not trained on; priors and baselines are built from them.",
    ),
    (
        "Gallery",
        "For re-identification every attacker owns other photos of candidates; chance is one over their number.",
    ),
    (
        "Candidates",
        "For candidate-match the attacker knows that the photos behind a step are among the candidates, which are photos of "
        "other steps, of the gallery and of strangers. Chance is one over those that are not in the same batch.",
    ),
    (
        "DP-aware",
        "Candidate-match, canary-inference and gradient-inversion model the clipping and noise of dp-sgd. The other attacks, "
        "and all under other defenses, do not, so that small leakage under noise is a lower bound only in their rows.",
    ),
    (
        "Judge",
        "A recogniser trained on other people, which no attack can reach. Its thresholds come from people whom nobody trained "
        "on, so that an impostor is accepted at the FMR named. SAR-I compares with the very photo, SAR-II with others of the "
        "person.",
    ),
    (
        "Behaviour",
        "Honest but curious: the protocol is followed and what arrives is read. Seats that manipulate are named so.",
    ),
)
LIMITS = (
    f"{NO_GUARANTEE.capitalize()}. Each figure is a lower bound on what leaks: what one attack found, with one setting and one "
    "budget. An ε is an upper bound, from a proof. The two are never merged.",
    "Below 100 targets no sentence here says that something does not leak: 0 successes in 20 still allow 13.9 % (one-sided, "
    "95 %), 0 in 100 still allow 3.0 %.",
    "Intervals resample people or victims. Where a configuration has several seeds, its value is their mean; utility and paired "
    "differences resample seeds and people together, while an attack's interval averages those of the seeds and adds what "
    "differs between them.",
    "Of each seat the best of several attacks is shown; it was chosen by these results, and so looks a little better than it is.",
    "PSNR and SSIM measure pixels, not whether a person can be recognised.",
    "Attacks that are not listed were not run; malicious servers, malicious clients and collusion are outside these figures "
    "unless a row names them.",
    "Operating points marked “not supported” have too few pairs of people for their false accept rate.",
)


def number(value: float, unit: str) -> str:
    """A value in the unit of its metric: "%" from a share, "dB", "±dB" signed, or "" for three decimals."""
    if unit == "%":
        return f"{100 * value:.0f}{THIN}%" if value in (0, 1) else f"{100 * value:.1f}{THIN}%"
    if unit.endswith("dB"):
        text = f"{round(value, 1) + 0.0:{'+' if unit == '±dB' else ''}.1f}"
        return f"{text}{THIN}dB".replace("-", MINUS)
    return f"{value:.3f}".replace("-", MINUS)


def unit_of(metric: str) -> str:
    return METRICS[metric][1] if metric in METRICS else ""


def difference(value: float, unit: str) -> str:
    """A signed value, of shares in percentage points."""
    if unit == "%":
        text = f"{round(100 * value, 1) + 0.0:+.1f}{THIN}pp"
    elif unit.endswith("dB"):
        text = f"{round(value, 1) + 0.0:+.1f}{THIN}dB"
    else:
        text = f"{round(value, 3) + 0.0:+.3f}"
    return text.replace("-", MINUS)


def interval(value: Mapping[str, Any] | Spread, unit: str) -> str:
    """ "[low, high]" in the unit of the value, or "" where there is none."""
    low, high = (value.low, value.high) if isinstance(value, Spread) else (value.get("low"), value.get("high"))
    if low is None:
        return ""
    scale, digits = (100, 1) if unit == "%" else (1, 1) if unit.endswith("dB") else (1, 3)
    ends = ["no upper end" if end is None else f"{round(scale * end, digits) + 0.0:.{digits}f}" for end in (low, high)]
    return f"[{ends[0]}, {ends[1]}]".replace("-", MINUS)
