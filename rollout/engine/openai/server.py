"""vLLM's own OpenAI-compatible server on the engine, with the policy version in every response (engine process)."""

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
from rollcast.rollout.engine.openai.middleware import PolicyVersionMiddleware
from rollcast.rollout.protocol.messages import EngineSpec

POLL_S = 0.01
# The module of vLLM's command line, which differs between the supported versions.
CLI_MODULES = ("vllm.entrypoints.launchers.cli_args", "vllm.entrypoints.openai.cli_args")
# The settings that a server inside an engine has. All others belong to the engine, or would have no effect.
HTTP_SETTINGS = {"host", "root_path", "api_key", "enable_request_id_headers", "disable_fastapi_docs"}
CORS_SETTINGS = {"allowed_origins", "allowed_methods", "allowed_headers", "allow_credentials"}
TLS_SETTINGS = {"ssl_keyfile", "ssl_certfile", "ssl_ca_certs", "ssl_cert_reqs", "ssl_ciphers"}
CHAT_SETTINGS = {"chat_template", "chat_template_content_format", "trust_request_chat_template", "response_role"}
CHAT_SETTINGS |= {"default_chat_template_kwargs"}
TOOL_SETTINGS = {"tool_call_parser", "enable_auto_tool_choice", "exclude_tools_when_tool_choice_none"}
RESPONSE_SETTINGS = {"served_model_name", "return_tokens_as_token_ids", "enable_prompt_tokens_details"}
RESPONSE_SETTINGS |= {"enable_force_include_usage", "enable_log_requests", "max_log_len"}
SETTINGS = HTTP_SETTINGS | CORS_SETTINGS | TLS_SETTINGS | CHAT_SETTINGS | TOOL_SETTINGS | RESPONSE_SETTINGS
# Environment variables that let clients of vLLM's server change weights or pause the engine.
FORBIDDEN_VARIABLES = ("VLLM_SERVER_DEV_MODE", "VLLM_ALLOW_RUNTIME_LORA_UPDATING")
ANY_HOST = ("0.0.0.0", "::")


class OpenAIServer:
    """Takes its port before the engine starts, and serves there from `start` on."""

    def __init__(self, spec: EngineSpec) -> None:
        """Bind the port. Raises `ValueError` for flags that vLLM's server does not have, `OSError` for a taken port."""
        assert spec.openai_port is not None
        self._args = server_args(model=spec.config.model, flags=spec.config.openai_flags)
        host = self._args.host or spec.host
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._socket = socket.create_server((host, spec.openai_port), family=family)
        shown = spec.host if host in ANY_HOST else f"[{host}]" if ":" in host else host
        scheme = "https" if self._args.ssl_certfile else "http"
        self.address = f"{scheme}://{shown}:{self._socket.getsockname()[1]}/v1"

    async def start(self, client: VersionedClient) -> None:
        """Start to serve, until the process ends. Returns once the server has started."""
        from vllm.entrypoints.openai.api_server import build_app, init_app_state

        args = self._args
        # The reasoning parser is set there: the engine must know it, too.
        args.structured_outputs_config = client.vllm_config.structured_outputs_config
        tasks = await client.get_supported_tasks()
        app = build_app(args, tasks, client.model_config)
        engine_client: Any = client
        await init_app_state(engine_client, app.state, args, tasks)
        config = uvicorn.Config(
            PolicyVersionMiddleware(app),
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
                raise OSError("vLLM's server ended while it was starting")
            await asyncio.sleep(POLL_S)


class _Server(uvicorn.Server):
    """Leaves signals to the engine process."""

    def capture_signals(self) -> Any:
        """Override uvicorn's hook: handle no signal."""
        return nullcontext()


def server_args(*, model: str, flags: Sequence[str]) -> argparse.Namespace:
    """Return the settings of vLLM's server.

    Raises `ValueError` for flags that it does not have, or that would have no effect inside an engine.
    """
    from vllm import envs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    if dangerous := [name for name in FORBIDDEN_VARIABLES if getattr(envs, name)]:
        raise ValueError(f"openai_port: unset {dangerous[0]}, which lets clients change what the engine serves")
    cli, shown = _cli(), f"openai_flags {' '.join(flags)!r}"
    parser = cli.make_arg_parser(FlexibleArgumentParser())
    default = parser.parse_args([])
    try:
        args = parser.parse_args(list(flags))
    except SystemExit:
        raise ValueError(f"{shown}: not what `vllm serve` takes, see above") from None
    for name, value in vars(args).items():
        if name not in SETTINGS and repr(value) != repr(getattr(default, name)):
            raise ValueError(f"{shown}: {name} is not a setting of a server inside an engine (try engine_args)")
    args.model = model
    args.served_model_name = args.served_model_name or [Path(model).resolve().name, model]
    # The engine keeps none.
    args.disable_log_stats = True
    cli.validate_parsed_serve_args(args)
    return args


def _cli() -> Any:
    for name in CLI_MODULES:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError:
            continue
    raise ImportError(f"this vLLM has the command line of its server in none of {', '.join(CLI_MODULES)}")
