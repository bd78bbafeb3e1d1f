"""Where Switchyard's processes read their environment: one class, every variable documented here.

`Settings` is the only reader of the environment. What is served (models, backends, limits of a call)
is declared in `switchyard.yaml` and read by `catalog.py`.
"""

from functools import lru_cache
from pathlib import Path
from typing import Literal

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict


class Settings(BaseSettings):
    """Environment of a process, `SWITCHYARD_*`. Defaults describe the one-machine stack."""

    model_config = SettingsConfigDict(env_prefix="SWITCHYARD_", env_file=".env", extra="ignore")

    config: Path = Field(Path("switchyard.yaml"), description="The file that declares models, backends and limits.")
    home: Path = Field(Path(".switchyard"), description="Data, logs and sockets of the one-machine stack.")
    models_dir: Path = Field(Path("models"), description="Folder that relative model paths start from.")
    database_url: str = Field("", description="postgresql:// URL. Empty: the embedded Postgres under SWITCHYARD_HOME.")
    redis_url: str = Field("", description="redis:// URL. Empty: the embedded Valkey under SWITCHYARD_HOME.")
    host: str = Field("127.0.0.1", description="Address the gateway listens on.")
    port: int = Field(8080, description="Port the gateway listens on.")
    admin_api: Literal["loopback", "all", "off"] = Field(
        "loopback", description="Who is served /admin/v1: callers on this machine, all, or nobody (off)."
    )
    gateway_processes: int = Field(1, ge=1, description="Gateway processes behind the one port.")
    flower_port: int = Field(5555, description="Port Flower listens on, loopback only.")
    metrics_port: int = Field(
        0, description="Port a worker or reconciler serves its own /metrics on. 0: shared files on one host."
    )
    metrics_host: str = Field("127.0.0.1", description="Address of SWITCHYARD_METRICS_PORT.")
    log_level: str = Field("INFO", description="DEBUG, INFO, WARNING or ERROR.")
    log_format: str = Field("json", description="json or console.")
    log_prompts: bool = Field(False, description="Keep prompt text in the request log table.")
    lease_s: float = Field(15.0, gt=0, description="Seconds a worker holds a job without a heartbeat.")
    heartbeat_s: float = Field(1.0, gt=0, description="Seconds between a worker's heartbeats.")
    sweep_s: float = Field(1.0, gt=0, description="Seconds between two passes of the reconciler.")
    resend_after_s: float = Field(5.0, gt=0, description="Seconds a job may stay queued before its message is doubted.")
    drain_s: float = Field(25.0, gt=0, description="Seconds a stopping process gives to what is running.")
    max_attempts: int = Field(3, ge=1, description="Attempts before a job fails with attempts_exhausted.")
    quarantine_s: float = Field(
        600.0, ge=0, description="Seconds for which a request that killed its worker on every attempt is refused."
    )
    stall_s: float = Field(
        60.0, gt=0, description="Seconds without one finished step after which a busy backend counts as hung."
    )
    unsafe_servers: bool = Field(
        False, description="Run on a Postgres or Redis whose settings can lose what was accepted."
    )
    wait_s: float = Field(600.0, gt=0, description="Longest synchronous wait before the answer becomes a 202.")
    webhook_networks: str = Field(
        "", description="Private networks that webhooks may be sent into, e.g. `10.0.0.0/8,fd00::/8`."
    )
    webhook_timeout_s: float = Field(15.0, gt=0, description="Seconds a webhook's receiver has for its answer.")
    webhook_retry_s: str = Field(
        "5,300,1800,7200,18000,36000,50400,72000,86400",
        description="Seconds between a webhook's tries, give or take a fifth.",
    )
    result_ttl_s: int = Field(86_400, ge=60, description="Seconds a finished job and its result are kept.")


@lru_cache
def load() -> Settings:
    """The settings of this process, read once."""
    return Settings()
