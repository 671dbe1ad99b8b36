"""A W&B server on 127.0.0.1, as far as a run needs one; it can go bad in the middle of a run."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class WandbServer(ThreadingHTTPServer):
    """Takes runs in, over HTTP.

    Attributes:
        trouble: None; "hang" to take requests and never answer; "error" to answer each with 500.
        rows: History rows that were uploaded.
    """

    daemon_threads = True
    block_on_close = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.trouble: str | None = None
        self.rows: list[dict[str, Any]] = []
        self.over = threading.Event()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def go_bad(self, trouble: str) -> None:
        """Hang, answer with errors, or ("refuse") stop listening."""
        self.trouble = trouble
        if trouble == "refuse":
            self.close()

    def close(self) -> None:
        self.over.set()
        self.shutdown()
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: clients that hang up are what this is about."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: WandbServer

    def do_GET(self) -> None:
        self._reply({})

    def do_PUT(self) -> None:
        self._read()
        self._reply({})

    def do_POST(self) -> None:
        body = self._read()
        if self.path.endswith("/graphql"):
            asked = json.loads(body)
            data = self._answer(asked["query"], asked.get("variables") or {})
            refusal = {"errors": [{"message": "this server keeps no artifacts"}], "data": None}
            self._reply(refusal if data is None else {"data": data})
            return
        if self.path.endswith("/file_stream"):
            for name, file in (json.loads(body).get("files") or {}).items():
                if "history" in name:
                    self.server.rows += [json.loads(line) for line in file["content"]]
        self._reply({})

    def _read(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _answer(self, query: str, variables: dict[str, Any]) -> dict[str, Any] | None:
        if "rtifact" in query:
            return None
        if "upsertBucket" in query:
            project = {"id": "p", "name": "huggingface", "entity": {"id": "e", "name": "me"}}
            bucket = {"id": "r", "name": variables.get("name"), "displayName": "x", "config": "{}"}
            counts = {"historyLineCount": 0, "eventsLineCount": 0, "logLineCount": 0}
            run = {**bucket, **counts, "project": project, "sweepName": None}
            return {"upsertBucket": {"bucket": run, "inserted": True}}
        if "createRunFiles" in query:
            files = [
                {"name": name, "uploadUrl": f"{self.server.url}/{name}"}
                for name in variables["files"]
            ]
            return {"createRunFiles": {"runID": "r", "uploadHeaders": [], "files": files}}
        versions = {"cliVersionInfo": {}, "features": [], "latestLocalVersionInfo": None}
        viewer = {"id": "u", "entity": "me", "username": "me", "flags": "{}"}
        return {
            "viewer": {**viewer, "teams": {"edges": []}},
            "serverInfo": versions,
            "model": {"bucket": None},
        }

    def _reply(self, answer: Any) -> None:
        if self.server.trouble == "hang":
            self.server.over.wait()
            return
        body = json.dumps(answer).encode()
        self.send_response(500 if self.server.trouble == "error" else 200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        """Say nothing."""
