"""What `flwr run` starts on a SuperLink and on SuperNodes: the server trains into a run directory as `fedgc-priv train` does."""

from __future__ import annotations

import os
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedgc.config import load_config
from fedgc.pipeline.engines import Deployment
from fedgc.pipeline.flower import node
from fedgc.pipeline.training import train
from fedgc.showing import watching

server_app = ServerApp()
client_app = node.client_app(node.DeployedNode())


@server_app.main()
def main(grid: Grid, context: Context) -> None:
    """Run configuration: ``config``, a TOML file on the server, and ``out``, the run directory; it goes on where that one
    stopped."""
    asked = context.run_config
    config = load_config(Path(str(asked["config"])), environment=os.environ, flags={"engine": "flower"})
    with watching() as watch:
        train(config, Path(str(asked["out"])), resume=True, watch=watch, engine=Deployment(grid))
