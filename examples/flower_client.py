"""A Flower client that keeps what it sends in a file, which `fedgc-priv attack` reads."""

import copy
from pathlib import Path

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fedgc.data.faces import load_faces
from fedgc.foreign import save_update
from fedgc.heads import loss
from fedgc.models import build_model
from fedgc.types import ModelSpec

spec = ModelSpec("small", "group", embedding_size=32, image_size=32, margin="cosface", margin_size=0.25, scale=30.0)
app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    faces = load_faces("synthetic:10x2", image_size=32, align="none", seed=0)
    images, labels = faces.float_images([4, 14]), faces.labels[[4, 14]]
    model = build_model(spec, classes=10).eval()
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    before = copy.deepcopy(model.state_dict())
    loss(model(images), labels, spec).backward()
    torch.optim.SGD(model.parameters(), lr=0.05).step()
    save_update(Path(context.node_config["keep"]), before, model.state_dict(), spec, lr=0.05, batch_size=len(images))
    sent = {"arrays": ArrayRecord(model.state_dict()), "metrics": MetricRecord({"num-examples": len(images)})}
    return Message(RecordDict(sent), reply_to=message)
