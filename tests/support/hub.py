"""As much of the Hugging Face Hub as an upload speaks to, on this machine: repositories, LFS."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Hub:
    """What was asked of the stand-in, and what lies in it now.

    Attributes:
        url: For `HF_ENDPOINT`.
        files: Content by name of repository and path.
        commits: Names of the files of each commit.
        created: What each repository was created with.
        tokens: What `Authorization` said.
    """

    url: str = ""
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    commits: list[list[str]] = field(default_factory=list)
    created: list[dict[str, Any]] = field(default_factory=list)
    tokens: set[str] = field(default_factory=set)
    objects: dict[str, bytes] = field(default_factory=dict)


def _answer(hub: Hub, method: str, path: str, body: bytes) -> tuple[int, Any]:
    parts = path.partition("?")[0].strip("/").split("/")
    if parts[0] == "lfs":
        hub.objects[parts[1]] = body
        return 200, {}
    if path.startswith("/api/repos/create"):
        asked = json.loads(body)
        name = f"{asked.get('organization') or 'us'}/{asked['name']}"
        hub.created.append(asked)
        hub.files.setdefault(name, {})
        return 200, {"url": f"{hub.url}/{name}", "id": name}
    if "whoami" in path:
        return 200, {"name": "us", "type": "user", "orgs": []}
    if path.startswith("/api/validate-yaml"):
        return 200, {"warnings": [], "errors": []}
    if path.endswith("/info/lfs/objects/batch"):
        objects = [
            {**one, "actions": {"upload": {"href": f"{hub.url}/lfs/{one['oid']}", "header": {}}}}
            for one in json.loads(body)["objects"]
        ]
        return 200, {"transfer": "basic", "objects": objects}
    name = "/".join(parts[2:4])
    if "/preupload/" in path:
        files = [
            {
                "path": one["path"],
                "uploadMode": "lfs" if one["path"].endswith(".safetensors") else "regular",
                "shouldIgnore": False,
            }
            for one in json.loads(body)["files"]
        ]
        return 200, {"files": files}
    if "/commit/" in path:
        return 200, _commit(hub, name, body)
    if parts[:2] == ["api", "models"] and name in hub.files:
        return 200, {"id": name, "sha": "0" * 40, "siblings": [], "private": False, "tags": []}
    return 404, {"error": "not here"}


def _commit(hub: Hub, name: str, body: bytes) -> dict[str, Any]:
    paths = []
    for line in body.splitlines():
        item = json.loads(line)
        value = item["value"]
        if item["key"] == "file":
            hub.files[name][value["path"]] = base64.b64decode(value["content"])
        elif item["key"] == "lfsFile":
            hub.files[name][value["path"]] = hub.objects[value["oid"]]
        else:
            continue
        paths.append(value["path"])
    hub.commits.append(sorted(paths))
    url = f"{hub.url}/{name}/commit/{len(hub.commits):040x}"
    return {"commitOid": f"{len(hub.commits):040x}", "commitUrl": url, "success": True}


@contextmanager
def stand_in_hub() -> Iterator[Hub]:
    """Serve an empty hub on a port of this machine."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _handle(self) -> None:
            size = int(self.headers.get("Content-Length") or 0)
            body = self.rfile.read(size)
            if token := self.headers.get("Authorization"):
                hub.tokens.add(token)
            code, answer = _answer(hub, self.command, self.path, body)
            text = json.dumps(answer).encode()
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(text)

        do_GET = do_POST = do_PUT = do_HEAD = _handle

        def log_message(self, format: str, *args: Any) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
