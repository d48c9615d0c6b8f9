"""vLLM's own OpenAI-compatible server inside an engine, with the policy version in every answer (engine process)."""

import argparse
import asyncio
import importlib
import socket
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import uvicorn

from rollcast.rollout.engine.openai.client import VersionedClient
from rollcast.rollout.engine.openai.middleware import TellVersions
from rollcast.rollout.protocol.messages import Launch

POLL_S = 0.01
# vLLM moved its command line between the versions that are supported.
CLI_MODULES = ("vllm.entrypoints.launchers.cli_args", "vllm.entrypoints.openai.cli_args")
# What can be asked of a server inside an engine. All else is the engine's, or would have no effect.
OF_HTTP = {"host", "root_path", "api_key", "enable_request_id_headers", "disable_fastapi_docs"}
OF_BROWSERS = {"allowed_origins", "allowed_methods", "allowed_headers", "allow_credentials"}
OF_TLS = {"ssl_keyfile", "ssl_certfile", "ssl_ca_certs", "ssl_cert_reqs", "ssl_ciphers"}
OF_CHATS = {"chat_template", "chat_template_content_format", "trust_request_chat_template", "response_role"}
OF_CHATS |= {"default_chat_template_kwargs"}
OF_TOOLS = {"tool_call_parser", "enable_auto_tool_choice", "exclude_tools_when_tool_choice_none"}
OF_ANSWERS = {"served_model_name", "return_tokens_as_token_ids", "enable_prompt_tokens_details"}
OF_ANSWERS |= {"enable_force_include_usage", "enable_log_requests", "max_log_len"}
SETTINGS = OF_HTTP | OF_BROWSERS | OF_TLS | OF_CHATS | OF_TOOLS | OF_ANSWERS
# With these in its environment, vLLM's server changes weights or pauses by itself.
NEVER = ("VLLM_SERVER_DEV_MODE", "VLLM_ALLOW_RUNTIME_LORA_UPDATING")
ANY_HOST = ("0.0.0.0", "::")


class OpenAIDoor:
    """A port, taken before the engine starts, and what to serve there once it has."""

    def __init__(self, launch: Launch) -> None:
        assert launch.openai_port is not None
        self._args = server_args(model=launch.model, flags=launch.openai_flags)
        host = self._args.host or launch.host
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._socket = socket.create_server((host, launch.openai_port), family=family)
        shown = launch.host if host in ANY_HOST else f"[{host}]" if ":" in host else host
        scheme = "https" if self._args.ssl_certfile else "http"
        self.address = f"{scheme}://{shown}:{self._socket.getsockname()[1]}/v1"

    async def open(self, client: VersionedClient) -> None:
        """Serve, until the process ends. Returns when it does."""
        from vllm.entrypoints.openai.api_server import build_app, init_app_state

        args = self._args
        # The reasoning parser is there: the engine must know it, too.
        args.structured_outputs_config = client.vllm_config.structured_outputs_config
        tasks = await client.get_supported_tasks()
        app = build_app(args, tasks, client.model_config)
        client_of_vllm: Any = client
        await init_app_state(client_of_vllm, app.state, args, tasks)
        config = uvicorn.Config(
            TellVersions(app),
            log_level="warning",
            access_log=False,
            ssl_keyfile=args.ssl_keyfile,
            ssl_certfile=args.ssl_certfile,
            ssl_ca_certs=args.ssl_ca_certs,
            ssl_cert_reqs=args.ssl_cert_reqs,
            ssl_ciphers=args.ssl_ciphers,
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
    """Settings of vLLM's server. Raises `ValueError` for flags that it does not have, or that would do nothing here."""
    from vllm import envs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    if dangerous := [name for name in NEVER if getattr(envs, name)]:
        raise ValueError(f"openai_port: unset {dangerous[0]}, which lets clients change what the engine serves")
    cli, told = _cli(), f"openai_flags {' '.join(flags)!r}"
    parser = cli.make_arg_parser(FlexibleArgumentParser())
    default = parser.parse_args([])
    try:
        args = parser.parse_args(list(flags))
    except SystemExit:
        raise ValueError(f"{told}: not what `vllm serve` takes, see above") from None
    for name, value in vars(args).items():
        if name not in SETTINGS and repr(value) != repr(getattr(default, name)):
            raise ValueError(f"{told}: {name} is not a setting of a server inside an engine (try engine_args)")
    args.model = model
    args.served_model_name = args.served_model_name or [Path(model).resolve().name, model]
    # Of the engine.
    args.disable_log_stats = True
    cli.validate_parsed_serve_args(args)
    return args


def _cli() -> Any:
    for name in CLI_MODULES:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError:
            continue
    raise ImportError(f"this vLLM has its server's command line in none of {', '.join(CLI_MODULES)}")
