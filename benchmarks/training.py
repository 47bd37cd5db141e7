"""Images per second: a bare loop, a federated round over the same photos, and both under differential privacy."""

from __future__ import annotations

import torch

from benchmarks.timing import seconds
from defenses.dp_sgd import DPSGD
from defenses.none import NoDefense
from fedgc import heads
from fedgc.algorithms import ALGORITHMS
from fedgc.config import load_config
from fedgc.doors import Defense
from fedgc.federation import Federation
from fedgc.models import build_model
from fedgc.pipeline.memory import keep_freed_memory
from fedgc.pipeline.setting import prepare

SETTINGS = ("data.source=synthetic:80x12", "data.augment=false", "federation.local_epochs=1")


def bare(photos: torch.Tensor, labels: torch.Tensor, batch: int) -> None:
    """Plain SGD over every photo once, contiguous float32, no federation."""
    spec = load_config(settings=SETTINGS).spec()
    model = build_model(spec, int(labels.max()) + 1)
    torch.nn.init.normal_(model.head.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.03, momentum=0.9)
    for index in torch.randperm(len(photos)).split(batch):
        optimizer.zero_grad()
        heads.loss(model(photos[index].float() / 255), labels[index], spec).backward()
        optimizer.step()


def round_of(algorithm: str, clients: int, defense: Defense) -> tuple[float, int]:
    """Seconds and images of one round."""
    config = load_config(settings=(*SETTINGS, f"federation.clients={clients}", f"federation.algorithm={algorithm}"))
    setting = prepare(config)
    made = Federation(
        ALGORITHMS[algorithm], config.spec(), config.schedule(), setting.parties, defense, 0, 1, setting.device
    )
    state = made.initial_state()
    return seconds(lambda: made.play(state)), made.play(state).images


def main() -> None:
    keep_freed_memory()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; default net, 48 px, batch 32, median of 3")
    party = prepare(load_config(settings=(*SETTINGS, "federation.algorithm=centralized"))).parties[0]
    loop = len(party.photos) / seconds(lambda: bare(party.photos, party.labels, 32))
    print(f"{'bare loop':<34} {loop:7.0f} images/s")
    private = DPSGD(noise_multiplier=1.0)
    for name, clients, defense in (
        ("centralized", 1, NoDefense(name="none")), ("fedavg", 4, NoDefense(name="none")),
        ("fedgc", 4, NoDefense(name="none")), ("fedgc", 4, private),
    ):  # fmt: skip
        spent, images = round_of(name, clients, defense)
        label = f"{name}, {clients} clients, {defense.name}"
        print(f"{label:<34} {images / spent:7.0f} images/s, {images / spent / loop:5.2f} of the bare loop")


if __name__ == "__main__":
    main()
