"""``serve``: the HTTP service."""

from __future__ import annotations

import ipaddress
import logging
from functools import partial
from typing import Annotated, Any

import typer

from ..config import EngineConfig
from ..errors import ConfigError, MissingDependencyError, OutputError
from .console import Console
from .options import Debug, Grouped, check_models_dir, load_config, takes_settings

Host = Annotated[str | None, typer.Option("--host", help="Address to listen on.", show_default=False)]
Port = Annotated[
    str | None, typer.Option("--port", "-p", metavar="<int>", help="Port; 0 takes a free one.", show_default=False)
]


@takes_settings
def serve(host: Host = None, port: Port = None, debug: Debug = False, **settings: Any) -> None:
    """Answer requests over HTTP until SIGTERM or Ctrl-C. The log goes to stderr, a JSON object a line."""
    with Console(debug=debug):
        given = {name: value for name, value in (("host", host), ("port", port)) if value is not None}
        config = load_config(settings, **given)
        _require_packages()
        from .server.logs import set_up_logs
        from .server.supervisor import launch

        check_models_dir(config)
        check_reach(config)
        config = config.with_whole_folders()
        keys = (*config.api_keys, *filter(None, (config.metrics_key,)), *config.tokens.values())
        secrets = tuple(key.get_secret_value() for key in keys)
        set_up_logs(secrets, logging.DEBUG if debug else logging.INFO)
        warn_of_outputs(config)
        start = partial(launch, config, secrets)
        child = start()  # it loads the model while the front is imported
        try:
            from .server.run import serve_http

            code = serve_http(config, start, child)
        finally:
            child.connection.close()
        if code:
            raise SystemExit(code)


def _require_packages() -> None:
    from importlib.util import find_spec

    missing = [name for name in ("fastapi", "uvicorn") if find_spec(name) is None]
    if missing:
        raise MissingDependencyError(
            f"the service needs {' and '.join(missing)}; install them with: pip install 'lightweight-engine[serve]'"
        )


def check_reach(config: EngineConfig) -> None:
    """Refuse to be reached by others without a key.

    Raises:
        ConfigError: says what to set.
    """
    if config.api_keys or config.host.lower() == "localhost":
        return
    try:
        loopback = ipaddress.ip_address(config.host).is_loopback
    except ValueError:
        loopback = False
    if not loopback:
        raise ConfigError(
            f"host: {config.host} may be reached by others, and there are no api_keys; set LWE_API_KEYS, or listen on "
            "127.0.0.1"
        )


def warn_of_outputs(config: EngineConfig) -> None:
    """Log that pictures cannot be kept. No refusal: only callers who ask for it need the folder."""
    from ..core.images import check_folder

    try:
        check_folder(config.output_dir)
    except OutputError as error:
        logging.getLogger(__name__).warning("requests with save_images will be refused: %s", error)


def register(app: typer.Typer) -> None:
    app.command("serve", cls=Grouped)(serve)
