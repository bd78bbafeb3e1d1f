"""`python -m benchmarks.bare PORT FILE`: a FastAPI route that reads nothing and returns the bytes of FILE.

The least that any FastAPI service costs, run by uvicorn as `api.server` runs it: what a cache hit is
measured against.
"""

import argparse
from pathlib import Path

import uvicorn
from fastapi import FastAPI, Response


def create_app(body: bytes) -> FastAPI:
    app = FastAPI()

    @app.post("/v1/chat/completions")
    async def answer() -> Response:
        return Response(body, media_type="application/json")

    return app


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bare", description=__doc__)
    parser.add_argument("port", type=int)
    parser.add_argument("file", type=Path)
    args = parser.parse_args()
    uvicorn.run(
        create_app(args.file.read_bytes()),
        host="127.0.0.1",
        port=args.port,
        loop="uvloop",
        http="httptools",
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=75,
        backlog=2048,
    )


if __name__ == "__main__":
    main()
