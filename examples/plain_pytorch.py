"""One step of plain PyTorch, and the file that `fedgc-priv attack` reads: python examples/plain_pytorch.py FILE.safetensors"""

import copy
import sys
from pathlib import Path

import torch

from fedgc.data.faces import load_faces
from fedgc.foreign import save_update
from fedgc.heads import initial_rows, loss
from fedgc.models import build_model
from fedgc.types import ModelSpec

spec = ModelSpec("small", "group", embedding_size=32, image_size=32, margin="cosface", margin_size=0.25, scale=30.0)
faces = load_faces("synthetic:10x2", image_size=32, align="none", seed=0)
images, labels = faces.float_images([4, 14]), faces.labels[[4, 14]]  # a photo each of the people 2 and 7

model = build_model(spec, classes=10).eval()
model.head.weight.data = initial_rows(10, 32, torch.Generator().manual_seed(0))
optimizer = torch.optim.SGD(model.parameters(), lr=0.05)

before = copy.deepcopy(model.state_dict())
optimizer.zero_grad()
loss(model(images), labels, spec).backward()
optimizer.step()
save_update(Path(sys.argv[1]), before, model.state_dict(), spec, lr=0.05, batch_size=len(images))
