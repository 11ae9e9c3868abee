"""LitServe around the same sampler: its batching, its processes, its HTTP."""

from __future__ import annotations

import base64
from typing import Any

import litserve

from bench.serving.servers import checkpoint
from robuq_core.images import encode_image
from robuq_core.params import RowSpec


class Images(litserve.LitAPI):
    """A batch runs until its longest request is done; rows that are done earlier cost nothing more."""

    def setup(self, device: str) -> None:
        from robuq_core.pipeline import Sampler

        self.sampler = Sampler.from_checkpoint(checkpoint())

    # LitServe reads this method's annotations at run time, where ours are strings; without any it passes the JSON.
    def decode_request(self, request):  # type: ignore[no-untyped-def]
        return request

    def predict(self, bodies: list[dict[str, Any]]) -> list[dict[str, Any]]:
        defaults = self.sampler.defaults
        specs = [{"class_id": 0, "sampler": defaults.sampler} | body for body in bodies]
        rows = [self.sampler.start(RowSpec(**spec)) for spec in specs]
        while running := [row for row in rows if not row.done]:
            self.sampler.step(running)
        images = [base64.b64encode(encode_image(self.sampler.decode(row), "png")).decode() for row in rows]
        return [body | {"images": [image]} for body, image in zip(bodies, images, strict=True)]

    def encode_response(self, output):  # type: ignore[no-untyped-def]
        return output


def serve_litserve(port: int, max_batch_size: int, batch_timeout_s: float) -> None:
    """Serve ``POST /generate`` until interrupted. No request may be guided: an image takes one row on either side."""
    api = Images(max_batch_size=max_batch_size, batch_timeout=batch_timeout_s, api_path="/generate")
    server = litserve.LitServer(api, accelerator="cpu", devices=1, workers_per_device=1, timeout=False)
    server.run(host="127.0.0.1", port=port, generate_client_file=False, log_level="warning")
