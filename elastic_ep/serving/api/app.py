"""The HTTP application: one function that ties a backend, a tokenizer and metrics to their routes. It owns no state of its own."""

from __future__ import annotations

from fastapi import FastAPI

from elastic_ep import __version__
from elastic_ep.serving.api import elastic_routes, generate_routes, server_routes
from elastic_ep.serving.api.errors import install_error_handlers
from elastic_ep.serving.api.openapi import install_openapi
from elastic_ep.serving.backend import Backend
from elastic_ep.serving.metrics import Metrics
from elastic_ep.serving.text import Tokenizer


def create_app(backend: Backend, tokenizer: Tokenizer, metrics: Metrics) -> FastAPI:
    """The ASGI application. `metrics` reads the backend's status from now on, so it serves one application only."""
    app = FastAPI(title="elastic-ep", version=__version__, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.include_router(generate_routes.router(backend, tokenizer, metrics))
    app.include_router(server_routes.router(backend, metrics))
    app.include_router(elastic_routes.router(backend))
    install_error_handlers(app, metrics.request_rejected)
    install_openapi(app, backend, has_text=tokenizer.has_text)
    metrics.watch(backend.status)
    return app
