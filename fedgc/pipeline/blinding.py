"""Class embeddings as their clients read them, where the server holds them turned by a secret.

Transcripts hold what was on the wire. A client, curious or not, knows the secret: it is taken from the run's owner-only state for
the seats of clients, and for scoring, and for nobody else.
"""

from __future__ import annotations

from fedgc.client import clients_secret
from fedgc.config import load_config
from fedgc.doors import Defense
from fedgc.runs import RunDirectory
from fedgc.transcripts import rows_read
from fedgc.types import Transcript


def as_clients_read(run: RunDirectory, transcript: Transcript) -> Transcript:
    """The transcript with class embeddings turned back; itself where the run's defense turns none."""
    defense = load_config(run.path / "config.toml").defense
    if type(defense).unblinded is Defense.unblinded:
        return transcript
    key = run.noise_key(getattr(defense, "noise_seed", None))
    return rows_read(transcript, lambda rows: defense.unblinded(rows, clients_secret(key)))
