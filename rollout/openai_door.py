"""vLLM's own OpenAI-compatible server inside an engine, with the policy version in every answer (engine process)."""

import argparse
import asyncio
import dataclasses
import importlib
import socket
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import uvicorn

from rollcast.rollout.records import Launch
from rollcast.rollout.telling import TellVersions
from rollcast.rollout.versioned import VersionedClient

POLL_S = 0.01
# vLLM moved its command line between the versions that are supported.
CLI_MODULES = ("vllm.entrypoints.launchers.cli_args", "vllm.entrypoints.openai.cli_args")
# Fields of the engine that are the server's business, and the other way round.
OF_SERVER, OF_ENGINE = {"served_model_name"}, {"port", "uds"}


class OpenAIDoor:
    """A port, taken before the engine starts, and what to serve there once it has."""

    def __init__(self, launch: Launch) -> None:
        assert launch.openai_port is not None
        self._args = server_args(model=launch.model, flags=launch.openai_flags)
        host = self._args.host or launch.host
        self._socket = socket.create_server((host, launch.openai_port))
        self.address = f"http://{host}:{self._socket.getsockname()[1]}/v1"

    async def open(self, client: VersionedClient) -> None:
        """Serve, until the process ends. Returns when it does."""
        from vllm.entrypoints.openai.api_server import build_app, init_app_state

        tasks = await client.get_supported_tasks()
        app = build_app(self._args, tasks, client.model_config)
        client_of_vllm: Any = client
        await init_app_state(client_of_vllm, app.state, self._args, tasks)
        config = uvicorn.Config(
            TellVersions(app),
            log_level="warning",
            access_log=False,
            ssl_keyfile=self._args.ssl_keyfile,
            ssl_certfile=self._args.ssl_certfile,
        )
        server = app.state.server = _Server(config)
        self._serving = asyncio.create_task(server.serve(sockets=[self._socket]))
        while not server.started:
            if self._serving.done():
                self._serving.result()
                raise OSError("vLLM's server has ended while it started")
            await asyncio.sleep(POLL_S)


class _Server(uvicorn.Server):
    """Leaves signals to the engine's service."""

    def capture_signals(self) -> Any:
        """Uvicorn's hook."""
        return nullcontext()


def server_args(*, model: str, flags: Sequence[str]) -> argparse.Namespace:
    """Settings of vLLM's server. Raises `ValueError` for flags that it does not have, or that are the engine's."""
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    cli = _cli()
    parser = cli.make_arg_parser(FlexibleArgumentParser())
    default = parser.parse_args([])
    try:
        args = parser.parse_args(list(flags))
    except SystemExit:
        raise ValueError(f"openai_flags {shown(flags)}: not what `vllm serve` takes, see above") from None
    known = {field.name for field in dataclasses.fields(cli.FrontendArgs)} - OF_ENGINE | OF_SERVER
    for name, value in vars(args).items():
        if name not in known and repr(value) != repr(getattr(default, name)):
            raise ValueError(f"openai_flags {shown(flags)}: {name} is not a setting of the server alone")
    args.model = model
    args.served_model_name = args.served_model_name or [Path(model).resolve().name, model]
    return args


def shown(flags: Sequence[str]) -> str:
    return repr(" ".join(flags))


def _cli() -> Any:
    for name in CLI_MODULES:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError:
            continue
    raise ImportError(f"this vLLM has its server's command line in none of {', '.join(CLI_MODULES)}")
